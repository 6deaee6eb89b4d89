"""Paths: at which step is each position revealed? (DESIGN section 3)

A T-step sampler runs k = T, T-1, ..., 1. Before step k the mask ratio is k / T (linear schedule, alpha(t) = 1 - t); the
position with reveal step s is masked as long as k >= s and is drawn in step s. Two laws of s, both independent of
the tokens:

    bernoulli  s uniform on 1..T, each position for itself: the diffusion's own law
    balanced   a uniformly random order cut into T equal parts (sizes differ by at most one): less variance

With T = infinity, positions are revealed one at a time in a uniformly random order.
"""

import math

import torch
from torch import Tensor

LAWS = ("bernoulli", "balanced")


def random_ranks(u: Tensor, maskable: Tensor) -> Tensor:
    """Ranks 1..n of the n maskable positions in uniformly random order, int64; 0 where not maskable.

    Args:
        u: uniform noise [..., n positions].
        maskable: bool, same shape.
    """
    order = u.masked_fill(~maskable, 2.0).argsort(dim=-1, stable=True)
    ranks = torch.empty_like(order)
    numbers = torch.arange(1, u.shape[-1] + 1, device=u.device).expand_as(order)
    return ranks.scatter_(-1, order, numbers).masked_fill_(~maskable, 0)


def reveal_steps(u: Tensor, maskable: Tensor, steps: float, law: str) -> tuple[Tensor, int]:
    """A whole path for each group.

    Args:
        u: uniform noise, float64 [B, G, L / G].
        maskable: bool, same shape; other positions are never masked.
        steps: T, may be infinite.

    Returns:
        s, int64 [B, G, L / G], in 1..T at maskable positions and 0 elsewhere; and T, made finite (where nothing
        more can be gained: at most one position a step).
    """
    if law == "bernoulli" and steps != math.inf:
        return (u * steps).long().add_(1).masked_fill_(~maskable, 0), int(steps)
    ranks = random_ranks(u, maskable)
    total = int(min(steps, max(1, int(maskable.sum(-1).max()))))
    count = maskable.sum(-1, keepdim=True).clamp(min=1)
    # Masked before step k  <=>  rank <= floor(k n / T)  <=>  k >= ceil(rank T / n). A group with fewer positions than
    # steps reveals one a step, the last ones first: its steps do not depend on the groups beside it.
    return torch.where(count <= total, ranks, (ranks * total + count - 1) // count), total
