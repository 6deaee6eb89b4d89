"""The noise of ``vmd_scale/diffusion/noise.py`` for an exported folder: the same numbers, made by torch alone.

Training makes them with numpy, which is faster; an exported folder needs torch and safetensors only. A test
holds the two against each other, bit for bit.
"""

import math
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


class Stream(IntEnum):
    """What a number is for. Two streams never share a number."""

    TIME = 0
    PATH = 1
    LATENT = 2
    DROPOUT = 3
    SAMPLE_PATH = 4
    SAMPLE_LATENT = 5
    SAMPLE_TOKEN = 6


def philox(counter: Tensor, key: tuple[int, int]) -> Tensor:
    """Philox4x32-10 (Salmon et al., SC 2011) on int64 [4, n] that hold 32 bits each; products wrap around."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = ((product1 >> 32) & _LOW) ^ c1 ^ k0, product1 & _LOW
        c2, c3 = ((product0 >> 32) & _LOW) ^ c3 ^ k1, product0 & _LOW
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return torch.stack((c0, c1, c2, c3))


@dataclass(frozen=True)
class Noise:
    """All the noise of one seed (0 <= seed < 2**63): a pure function of (stream, step, row, element)."""

    seed: int

    def uniform(self, stream: Stream, step: int, rows: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Uniform in the open interval (0, 1), float64 [len(rows), *shape]."""
        per_row = math.prod(shape)
        blocks = (per_row + 1) // 2  # one counter gives four words, two doubles
        words = (torch.arange(blocks), rows[:, None], torch.tensor(step & _LOW), torch.tensor(step >> 32 << 8 | stream))
        counter = torch.stack([word.expand(len(rows), blocks) for word in words])
        made = philox(counter.reshape(4, -1), (self.seed & _LOW, self.seed >> 32))
        high, low = made[0::2], made[1::2]
        values = (((high >> 6) << 26 | low >> 6).double() + 0.5) * 2.0**-52
        values = values.reshape(2, len(rows), blocks).permute(1, 2, 0).reshape(len(rows), -1)
        return values[:, :per_row].reshape(len(rows), *shape)

    def normal(self, stream: Stream, step: int, rows: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Standard normal (Box-Muller), fp32 [len(rows), *shape]."""
        per_row = math.prod(shape)
        u = self.uniform(stream, step, rows, ((per_row + 1) // 2, 2))
        radius, angle = (-2 * u[..., 0].log()).sqrt(), 2 * math.pi * u[..., 1]
        values = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1).flatten(1)
        return values[:, :per_row].reshape(-1, *shape).float()
