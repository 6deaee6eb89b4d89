"""Paths: at which step is each position revealed? (docs/method.md)

A T-step sampler runs k = T, T-1, ..., 1. Before step k the mask ratio is k / T (linear schedule, alpha(t) = 1 - t); the
position with reveal step s is masked as long as k >= s and is drawn in step s. Two laws of s are independent of the
tokens:

    bernoulli  s uniform on 1..T, each position for itself: the diffusion's own law
    balanced   a uniformly random order cut into T equal parts (sizes differ by at most one): less variance

With T = infinity, positions are revealed one at a time in a uniformly random order. Three laws follow the predictions
p(x0^i | xt, z), with as many positions a step as balanced; they look at the whole distribution, never at a drawn token,
so that whoever knows x0 and z can replay the path:

    top_prob   where the most probable token is most probable (MaskGIT, arXiv 2202.04200, looks at the drawn token)
    margin     where it leads the second by most (arXiv 2502.06768)
    entropy    where the distribution has least entropy (Dream, arXiv 2508.15487)
"""

import math

import torch
from torch import Tensor

RANDOM_LAWS = ("bernoulli", "balanced")
CONFIDENCE_LAWS = ("top_prob", "margin", "entropy")
LAWS = RANDOM_LAWS + CONFIDENCE_LAWS


def confidence(logits: Tensor, law: str) -> Tensor:
    """How sure a prediction is, the larger the surer; logits [..., V] -> float64 [...]."""
    p = logits.double().softmax(-1)
    if law == "entropy":
        return (p * p.clamp(min=1e-300).log()).sum(-1)
    first, *second = p.topk(min(2, p.shape[-1]), dim=-1).values.unbind(-1)
    return first - second[0] if law == "margin" and second else first


def finite_steps(steps: float, count: Tensor) -> int:
    """T made finite: as many steps as some row has positions are enough, where no step is left empty by chance."""
    return int(min(steps, max(1, int(count.max()))))


def masked_before(k: int, steps: float, count: Tensor) -> Tensor:
    """Masked positions before step k of T, of `count` in all: one a step where there are no more than T, int64.

    What the balanced law and the laws of confidence have in common.
    """
    if math.isinf(steps):
        return count.clamp(max=k)
    return torch.where(count <= steps, count.clamp(max=k), count * k // int(steps))


def highest(priority: Tensor, among: Tensor, count: Tensor) -> Tensor:
    """The `count` positions of highest priority among some: [B, n], bool [B, n], int64 [B] -> bool [B, n]."""
    order = priority.masked_fill(~among, -math.inf).argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(priority.shape[-1], device=priority.device).expand_as(order)
    return among & (torch.empty_like(order).scatter_(-1, order, places) < count.unsqueeze(-1))


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
    """A whole path for each group, by a law that is independent of the tokens.

    Args:
        u: uniform noise, float64 [B, G, L / G].
        maskable: bool, same shape; other positions are never masked.
        steps: T, may be infinite.

    Returns:
        s, int64 [B, G, L / G], in 1..T at maskable positions and 0 elsewhere; and T, made finite (where nothing
        more can be gained: at most one position a step).
    """
    if law not in RANDOM_LAWS:
        raise ValueError(f"law {law!r} depends on the predictions; allowed: {', '.join(RANDOM_LAWS)}")
    if law == "bernoulli" and steps != math.inf:
        return (u * steps).long().add_(1).masked_fill_(~maskable, 0), int(steps)
    ranks = random_ranks(u, maskable)
    count = maskable.sum(-1, keepdim=True).clamp(min=1)
    total = finite_steps(steps, count)
    # Masked before step k  <=>  rank <= floor(k n / T)  <=>  k >= ceil(rank T / n). A group with fewer positions than
    # steps reveals one a step, the last ones first: its steps do not depend on the groups beside it.
    return torch.where(count <= total, ranks, (ranks * total + count - 1) // count), total
