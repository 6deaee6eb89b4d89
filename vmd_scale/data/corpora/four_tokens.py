"""Four tokens of which one or two are free: the tasks D1 and D2 of arXiv 2510.23606."""

from collections.abc import Iterator

import numpy as np

from vmd_scale.config import DataConfig
from vmd_scale.data.corpora.registry import Document, corpus
from vmd_scale.data.corpora.symbol_rows import Listed, check_tokenizer, listed_documents, variant_of
from vmd_scale.errors import UserError

SYMBOLS = 10
TRAIN_ROWS = 100_000


@corpus("four_tokens", origin="d1")
def four_tokens(config: DataConfig, split: str) -> Iterator[Document]:
    """Rows of four of ten symbols; data.source is a variant of `four_tokens_distribution`."""
    check_tokenizer(config, SYMBOLS)
    variant = variant_of(config, split, "d1")
    return listed_documents(_listed(variant), f"four_tokens {variant}", split, TRAIN_ROWS)


def four_tokens_distribution(source: str = "d1") -> tuple[np.ndarray, np.ndarray]:
    """The rows that occur, int64 [n, 4], and their probabilities, float64 [n].

    Args:
        source: ``d1``: (k, k+1, k+2, k+3 mod 10), 10 rows. ``d2``: (k, k+1, l, l+1 mod 10), 100 rows.

    Raises:
        UserError: neither of these.
    """
    listed = _listed(source)
    return listed.rows, listed.probabilities


def _listed(source: str) -> Listed:
    if source == "d1":
        rows = np.arange(SYMBOLS)[:, None] + np.arange(4)
    elif source == "d2":
        k, l = np.divmod(np.arange(SYMBOLS**2), SYMBOLS)  # noqa: E741  the paper's letter
        rows = np.stack([k, k + 1, l, l + 1], axis=1)
    else:
        raise UserError(f"data.source {source!r}: corpus 'four_tokens' has the variants 'd1' and 'd2'")
    return Listed(rows % SYMBOLS, np.ones(len(rows), dtype=np.int64))
