"""Optimizer and learning rate."""

import math
from collections.abc import Iterable
from typing import Any

import torch

from vmd_scale.config import TrainingConfig
from vmd_scale.model import VMD


def build_optimizer(model: VMD, training: TrainingConfig, device: torch.device) -> torch.optim.Optimizer:
    """AdamW with weight decay on matrices only, or Muon (kellerjordan.github.io/posts/muon) beside it.

    A client optimizer: one named in DeepSpeed's JSON would be compiled when first used, for minutes.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    hidden = {id(p) for p in model.hidden_matrices} if training.optimizer == "muon" else set()
    others = [p for p in parameters if id(p) not in hidden]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in others if p.dim() >= 2], "weight_decay": training.weight_decay},
        {"params": [p for p in others if p.dim() < 2], "weight_decay": 0.0},
    ]
    fused = device.type in ("cuda", "cpu")
    if training.optimizer == "adamw":
        return torch.optim.AdamW(_filled(groups), lr=training.learning_rate, betas=training.betas, fused=fused)
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    for group in groups:
        group |= {"use_muon": False, "lr": training.learning_rate, "betas": training.betas, "eps": 1e-8}
    matrices: dict[str, Any] = {
        "use_muon": True,
        "params": [p for p in parameters if id(p) in hidden],
        "lr": training.muon_learning_rate,
        "momentum": training.muon_momentum,
        "weight_decay": training.weight_decay,
    }
    return MuonWithAuxAdam(
        _filled([matrices, *groups]), adam_optimizer=torch.optim.AdamW, adam_optimizer_kwargs={"fused": fused}
    )


def _filled(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [group for group in groups if group["params"]]


def set_learning_rates(groups: Iterable[dict[str, Any]], step: int, training: TrainingConfig) -> None:
    """Set the rates of the update made by `step` in an optimizer's parameter groups: all follow one schedule."""
    rate = learning_rate_at(step, training)
    for group in groups:
        peak = training.muon_learning_rate if group.get("use_muon") else training.learning_rate
        group["lr"] = rate * (peak / training.learning_rate)


def learning_rate_at(step: int, training: TrainingConfig) -> float:
    """AdamW's rate for the update made by step 0, 1, ...: a pure function, so that a resumed run cannot drift."""
    peak, warmup = training.learning_rate, training.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    if training.lr_schedule == "constant":
        return peak
    progress = min(1.0, (step - warmup) / max(1, training.steps - warmup))
    shape = 0.5 * (1 + math.cos(math.pi * progress)) if training.lr_schedule == "cosine" else 1 - progress
    return peak * (training.final_lr_ratio + (1 - training.final_lr_ratio) * shape)
