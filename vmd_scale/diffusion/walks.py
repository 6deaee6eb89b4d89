"""Scoring x0 along a path: where rows stand, and what each step reveals. Everything is on the host."""

from typing import Protocol

import torch
from torch import Tensor

from vmd_scale.diffusion.paths import finite_steps, highest, masked_before, reveal_steps
from vmd_scale.diffusion.sampler import Sampler
from vmd_scale.diffusion.tokens import confidence_of
from vmd_scale.model import VMD


class Path(Protocol):
    """Steps k = total, ..., 1; `masked`, bool [B, L], is the state before the next of them."""

    total: int
    masked: Tensor

    def reveals(self, k: int) -> Tensor:
        """Whether step k reveals anything of each group, bool [B, G]."""

    def step(self, k: int, hidden: Tensor, model: VMD) -> Tensor:
        """Take step k; what it reveals, bool [B, L]. `hidden` [B, L, D] are the denoiser's states before it."""


class DrawnPath:
    """By a law that is independent of the tokens; `u` is uniform noise, float64 [B, G, L / G]."""

    def __init__(self, maskable: Tensor, u: Tensor, sampler: Sampler) -> None:
        self.steps, self.total = reveal_steps(u, maskable.view(u.shape), sampler.steps, sampler.law)
        self.masked = maskable

    def reveals(self, k: int) -> Tensor:
        return (self.steps == k).any(-1)

    def step(self, k: int, hidden: Tensor, model: VMD) -> Tensor:
        revealed = (self.steps == k).view_as(self.masked)
        self.masked = self.masked & ~revealed
        return revealed


class ReplayedPath:
    """By a law of confidence: what the sampler would reveal next, had it drawn the tokens of x0 so far."""

    def __init__(self, maskable: Tensor, groups: int, sampler: Sampler) -> None:
        self.sampler, self.groups, self.masked = sampler, groups, maskable
        self.count = maskable.view(len(maskable), groups, -1).sum(-1)
        self.total = finite_steps(sampler.steps, self.count)

    def reveals(self, k: int) -> Tensor:
        return self._number(k) > 0

    def step(self, k: int, hidden: Tensor, model: VMD) -> Tensor:
        head, vocab_size = model.denoiser.logits, model.architecture.vocab_size
        sure = confidence_of(hidden[self.masked.to(hidden.device)], head, vocab_size, self.sampler.law).cpu()
        priority = torch.zeros(self.masked.shape, dtype=torch.float64).masked_scatter(self.masked, sure)
        by_group, masked = (x.reshape(len(x) * self.groups, -1) for x in (priority, self.masked))
        revealed = highest(by_group, masked, self._number(k).flatten()).view_as(self.masked)
        self.masked = self.masked & ~revealed
        return revealed

    def _number(self, k: int) -> Tensor:
        steps, count = self.sampler.steps, self.count
        return masked_before(k, steps, count) - masked_before(k - 1, steps, count)
