import importlib.util
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from vmd_scale.errors import UserError
from vmd_scale.tokenization import (
    KEPT,
    SentencePieceTokenizer,
    Tokenizer,
    keep_tokenizer,
    load_tokenizer,
    vocab_size_of,
)
from vmd_scale.tokenization.loading import VOCAB_SIZES

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("VMD_SHARED_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
ASSETS = SHARED / "tokenizers"
needs_assets = pytest.mark.skipif(not ASSETS.is_dir(), reason=f"tokenizer assets not at {ASSETS}")
ENGLISH = "The cat isn't on the mat, 42 times: “naïve” 中文 😀 <|endoftext|> [SEP]"


@pytest.fixture(scope="module")
def gpt2() -> Tokenizer:
    return load_tokenizer(f"gpt2:{ASSETS}")


@pytest.fixture(scope="module")
def bert() -> Tokenizer:
    return load_tokenizer(f"bert:{ASSETS}")


@pytest.fixture(scope="module")
def sentencepiece_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sentencepiece")
    text = folder / "text.txt"
    text.write_text("\n".join(f"the number {n} follows the number {n - 1} in a row" for n in range(300)))
    output = folder / "tiny.model"
    script = ROOT / "tokenizer" / "train_sentencepiece.py"
    command = [sys.executable, script, "--input", text, "--vocab-size", "290", "--output", output, "--threads", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(command, check=True, capture_output=True, env=environment)
    return output


@given(st.text(alphabet=" abcdefghijklmnopqrstuvwxyz"))
def test_text8_round_trip(text: str) -> None:
    tokenizer = load_tokenizer("text8")
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int64
    assert tokenizer.decode(ids) == text


def test_text8_ids_and_mask() -> None:
    tokenizer = load_tokenizer("text8")
    assert tokenizer.encode(" az").tolist() == [0, 1, 26]
    assert tokenizer.vocab_size == 27
    assert tokenizer.decode([1, 27, 0]) == "a_ "
    assert (tokenizer.begin_id, tokenizer.end_id, tokenizer.pad_id) == (None, None, None)


def test_text8_of_mdlm_has_35_ids() -> None:
    tokenizer = load_tokenizer("text8_mdlm")
    assert tokenizer.vocab_size == 35
    assert tokenizer.encode("az ").tolist() == [8, 33, 34]
    assert (tokenizer.begin_id, tokenizer.end_id, tokenizer.pad_id) == (2, 3, 5)
    assert tokenizer.decode([2, 8, 35, 34, 3]) == "[BOS]a_ [EOS]"
    assert tokenizer.fingerprint != load_tokenizer("text8").fingerprint
    with pytest.raises(UserError, match="'\\['"):
        tokenizer.encode("[BOS]")
    plain = tokenizers.Tokenizer.from_str(tokenizer.files()["tokenizer.json"].decode())
    assert plain.encode("a z").ids == [8, 34, 33]


def test_fingerprints_outlive_versions() -> None:
    """They lie in everybody's shards and checkpoints."""
    known = {
        "text8": "5ef262438dfd6bc5",
        "sudoku": "98bd45db570ce80b",
        "symbols:10": "afb69b545fc82a6a",
    }
    assert {name: load_tokenizer(name).fingerprint[:16] for name in known} == known


def test_sudoku_ids() -> None:
    tokenizer = load_tokenizer("sudoku")
    assert tokenizer.encode("129").tolist() == [0, 1, 8]
    assert tokenizer.decode([8, 9]) == "9_"


@given(size=st.integers(2, 1 << 16), data=st.data())
def test_symbols_round_trip(size: int, data: st.DataObject) -> None:
    tokenizer = load_tokenizer(f"symbols:{size}")
    ids = data.draw(st.lists(st.integers(0, size - 1)))
    assert tokenizer.vocab_size == size
    assert tokenizer.encode(tokenizer.decode(ids)).tolist() == ids
    assert tokenizer.decode([*ids, size]).endswith("_")


def test_symbols_are_numbers() -> None:
    tokenizer = load_tokenizer("symbols:10")
    assert tokenizer.decode([3, 10, 9]) == "3 _ 9"
    assert tokenizer.encode(" 3\n9 ").tolist() == [3, 9]
    assert tokenizer.encode("").dtype == np.int64
    plain = tokenizers.Tokenizer.from_str(tokenizer.files()["tokenizer.json"].decode())
    assert plain.encode("3 9").ids == [3, 9]
    assert plain.decode([3, 9]) == "3 9"
    for bad in ("10", "-1", "+1", "1_0", "a", "_", "٣", "9" * 5000):
        with pytest.raises(UserError, match="position 1"):
            tokenizer.encode(f"3 {bad} 4")


@pytest.mark.parametrize("size", ["", "1", "65537", "-2", "ten", "1e3", "9" * 5000])
def test_numbers_of_symbols(size: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"from 2 to 65536, such as 'symbols:10'"):
        load_tokenizer(f"symbols:{size}")
    (tmp_path / "symbols.json").write_text(f'{{"symbols": "{size}"}}')
    with pytest.raises(UserError, match=r"symbols\.json.* from 2 to 65536"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("bad", ["A", "é", "😀", "\n"])
def test_character_outside_the_alphabet(bad: str) -> None:
    with pytest.raises(UserError, match="position 2") as error:
        load_tokenizer("text8").encode(f"ab{bad}c")
    assert repr(bad) in str(error.value)


@pytest.mark.parametrize("ids", [[-1], [28]])
def test_ids_outside_the_vocabulary(ids: list[int]) -> None:
    with pytest.raises(ValueError, match=r"0\.\.27"):
        load_tokenizer("text8").decode(ids)


@needs_assets
@settings(max_examples=50, deadline=None)
@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_gpt2_round_trip(gpt2: Tokenizer, text: str) -> None:
    assert gpt2.decode(gpt2.encode(text)) == text


@needs_assets
def test_gpt2_published_ids(gpt2: Tokenizer) -> None:
    assert gpt2.vocab_size == 50257
    assert gpt2.begin_id == gpt2.end_id == 50256
    assert gpt2.encode("Hello world").tolist() == [15496, 995]
    assert gpt2.decode([15496, 50257, 995]) == "Hello[MASK] world"


@needs_assets
def test_a_document_cannot_spell_a_special_token(gpt2: Tokenizer, bert: Tokenizer) -> None:
    assert gpt2.end_id not in gpt2.encode(ENGLISH)
    assert bert.end_id not in bert.encode(ENGLISH)


@needs_assets
def test_bert_round_trip(bert: Tokenizer) -> None:
    assert (bert.vocab_size, bert.begin_id, bert.end_id, bert.pad_id) == (30522, 101, 102, 0)
    assert bert.encode("Hello, playing worlds").tolist() == [7592, 1010, 2652, 8484]
    assert bert.decode(bert.encode("Hello unaffable world")) == "hello unaffable world"
    assert bert.decode([7592, 30522, 2088]) == "hello [MASK] world"


def test_sentencepiece(sentencepiece_file: Path) -> None:
    tokenizer = load_tokenizer(str(sentencepiece_file))
    assert isinstance(tokenizer, SentencePieceTokenizer)
    text = "the number 7 follows é"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert (tokenizer.begin_id, tokenizer.end_id, tokenizer.pad_id) == (1, 2, 3)
    assert tokenizer.decode([*ids[:1], tokenizer.vocab_size, *ids[1:]]).count("[MASK]") == 1


def test_the_same_text_gives_the_same_sentencepiece_model(tmp_path: Path) -> None:
    """Wherever it lies; also where sentences are drawn at random."""
    spec = importlib.util.spec_from_file_location("train_sentencepiece", ROOT / "tokenizer" / "train_sentencepiece.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    words = [f"{a}{b}" for a in ("la", "ro", "mi", "tun") for b in ("ka", "pe", "", "sol")]
    choice = random.Random(0).choice
    text = "".join(f"{' '.join(choice(words) for _ in range(8))}\n" for _ in range(500))
    models = []
    for name, seed in (("one", 0), ("another", 0), ("other_seed", 1)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / f"{name}.txt").write_text(text)
        module.train([folder / f"{name}.txt"], 275, folder / "new.model", 4, 120, seed)
        models.append((folder / "new.model").read_bytes())
    assert models[0] == models[1]
    assert models[0] != models[2]
    (tmp_path / "long.txt").write_text("zebra " * 2000 + f"\n{text}")
    module.train([tmp_path / "long.txt"], 280, tmp_path / "long.model", 4, 1000)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "long.model"))
    assert "<0x" not in "".join(processor.encode("zebra", out_type=str))
    with pytest.raises(UserError, match="--vocab-size 100: SentencePiece refused"):
        module.train([tmp_path / "one" / "one.txt"], 100, tmp_path / "small.model", 1, 120)
    assert not (tmp_path / "small.model").exists()


@pytest.mark.parametrize("name", ["text8", "text8_mdlm", "sudoku", "symbols:300", "gpt2", "bert", "sentencepiece"])
def test_export_and_pickle_keep_the_ids(
    name: str, tmp_path: Path, request: pytest.FixtureRequest, sentencepiece_file: Path
) -> None:
    if name in ("gpt2", "bert"):
        if not ASSETS.is_dir():
            pytest.skip(f"tokenizer assets not at {ASSETS}")
        tokenizer = request.getfixturevalue(name)
    else:
        tokenizer = load_tokenizer(str(sentencepiece_file) if name == "sentencepiece" else name)
    for file, content in tokenizer.files().items():
        (tmp_path / file).write_bytes(content)
    text = {"text8": "some words", "text8_mdlm": "some words", "sudoku": "987", "symbols:300": "0 299"}.get(
        name, ENGLISH
    )
    for copy in (load_tokenizer(str(tmp_path)), pickle.loads(pickle.dumps(tokenizer))):
        assert copy.fingerprint == tokenizer.fingerprint
        assert copy.vocab_size == tokenizer.vocab_size
        assert (copy.begin_id, copy.end_id, copy.pad_id) == (tokenizer.begin_id, tokenizer.end_id, tokenizer.pad_id)
        assert copy.encode(text).tolist() == tokenizer.encode(text).tolist()


@needs_assets
def test_another_file_naming_is_the_same_tokenizer(gpt2: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_bytes((ASSETS / "gpt2_encoder.json").read_bytes())
    (tmp_path / "merges.txt").write_bytes((ASSETS / "gpt2_vocab.bpe").read_bytes())
    assert load_tokenizer(str(tmp_path)).fingerprint == gpt2.fingerprint


@needs_assets
def test_what_a_run_keeps_is_of_its_last_tokenizer_alone(sentencepiece_file: Path, tmp_path: Path) -> None:
    """A start that failed before its first checkpoint may have had another one. Other files are not ours."""
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="b"))
    words.save(str(tmp_path / "tokenizer.json"))
    both = [load_tokenizer(str(path)) for path in (tmp_path / "tokenizer.json", sentencepiece_file)]
    for tokenizer in (*both, *both):
        keep_tokenizer(tokenizer, tmp_path)
        (tmp_path / KEPT / "notes.txt").touch()
        assert {path.name for path in (tmp_path / KEPT).iterdir()} == {*tokenizer.files(), "notes.txt"}
        assert load_tokenizer(str(tmp_path / KEPT)).fingerprint == tokenizer.fingerprint


@needs_assets
def test_a_hub_name_is_looked_up_in_the_assets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "tokenizer" / "assets" / "bert-base-uncased"
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_bytes((ASSETS / "bert_base_uncased_vocab.txt").read_bytes())
    assert load_tokenizer("bert-base-uncased").vocab_size == 30522


@needs_assets
def test_vocabulary_sizes_that_planning_knows_without_files(gpt2: Tokenizer, bert: Tokenizer) -> None:
    assert {"gpt2": gpt2.vocab_size, "bert-base-uncased": bert.vocab_size} == VOCAB_SIZES


def test_planning_needs_no_network_and_prefers_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tokenizers.Tokenizer, "from_pretrained", lambda name: pytest.fail(f"{name} was fetched"))
    assert vocab_size_of("gpt2") == 50257
    assert vocab_size_of("symbols:11") == 11
    folder = tmp_path / "tokenizer" / "assets" / "gpt2"
    folder.mkdir(parents=True)
    (folder / "symbols.json").write_text('{"symbols": 77}')
    assert vocab_size_of("gpt2") == 77


def test_different_tokenizers_have_different_fingerprints() -> None:
    names = ["text8", "sudoku", "symbols:9", "symbols:10"]
    assert len({load_tokenizer(name).fingerprint for name in names}) == len(names)


def word_piece(vocab: dict[str, int], **normalizer: object) -> str:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocab, unk_token="u"))
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(**normalizer)
    return tokenizer.to_str()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (word_piece({"u": 0, "a": 1}), word_piece({"z": 0, "a": 1})),
        (word_piece({"u": 0}, lowercase=True, strip_accents=None), word_piece({"u": 0}, strip_accents=False)),
    ],
)
def test_whatever_gives_other_ids_gives_another_fingerprint(one: str, other: str, tmp_path: Path) -> None:
    """The entry of id 0; accents that are kept, where lower case alone would strip them."""
    found = []
    for name, serialized in (("one", one), ("other", other)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text(serialized)
        found.append(load_tokenizer(str(tmp_path / name)).fingerprint)
    assert found[0] != found[1]


def test_a_token_that_text_can_spell_is_not_one_that_it_cannot(tmp_path: Path) -> None:
    found = {}
    for special in (True, False):
        tokenizer = tokenizers.Tokenizer.from_str(word_piece({"u": 0, "a": 1}))
        token = tokenizers.AddedToken("<x>", special=special)
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)([token])
        (tmp_path / "tokenizer.json").write_text(tokenizer.to_str())
        found[special] = load_tokenizer(str(tmp_path))
    assert found[True].encode("<x>").tolist() != found[False].encode("<x>").tolist()
    assert found[True].fingerprint != found[False].fingerprint


@needs_assets
def test_ambiguous_folder() -> None:
    with pytest.raises(UserError, match="several tokenizers"):
        load_tokenizer(str(ASSETS))


def test_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tokenizer"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(UserError, match="no gpt2 files"):
        load_tokenizer(f"gpt2:{tmp_path}")
    with pytest.raises(UserError, match="no such file"):
        load_tokenizer(str(tmp_path / "missing.model"))


@pytest.mark.parametrize("name", ["broken.model", "broken.json", "vocab.txt", "notes.md"])
def test_damaged_files(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"not a tokenizer")
    with pytest.raises(UserError, match=name):
        load_tokenizer(str(tmp_path / name))
