"""The one-step estimate as published code computes it, for tables that are to be laid beside published ones.

It differs from `likelihood.elbo` in two ways, each of which costs the right to be called a bound:

    mdlm_compat  t ~ U(0.001, 1], a position is masked with probability 0.999 t, weight 1/t (arXiv 2406.07524, code):
                 the states in which nearly nothing is masked are left out
    counted      positions that are masked but not counted, such as padding that is treated as text
"""

import torch
from torch import Tensor

from vmd_scale.diffusion.corruption import masked_index, masked_share, stratified
from vmd_scale.diffusion.likelihood import Rows
from vmd_scale.diffusion.noise import Noise, Stream
from vmd_scale.model import VMD

INTERVALS = ("full", "mdlm_compat")
MDLM_EPSILON = 1e-3


def compat_estimate(
    model: VMD, rows: Rows, counted: Tensor, interval: str, noise: Noise, total_rows: int, draw: int = 0
) -> Tensor:
    """Nats of the counted tokens of each row by one random state, T = inf, law bernoulli; float64 [B]. Not a bound.

    Args:
        counted: bool [B, L], those of the maskable positions whose loss is counted.
        interval: of t, full is (0, 1].
        total_rows: rows in the whole evaluation set: times are stratified over it.
    """
    epsilon = {"full": 0.0, "mdlm_compat": MDLM_EPSILON}[interval]
    u = stratified(noise, draw, rows.numbers, total_rows, model.architecture.groups)
    return estimate_at(model, rows, counted, epsilon + (1 - epsilon) * (1 - u), 1 - epsilon, noise, draw)


@torch.no_grad()
def estimate_at(model: VMD, rows: Rows, counted: Tensor, t: Tensor, scale: float, noise: Noise, draw: int) -> Tensor:
    """The estimate at given times t, float64 [B, G]: masked with probability scale * t, weight 1 / t.

    With a latent, its KL is counted once, as in the ELBO.
    """
    a, device = model.architecture, next(model.parameters()).device
    u = noise.uniform(Stream.PATH, draw, rows.numbers, (a.groups, a.row_length // a.groups))
    masked = (u <= (scale * t).unsqueeze(-1)).flatten(1) & rows.maskable
    latent_noise = None
    if a.latent_width:
        latent_noise = noise.normal(Stream.LATENT, draw, rows.numbers, (a.groups, a.latent_width)).to(device)
    device_rows = rows.to(device)
    nll, posterior = model(
        device_rows.clean,
        rows.clean.masked_fill(masked, a.mask_id).to(device),
        masked_index(masked).to(device),
        device_rows.maskable,
        latent_noise,
        device_rows.attend,
        masked_share(masked, rows.maskable, a.groups).to(device),
    )
    of_groups = (nll.double() * counted.to(device)).unflatten(1, (a.groups, -1)).sum(-1)
    nats = (of_groups / t.to(device)).sum(-1)
    if posterior is not None:
        nats += (posterior.kl().double() * device_rows.maskable.view(len(nll), a.groups, -1).any(-1)).sum(-1)
    return nats.cpu()
