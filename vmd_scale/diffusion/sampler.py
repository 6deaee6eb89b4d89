"""The ancestral T-step sampler: the very model whose likelihood `likelihood` bounds."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vmd_scale.diffusion.corruption import masked_share
from vmd_scale.diffusion.noise import Noise, Stream
from vmd_scale.diffusion.paths import LAWS, reveal_steps
from vmd_scale.model import VMD


@dataclass(frozen=True)
class Sampler:
    """A generative model by name. Raises `ValueError` for a name that does not exist."""

    steps: float  # T, math.inf allowed
    latent: str = "fixed"  # fixed: one z for the whole path; fresh: a new z at every step
    law: str = "balanced"  # of the paths: bernoulli | balanced

    def __post_init__(self) -> None:
        if self.steps < 1 or self.latent not in ("fixed", "fresh") or self.law not in LAWS:
            raise ValueError(f"no such sampler: {self}")


def substep(draw: int, step: int) -> int:
    """A number of its own for each (draw, step of the path), for noise that is drawn afresh at every step."""
    return (draw + 1) << 32 | step


@torch.no_grad()
def sample(
    model: VMD,
    sampler: Sampler,
    noise: Noise,
    numbers: Tensor,
    given: Tensor | None = None,
    maskable: Tensor | None = None,
    attend: Tensor | None = None,
) -> Tensor:
    """Draw rows. Row number n of a seed is always the same row, whatever it is batched with.

    Args:
        numbers: int64 [B], which rows of this seed, on the host.
        given: int64 [B, L], tokens to keep where `maskable` is false (infilling); None starts from all masks.
        maskable: bool [B, L], positions to draw; None draws all.
        attend: bool [B, L], false at padding.

    Returns:
        int64 [B, L], on the host.
    """
    a, device = model.architecture, next(model.parameters()).device
    batch, groups = len(numbers), a.groups
    if maskable is None:
        maskable = torch.ones(batch, a.row_length, dtype=torch.bool)
    x = torch.full((batch, a.row_length), a.mask_id) if given is None else given.masked_fill(maskable, a.mask_id)
    u_path = noise.uniform(Stream.SAMPLE_PATH, 0, numbers, (groups, a.row_length // groups))
    steps, total = reveal_steps(u_path, maskable.view(u_path.shape), sampler.steps, sampler.law)
    u_token = noise.uniform(Stream.SAMPLE_TOKEN, 0, numbers, (a.row_length,)).to(
        device
    )  # a position is drawn only once
    on_attend = None if attend is None else attend.to(device)
    x, on_maskable = x.to(device), maskable.to(device)
    z = _prior(model, noise, numbers, 0)
    for group in range(groups):  # block after block; a plain row is one block
        for k in range(total, 0, -1):
            revealed = torch.zeros_like(steps, dtype=torch.bool)
            revealed[:, group] = steps[:, group] == k
            if not revealed.any():
                continue
            if sampler.latent == "fresh":
                z = _prior(model, noise, numbers, substep(group, k))
            where = revealed.view(batch, -1).to(device)
            ratio = masked_share(x == a.mask_id, on_maskable, groups) if a.time_conditioning else None
            hidden = model.denoiser(x, z, on_attend, ratio, clean=x)
            x = x.masked_scatter(where, draw_categorical(model.denoiser.logits(hidden[where]), u_token[where]))
    return x.cpu()


def draw_categorical(logits: Tensor, u: Tensor) -> Tensor:
    """Inverse-CDF draw in float64 (lower precision cuts off the tails and flatters samples).

    Args:
        logits: [..., V]; u: uniform in (0, 1), float64 [...].

    Returns:
        int64 [...].
    """
    cumulative = logits.double().softmax(-1).cumsum(-1)
    threshold = u.unsqueeze(-1) * cumulative[..., -1:]
    return torch.searchsorted(cumulative, threshold).squeeze(-1).clamp(max=logits.shape[-1] - 1)


def _prior(model: VMD, noise: Noise, numbers: Tensor, step: int) -> Tensor | None:
    a = model.architecture
    if not a.latent_width:
        return None
    device = next(model.parameters()).device
    return noise.normal(Stream.SAMPLE_LATENT, step, numbers, (a.groups, a.latent_width)).to(device)
