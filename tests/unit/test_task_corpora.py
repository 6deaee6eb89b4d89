"""The reference tasks: what their generators promise."""

import math
from pathlib import Path

import numpy as np
import pytest
from task_rows import SYMBOLS, data, rows

from vmd_scale.config_file import load_config
from vmd_scale.data.corpora import SPLITS, documents
from vmd_scale.data.corpora.draws import below, uniform, words
from vmd_scale.data.corpora.four_tokens import four_tokens_distribution
from vmd_scale.data.corpora.toy2d import toy2d_distribution
from vmd_scale.data.corpora.two_tokens import two_tokens_distribution
from vmd_scale.data.inspection import inspect
from vmd_scale.data.prepare import prepare
from vmd_scale.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
WORDS = [3639726132353229720, 12591785535139303461, 8654169215310758512]  # of the stream "a name"


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
