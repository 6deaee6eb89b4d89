import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from preparations import data

from vmd_scale.config import DataConfig
from vmd_scale.data.inspection import inspect
from vmd_scale.data.manifest import FORMAT_VERSION, Manifest, check_compatible, read_manifest, token_dtype
from vmd_scale.data.prepare import prepare
from vmd_scale.data.roles import Role
from vmd_scale.data.shards import ShardReader, SplitWriter, verify_folder
from vmd_scale.errors import UserError
from vmd_scale.tokenization import load_tokenizer

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon"]


@pytest.fixture
def prepared(tmp_path: Path) -> DataConfig:
    lines = [f"line {n} {WORDS[n % 5]} {WORDS[n // 5 % 5]}" for n in range(100)]
    (tmp_path / "text.txt").write_text("\n".join(lines))
    config = data(tmp_path, row_length=8, shard_tokens=200)
    prepare(config, progress=False)
    return config


def edit_manifest(config: DataConfig, **changes: object) -> None:
    path = Path(config.shards) / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@settings(deadline=None, max_examples=30)
@given(rows=st.integers(1, 40), rows_per_shard=st.integers(1, 9), with_roles=st.booleans(), draw=st.data())
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, rows: int, rows_per_shard: int, with_roles: bool, draw: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    tokens = np.arange(rows * 6, dtype=np.uint16).reshape(rows, 6)
    roles = (tokens % 3).astype(np.uint8) if with_roles else None
    writer = SplitWriter(folder, "train", np.dtype(np.uint16), 6, rows_per_shard)
    cut = draw.draw(st.integers(0, rows))
    for part in (slice(0, cut), slice(cut, rows)):
        writer.append(tokens[part], None if roles is None else roles[part])
    shards = writer.close()
    assert all(shard.rows <= rows_per_shard for shard in shards)
    record = {
        "rows": rows, "counted_tokens": rows * 6, "documents": 1, "skipped_documents": 0, "truncated_documents": 0,
        "dropped_tokens": 0, "characters": 0, "utf8_bytes": 0, "unigram_entropy": 0.0, "shards": shards,
    }  # fmt: skip
    manifest = Manifest.model_validate({
        "tokenizer": "t", "tokenizer_fingerprint": "f", "vocab_size": 1000, "dtype": "uint16", "row_length": 6,
        "packing": "wrap", "row_specials": False, "corpus": "c", "source": None, "normalizer": "none",
        "validation_documents": None, "licence": None, "splits": {"train": record},
    })  # fmt: skip
    reader = ShardReader(folder, "train", manifest)
    asked = np.array(draw.draw(st.lists(st.integers(0, rows - 1), max_size=20)), dtype=np.int64)
    read_tokens, read_roles = reader.read(asked)
    assert read_tokens.dtype == np.int64
    assert np.array_equal(read_tokens, tokens[asked])
    assert reader.has_roles is with_roles
    assert (read_roles is None) is not with_roles
    if roles is not None:
        assert np.array_equal(read_roles, roles[asked])
    reader.verify()


def test_prepared_rows_are_the_text(prepared: DataConfig) -> None:
    reader = ShardReader(prepared.shards, "train")
    tokens, _ = reader.read(np.arange(reader.rows))
    text = load_tokenizer("text8").decode(tokens.ravel())
    assert text.startswith(" line zero alpha alpha line one beta alpha")
    assert len(reader.manifest.splits["train"].shards) > 3
    assert reader.manifest.splits["train"].counted_tokens == tokens.size


def test_rows_out_of_range(prepared: DataConfig) -> None:
    reader = ShardReader(prepared.shards, "validation")
    for row in (-1, reader.rows):
        with pytest.raises(IndexError):
            reader.read(np.array([row]))


def test_truncated_shard(prepared: DataConfig) -> None:
    path = Path(prepared.shards) / "train-00001.tokens"
    path.write_bytes(path.read_bytes()[:-6])
    with pytest.raises(UserError, match=r"train-00001\.tokens.*expected 400 bytes, found 394"):
        ShardReader(prepared.shards, "train")
    lazy = ShardReader(prepared.shards, "train", check_sizes=False)
    lazy.read(np.array([0]))
    with pytest.raises(UserError, match=r"train-00001\.tokens"):
        lazy.read(np.array([26]))


def test_missing_shard(prepared: DataConfig) -> None:
    (Path(prepared.shards) / "test-00000.tokens").unlink()
    with pytest.raises(UserError, match=r"test-00000\.tokens: missing"):
        ShardReader(prepared.shards, "test")


def test_altered_shard(prepared: DataConfig) -> None:
    assert verify_folder(prepared.shards) == read_manifest(prepared.shards)
    path = Path(prepared.shards) / "train-00002.tokens"
    content = bytearray(path.read_bytes())
    content[10] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"train-00002\.tokens: altered"):
        verify_folder(prepared.shards)


def test_id_outside_the_vocabulary(prepared: DataConfig) -> None:
    path = Path(prepared.shards) / "train-00000.tokens"
    content = bytearray(path.read_bytes())
    content[0:2] = (27).to_bytes(2, "little")
    path.write_bytes(content)
    with pytest.raises(UserError, match="token id 27"):
        ShardReader(prepared.shards, "train").read(np.array([0]))


def test_manifest_of_another_world(prepared: DataConfig) -> None:
    edit_manifest(prepared, dtype="uint16", vocab_size=65536)
    with pytest.raises(UserError, match="too small for a vocabulary"):
        ShardReader(prepared.shards, "train")
    edit_manifest(prepared, format_version=FORMAT_VERSION + 1, unheard_of=1)
    with pytest.raises(UserError, match=f"format version {FORMAT_VERSION + 1}"):
        ShardReader(prepared.shards, "train")
    (Path(prepared.shards) / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="damaged"):
        ShardReader(prepared.shards, "train")


def test_not_prepared_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"launchers/prepare_data\.py --config"):
        ShardReader(tmp_path / "nothing", "train")


def test_split_that_was_not_prepared(tmp_path: Path, prepared: DataConfig) -> None:
    config = prepared.model_copy(update={"shards": str(tmp_path / "other")})
    prepare(config, splits=["train"], progress=False)
    with pytest.raises(UserError, match="no 'test' split; prepared: train"):
        ShardReader(config.shards, "test")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("row_length", 16),
        ("packing", "pad"),
        ("corpus", "text8"),
        ("source", "elsewhere.txt"),
        ("normalizer", "none"),
        ("validation_documents", 7),
    ],
)
def test_other_settings_than_the_shards(prepared: DataConfig, key: str, value: object) -> None:
    manifest, tokenizer = read_manifest(prepared.shards), load_tokenizer("text8")
    check_compatible(manifest, prepared, tokenizer)
    check_compatible(manifest, prepared.model_copy(update={"source": None}), tokenizer)
    with pytest.raises(UserError, match=rf"data\.{key} is"):
        check_compatible(manifest, prepared.model_copy(update={key: value}), tokenizer)


def test_wrong_tokenizer(prepared: DataConfig) -> None:
    with pytest.raises(UserError, match=r"not the one that the shards .* were written with"):
        check_compatible(read_manifest(prepared.shards), prepared, load_tokenizer("sudoku"))


def test_token_dtype_leaves_room_for_the_mask() -> None:
    assert token_dtype(65535) == np.uint16
    assert token_dtype(65536) == np.uint32


def test_inspect_shows_text(prepared: DataConfig) -> None:
    shown = inspect(prepared.shards)
    assert "train[0]: ' line ze'" in shown
    assert "bits per token" in shown


def test_given_cells_survive(tmp_path: Path) -> None:
    quiz, solution = "1" + "0" * 80, "123456789" * 9
    (tmp_path / "text.txt").write_text(f"{quiz},{solution}\n")
    config = data(tmp_path, corpus="sudoku", tokenizer="sudoku", normalizer=None, row_length=81, shard_tokens=200,
                  source={"test": str(tmp_path / "text.txt")})  # fmt: skip
    record = prepare(config, progress=False).splits["test"]
    assert record.counted_tokens == 80
    _, roles = ShardReader(config.shards, "test").read(np.array([0]))
    assert roles is not None
    assert roles[0].tolist() == [Role.GIVEN] + [Role.ORDINARY] * 80
