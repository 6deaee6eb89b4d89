"""Keyed random numbers for corpora that are drawn: a name is a stream, the same on every machine.

The numbers are the raw words of numpy's Philox4x64-10, whose key is the SHA-256 of the name. Nothing else of numpy's
generators is used: raw words never change with its version, distributions may.
"""

import hashlib

import numpy as np


def words(name: str, count: int) -> np.ndarray:
    """The first `count` words of the stream of this name, uint64 [count]."""
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "little")
    return np.random.Philox(key=key).random_raw(count)


def below(bound: int, random_words: np.ndarray) -> np.ndarray:
    """Words [...] as integers 0 .. bound - 1, int64 [...]; equally likely but for bound / 2^32 at most."""
    if not 1 <= bound < 1 << 32:
        raise ValueError(f"bound must lie in 1..2^32 - 1, found {bound}")
    return ((random_words >> np.uint64(32)) * np.uint64(bound) >> np.uint64(32)).astype(np.int64)


def uniform(random_words: np.ndarray) -> np.ndarray:
    """Words [...] as numbers of the open interval (0, 1), float64 [...]."""
    return ((random_words >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
