"""The reference tasks: what their generators promise, and the readers of image files."""

import gzip
import io
import math
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmd_scale.config import DataConfig, load_config
from vmd_scale.data.corpora import SPLITS, documents
from vmd_scale.data.corpora.draws import below, uniform, words
from vmd_scale.data.corpora.four_tokens import four_tokens_distribution
from vmd_scale.data.corpora.sudoku_generator import generated_puzzle, split_of_solution
from vmd_scale.data.corpora.sudoku_grids import count_solutions, is_valid_solution
from vmd_scale.data.corpora.toy2d import toy2d_distribution
from vmd_scale.data.corpora.two_tokens import two_tokens_distribution
from vmd_scale.data.inspection import inspect
from vmd_scale.data.prepare import prepare
from vmd_scale.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("VMD_SHARED_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
PUZZLE = "004300209005009001070060043006002087190007400050083000600000105003508690042910300"
SOLUTION = "864371259325849761971265843436192587198657432257483916689734125713528694542916378"
WORDS = [3639726132353229720, 12591785535139303461, 8654169215310758512]  # of the stream "a name"
SEVENTH = "800500016000002083700381405904050001057000000000008094608073000500020007070005639"
SYMBOLS = {"two_tokens": 10, "four_tokens": 10, "toy2d": 50, "mnist": 2, "cifar10": 256}


def data(corpus: str, source: object = None, **more: object) -> DataConfig:
    tokenizer = "sudoku" if corpus == "sudoku" else f"symbols:{SYMBOLS[corpus]}"
    values = {"tokenizer": tokenizer, "row_length": 2, "shards": "unused", **more}
    return DataConfig.model_validate({"corpus": corpus, "source": source, **values})


def rows(config: DataConfig, split: str) -> np.ndarray:
    return np.stack([document.tokens for document in documents(config, split) if document.tokens is not None])


def table(found: np.ndarray, symbols: int) -> np.ndarray:
    """How often each row [n, L] occurs, over all symbols^L of them."""
    length = found.shape[1]
    return np.bincount(found @ symbols ** np.arange(length)[::-1], minlength=symbols**length)


def assert_drawn_from(counts: np.ndarray, probabilities: np.ndarray) -> None:
    """Pearson's statistic within five of its standard deviations; cells that are too rare for it are joined."""
    expected = probabilities * counts.sum()
    assert not counts[expected == 0].any()
    rare = expected < 10
    counts, expected = (np.append(values[~rare], values[rare].sum()) for values in (counts, expected))
    freedom = len(counts) - 1
    statistic = ((counts - expected) ** 2 / np.maximum(expected, 1)).sum()
    assert abs(statistic - freedom) < 5 * math.sqrt(2 * freedom) + 2


# ---------------------------------------------------------------- keyed numbers


def test_a_name_is_the_same_stream_everywhere() -> None:
    assert words("a name", 3).tolist() == WORDS
    assert np.array_equal(words("a name", 10)[:3], words("a name", 3))
    assert not np.intersect1d(words("a name", 100), words("another", 100)).size


def test_numbers_of_words() -> None:
    extremes = np.array([0, 2**64 - 1], dtype=np.uint64)
    assert below(10, extremes).tolist() == [0, 9]
    low, high = uniform(extremes)
    assert 0 < low < high < 1
    assert_drawn_from(np.bincount(below(7, words("seven", 70_000))), np.full(7, 1 / 7))


# ---------------------------------------------------------------- two and four tokens


@pytest.mark.parametrize(
    ("corpus", "source", "listed", "entropy"),
    [
        ("two_tokens", "uniform", 10, math.log(10)),
        ("two_tokens", "weighted", 55, -sum(k / 55 * math.log(k / 55) for k in range(1, 11))),
        ("two_tokens", "0", 100, math.log(100)),
        ("two_tokens", "1", 10, math.log(10)),
        ("two_tokens", "0.3", 1000, math.log(10) - 0.37 * math.log(0.37) - 9 * 0.07 * math.log(0.07)),
        ("two_tokens", "1/3", 150, math.log(10) - 0.4 * math.log(0.4) - 9 / 15 * math.log(1 / 15)),
        ("four_tokens", "d1", 10, math.log(10)),
        ("four_tokens", "d2", 100, math.log(100)),
    ],
)
def test_listed_tasks(corpus: str, source: str, listed: int, entropy: float) -> None:
    found, probabilities = {"two_tokens": two_tokens_distribution, "four_tokens": four_tokens_distribution}[corpus](
        source
    )
    length = 2 if corpus == "two_tokens" else 4
    assert found.dtype == np.int64
    assert found.shape == (len(probabilities), length)
    assert math.isclose(probabilities.sum(), 1)
    assert math.isclose(-(probabilities * np.log(probabilities)).sum(), entropy)
    exact = np.zeros(10**length)
    exact[found @ 10 ** np.arange(length)[::-1]] = probabilities
    config = data(corpus, source)
    for split in ("validation", "test"):
        counts = table(rows(config, split), 10)
        assert counts.sum() == listed
        np.testing.assert_allclose(counts / listed, exact)
    train = rows(config, "train")
    assert len(train) == 100_000
    assert_drawn_from(table(train, 10), exact)


def test_the_pairs_are_coupled_as_said() -> None:
    assert all(second == (first + 1) % 10 for first, second in two_tokens_distribution()[0])
    found, probabilities = two_tokens_distribution("0.5")
    follows = found[:, 1] == (found[:, 0] + 1) % 10
    assert math.isclose(probabilities[follows].sum(), 0.5 + 0.5 / 10)
    assert four_tokens_distribution("d1")[0][8].tolist() == [8, 9, 0, 1]
    assert [9, 0, 3, 4] in four_tokens_distribution("d2")[0].tolist()


@pytest.mark.parametrize(("corpus", "default"), [("two_tokens", "uniform"), ("four_tokens", "d1"), ("toy2d", None)])
def test_null_is_the_first_variant(corpus: str, default: str | None) -> None:
    named = data(corpus, default or "checkerboard")
    assert np.array_equal(rows(data(corpus), "train"), rows(named, "train"))
    mixed = data(corpus, {"test": default or "circles"})
    assert len(rows(mixed, "test"))


# ---------------------------------------------------------------- toys


@pytest.mark.parametrize("variant", ["checkerboard", "swiss_roll", "circles"])
def test_toys(variant: str) -> None:
    exact = toy2d_distribution(variant)
    assert exact.shape == (50, 50)
    assert math.isclose(exact.sum(), 1)
    splits = {split: rows(data("toy2d", variant), split) for split in SPLITS}
    assert [len(found) for found in splits.values()] == [100_000, 10_000, 10_000]
    for found in splits.values():
        assert_drawn_from(table(found, 50), exact.ravel())
    assert not np.array_equal(splits["validation"], splits["test"])


def test_toys_look_as_they_should() -> None:
    board, roll, circles = (toy2d_distribution(name) for name in ("checkerboard", "swiss_roll", "circles"))
    assert board[0, 0] == board[49, 49] == 1 / 1250
    assert board[0, 49] == board[20, 30] == 0
    assert board[12, 0] == 1 / 2500  # half of this cell is dark
    np.testing.assert_allclose(circles, circles.T, atol=1e-15)
    np.testing.assert_allclose(circles, circles[::-1], atol=1e-15)
    assert circles[25, 25] < 1e-9
    distance = np.hypot(*np.meshgrid(*[np.arange(50) - 24.5] * 2)) * 8 / 50
    assert math.isclose(circles[distance < 2.25].sum(), 0.5, abs_tol=0.01)
    assert roll[25, 25 + int(4.5 * math.pi / 5 / 0.16)] > 1e-3  # its outer end is straight above the middle
    assert roll[25, 25] < 1e-4


# ---------------------------------------------------------------- Sudoku


def digits(text: str) -> np.ndarray:
    return np.array([int(c) for c in text])


def test_counting_solutions() -> None:
    assert count_solutions(digits(PUZZLE)) == 1
    assert count_solutions(digits(SOLUTION)) == 1
    assert count_solutions(np.zeros(81, dtype=int), limit=7) == 7
    assert count_solutions([5, 5, *[0] * 79]) == 0
    # a rectangle of two digits in two rows, columns and boxes can be exchanged
    grid = digits(SOLUTION)
    nine = grid.reshape(9, 9)
    rectangle = next(
        (a, b, c, d)
        for a in range(9)
        for b in range(a + 1, 9)
        for c in range(9)
        for d in range(c + 1, 9)
        if (nine[a, c], nine[a, d]) == (nine[b, d], nine[b, c]) and (a // 3 == b // 3) != (c // 3 == d // 3)
    )
    a, b, c, d = rectangle
    nine[[a, a, b, b], [c, d, c, d]] = 0
    assert count_solutions(nine.ravel(), limit=10) == 2


def test_valid_solutions() -> None:
    grid = digits(SOLUTION)
    swapped = grid.copy()
    swapped[[0, 1]] = swapped[[1, 0]]  # the row still has all digits
    band = np.roll(grid, 9)  # rows and columns are right, boxes are not
    assert is_valid_solution(np.stack([grid, swapped, band, grid - 1])).tolist() == [True, False, False, False]
    assert is_valid_solution(grid.tolist())
    with pytest.raises(ValueError, match="81"):
        is_valid_solution(grid[:80])


@pytest.mark.parametrize(("source", "low", "high"), [("generate:200", 29, 37), ("generate:60:24-30", 24, 30)])
def test_generated_puzzles(source: str, low: int, high: int) -> None:
    config = data("sudoku", source)
    seen: set[bytes] = set()
    total = 0
    for split in SPLITS:
        for document in documents(config, split):
            assert document.tokens is not None
            assert document.given is not None
            grid = document.tokens + 1
            assert is_valid_solution(grid)
            assert low <= document.given.sum() <= high
            assert split_of_solution(grid) == split
            if total % 3 == 0:
                assert count_solutions(np.where(document.given, grid, 0)) == 1
            seen.add(grid.tobytes())
            total += 1
    assert total == len(seen) == int(source.split(":")[1])


def test_puzzles_are_always_the_same() -> None:
    grid, given = generated_puzzle(7, "test")
    assert "".join(map(str, np.where(given, grid, 0))) == SEVENTH
    other, _ = generated_puzzle(7, "test", (24, 30))
    assert not np.array_equal(grid, other)


def test_all_puzzles_of_a_mapped_source_are_of_its_split() -> None:
    mapped = data("sudoku", {"test": "generate:20:30-34"})
    assert len(list(documents(mapped, "test"))) == 20


# ---------------------------------------------------------------- images


def write_idx(path: Path, images: np.ndarray) -> None:
    header = np.array([0x0803, len(images), 28, 28], dtype=">u4").tobytes()
    content = header + images.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_mnist_round_trip(suffix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images = (words("pixels", 50 * 784) >> np.uint64(56)).astype(np.uint8).reshape(50, 784)
    images[0, :3] = 0, 127, 128
    write_idx(tmp_path / f"train-images-idx3-ubyte{suffix}", images[:40])
    write_idx(tmp_path / f"t10k-images-idx3-ubyte{suffix}", images[40:])
    config = data("mnist", str(tmp_path), validation_documents=10)
    found = np.concatenate([rows(config, split) for split in SPLITS])
    assert np.array_equal(found, images >= 128)
    assert found[0, :3].tolist() == [0, 0, 1]
    assert len(rows(config, "validation")) == 10
    assert "do not report" in caplog.text
    with pytest.raises(UserError, match=r"data\.validation_documents is 5,000"):
        rows(data("mnist", str(tmp_path)), "train")


@pytest.mark.skipif(not (SHARED / "mnist").is_dir(), reason=f"MNIST not at {SHARED / 'mnist'}")
def test_real_mnist() -> None:
    config = data("mnist", str(SHARED / "mnist"))
    assert sum(1 for _ in documents(config, "train")) == 55_000
    validation, test = rows(config, "validation"), rows(config, "test")
    assert validation.shape == (5000, 784)
    assert test.shape == (10_000, 784)
    assert 0.12 < test.mean() < 0.14  # a seventh of the pixels is ink


@pytest.mark.parametrize("damage", ["magic", "short", "long", "shape", "empty", "gzip"])
def test_damaged_idx(damage: str, tmp_path: Path) -> None:
    path = tmp_path / ("t10k-images-idx3-ubyte.gz" if damage == "gzip" else "t10k-images-idx3-ubyte")
    write_idx(path, np.zeros((3, 784)))
    content = path.read_bytes()
    shape = content[:8] + np.array([32, 32], dtype=">u4").tobytes() + content[16:]
    changed = {
        "magic": b"\0\0\x08\x01" + content[4:],
        "short": content[:-1],
        "long": content + b"\0",
        "shape": shape,
        "empty": b"",
        "gzip": content[:-12],
    }
    path.write_bytes(changed[damage])
    with pytest.raises(UserError, match=path.name):
        rows(data("mnist", str(tmp_path)), "test")


def write_cifar(folder: Path, pictures: np.ndarray) -> None:
    """Pictures [60, 32, 32, 3]: ten a batch."""
    folder.mkdir(exist_ok=True)
    names = [f"data_batch_{n}" for n in range(1, 6)] + ["test_batch"]
    for name, batch in zip(names, pictures.reshape(6, 10, 32, 32, 3), strict=True):
        records = [bytes([n % 10]) + picture.transpose(2, 0, 1).tobytes() for n, picture in enumerate(batch)]
        (folder / f"{name}.bin").write_bytes(b"".join(records))


@pytest.fixture
def pictures(tmp_path: Path) -> np.ndarray:
    values = (words("pictures", 60 * 3072) >> np.uint64(56)).astype(np.uint8).reshape(60, 32, 32, 3)
    write_cifar(tmp_path / "cifar-10-batches-bin", values)
    return values


@pytest.mark.parametrize("place", ["folder", "above", "archive", "beside"])
def test_cifar_round_trip(place: str, pictures: np.ndarray, tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-bin"
    source = {"folder": folder, "above": tmp_path, "archive": tmp_path / "a" / "cifar-10-binary.tar.gz"}
    source["beside"] = tmp_path / "a"
    (tmp_path / "a").mkdir()
    with tarfile.open(source["archive"], "w:gz") as archive:
        archive.add(folder, folder.name)
    config = data("cifar10", str(source[place]), validation_documents=5)
    found = {split: rows(config, split) for split in SPLITS}
    assert [len(part) for part in found.values()] == [45, 5, 10]
    assert np.array_equal(np.concatenate(list(found.values())), pictures.reshape(60, -1))
    assert found["train"][0, :3].tolist() == pictures[0, 0, 0].tolist()  # red, green, blue of the first pixel


@pytest.mark.usefixtures("pictures")
def test_damaged_cifar(tmp_path: Path) -> None:
    path = tmp_path / "cifar-10-batches-bin" / "test_batch.bin"
    content = path.read_bytes()
    config = data("cifar10", str(tmp_path))
    for damaged, message in [(content[:-1], "records of 3,073"), (b"", "records of"), (b"\x0b" + content[1:], "label")]:
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=message) as error:
            rows(config, "test")
        assert "test_batch.bin" in str(error.value)
    (tmp_path / "cifar-10-batches-bin" / "data_batch_4.bin").unlink()
    with pytest.raises(UserError, match=r"data_batch_4\.bin"):
        rows(config, "train")


@pytest.mark.usefixtures("pictures")
def test_damaged_cifar_archive(tmp_path: Path) -> None:
    path = tmp_path / "cifar-10-binary.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        archive.add(tmp_path / "cifar-10-batches-bin" / "test_batch.bin", "cifar-10-batches-bin/test_batch.bin")
    config = data("cifar10", str(path))
    with pytest.raises(UserError, match="lacks data_batch_1"):
        rows(config, "train")
    content = path.read_bytes()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("something/else"))
    for damaged in (content[: len(content) // 2], b"no archive", content[:100] + b"\xff" * 100 + content[200:]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"cifar-10-binary\.tar\.gz: not a readable"):
            rows(config, "test")
    path.write_bytes(buffer.getvalue())
    with pytest.raises(UserError, match="lacks test_batch"):
        rows(config, "test")


# ---------------------------------------------------------------- wrong input, and the whole way


@pytest.mark.parametrize(
    ("corpus", "source", "words_of_error"),
    [
        ("two_tokens", "even", ["uniform", "weighted", "'0.3'"]),
        ("two_tokens", "1.5", ["0 to 1"]),
        ("two_tokens", "-0.1", ["0 to 1"]),
        ("two_tokens", "nan", ["0 to 1"]),
        ("two_tokens", "1/0", ["0 to 1"]),
        ("two_tokens", "1e-99999999999", ["0 to 1"]),
        ("two_tokens", "0.1234", ["500,000 rows", "10,000", "0.12"]),
        ("four_tokens", "d3", ["'d3'", "'d1' and 'd2'"]),
        ("toy2d", "moons", ["'moons'", "swiss_roll"]),
        ("sudoku", "generate:", ["generate:20000"]),
        ("sudoku", "generate:19", ["20 puzzles"]),
        ("sudoku", "generate:100:20-30", ["24 to 80 clues"]),
        ("sudoku", "generate:100:30-29", ["24 to 80 clues"]),
        ("mnist", "nowhere", ["nowhere"]),
        ("mnist", None, ["missing"]),
        ("mnist", "pyproject.toml", ["t10k-images-idx3-ubyte.gz"]),
        ("cifar10", "tests", ["cifar-10-binary.tar.gz"]),
    ],
)
def test_wrong_sources(
    corpus: str, source: str | None, words_of_error: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=r"data\.source") as error:
        list(documents(data(corpus, source), "test"))
    assert all(word in str(error.value) for word in words_of_error)


@pytest.mark.parametrize("corpus", [*SYMBOLS, "sudoku"])
def test_the_tokenizer_must_fit(corpus: str) -> None:
    wanted = "sudoku" if corpus == "sudoku" else f"symbols:{SYMBOLS[corpus]}"
    with pytest.raises(UserError, match=f"needs tokenizer '{wanted}'"):
        list(documents(data(corpus, tokenizer="symbols:3"), "train"))


@pytest.mark.parametrize("name", ["two_tokens", "four_tokens_d1", "four_tokens_d2", "toy2d", "sudoku"])
def test_prepared_and_inspected(name: str, tmp_path: Path) -> None:
    config = load_config(ROOT / "configs" / f"{name}.json").data
    one = config.model_copy(update={"shards": str(tmp_path / "one")})
    if name == "sudoku":
        one = one.model_copy(update={"source": "generate:40"})
    manifest = prepare(one, progress=False)
    if name == "two_tokens":  # the others go the same way, and processes take time to start
        two = one.model_copy(update={"shards": str(tmp_path / "two"), "workers": 2})
        assert prepare(two, splits=["train"], progress=False).splits["train"] == manifest.splits["train"]
    assert list(manifest.splits) == list(SPLITS)
    text = inspect(tmp_path / "one")
    assert "test[0]: '" in text
    assert manifest.row_length == config.row_length


@settings(max_examples=30, deadline=None)
@given(number=st.integers(0, 10**9 - 1), split=st.sampled_from(SPLITS))
def test_every_number_is_a_puzzle(number: int, split: str) -> None:
    grid, given_cells = generated_puzzle(number, split, (26, 40))
    assert is_valid_solution(grid)
    assert 26 <= given_cells.sum() <= 40
    assert count_solutions(np.where(given_cells, grid, 0)) == 1
