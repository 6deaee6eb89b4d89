"""Weighted mixtures of corpora: one order and one reader over the rows of all of them.

Which corpus a position of the order belongs to is decided by a fixed pattern of at most `PERIOD` positions, repeated
forever; within a corpus its rows come in the `SampleOrder` of their own. So the order stays a pure function of the
position, corpora of different sizes go through their epochs independently, and the cursor of a run is one integer.
"""

import logging
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from vmd_scale.config import DataConfig
from vmd_scale.data.loader import RowOrder
from vmd_scale.data.manifest import Manifest, manifests_of
from vmd_scale.data.order import SampleOrder
from vmd_scale.data.roles import Role
from vmd_scale.data.shards import ShardReader, shard_cache
from vmd_scale.errors import UserError

PERIOD = 10_000
log = logging.getLogger(__name__)


class MixtureOrder:
    """The endless order of the rows of several corpora; theirs are numbered one corpus after the other.

    Args:
        rows: of each corpus.
        weights: shares of the positions, in proportion. Multiples of 1 / `PERIOD` of their sum are kept exactly, others
            are rounded to that.
        seed: training.seed.

    Raises:
        UserError: a weight below 1 / `PERIOD` of the sum.
    """

    def __init__(self, rows: Sequence[int], weights: Sequence[float], seed: int) -> None:
        self.quotas = np.array(quotas_of(weights), dtype=np.int64)
        self.pattern = interleave(self.quotas)
        self._orders = [SampleOrder(n, seed, stream) for stream, n in enumerate(rows)]
        self._first_rows = np.cumsum([0, *rows[:-1]])
        self._rank = np.empty(len(self.pattern), dtype=np.int64)  # of a slot among those of the same corpus
        for number, quota in enumerate(self.quotas):
            self._rank[self.pattern == number] = np.arange(quota)

    def row_numbers(self, positions: np.ndarray) -> np.ndarray:
        """Row numbers int64 [n] of positions int64 [n] >= 0 of the endless order; each is independent of the others."""
        periods, slots = np.divmod(np.asarray(positions, dtype=np.int64), len(self.pattern))
        corpus = self.pattern[slots]
        places = periods * self.quotas[corpus] + self._rank[slots]
        numbers = np.empty_like(places)
        for number, order in enumerate(self._orders):
            here = corpus == number
            numbers[here] = self._first_rows[number] + order.row_numbers(places[here])
        return numbers


class MixtureReader:
    """Random access to the rows of several corpora, numbered one corpus after the other."""

    def __init__(self, readers: Sequence[ShardReader]) -> None:
        self._readers = readers
        self._ends = np.cumsum([reader.rows for reader in readers])
        self.rows = int(self._ends[-1])
        self.has_roles = any(reader.has_roles for reader in readers)

    @property
    def manifest(self) -> Manifest:
        """That of the first corpus: what the model must know of the rows is the same for all."""
        return self._readers[0].manifest

    def read(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """As `ShardReader.read`; where only some corpora have roles, the others' rows are ordinary."""
        length = self.manifest.row_length
        tokens = np.empty((len(rows), length), dtype=np.int64)
        roles = np.full((len(rows), length), np.uint8(Role.ORDINARY)) if self.has_roles else None
        corpus = np.searchsorted(self._ends, rows, side="right")
        for number in np.unique(corpus):
            reader, here = self._readers[number], np.flatnonzero(corpus == number)
            tokens[here], found = reader.read(rows[here] - (self._ends[number] - reader.rows))
            if roles is not None and found is not None:
                roles[here] = found
        return tokens, roles


def training_rows(
    data: DataConfig, seed: int, manifests: Sequence[Manifest] | None = None
) -> tuple["ShardReader | MixtureReader", RowOrder]:
    """The rows that a run is trained on, and their order.

    Args:
        manifests: of each corpus; null reads them. Sizes of files are compared when they are mapped, not here.

    Raises:
        UserError: see `ShardReader` and `MixtureOrder`.
    """
    corpora = data.corpora()
    cache, sharing = shard_cache(data), len(corpora)
    readers = [
        ShardReader(each.shards, "train", manifest, check_sizes=False, cache=cache, sharing=sharing)
        for each, manifest in zip(corpora, manifests or manifests_of(data), strict=True)
    ]
    if len(readers) == 1:
        return readers[0], SampleOrder(readers[0].rows, seed)
    order = MixtureOrder([reader.rows for reader in readers], [each.weight for each in corpora], seed)
    return MixtureReader(readers), order


def attended_positions(data: DataConfig, manifests: Sequence[Manifest]) -> float | None:
    """The least number of positions that one attends to in training; None: all of a row. See `Manifest`."""
    if data.packing != "document":
        return None
    of_corpora = [manifest.attended_positions("train") for manifest in manifests]
    return float(np.average(of_corpora, weights=[each.weight for each in data.corpora()]))


def quotas_of(weights: Sequence[float]) -> list[int]:
    """Positions of each corpus in a period: the smallest whole numbers in these proportions, or the nearest ones."""
    exact = [Fraction(str(weight)) for weight in weights]
    shares = [weight / sum(exact) for weight in exact]
    period = math.lcm(*(share.denominator for share in shares))
    if period <= PERIOD:
        return [int(share * period) for share in shares]
    quotas = [math.floor(share * PERIOD) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda n: quotas[n] - shares[n] * PERIOD)  # stable: ties by number
    for n in by_remainder[: PERIOD - sum(quotas)]:
        quotas[n] += 1
    if not all(quotas):
        raise UserError(
            f"data.mixture: weight {weights[quotas.index(0)]} is less than 1/{PERIOD} of the sum of all weights"
        )
    log.info("data.mixture: shares are rounded, of %d rows the corpora have %s", PERIOD, quotas)
    return quotas


def interleave(quotas: np.ndarray) -> np.ndarray:
    """Which corpus has each position of a period, int64 [sum of quotas]: as evenly as can be.

    Of any first n positions, each corpus has its share of n to less than one (Tijdeman, The chairman assignment
    problem, Discrete Mathematics 32, 1980).
    """
    period, corpora = int(quotas.sum()), len(quotas)
    pattern = np.zeros(period, dtype=np.int64)
    if corpora == 1:
        return pattern
    slack, counts = 2 * corpora - 2, np.zeros(corpora, dtype=np.int64)
    for n in range(1, period + 1):
        behind = (quotas * n - counts * period) * slack  # in units of 1 / (slack * period)
        deadline = np.where(behind >= period, ((slack - 1) * period - behind) / quotas, np.inf)
        pattern[n - 1] = chosen = int(deadline.argmin())
        counts[chosen] += 1
    return pattern
