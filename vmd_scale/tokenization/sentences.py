"""SentencePiece models."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from vmd_scale.errors import UserError
from vmd_scale.tokenization.exported import exported_files
from vmd_scale.tokenization.interface import MASK_TEXT, Tokenizer, checked_ids
from vmd_scale.tokenization.unigram import unigram_as_json


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
        # SentencePiece drops the word boundary in front of a text; after a mask it is wanted.
        boundary = bool(run) and not first and self._processor.id_to_piece(run[0]).startswith("\u2581")
        return " " + text if boundary else text

    def files(self) -> dict[str, bytes]:
        """`tokenizer.json` serves readers that know nothing of SentencePiece; of a unigram model only."""
        files = {"spiece.model": self._model}
        if (serialized := unigram_as_json(self._model)) is None:
            return files
        ids = {"bos_token": self.begin_id, "eos_token": self.end_id, "pad_token": self.pad_id}
        specials = {key: None if i is None else self._processor.id_to_piece(i) for key, i in ids.items()}
        return files | exported_files(serialized, self.vocab_size, specials, original="spiece.model", joins_spaces=True)


def sentencepiece_tokenizer(name: str, path: Path) -> Tokenizer:
    try:
        return SentencePieceTokenizer(name, path.read_bytes())
    except (RuntimeError, OSError) as error:
        raise UserError(f"{path}: not a SentencePiece model: {error}") from None
