"""What the corpora of symbols share: their tokenizer, the variants that data.source names, and listed distributions."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from vmd_scale.config import DataConfig
from vmd_scale.data.corpora.draws import below, words
from vmd_scale.data.corpora.registry import Document
from vmd_scale.data.corpora.sources import source_of
from vmd_scale.errors import UserError


@dataclass(frozen=True)
class Listed:
    """A distribution as rows int64 [n, L], each `counts` int64 [n] times in a list that is exactly the distribution."""

    rows: np.ndarray
    counts: np.ndarray

    @property
    def probabilities(self) -> np.ndarray:
        """float64 [n]; they sum to 1."""
        return self.counts / self.counts.sum()

    def draw(self, name: str, count: int) -> np.ndarray:
        """Independent rows int64 [count, L] of the stream of this name."""
        positions = below(int(self.counts.sum()), words(name, count))
        return self.rows[np.searchsorted(np.cumsum(self.counts), positions, side="right")]

    def whole(self) -> np.ndarray:
        """The list itself, int64 [sum(counts), L]."""
        return np.repeat(self.rows, self.counts, axis=0)


def check_tokenizer(config: DataConfig, symbols: int) -> None:
    """`UserError` unless data.tokenizer is the one of this many symbols."""
    wanted = f"symbols:{symbols}"
    if config.tokenizer != wanted:
        raise UserError(f"data.tokenizer {config.tokenizer!r}: corpus {config.corpus!r} needs tokenizer {wanted!r}")


def variant_of(config: DataConfig, split: str, default: str) -> str:
    """The variant that data.source names for a split, `default` for null."""
    return default if config.source is None else source_of(config, split).path


def listed_documents(listed: Listed, name: str, split: str, train_rows: int) -> Iterator[Document]:
    """Draws of the stream `name` for train; the exact distribution as a list for validation and for test, the same."""
    return as_documents(listed.draw(name, train_rows) if split == "train" else listed.whole())


def as_documents(rows: np.ndarray) -> Iterator[Document]:
    """A document a row; rows [n, L] of any integer type."""
    return (Document(tokens=row.astype(np.int64)) for row in rows)
