"""Counter-based noise: every random number is a pure function of (seed, stream, step, row, element).

Nothing has a state, so a resumed run, another number of ranks or another micro-batch sees the same noise. The numbers
are made on the host, so that a CPU and a GPU see the same ones too.
The generator is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
"""

import math
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

_MULTIPLIERS = np.array([0xD2511F53, 0xCD9E8D57], dtype=np.uint64)
_WEYL = np.array([0x9E3779B9, 0xBB67AE85], dtype=np.uint64)
_LOW = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)


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
    c0, c1, c2, c3 = counter
    k0, k1 = (np.uint64(word) for word in key)
    for _ in range(10):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = (product1 >> _32) ^ c1 ^ k0, product1 & _LOW
        c2, c3 = (product0 >> _32) ^ c3 ^ k1, product0 & _LOW
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return np.stack((c0, c1, c2, c3))


@dataclass(frozen=True)
class Noise:
    """All the noise of one seed (0 <= seed < 2**63)."""

    seed: int

    def uniform(self, stream: Stream, step: int, rows: np.ndarray | Tensor, shape: tuple[int, ...]) -> Tensor:
        """Uniform in the open interval (0, 1), float64 [len(rows), *shape].

        Args:
            step: training step, or number of the draw: 0 <= step < 2**56.
            rows: int64, each below 2**32: position in the global batch, or number of the row.
        """
        rows = np.asarray(rows, dtype=np.uint64)
        per_row = math.prod(shape)
        blocks = (per_row + 1) // 2  # one counter gives four words, two doubles
        counter = np.empty((4, len(rows), blocks), dtype=np.uint64)
        counter[0] = np.arange(blocks, dtype=np.uint64)
        counter[1] = rows[:, None]
        counter[2] = step & 0xFFFFFFFF
        counter[3] = (step >> 32) << 8 | int(stream)
        words = philox(counter.reshape(4, -1), (self.seed & 0xFFFFFFFF, self.seed >> 32))
        high, low = words[0::2], words[1::2]
        integers = (high >> np.uint64(6)) << np.uint64(26) | low >> np.uint64(6)  # 52 bits
        values = (integers.astype(np.float64) + 0.5) * 2.0**-52
        values = values.reshape(2, len(rows), blocks).transpose(1, 2, 0).reshape(len(rows), -1)
        return torch.from_numpy(np.ascontiguousarray(values[:, :per_row])).view(len(rows), *shape)

    def normal(self, stream: Stream, step: int, rows: np.ndarray | Tensor, shape: tuple[int, ...]) -> Tensor:
        """Standard normal (Box-Muller), fp32 [len(rows), *shape]."""
        per_row = math.prod(shape)
        u = self.uniform(stream, step, rows, ((per_row + 1) // 2, 2))
        radius, angle = (-2 * u[..., 0].log()).sqrt(), 2 * math.pi * u[..., 1]
        values = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1).flatten(1)
        return values[:, :per_row].reshape(-1, *shape).float()

    def integer(self, stream: Stream, step: int, row: int) -> int:
        """One integer in [0, 2**52), to seed a generator that is not ours (dropout)."""
        return int(self.uniform(stream, step, np.array([row]), (1,)).item() * 2**52)
