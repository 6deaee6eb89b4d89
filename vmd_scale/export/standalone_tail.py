"""The end of the exported modelling file: loading, and a loss for fine-tuning in a plain PyTorch loop."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from vmd_scale.model.architecture import Architecture
from vmd_scale.model.vmd import VMD


def load(folder: str | Path, device: str | torch.device = "cpu") -> VMD:
    """The model of an exported folder, in evaluation mode."""
    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model = VMD(Architecture(**config["architecture"]))
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.to(device).eval()


def negative_elbo(model: VMD, clean: Tensor, maskable: Tensor | None = None) -> Tensor:
    """One-sample negative ELBO of each row at T = infinity, in nats [B]: a loss for fine-tuning.

    Draws a number n of masked positions uniformly from 1..N in each group of N maskable ones, weighs their NLL by N / n
    and adds KL(q(z | x0) || p(z)) once. Uses torch's global generator.

    Args:
        clean: int64 [B, L].
        maskable: bool [B, L]; positions that are false stay as they are and are not counted (a prompt).
    """
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
    nll, posterior = model(clean, noisy, index, maskable, epsilon, None, ratio)
    loss = (nll.unflatten(1, (a.groups, -1)).sum(-1) / ratio).sum(-1)
    return loss if posterior is None else loss + (posterior.kl() * in_groups.any(-1)).sum(-1)
