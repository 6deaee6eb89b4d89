"""From a configuration to the objects of a run: the one place where config keys meet constructors."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vmd_scale.adapters import add_adapters, freeze
from vmd_scale.config import Config, step_values
from vmd_scale.data.loader import Batch
from vmd_scale.data.manifest import Manifest
from vmd_scale.data.roles import Role, is_counted
from vmd_scale.diffusion.importance import ImportanceWeighted
from vmd_scale.diffusion.noise import Noise
from vmd_scale.diffusion.objective import Nelbo, Objective, Surrogate
from vmd_scale.model import VMD, Architecture

CONDITION_WIDTH = 128  # published with MDLM; no wider than the model


def build_architecture(config: Config, vocab_size: int) -> Architecture:
    model, latent = config.model, config.latent
    return Architecture(
        vocab_size=vocab_size,
        row_length=config.data.row_length,
        groups=config.groups,
        layers=model.layers,
        width=model.width,
        heads=model.heads,
        mlp_ratio=model.mlp_ratio,
        mlp=model.mlp,
        norm=model.norm,
        dropout=model.dropout,
        tie_embeddings=model.tie_embeddings,
        time_conditioning=model.time_conditioning,
        biases=model.biases,
        attention=model.attention,
        condition_width=min(CONDITION_WIDTH, model.width),
        latent_width=latent.width,
        injection=latent.injection,
        encoder_layers=config.encoder_layers,
        encoder_width=config.encoder_width,
        prior=latent.prior,
        documents=config.documents,
    )


def build_model(config: Config, vocab_size: int) -> VMD:
    """A freshly initialized model, a function of the seed alone, with adapters and frozen parts where wanted.

    Raises:
        UserError: a pattern of names that nothing has.
    """
    training = config.training
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        model = VMD(build_architecture(config, vocab_size))
        if training.lora is not None:
            add_adapters(model, training.lora)
    if training.trainable or training.lora:
        freeze(model, training.trainable)
    return model


def build_objective(config: Config, vocab_size: int) -> Objective:
    diffusion = config.diffusion
    shared: dict[str, Any] = {
        "law": diffusion.paths,
        "groups": config.groups,
        "documents": config.documents,
        "latent_width": config.latent.width,
        "mask_id": vocab_size,
        "noise": Noise(config.training.seed),
    }
    steps = step_values(diffusion.steps)
    if diffusion.objective == "nelbo":
        return Nelbo(steps=steps, free_bits=diffusion.free_bits, **shared)
    if diffusion.objective == "vmd":
        return Surrogate(free_bits=diffusion.free_bits, **shared)
    return ImportanceWeighted(steps=steps, importance_samples=diffusion.importance_samples, **shared)


@dataclass(frozen=True)
class Parts:
    """What makes a run's model and objective from its configuration and the number of symbols; others may be given."""

    model: Callable[[Config, int], VMD] = build_model
    objective: Callable[[Config, int], Objective] = build_objective


def masks_of(batch: Batch, manifest: Manifest) -> tuple[Tensor, Tensor | None]:
    """Which positions may be masked, bool [B, L], and which may be attended.

    The latter is bool [B, L], or None for all; packing `document` tells documents apart, see model/documents.py.

    Whether there is an attention mask depends on the packing alone, so that all batches of a run look alike.
    """
    if batch.roles is None:
        maskable = torch.ones_like(batch.tokens, dtype=torch.bool)
        return maskable, maskable if manifest.packing == "pad" else None
    maskable, filled = is_counted(batch.roles), batch.roles != Role.PADDING
    if manifest.packing == "document":
        return maskable, (batch.roles == Role.FIRST).cumsum(1).masked_fill(~filled, 0).int()
    return maskable, filled if manifest.packing == "pad" else None
