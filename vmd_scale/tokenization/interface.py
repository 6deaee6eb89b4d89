"""What the rest of the project knows of a tokenizer."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

MASK_TEXT = "[MASK]"


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


def checked_ids(ids: Sequence[int] | np.ndarray, vocab_size: int) -> list[int]:
    """The ids as a list; a `ValueError` names an id that is outside 0 .. vocab_size (the mask)."""
    array = np.asarray(ids, dtype=np.int64)
    if array.size and (array.min() < 0 or array.max() > vocab_size):
        raise ValueError(f"token ids must lie in 0..{vocab_size}, found {array.min()}..{array.max()}")
    return array.tolist()
