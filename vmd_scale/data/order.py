"""The global sample order: a pure function (seed, position) -> row, in O(1) memory.

Position n lies in epoch n // rows. Every epoch is a keyed pseudo-random permutation of the row numbers: a Feistel
network over the smallest domain of 4^h >= rows numbers, and *cycle walking*: a number that falls outside the rows is
permuted again until it falls inside, which keeps the whole thing a permutation of the rows.
"""

import numpy as np

ROUNDS = 8  # 4 suffice for large domains in theory; small ones mix more slowly


class SampleOrder:
    """The endless, shuffled order of the rows of a corpus.

    Args:
        rows: rows of the corpus, 1 .. 2^62.
        seed: training.seed; another seed is another order.
        stream: likewise, for the corpora of a mixture.
    """

    def __init__(self, rows: int, seed: int, stream: int = 0) -> None:
        if not 1 <= rows <= 1 << 62:
            raise ValueError(f"rows must lie in 1..2^62, found {rows}")
        self.rows = rows
        self.seed = seed
        half = max(1, ((rows - 1).bit_length() + 1) // 2)
        self._half = np.uint64(half)
        self._mask = np.uint64((1 << half) - 1)
        self._seed_key = _mix(np.array([seed % (1 << 64)], dtype=np.uint64)) ^ np.uint64(stream)

    def row_numbers(self, positions: np.ndarray) -> np.ndarray:
        """Row numbers int64 [n] of positions int64 [n] >= 0 of the endless order; each is independent of the others."""
        positions = np.asarray(positions, dtype=np.int64)
        if positions.size and positions.min() < 0:
            raise ValueError(f"positions must be >= 0, found {positions.min()}")
        epochs, numbers = np.divmod(positions.astype(np.uint64), np.uint64(self.rows))
        epoch_keys = _mix(self._seed_key ^ _mix(epochs))
        numbers = self._permute(numbers, epoch_keys)
        outside = np.flatnonzero(numbers >= self.rows)
        while len(outside):  # less than four turns on average: the domain is less than four times the rows
            walked = self._permute(numbers[outside], epoch_keys[outside])
            numbers[outside] = walked
            outside = outside[walked >= self.rows]
        return numbers.astype(np.int64)

    def _permute(self, numbers: np.ndarray, epoch_keys: np.ndarray) -> np.ndarray:
        """One pass of the Feistel network over the domain of 2 h bits; numbers and keys are uint64 [n]."""
        left, right = numbers >> self._half, numbers & self._mask
        for round_number in range(ROUNDS):
            round_key = _mix(epoch_keys + np.uint64(round_number))
            left, right = right, left ^ (_mix(right ^ round_key) & self._mask)
        return (left << self._half) | right


def _mix(x: np.ndarray) -> np.ndarray:
    """A bijection of uint64 in which every input bit changes every output bit half the time (SplitMix64)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
