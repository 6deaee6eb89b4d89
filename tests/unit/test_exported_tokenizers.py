"""An exported tokenizer read by transformers: the ids of training, and a mask that can be written."""

import io
import json
import os
import random
import unicodedata
from pathlib import Path

import pytest
import sentencepiece
import tokenizers

from vmd_scale.tokenization import TOKENIZER_FILES, SentencePieceTokenizer, load_tokenizer
from vmd_scale.tokenization.exported import with_mask

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("VMD_SHARED_DATA", ROOT.parent / "shared" / "data"))
ASSETS = SHARED / "tokenizers"
TEXT = [line for page in sorted((ROOT / "docs").glob("*.md")) for line in page.read_text().splitlines() if line.strip()]
VARIED = [
    "",
    " ",
    "The cat isn't  on the\tmat,\n\n 42 times: “naïve” café  ",
    "中文，한글 ﬁve ½ Ⅳ ａｂｃ １２３ … 𝔘𝔫𝔦",
    "한글 각하 Việt Nam tiếng nước ngoài Ångström",
    "ﬁ\u0301 ½\u0301 हिन्दी ภาษาไทย עִבְרִית العَرَبِيَّة",
    "😀 👨‍👩‍👧 🇩🇪 ❤️ \u200b\ufeff\u00a0\u3000\u2028 x\x00y\x01z\x7f",
    "a ▁ b▁▁c▁ ▁",
    "rank <unk> of <0x41> and <0x0A>, <unk><unk>",
    " [CLS] <|endoftext|> ",
]


def sentencepiece_model(**options: object) -> SentencePieceTokenizer:
    model = io.BytesIO()
    usual = {"vocab_size": 1200, "byte_fallback": True, "unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": 3}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT), model_writer=model, minloglevel=2, num_threads=1, **(usual | options)
    )
    return SentencePieceTokenizer("tiny", model.getvalue())


def written(tokenizer, folder: Path) -> Path:
    for name, content in tokenizer.files().items():
        assert name in TOKENIZER_FILES  # or another export would leave it there
        (folder / name).write_bytes(content)
    return folder


def as_transformers_reads_it(folder: Path):
    transformers = pytest.importorskip("transformers", reason="AutoTokenizer is transformers'")
    return transformers.AutoTokenizer.from_pretrained(str(folder))


def generic(tmp_path: Path, **pieces: int):
    """A tokenizer.json as a hub has them: its own [MASK], special tokens around a text, a limit, holes in its ids."""
    vocabulary = {"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "[MASK]": 3, "a": 4, "b": 5, **pieces}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(["[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    tokenizer.enable_truncation(2)
    (tmp_path / "generic").mkdir()
    (tmp_path / "generic" / "tokenizer.json").write_text(tokenizer.to_str())
    return load_tokenizer(str(tmp_path / "generic"))


KINDS = [
    "text8",
    "text8_mdlm",
    "sudoku",
    "symbols:300",
    "gpt2",
    "bert",
    "sentencepiece",
    "generic",
    "generic with holes",
]


@pytest.mark.parametrize("kind", KINDS)
def test_the_mask_can_be_written_and_has_the_models_id(kind: str, tmp_path: Path) -> None:
    if kind in ("gpt2", "bert"):
        if not ASSETS.is_dir():
            pytest.skip(f"tokenizer assets not at {ASSETS}")
        tokenizer = load_tokenizer(f"{kind}:{ASSETS}")
    elif kind.startswith("generic"):
        tokenizer = generic(tmp_path, **({"far": 11} if kind.endswith("holes") else {}))
    else:
        tokenizer = sentencepiece_model() if kind == "sentencepiece" else load_tokenizer(kind)
    (tmp_path / "out").mkdir()
    folder = written(tokenizer, tmp_path / "out")
    theirs, mask = as_transformers_reads_it(folder), tokenizer.vocab_size
    assert (theirs.mask_token, theirs.mask_token_id, len(theirs)) == ("[MASK]", mask, mask + 1)
    before, after = {"sudoku": ("1", "2"), "symbols:300": ("0 ", " 299")}.get(kind, ("a ", " b"))
    spaces_are_tokens = kind.startswith("text8")
    parts = [part if spaces_are_tokens else part.strip() for part in (before, after)]
    left, right = (tokenizer.encode(part).tolist() for part in parts)
    if kind == "gpt2":
        right = tokenizer.encode(after).tolist()  # the space is a part of its token
    assert theirs(f"{before}[MASK]{after}")["input_ids"] == [*left, mask, *right]
    assert theirs(f"{before}[MASK]{after}", return_tensors=None)["attention_mask"] == [1] * (len(left) + 1 + len(right))
    assert [theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id] == [
        tokenizer.begin_id,
        tokenizer.end_id,
        tokenizer.pad_id,
    ]
    again = load_tokenizer(str(folder))  # to go on training
    assert (again.fingerprint, again.vocab_size) == (tokenizer.fingerprint, mask)
    assert [again.begin_id, again.end_id, again.pad_id] == [tokenizer.begin_id, tokenizer.end_id, tokenizer.pad_id]
    (tmp_path / "twice").mkdir()
    assert load_tokenizer(str(written(again, tmp_path / "twice"))).fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize("kind", ["gpt2", "bert", "generic"])
def test_texts_have_the_ids_of_training(kind: str, tmp_path: Path) -> None:
    if kind != "generic" and not ASSETS.is_dir():
        pytest.skip(f"tokenizer assets not at {ASSETS}")
    tokenizer = generic(tmp_path) if kind == "generic" else load_tokenizer(f"{kind}:{ASSETS}")
    theirs = as_transformers_reads_it(written(tokenizer, tmp_path))
    for text in VARIED[:-1]:  # which spells special tokens: transformers reads them
        assert theirs(text)["input_ids"] == tokenizer.encode(text).tolist(), text


def test_a_mask_that_cannot_have_the_models_id_is_an_error() -> None:
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    assert json.loads(with_mask(plain.to_str(), 2))["added_tokens"][-1]["id"] == 2
    with pytest.raises(RuntimeError, match=r"\[MASK\] became token 2 of tokenizer.json instead of 1"):
        with_mask(plain.to_str(), 1)


SENTENCEPIECE = {
    "as ours are trained": {},
    "no byte fallback": {"byte_fallback": False},
    "no normalization": {"normalization_rule_name": "identity"},
    "lower case": {"normalization_rule_name": "nmt_nfkc_cf"},
    "spaces kept": {"remove_extra_whitespaces": False},
    "no dummy prefix": {"add_dummy_prefix": False},
    "symbols of the user": {"user_defined_symbols": ["<sep>", "[X]"]},
}


@pytest.mark.parametrize("options", SENTENCEPIECE.values(), ids=SENTENCEPIECE)
def test_a_sentencepiece_model_has_the_same_ids_without_sentencepiece(options: dict, tmp_path: Path) -> None:
    tokenizer = sentencepiece_model(**options)
    theirs = as_transformers_reads_it(written(tokenizer, tmp_path))
    choice, some = random.Random(0).choice, random.Random(0).randrange
    texts = [*VARIED, "a<sep>b [X] <sep>c", *TEXT[::40]]
    texts += [unicodedata.normalize("NFD", text) for text in texts]
    letters = " \t▁aé,.<0x41>zß中😀\u0301" + "".join(choice(TEXT) for _ in range(20))
    texts += ["".join(choice(letters) for _ in range(some(40))) for _ in range(300)]
    texts += ["-".join(chr(code) for code in range(start, start + 64)) for start in range(0x20, 0x3000, 64)]
    for text in texts:
        wanted = tokenizer.encode(text).tolist()
        assert theirs(text)["input_ids"] == wanted, ascii(text)
        if "▁" not in text:
            assert theirs.decode(wanted) == tokenizer.decode(wanted), ascii(text)


def test_of_a_sentencepiece_model_that_is_no_unigram_only_the_model_is_exported() -> None:
    assert set(sentencepiece_model(model_type="bpe").files()) == {"spiece.model"}
