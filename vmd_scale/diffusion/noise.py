"""Counter-based noise: every random number is a pure function of (seed, stream, step, row, element).

Nothing has a state, so a resumed run, another number of ranks or another micro-batch sees the same noise. The numbers
are made on the host, so that a CPU and a GPU see the same ones too.
The generator is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
"""

import functools
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import IntEnum
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from vmd_scale.errors import UserError

_MULTIPLIERS = np.array([0xD2511F53, 0xCD9E8D57], dtype=np.uint64)
_WEYL = np.array([0x9E3779B9, 0xBB67AE85], dtype=np.uint64)
_LOW = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)
THREADS = 4  # of the host, at most, that draw noise together
PIECE = 2**14  # counters at a time: what is computed of them stays in a core's cache
T = TypeVar("T")


def _in_pieces(draw: Callable[[np.ndarray], T], rows: np.ndarray, blocks: int) -> Iterator[tuple[int, T]]:
    """`draw` of consecutive pieces of `rows`: where each begins, and the result.

    Several pieces are drawn by several threads.
    """
    size = max(1, PIECE // max(1, blocks))
    starts = range(0, len(rows), size)
    pieces = (rows[start : start + size] for start in starts)
    threads = min(THREADS, torch.get_num_threads())
    parallel = len(starts) > 1 and threads > 1
    drawn = _pool(threads, os.getpid()).map(draw, pieces) if parallel else map(draw, pieces)
    return zip(starts, drawn, strict=True)


@functools.cache
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """One for each process: a forked one has none of its parent's threads."""
    return ThreadPoolExecutor(threads, thread_name_prefix="noise")


class Stream(IntEnum):
    """What a number is for. Two streams never share a number."""

    TIME = 0
    PATH = 1
    LATENT = 2
    DROPOUT = 3
    SAMPLE_PATH = 4  # a sample's own, so that scoring it with the same seed does not meet the noise that made it
    SAMPLE_LATENT = 5
    SAMPLE_TOKEN = 6


def philox(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Philox4x32-10: uint64 [4, n] counters of 32 bits each and a key of two 32-bit words -> uint64 [4, n] words."""
    words = counter.copy()
    c0, c1, c2, c3 = words
    product0, product1 = np.empty_like(words[:2])
    k0, k1 = (np.uint64(word) for word in key)
    for _ in range(10):  # in place: new memory would cost more than the arithmetic
        np.multiply(c0, _MULTIPLIERS[0], out=product0)
        np.multiply(c2, _MULTIPLIERS[1], out=product1)
        np.right_shift(product1, _32, out=c0)
        c0 ^= c1
        c0 ^= k0
        np.bitwise_and(product1, _LOW, out=c1)
        np.right_shift(product0, _32, out=c2)
        c2 ^= c3
        c2 ^= k1
        np.bitwise_and(product0, _LOW, out=c3)
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return words


@dataclass(frozen=True)
class Noise:
    """All the noise of one seed (0 <= seed < 2**63, else `UserError`)."""

    seed: int

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed {self.seed}: allowed: 0 to 2^63 - 1")

    def uniform(self, stream: Stream, step: int, rows: np.ndarray | Tensor, shape: tuple[int, ...]) -> Tensor:
        """Uniform in the open interval (0, 1), float64 [len(rows), *shape].

        Args:
            step: training step, or number of the draw: 0 <= step < 2**56.
            rows: int64, each below 2**32: position in the global batch, or number of the row.
        """
        rows, per_row = np.asarray(rows, dtype=np.uint64), math.prod(shape)
        blocks = (per_row + 1) // 2
        values = np.empty((len(rows), blocks, 2))
        for first, pair in _in_pieces(lambda some: self._pairs(stream, step, some, blocks), rows, blocks):
            values[first : first + pair.shape[1]] = pair.transpose(1, 2, 0)
        return torch.from_numpy(values).flatten(1)[:, :per_row].contiguous().view(len(rows), *shape)

    def normal(self, stream: Stream, step: int, rows: np.ndarray | Tensor, shape: tuple[int, ...]) -> Tensor:
        """Standard normal (Box-Muller), fp32 [len(rows), *shape]."""
        rows, per_row = np.asarray(rows, dtype=np.uint64), math.prod(shape)
        blocks = (per_row + 1) // 2
        values = torch.empty(len(rows), blocks, 2)

        def draw(some: np.ndarray) -> tuple[Tensor, Tensor]:
            u, v = torch.from_numpy(self._pairs(stream, step, some, blocks))
            radius, angle = u.log_().mul_(-2).sqrt_(), v.mul_(2 * math.pi)
            return radius * angle.cos(), radius.mul_(angle.sin_())

        for first, (x, y) in _in_pieces(draw, rows, blocks):
            values[first : first + len(x), :, 0], values[first : first + len(x), :, 1] = x, y
        return values.flatten(1)[:, :per_row].contiguous().view(len(rows), *shape)

    def _pairs(self, stream: Stream, step: int, rows: np.ndarray, blocks: int) -> np.ndarray:
        """Uniform float64 [2, len(rows), blocks]: one counter gives four words, two doubles."""
        counter = np.empty((4, len(rows), blocks), dtype=np.uint64)
        counter[0] = np.arange(blocks, dtype=np.uint64)
        counter[1] = rows[:, None]
        counter[2] = step & 0xFFFFFFFF
        counter[3] = (step >> 32) << 8 | int(stream)
        words = philox(counter.reshape(4, -1), (self.seed & 0xFFFFFFFF, self.seed >> 32))
        high, low = words[0::2], words[1::2]
        high >>= np.uint64(6)
        high <<= np.uint64(26)
        low >>= np.uint64(6)
        high |= low  # 52 bits
        values = high.astype(np.float64)
        values += 0.5
        values *= 2.0**-52
        return values.reshape(2, len(rows), blocks)

    def integer(self, stream: Stream, step: int, row: int) -> int:
        """One integer in [0, 2**52), to seed a generator that is not ours (dropout)."""
        return int(self.uniform(stream, step, np.array([row]), (1,)).item() * 2**52)
