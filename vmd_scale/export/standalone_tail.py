"""The end of the exported modeling file: loading, drawing, bounds, and a loss for fine-tuning in a plain loop."""

import json
import math
import pathlib

import torch
from safetensors.torch import load_file
from torch import Tensor

from vmd_scale.diffusion.likelihood import Rows, elbo, importance_weighted
from vmd_scale.diffusion.noise import Noise  # in the exported file: that of standalone_noise.py
from vmd_scale.diffusion.sampler import Sampler, sample
from vmd_scale.model.architecture import Architecture
from vmd_scale.model.vmd import VMD


def load(folder: str | pathlib.Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> VMD:
    """The model of an exported folder, in evaluation mode.

    Args:
        dtype: of the weights; None takes them as they were exported.
    """
    folder = pathlib.Path(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    index = folder / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if index.exists():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    with torch.device("meta"):
        model = build(config["architecture"], config["has_encoder"])
    weights = {name: value for file in sorted(names) for name, value in load_file(folder / file).items()}
    model.load_state_dict(weights, assign=True)
    return model.to(device, dtype).eval()


def build(architecture: dict, has_encoder: bool) -> VMD:
    """A fresh model. Without its encoder it draws and denoises, and has neither bounds nor a training loss."""
    model = VMD(Architecture(**architecture))
    if not has_encoder:
        model.encoder = None
    return model


def generate(
    model: VMD,
    prompt: Tensor | None = None,
    count: int = 1,
    steps: float = 64,
    latent: str = "fixed",
    paths: str = "balanced",
    temperature: float = 1.0,
    nucleus: float = 1.0,
    order_noise: float = 0.0,
    remask: float = 0.0,
    attend: Tensor | None = None,
    seed: int = 0,
) -> Tensor:
    """Draw rows by a T-step sampler; row number n of a seed is always the same row. Returns int64 [B, L].

    Args:
        prompt: int64 [B, n] with n <= L: tokens are kept, the mask id (`model.architecture.mask_id`) and what follows
            the prompt are drawn. None draws `count` whole rows.
        steps: T; math.inf reveals one token at a time.
        latent: fixed (one z a row or block) or fresh (a new one at every step).
        paths: balanced | bernoulli | top_prob | margin | entropy, the law of the revealing order.
        temperature, nucleus, order_noise, remask: for quality only; see `Sampler`.
        attend: bool [B, L], false at padding, which is kept as it is.

    Raises:
        ValueError: a prompt longer than a row, or a sampler that does not exist.
    """
    sampler = Sampler(steps, latent, paths, temperature, nucleus, order_noise, remask)
    a = model.architecture
    if prompt is None:
        return sample(model, sampler, Noise(seed), torch.arange(count))
    if prompt.shape[1] > a.row_length:
        raise ValueError(f"a prompt of {prompt.shape[1]} tokens; the model's rows have {a.row_length}")
    attend = None if attend is None else attend.cpu()
    rest = (0, a.row_length - prompt.shape[1])
    given = torch.nn.functional.pad(prompt.cpu(), rest, value=a.mask_id)
    maskable = given == a.mask_id if attend is None else (given == a.mask_id) & attend
    return sample(model, sampler, Noise(seed), torch.arange(len(given)), given, maskable, attend)


def bound(
    model: VMD,
    clean: Tensor,
    maskable: Tensor | None = None,
    steps: float = math.inf,
    samples: int = 1,
    latent: str = "fixed",
    paths: str = "balanced",
    attend: Tensor | None = None,
    draws: int = 1,
    seed: int = 0,
) -> Tensor:
    """Upper bound, in expectation, on -log p_T(x0) of each row under the T-step sampler; float64 [B], nats.

    Args:
        clean: int64 [B, L]; maskable: bool [B, L], the positions that count (None: all).
        samples: K; 1 is the ELBO by one random step, more the importance-weighted bound along whole paths.
        draws: how many independent estimates are averaged.

    Raises:
        ValueError: the folder was exported without the encoder.
    """
    _needs_encoder(model)
    if maskable is None:
        maskable = torch.ones_like(clean, dtype=torch.bool)
    rows = Rows(clean.cpu(), maskable.cpu(), None if attend is None else attend.cpu(), torch.arange(len(clean)))
    sampler, noise = Sampler(steps, latent, paths), Noise(seed)
    if samples > 1 or sampler.by_confidence:
        estimates = [importance_weighted(model, rows, sampler, noise, samples, draw) for draw in range(draws)]
    else:
        estimates = [elbo(model, rows, sampler, noise, len(clean), draw) for draw in range(draws)]
    return torch.stack(estimates).mean(0)


def negative_elbo(model: VMD, clean: Tensor, maskable: Tensor | None = None, attend: Tensor | None = None) -> Tensor:
    """One-sample negative ELBO of each row at T = infinity, in nats [B]: a loss for fine-tuning.

    Draws a number n of masked positions uniformly from 1..N in each group of N maskable ones, weighs their NLL by N / n
    and adds KL(q(z | x0) || p(z)) once. Uses torch's global generator.

    Args:
        clean: int64 [B, L].
        maskable: bool [B, L]; positions that are false stay as they are and are not counted (a prompt).
        attend: bool [B, L], false at padding.

    Raises:
        ValueError: the folder was exported without the encoder.
    """
    _needs_encoder(model)
    a = model.architecture
    if maskable is None:
        maskable = torch.ones_like(clean, dtype=torch.bool)
    in_groups = maskable.unflatten(1, (a.groups, -1))
    order = torch.rand(in_groups.shape, device=clean.device).masked_fill(~in_groups, 2.0).argsort(-1).argsort(-1)
    count = in_groups.sum(-1)
    masked_count = (torch.rand(count.shape, device=clean.device) * count).long() + 1
    masked = (in_groups & (order < masked_count.unsqueeze(-1))).flatten(1)
    noisy = clean.masked_fill(masked, a.mask_id)
    ratio = masked_count / count.clamp(min=1)
    epsilon = torch.randn(len(clean), a.groups, a.latent_width, device=clean.device) if a.latent_width else None
    index = masked.flatten().nonzero().squeeze(-1)
    nll, posterior = model(clean, noisy, index, maskable, epsilon, attend, ratio)
    loss = (nll.unflatten(1, (a.groups, -1)).sum(-1) / ratio).sum(-1)
    return loss if posterior is None else loss + (posterior.kl() * in_groups.any(-1)).sum(-1)


def _needs_encoder(model: VMD) -> None:
    if model.architecture.latent_width and model.encoder is None:
        raise ValueError("this folder was exported without the encoder, which bounds and training need")
