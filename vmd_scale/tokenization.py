"""Text to token ids and back, behind one small interface.

The mask symbol of the diffusion belongs to no tokenizer: it is always the id ``vocab_size``, one past the last.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from vmd_scale.errors import UserError

ASSETS = Path("tokenizer/assets")
MASK_TEXT = "[MASK]"
MOST_SYMBOLS = 1 << 16

GPT2_FILES = [  # (vocabulary, merges)
    ("encoder.json", "vocab.bpe"),
    ("vocab.json", "merges.txt"),
    ("gpt2_encoder.json", "gpt2_vocab.bpe"),
]
BERT_FILES = ["vocab.txt", "bert_base_uncased_vocab.txt"]
BEGIN_TOKENS = ["[CLS]", "<s>", "<bos>", "<|begin_of_text|>", "<|endoftext|>"]
END_TOKENS = ["[SEP]", "</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>"]
PAD_TOKENS = ["[PAD]", "<pad>", "<|padding|>"]


class Tokenizer(Protocol):
    """What the rest of the project knows of a tokenizer. Implementations can be pickled."""

    name: str
    vocab_size: int
    begin_id: int | None
    end_id: int | None
    pad_id: int | None
    fingerprint: str

    def encode(self, text: str) -> np.ndarray:
        """Ids of the text, int64 [n]; no special token is added, and none is read from the text."""

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of ids 0 .. vocab_size, where vocab_size is the mask."""

    def files(self) -> dict[str, bytes]:
        """File names and contents that an exported model folder needs; `load_tokenizer` reads that folder."""


class CharacterTokenizer:
    """One id a character of a fixed alphabet, in the alphabet's order."""

    begin_id: int | None = None
    end_id: int | None = None
    pad_id: int | None = None

    def __init__(self, name: str, alphabet: str) -> None:
        self.name = name
        self.alphabet = alphabet
        self.vocab_size = len(alphabet)
        self.fingerprint = hashlib.sha256(f"characters\0{alphabet}".encode()).hexdigest()
        self._id_of_byte = np.full(256, -1, dtype=np.int64)
        self._id_of_byte[np.frombuffer(alphabet.encode("ascii"), dtype=np.uint8)] = np.arange(len(alphabet))

    def encode(self, text: str) -> np.ndarray:
        """Raises `UserError` for the first character outside the alphabet."""
        # "replace" gives one "?" a character, which is in no alphabet, so that positions stay right
        ids = self._id_of_byte[np.frombuffer(text.encode("ascii", "replace"), dtype=np.uint8)]
        if len(ids) and ids.min() < 0:
            position = int(np.argmax(ids < 0))
            raise UserError(
                f"tokenizer {self.name!r}: character {text[position]!r} at position {position} "
                f"is outside the alphabet {self.alphabet!r}; set data.normalizer or use another tokenizer"
            )
        return ids

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        symbols = self.alphabet + "_"
        return "".join(symbols[i] for i in checked_ids(ids, self.vocab_size))

    def files(self) -> dict[str, bytes]:
        """`tokenizer.json` serves readers that know nothing of this project."""
        description = {"name": self.name, "alphabet": self.alphabet}
        plain = tokenizers.Tokenizer(models.WordLevel({c: i for i, c in enumerate(self.alphabet)}, unk_token=""))
        plain.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
        plain.decoder = decoders.Fuse()
        return {"characters.json": json.dumps(description).encode(), "tokenizer.json": plain.to_str().encode()}


class SymbolTokenizer:
    """Bare ids 0 .. size - 1, written as numbers with spaces between them: for data that are no text."""

    begin_id: int | None = None
    end_id: int | None = None
    pad_id: int | None = None

    def __init__(self, size: int) -> None:
        self.name = f"symbols:{size}"
        self.vocab_size = size
        self.fingerprint = hashlib.sha256(f"symbols\0{size}".encode()).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        """Raises `UserError` for the first word that is no id."""
        return np.array([self._id(word, n) for n, word in enumerate(text.split())], dtype=np.int64)

    def _id(self, word: str, position: int) -> int:
        # int() would also take "+1", "1_0" and the digits of other scripts
        if word.isascii() and word.isdigit() and len(word) <= 5 and int(word) < self.vocab_size:
            return int(word)
        raise UserError(
            f"tokenizer {self.name!r}: symbol {word[:20]!r} at position {position} is not a number from 0 to "
            f"{self.vocab_size - 1}"
        )

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return " ".join("_" if i == self.vocab_size else str(i) for i in checked_ids(ids, self.vocab_size))

    def files(self) -> dict[str, bytes]:
        """`tokenizer.json` serves readers that know nothing of this project."""
        plain = tokenizers.Tokenizer(models.WordLevel({str(i): i for i in range(self.vocab_size)}, unk_token=""))
        plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        description = {"symbols": self.vocab_size}
        return {"symbols.json": json.dumps(description).encode(), "tokenizer.json": plain.to_str().encode()}


class SubwordTokenizer:
    """Any tokenizer of the `tokenizers` library: byte-level BPE, WordPiece, whatever a tokenizer.json says."""

    def __init__(self, name: str, serialized: str, begin: str | None, end: str | None, pad: str | None) -> None:
        self.name = name
        self._arguments = (name, serialized, begin, end, pad)
        self._tokenizer = tokenizers.Tokenizer.from_str(serialized)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        # a document that spells "<|endoftext|>" must not be able to end itself
        self._tokenizer.encode_special_tokens = True
        self.vocab_size = 1 + max(self._tokenizer.get_vocab().values())
        self.begin_id = self._special_id(begin)
        self.end_id = self._special_id(end)
        self.pad_id = self._special_id(pad)
        self.fingerprint = _fingerprint_of_json(json.loads(self._tokenizer.to_str()))

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        return SubwordTokenizer, self._arguments

    def _special_id(self, token: str | None) -> int | None:
        return None if token is None else self._tokenizer.token_to_id(token)

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        # Through the token strings, not Tokenizer.decode: the mask has a string but no id there.
        pieces = [
            MASK_TEXT if i == self.vocab_size else (self._tokenizer.id_to_token(i) or "")
            for i in checked_ids(ids, self.vocab_size)
        ]
        decoder = self._tokenizer.decoder
        return decoder.decode(pieces) if decoder is not None else " ".join(pieces)

    def files(self) -> dict[str, bytes]:
        _, serialized, begin, end, pad = self._arguments
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        specials = {"bos_token": begin, "eos_token": end, "pad_token": pad}
        settings |= {key: token for key, token in specials.items() if token is not None}
        return {"tokenizer.json": serialized.encode(), "tokenizer_config.json": json.dumps(settings, indent=2).encode()}


class SentencePieceTokenizer:
    """A SentencePiece ``.model``."""

    def __init__(self, name: str, model: bytes) -> None:
        self.name = name
        self._model = model
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.vocab_size = self._processor.vocab_size()
        self.begin_id, self.end_id, self.pad_id = (
            i if i >= 0 else None
            for i in (self._processor.bos_id(), self._processor.eos_id(), self._processor.pad_id())
        )
        self.fingerprint = hashlib.sha256(model).hexdigest()

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        return SentencePieceTokenizer, (self.name, self._model)

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._processor.encode(text), dtype=np.int64)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        # A run of ids is decoded at once (bytes of one character may be several ids); masks stand between the runs.
        runs: list[list[int]] = [[]]
        for i in checked_ids(ids, self.vocab_size):
            if i == self.vocab_size:
                runs.append([])
            else:
                runs[-1].append(i)
        return MASK_TEXT.join(self._decode_run(run, first=n == 0) for n, run in enumerate(runs))

    def _decode_run(self, run: list[int], first: bool) -> str:
        text = self._processor.decode(run)
        # SentencePiece drops the word boundary in front of a text; behind a mask it is wanted.
        boundary = bool(run) and not first and self._processor.id_to_piece(run[0]).startswith("\u2581")
        return " " + text if boundary else text

    def files(self) -> dict[str, bytes]:
        return {"spiece.model": self._model}


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of a name (``text8``, ``symbols:N``, ``gpt2``, a hub name), a file, a folder, or ``gpt2:FOLDER``.

    Raises:
        UserError: nothing there, several tokenizers in one folder, or a file that is not what its name says.
    """
    if name == "text8":
        return CharacterTokenizer("text8", " abcdefghijklmnopqrstuvwxyz")
    if name == "sudoku":
        return CharacterTokenizer("sudoku", "123456789")
    kind, colon, folder = name.partition(":")
    if colon and kind == "symbols":
        return _symbols(name, folder)
    if colon and kind in ("gpt2", "bert"):
        loaders = _loaders_in(name, Path(folder))
        if kind not in loaders:
            raise UserError(f"data.tokenizer {name!r}: no {kind} files in {folder}; expected {_expected_files()[kind]}")
        return loaders[kind]()
    for place in (Path(name), ASSETS / name, ASSETS / f"{name}.model"):
        if place.exists():
            return _load_path(name, place)
    if "/" in name.strip("/") and (name.startswith((".", "/", "~")) or Path(name).suffix):
        raise UserError(f"data.tokenizer {name!r}: no such file or folder")
    return _load_from_hub(name)


def checked_ids(ids: Sequence[int] | np.ndarray, vocab_size: int) -> list[int]:
    """The ids as a list; a `ValueError` names an id that is outside 0 .. vocab_size (the mask)."""
    array = np.asarray(ids, dtype=np.int64)
    if array.size and (array.min() < 0 or array.max() > vocab_size):
        raise ValueError(f"token ids must lie in 0..{vocab_size}, found {array.min()}..{array.max()}")
    return array.tolist()


def _load_path(name: str, path: Path) -> Tokenizer:
    if path.is_dir():
        loaders = _loaders_in(name, path)
        # these are complete by themselves; other files beside them only repeat what they say
        for complete in ("characters", "symbols", "tokenizer.json"):
            if complete in loaders:
                return loaders[complete]()
        if len(loaders) != 1:
            found = f"several tokenizers ({', '.join(sorted(loaders))})" if loaders else "no tokenizer"
            raise UserError(
                f"data.tokenizer {name!r}: {found} in {path}; name one file, or write gpt2:FOLDER or bert:FOLDER. "
                f"Known files: {'; '.join(_expected_files().values())}"
            )
        return next(iter(loaders.values()))()
    if path.suffix == ".model":
        return _load_sentencepiece(name, path)
    if path.name in BERT_FILES:
        return _load_bert(name, path)
    for vocabulary, merges in GPT2_FILES:
        if path.name in (vocabulary, merges):
            return _load_gpt2(name, path.parent / vocabulary, path.parent / merges)
    if path.suffix == ".json":
        return _load_tokenizer_json(name, path)
    raise UserError(f"data.tokenizer {name!r}: unknown kind of file; expected {'; '.join(_expected_files().values())}")


def _loaders_in(name: str, folder: Path) -> dict[str, Callable[[], Tokenizer]]:
    """Kind -> how to load it, for every tokenizer whose files are in the folder."""
    loaders: dict[str, Callable[[], Tokenizer]] = {}
    if (folder / "characters.json").is_file():
        loaders["characters"] = partial(_load_characters, folder / "characters.json")
    if (folder / "symbols.json").is_file():
        loaders["symbols"] = partial(_load_symbols, folder / "symbols.json")
    if (folder / "tokenizer.json").is_file():
        loaders["tokenizer.json"] = partial(_load_tokenizer_json, name, folder / "tokenizer.json")
    for vocabulary, merges in GPT2_FILES:
        if (folder / vocabulary).is_file() and (folder / merges).is_file():
            loaders["gpt2"] = partial(_load_gpt2, name, folder / vocabulary, folder / merges)
    for vocabulary in BERT_FILES:
        if (folder / vocabulary).is_file():
            loaders["bert"] = partial(_load_bert, name, folder / vocabulary)
    for model in sorted(folder.glob("*.model")):
        loaders[model.name] = partial(_load_sentencepiece, name, model)
    return loaders


def _expected_files() -> dict[str, str]:
    return {
        "tokenizer.json": "tokenizer.json",
        "gpt2": " or ".join(" + ".join(pair) for pair in GPT2_FILES),
        "bert": " or ".join(BERT_FILES),
        "sentencepiece": "NAME.model",
    }


def _load_characters(path: Path) -> Tokenizer:
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        return CharacterTokenizer(description["name"], description["alphabet"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a character tokenizer: {error!r}") from None


def _load_symbols(path: Path) -> Tokenizer:
    try:
        size = json.loads(path.read_text(encoding="utf-8"))["symbols"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a tokenizer of symbols: {error!r}") from None
    return _symbols(str(path), str(size))


def _symbols(name: str, size: str) -> Tokenizer:
    if not (size.isascii() and size.isdigit() and len(size) <= 5 and 2 <= int(size) <= MOST_SYMBOLS):
        raise UserError(
            f"data.tokenizer {name!r}: {size[:20]!r} symbols; expected a number from 2 to {MOST_SYMBOLS}, such as "
            "'symbols:10'"
        )
    return SymbolTokenizer(int(size))


def _load_gpt2(name: str, vocabulary: Path, merges: Path) -> Tokenizer:
    try:
        tokenizer = tokenizers.Tokenizer(models.BPE.from_file(str(vocabulary), str(merges)))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"data.tokenizer {name!r}: cannot read {vocabulary} and {merges}: {error}") from None
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return SubwordTokenizer(name, tokenizer.to_str(), "<|endoftext|>", "<|endoftext|>", None)


def _load_bert(name: str, vocabulary: Path) -> Tokenizer:
    try:
        tokenizer = tokenizers.Tokenizer(models.WordPiece.from_file(str(vocabulary), unk_token="[UNK]"))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"data.tokenizer {name!r}: cannot read {vocabulary}: {error}") from None
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    missing = [token for token in specials if tokenizer.token_to_id(token) is None]
    if missing:
        raise UserError(f"{vocabulary}: not a BERT vocabulary, it lacks {', '.join(missing)}")
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    tokenizer.add_special_tokens(specials)
    return SubwordTokenizer(name, tokenizer.to_str(), "[CLS]", "[SEP]", "[PAD]")


def _load_sentencepiece(name: str, path: Path) -> Tokenizer:
    try:
        return SentencePieceTokenizer(name, path.read_bytes())
    except (RuntimeError, OSError) as error:
        raise UserError(f"{path}: not a SentencePiece model: {error}") from None


def _load_tokenizer_json(name: str, path: Path) -> Tokenizer:
    try:
        serialized = path.read_text(encoding="utf-8")
        return _with_named_specials(name, tokenizers.Tokenizer.from_str(serialized), path.parent)
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{path}: not a tokenizer of the tokenizers library: {error}") from None


def _load_from_hub(name: str) -> Tokenizer:
    try:
        tokenizer = tokenizers.Tokenizer.from_pretrained(name)
    except Exception as error:  # offline, unknown name, no tokenizer.json: the library raises bare Exception
        raise UserError(
            f"data.tokenizer {name!r}: not text8, sudoku or symbols:N, not a file or folder, not under "
            f"{ASSETS / name}, and not to be had from the Hugging Face hub ({str(error).splitlines()[0]}). "
            f"Put its files into {ASSETS / name}/ or give their folder as data.tokenizer: "
            f"{'; '.join(_expected_files().values())}"
        ) from None
    return _with_named_specials(name, tokenizer, None)


def _with_named_specials(name: str, tokenizer: tokenizers.Tokenizer, folder: Path | None) -> Tokenizer:
    """Begin, end and pad from the tokenizer_config.json beside it, else by the names that everybody uses."""
    path = folder / "tokenizer_config.json" if folder else None
    settings = json.loads(path.read_text(encoding="utf-8")) if path and path.is_file() else {}
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}

    def special(keys: Sequence[str], usual: Sequence[str]) -> str | None:
        for key in keys:
            value = settings.get(key)
            token = value["content"] if isinstance(value, dict) else value
            if token is not None:
                return str(token)
        return next((token for token in usual if token in added), None)

    return SubwordTokenizer(
        name,
        tokenizer.to_str(),
        special(("bos_token", "cls_token"), BEGIN_TOKENS),
        special(("eos_token", "sep_token"), END_TOKENS),
        special(("pad_token",), PAD_TOKENS),
    )


def _fingerprint_of_json(description: dict[str, Any]) -> str:
    """sha256 of what defines the ids, whichever file format it came in and whichever library version wrote it."""
    model = dict(description["model"])
    if "merges" in model:  # written as "a b" or as ["a", "b"]
        model["merges"] = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    added = [{key: token[key] for key in ("id", "content")} for token in description["added_tokens"]]
    parts = [model, added, description["normalizer"], description["pre_tokenizer"]]
    return hashlib.sha256(json.dumps(_without_defaults(parts), sort_keys=True).encode()).hexdigest()


def _without_defaults(value: Any) -> Any:
    """Drops null, false and empty settings: a newer library writes new ones, all of them off."""
    if isinstance(value, dict):
        # trim_offsets only moves character offsets, never ids
        return {k: _without_defaults(v) for k, v in value.items() if v not in (None, False, "") and k != "trim_offsets"}
    return [_without_defaults(v) for v in value] if isinstance(value, list) else value
