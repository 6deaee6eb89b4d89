"""Corruption at one random step of a random path, with the weight that makes it an estimate of the bound."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vmd_scale.diffusion.noise import Noise, Stream
from vmd_scale.diffusion.paths import RANDOM_LAWS, random_ranks

INDEX_MULTIPLE = 128  # the list of masked positions is padded, so that few different shapes occur


@dataclass(frozen=True)
class Corruption:
    """B rows in G groups (diffusion blocks), each group at its own time."""

    noisy: Tensor  # int64 [B, L], mask_id where masked
    masked: Tensor  # bool [B, L]
    index: Tensor  # int64 [N], flat numbers of masked positions, padded with B * L
    weight: Tensor  # fp32 [B, G], what multiplies the summed NLL of masked positions: 1 / t for bernoulli
    ratio: Tensor  # fp32 [B, G], share of the maskable positions that are masked: all that time conditioning may see
    reveals: Tensor  # fp32 [B, G], T times the probability that the step reveals anything of the group (fresh z: KL)


def stratified(noise: Noise, step: int, positions: Tensor, total: int, groups: int) -> Tensor:
    """Uniforms in (0, 1) that are evenly spread over all `total` rows of a global batch (or evaluation set).

    Systematic sampling: in each group, the rows stand at equal distances on a circle that is turned by a random angle,
    so that every single number is uniform. Rows are dealt out by a lattice, so that each micro-batch is evenly spread
    too, whichever rank it falls on.

    Returns:
        float64 [B, G].
    """
    multiplier = round(total * (math.sqrt(5) - 1) / 2) or 1
    while math.gcd(multiplier, total) > 1:
        multiplier += 1
    offsets = noise.uniform(Stream.TIME, step, torch.zeros(1, dtype=torch.int64), (groups,))
    places = (positions * multiplier % total).double() / total
    return ((places[:, None] + offsets) % 1).clamp(2**-53, 1 - 2**-53)


def choose_steps(u: Tensor, choices: Sequence[float]) -> tuple[Tensor, Tensor]:
    """One T of `choices` for each entry, and what is left of the uniform: still uniform, still stratified."""
    scaled = u * len(choices)
    which = scaled.long().clamp(max=len(choices) - 1)
    return torch.tensor(choices, dtype=torch.float64)[which], (scaled - which).clamp(0, 1 - 2**-53)


def corrupt(
    clean: Tensor, maskable: Tensor, steps: Tensor, u_time: Tensor, u_path: Tensor, law: str, mask_id: int
) -> Corruption:
    """Mask `clean` as a T-step sampler would find it before a uniformly drawn step k.

    For any model, E[weight * sum_masked log p(x0 | xt)] = E_path[sum_i log p(x0_i | x before i is revealed)].

    Args:
        clean: int64 [B, L]; maskable: bool [B, L].
        steps: T, float64 [B, G], may be infinite.
        u_time: uniform, float64 [B, G], chooses the step.
        u_path: uniform, float64 [B, G, L / G], chooses the path.
    """
    if law not in RANDOM_LAWS:
        raise ValueError(f"law {law!r} depends on the predictions; allowed: {', '.join(RANDOM_LAWS)}")
    batch, length = clean.shape
    maskable_in = maskable.view(u_path.shape)
    count = maskable_in.sum(-1)  # n, [B, G]
    if law == "balanced":
        total = torch.minimum(steps, count.double()).clamp(min=1).long()  # more steps than positions reveal nothing
        k = (u_time * total).long() + 1
        masked_count, next_count = k * count // total, (k - 1) * count // total
        masked_in = maskable_in & (random_ranks(u_path, maskable_in) <= masked_count.unsqueeze(-1))
        weight = total * (masked_count - next_count) / masked_count.clamp(min=1)
        reveals = total * (masked_count > next_count)
    else:
        k = (u_time * steps).floor() + 1
        t = torch.where(steps.isinf(), 1 - u_time, k / steps)
        masked_in = maskable_in & (u_path <= t.unsqueeze(-1))
        weight = 1 / t
        masked_count = masked_in.sum(-1)
        something = 1 - (1 - 1 / k.clamp(min=1)).pow(masked_count)
        reveals = torch.where(steps.isinf(), masked_count / t, steps * something)
    masked = masked_in.reshape(batch, length)
    return Corruption(
        noisy=clean.masked_fill(masked, mask_id),
        masked=masked,
        index=masked_index(masked),
        weight=weight.float(),
        ratio=masked_share(masked, maskable, u_path.shape[1]),
        reveals=reveals.float(),
    )


def masked_share(masked: Tensor, maskable: Tensor, groups: int) -> Tensor:
    """Share of the maskable positions of each group that are masked, fp32 [B, G], from bool [B, L]."""
    count = maskable.view(len(masked), groups, -1).sum(-1).clamp(min=1)
    return masked.view(len(masked), groups, -1).sum(-1) / count


def masked_index(masked: Tensor) -> Tensor:
    """Flat numbers of the true entries of [B, L], padded with B * L to a multiple of `INDEX_MULTIPLE`, int64 [N]."""
    index = masked.flatten().nonzero().squeeze(-1)
    padding = min(-len(index) % INDEX_MULTIPLE, masked.numel() - len(index))
    return torch.nn.functional.pad(index, (0, padding), value=masked.numel())
