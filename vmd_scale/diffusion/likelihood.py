"""Valid bounds on the likelihood of named T-step samplers (docs/method.md), per row, in nats.

Everything here is an upper bound on -log p_T(x0) in expectation; a sampler is named by (T, latent fixed or fresh, law
of the paths). The training surrogate lives apart, in `vmd_surrogate`, because it bounds nothing.

    elbo  one random step of one random path; KL counted once (fixed z) or at every step that reveals something (fresh)
    iw    -log 1/K sum_k prod_over_path p(x0 | x_before, z) p(z) / q(z | x0): whole paths; falls to -log p_T(x0) with K

Laws of confidence leave no choice of the path once x0 and z are known: there the product is p(x0 | z) itself, and
without a latent iw is the exact likelihood. One random step of such a path cannot be had without walking to it, so that
elbo is not for them: iw with K = 1 is.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vmd_scale.diffusion.corruption import corrupt, masked_index, masked_share, stratified
from vmd_scale.diffusion.noise import Noise, Stream
from vmd_scale.diffusion.sampler import Sampler, substep
from vmd_scale.diffusion.walks import DrawnPath, Path, ReplayedPath
from vmd_scale.model import VMD, Posterior
from vmd_scale.model.documents import any_of, has_documents
from vmd_scale.model.head import masked_nll


@dataclass(frozen=True)
class Rows:
    """Rows to be scored. `numbers` name them to the noise: the result does not depend on how rows are batched."""

    clean: Tensor  # int64 [B, L]
    maskable: Tensor  # bool [B, L], the positions that are scored
    attend: Tensor | None  # bool [B, L], false at padding, or int32 [B, L], see model/documents.py
    numbers: Tensor  # int64 [B], on the host

    def to(self, device: torch.device) -> "Rows":
        attend = None if self.attend is None else self.attend.to(device)
        return Rows(self.clean.to(device), self.maskable.to(device), attend, self.numbers)


def elbo(model: VMD, rows: Rows, sampler: Sampler, noise: Noise, total_rows: int, draw: int = 0) -> Tensor:
    """Negative ELBO of each row by one random step; float64 [B], nats.

    Args:
        rows: on the host.
        total_rows: rows in the whole evaluation set: times are stratified over it.
        draw: number of the draw; other numbers give independent estimates.

    Raises:
        ValueError: a law of confidence, or a sampler that is not plain.
    """
    _check(sampler, rows)
    if sampler.by_confidence:
        raise ValueError(f"the one-step ELBO is for random paths, not {sampler.law!r}; use importance_weighted, K = 1")
    fresh = sampler.latent == "fresh"
    one = _score_one_step(model, rows, sampler.steps, sampler.law, noise, total_rows, draw, encode_all=not fresh)
    kl_weight = one.reveals if fresh else one.any_maskable
    return ((one.weight * one.nll).sum(-1) + (kl_weight * one.kl).sum(-1)).cpu()


def vmd_surrogate(model: VMD, rows: Rows, noise: Noise, total_rows: int, law: str, draw: int = 0) -> Tensor:
    """The surrogate objective of the VMD and VADD papers, per row in nats. NOT a bound: for published tables only."""
    one = _score_one_step(model, rows, math.inf, law, noise, total_rows, draw, encode_all=False)
    return ((one.weight * one.nll).sum(-1) + (one.weight * one.any_masked * one.kl).sum(-1)).cpu()


@torch.no_grad()
def importance_weighted(model: VMD, rows: Rows, sampler: Sampler, noise: Noise, samples: int, draw: int = 0) -> Tensor:
    """IW-K bound of each row (arXiv 1509.00519, over latents and paths together); float64 [B], nats.

    Costs K * T forwards; K = 1 is the ELBO by whole paths. Each sample scores a whole path, so that it is an unbiased
    estimate of p_T(x0): a noisy estimate of an inner bound must never stand under the logarithm of the mean. Blocks are
    bounded one by one, each given the clean ones before it: that is tighter than one mean over whole rows.

    Raises:
        ValueError: a sampler that is not plain.
    """
    logs = [path_log_weight(model, rows, sampler, noise, draw * samples + k) for k in range(samples)]
    return (math.log(samples) - torch.stack(logs).logsumexp(0)).sum(-1)


@torch.no_grad()
def path_log_weight(model: VMD, rows: Rows, sampler: Sampler, noise: Noise, sample: int) -> Tensor:
    """log of prod_i p(x0_i | x before i, z) * p(z) / q(z | x0) for one path, drawn or replayed, and z; float64 [B, G].

    In the block variant all blocks walk their paths at once: each sees only the clean blocks before it.
    """
    _check(sampler, rows)
    a, device = model.architecture, next(model.parameters()).device
    batch, groups = len(rows.clean), a.groups
    path: Path
    if sampler.by_confidence:
        path = ReplayedPath(rows.maskable, groups, sampler)
    else:
        shape = (groups, a.row_length // groups)
        path = DrawnPath(rows.maskable, noise.uniform(Stream.PATH, sample, rows.numbers, shape), sampler)
    device_rows = rows.to(device)
    result = torch.zeros(batch, groups, dtype=torch.float64, device=device)
    z = None
    if a.latent_width and sampler.latent == "fixed":
        z, log_ratio = _draw(
            model.encode(device_rows.clean, device_rows.maskable, device_rows.attend),
            _epsilon(model, rows, noise, sample),
        )
        scored = log_ratio * any_of(device_rows.maskable, device_rows.attend, groups, a.documents)
        result += scored.unflatten(1, (groups, -1)).sum(-1)  # the documents of a row are bounded together
    for k in range(path.total, 0, -1):
        if not path.reveals(k).any():
            continue
        device_masked = path.masked.to(device)
        if a.latent_width and sampler.latent == "fresh":
            posterior = model.encode(device_rows.clean, device_masked, device_rows.attend)
            z, log_ratio = _draw(posterior, _epsilon(model, rows, noise, substep(sample, k)))
            result += log_ratio * path.reveals(k).to(device)
        ratio = masked_share(path.masked, rows.maskable, groups).to(device)
        noisy = device_rows.clean.masked_fill(device_masked, a.mask_id)
        hidden = model.denoiser(noisy, z, device_rows.attend, ratio, device_rows.clean)
        revealed = path.step(k, hidden, model)
        index = masked_index(revealed).to(device)
        nll = masked_nll(hidden, device_rows.clean, index, model.denoiser.logits, a.vocab_size)
        result -= nll.double().view(batch, groups, -1).sum(-1)
    return result.cpu()


def _check(sampler: Sampler, rows: Rows) -> None:
    if sampler.latent == "fresh" and has_documents(rows.attend):
        raise ValueError("fresh latents are not scored where a row holds several documents")
    if not sampler.is_plain:
        raise ValueError(f"a likelihood is that of the model's own distribution; this sampler changes it: {sampler}")


class _OneStep(NamedTuple):
    """What one corrupted state tells about each group, float64 or bool [B, G]; with documents * is [B, N]."""

    nll: Tensor  # summed over masked positions
    kl: Tensor  # * zero without a latent
    weight: Tensor
    reveals: Tensor
    any_masked: Tensor  # *
    any_maskable: Tensor  # *


@torch.no_grad()
def _score_one_step(
    model: VMD, rows: Rows, steps: float, law: str, noise: Noise, total_rows: int, draw: int, encode_all: bool
) -> _OneStep:
    a, device = model.architecture, next(model.parameters()).device
    u_time = stratified(noise, draw, rows.numbers, total_rows, a.groups)
    u_path = noise.uniform(Stream.PATH, draw, rows.numbers, (a.groups, a.row_length // a.groups))
    c = corrupt(rows.clean, rows.maskable, torch.full_like(u_time, steps), u_time, u_path, law, a.mask_id)
    device_rows, masked = rows.to(device), c.masked.to(device)
    nll, posterior = model(
        device_rows.clean,
        c.noisy.to(device),
        c.index.to(device),
        device_rows.maskable if encode_all else masked,
        _epsilon(model, rows, noise, draw),
        device_rows.attend,
        c.ratio.to(device),
    )
    per_group = nll.double().unflatten(1, (a.groups, -1)).sum(-1)
    return _OneStep(
        nll=per_group,
        kl=torch.zeros_like(per_group) if posterior is None else posterior.kl().double(),
        weight=c.weight.double().to(device),
        reveals=c.reveals.double().to(device),
        any_masked=any_of(masked, device_rows.attend, a.groups, a.documents),
        any_maskable=any_of(device_rows.maskable, device_rows.attend, a.groups, a.documents),
    )


def _draw(posterior: Posterior, epsilon: Tensor | None) -> tuple[Tensor, Tensor]:
    """z and log p(z) - log q(z) of each group, float64 [B, G]."""
    assert epsilon is not None
    z = posterior.sample(epsilon)
    return z, posterior.log_ratio_to_prior(z).double()


def _epsilon(model: VMD, rows: Rows, noise: Noise, step: int) -> Tensor | None:
    a = model.architecture
    if not a.latent_width:
        return None
    shape = (a.documents if has_documents(rows.attend) else a.groups, a.latent_width)
    return noise.normal(Stream.LATENT, step, rows.numbers, shape).to(next(model.parameters()).device)
