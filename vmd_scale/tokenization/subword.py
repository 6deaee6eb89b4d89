"""Tokenizers of the `tokenizers` library, in the formats that they are published in."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from vmd_scale.errors import UserError
from vmd_scale.tokenization.exported import PLAIN, TOKENIZER_CONFIG, exported_files
from vmd_scale.tokenization.interface import MASK_TEXT, Tokenizer, checked_ids

BEGIN_TOKENS = ["[CLS]", "<s>", "<bos>", "<|begin_of_text|>", "<|endoftext|>"]
END_TOKENS = ["[SEP]", "</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>"]
PAD_TOKENS = ["[PAD]", "<pad>", "<|padding|>"]


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
        specials = {"bos_token": begin, "eos_token": end, "pad_token": pad}
        joins_spaces = len(self.encode("a b")) <= 2
        exported = exported_files(serialized, self.vocab_size, specials, original=PLAIN, joins_spaces=joins_spaces)
        return {PLAIN: serialized.encode(), **exported}


def gpt2_tokenizer(name: str, vocabulary: Path, merges: Path) -> Tokenizer:
    try:
        tokenizer = tokenizers.Tokenizer(models.BPE.from_file(str(vocabulary), str(merges)))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"data.tokenizer {name!r}: cannot read {vocabulary} and {merges}: {error}") from None
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return SubwordTokenizer(name, tokenizer.to_str(), "<|endoftext|>", "<|endoftext|>", None)


def bert_tokenizer(name: str, vocabulary: Path) -> Tokenizer:
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


def with_named_specials(name: str, tokenizer: tokenizers.Tokenizer, folder: Path | None) -> Tokenizer:
    """Begin, end and pad from the tokenizer_config.json beside it, else by the names that everybody uses."""
    path = folder / TOKENIZER_CONFIG if folder else None
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
    vocabulary = model.pop("vocab")
    if "merges" in model:  # written as "a b" or as ["a", "b"]
        model["merges"] = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    added = [_defining(token) for token in description["added_tokens"]]
    parts = _without_defaults([model, added, description["normalizer"], description["pre_tokenizer"]])
    return hashlib.sha256(json.dumps([vocabulary, *parts], sort_keys=True).encode()).hexdigest()


def _defining(token: dict[str, Any]) -> dict[str, Any]:
    """How text matches a special token is no matter: it never does."""
    return {key: token[key] for key in ("id", "content", "special")} if token["special"] else token


def _without_defaults(value: Any) -> Any:
    """Drops null, false and empty settings: a newer library writes new ones, all of them off."""
    if isinstance(value, dict):
        # trim_offsets only moves character offsets, never ids; strip_accents: null is not off, but as lowercase is
        kept = {k: v for k, v in value.items() if k != "trim_offsets" and v is not None and v != ""}
        return {k: _without_defaults(v) for k, v in kept.items() if v is not False or k == "strip_accents"}
    return [_without_defaults(v) for v in value] if isinstance(value, list) else value
