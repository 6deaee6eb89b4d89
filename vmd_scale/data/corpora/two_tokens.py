"""Two tokens that determine each other: the smallest task on which independent unmasking fails (arXiv 2510.23606)."""

import math
import re
from collections.abc import Iterator
from fractions import Fraction

import numpy as np

from vmd_scale.config import DataConfig
from vmd_scale.data.corpora.registry import Document, corpus
from vmd_scale.data.corpora.symbol_rows import Listed, check_tokenizer, listed_documents, variant_of
from vmd_scale.errors import UserError

SYMBOLS = 10
TRAIN_ROWS = 100_000
LONGEST_LIST = 10_000
NUMBER = re.compile(r"[0-9]+(\.[0-9]+|/0*[1-9][0-9]*)?")


@corpus("two_tokens", origin="uniform")
def two_tokens(config: DataConfig, split: str) -> Iterator[Document]:
    """Pairs (k, k+1 mod 10); data.source is a variant of `two_tokens_distribution`."""
    check_tokenizer(config, SYMBOLS)
    variant = variant_of(config, split, "uniform")
    return listed_documents(_listed(variant), f"two_tokens {variant}", split, TRAIN_ROWS)


def two_tokens_distribution(source: str = "uniform") -> tuple[np.ndarray, np.ndarray]:
    """The pairs that occur, int64 [n, 2], and their probabilities, float64 [n].

    Args:
        source: ``uniform``: k is uniform over 0 .. 9. ``weighted``: P(k) = (k + 1) / 55. A number p of
            [0, 1] such as ``0.3`` or ``1/3``: k is uniform, and the second token is k + 1 with probability p, else
            uniform over 0 .. 9.

    Raises:
        UserError: none of these, or a p whose exact list would need more than 10,000 rows.
    """
    listed = _listed(source)
    return listed.rows, listed.probabilities


def _listed(source: str) -> Listed:
    first = np.arange(SYMBOLS)
    pairs = np.stack([first, (first + 1) % SYMBOLS], axis=1)
    if source == "uniform":
        return Listed(pairs, np.ones(SYMBOLS, dtype=np.int64))
    if source == "weighted":
        return Listed(pairs, first + 1)
    follows = _probability(source)
    every = np.stack(np.divmod(np.arange(SYMBOLS**2), SYMBOLS), axis=1)
    elsewhere = (1 - follows) / SYMBOLS**2
    coupled = elsewhere + follows / SYMBOLS
    total = math.lcm(coupled.denominator, elsewhere.denominator)
    if total > LONGEST_LIST:
        raise UserError(
            f"data.source {source!r}: an exact list of this distribution needs {total:,} rows, allowed are "
            f"{LONGEST_LIST:,}; take a number with fewer digits, such as {float(round(follows, 2))}"
        )
    is_pair = every[:, 1] == (every[:, 0] + 1) % SYMBOLS
    counts = np.where(is_pair, int(coupled * total), int(elsewhere * total))
    return Listed(every[counts > 0], counts[counts > 0])


def _probability(source: str) -> Fraction:
    value = None
    if NUMBER.fullmatch(source) and len(source) <= 20:
        value = Fraction(source)
    if value is None or value > 1:
        raise UserError(
            f"data.source {source!r}: corpus 'two_tokens' has the variants 'uniform', 'weighted' and a number "
            "from 0 to 1, such as '0.3'"
        )
    return value
