"""Tokenizers of data whose symbols can be listed: characters, and bare numbers."""

import hashlib
import json
from collections.abc import Sequence

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from vmd_scale.errors import UserError
from vmd_scale.tokenization.exported import exported_files
from vmd_scale.tokenization.interface import checked_ids

MOST_SYMBOLS = 1 << 16


class CharacterTokenizer:
    """One id a character of a fixed alphabet, in the alphabet's order, after those of `specials`.

    Args:
        specials: symbols that no text spells; where [BOS], [EOS] and [PAD] are among them, they are begin, end and pad.
    """

    def __init__(self, name: str, alphabet: str, specials: Sequence[str] = ()) -> None:
        self.name = name
        self.alphabet = alphabet
        self.specials = tuple(specials)
        self._symbols = [*self.specials, *alphabet, "_"]
        self.vocab_size = len(self._symbols) - 1
        self.begin_id, self.end_id, self.pad_id = map(self._special_id, ("[BOS]", "[EOS]", "[PAD]"))
        described = "\0".join(("characters", alphabet, *self.specials))
        self.fingerprint = hashlib.sha256(described.encode()).hexdigest()
        self._id_of_byte = np.full(256, -1, dtype=np.int64)
        places = np.arange(len(self.specials), self.vocab_size)
        self._id_of_byte[np.frombuffer(alphabet.encode("ascii"), dtype=np.uint8)] = places

    def _special_id(self, symbol: str) -> int | None:
        return self.specials.index(symbol) if symbol in self.specials else None

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
        return "".join(self._symbols[i] for i in checked_ids(ids, self.vocab_size))

    def files(self) -> dict[str, bytes]:
        """`tokenizer.json` serves readers that know nothing of this project."""
        description: dict[str, object] = {"name": self.name, "alphabet": self.alphabet}
        vocabulary = {symbol: i for i, symbol in enumerate(self._symbols[:-1])}
        plain = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=""))
        plain.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
        plain.decoder = decoders.Fuse()
        if self.specials:
            description["specials"] = list(self.specials)
            plain.add_special_tokens(list(self.specials))
        ids = {"bos_token": self.begin_id, "eos_token": self.end_id, "pad_token": self.pad_id}
        specials = {key: None if i is None else self._symbols[i] for key, i in ids.items()}
        return {
            "characters.json": json.dumps(description).encode(),
            **exported_files(plain.to_str(), self.vocab_size, specials),
        }


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
        return {
            "symbols.json": json.dumps(description).encode(),
            **exported_files(plain.to_str(), self.vocab_size, {}),
        }
