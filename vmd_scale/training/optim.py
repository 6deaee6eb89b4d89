"""Optimizer and learning rate."""

import math

import torch
from torch import nn

from vmd_scale.config import TrainingConfig


def build_optimizer(model: nn.Module, training: TrainingConfig, device: torch.device) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only.

    A client optimizer: one named in DeepSpeed's JSON would be compiled when first used, for minutes.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": training.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=training.learning_rate,
        betas=training.betas,
        fused=device.type in ("cuda", "cpu"),
    )


def learning_rate_at(step: int, training: TrainingConfig) -> float:
    """Learning rate of the update made by step 0, 1, ...: a pure function, so that a resumed run cannot drift."""
    peak, warmup = training.learning_rate, training.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    if training.lr_schedule == "constant":
        return peak
    progress = min(1.0, (step - warmup) / max(1, training.steps - warmup))
    shape = 0.5 * (1 + math.cos(math.pi * progress)) if training.lr_schedule == "cosine" else 1 - progress
    return peak * (training.final_lr_ratio + (1 - training.final_lr_ratio) * shape)
