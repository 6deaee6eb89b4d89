"""Training a part of the weights: names that are trained, and low-rank adapters (LoRA, arXiv 2106.09685).

Our own rather than peft's: an adapter's parameters stand beside the weight they adapt (`...qkv.weight`,
`...qkv.lora_a`, `...qkv.lora_b`), so that checkpoints of any ZeRO stage hold them like all others, weights that are
loaded into an adapted model keep their names, and evaluation, sampling and export read a merged plain model.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vmd_scale.config import LoRAConfig
from vmd_scale.errors import UserError

LATENT = "latent"
LATENT_PARTS = (
    "encoder.*",
    "prior_network.*",
    "denoiser.latent_to_condition.*",
    "denoiser.latent_to_embedding.*",
    "denoiser.blocks.*.modulation.*",
)


class LowRankLinear(nn.Linear):
    """W x + scale B A x. B starts at zero: at first nothing changes."""

    def __init__(self, adapted: nn.Linear, rank: int, scale: float) -> None:
        bias = adapted.bias is not None
        super().__init__(adapted.in_features, adapted.out_features, bias=bias, device="meta")
        self.weight, self.bias = adapted.weight, adapted.bias
        self.scale = scale
        self.lora_a = nn.Parameter(torch.randn(rank, adapted.in_features) / math.sqrt(adapted.in_features))
        self.lora_b = nn.Parameter(torch.zeros(adapted.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.scale * F.linear(F.linear(x, self.lora_a), self.lora_b)


def add_adapters(model: nn.Module, lora: LoRAConfig) -> None:
    """Give every linear layer of a matching name an adapter, in place. Draws from torch's global generator.

    Raises:
        UserError: a pattern that no linear layer has.
    """
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    _check(lora.layers, linear, "training.lora.layers")
    for name, module in linear.items():
        if matches(name, lora.layers):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, LowRankLinear(module, lora.rank, lora.scale))


def freeze(model: nn.Module, trainable: Sequence[str]) -> None:
    """Train adapters and the parameters of a matching name; no gradient is computed for the others.

    Raises:
        UserError: a pattern that no parameter has.
    """
    named = dict(model.named_parameters())
    patterns = [part for pattern in trainable for part in (LATENT_PARTS if pattern == LATENT else (pattern,))]
    _check([p for p in trainable if p != LATENT], named, "training.trainable")
    if LATENT in trainable and not any(matches(name, LATENT_PARTS) for name in named):
        raise UserError("training.trainable: 'latent' needs a latent, but latent.width is 0")
    for name, parameter in named.items():
        parameter.requires_grad_(matches(name, patterns) or name.endswith((".lora_a", ".lora_b")))


def merged(weights: Mapping[str, Tensor], lora: LoRAConfig | None) -> dict[str, Tensor]:
    """The weights of a plain model that computes what the adapted one does."""
    if lora is None:
        return dict(weights)
    plain = {name: value for name, value in weights.items() if not name.endswith((".lora_a", ".lora_b"))}
    for name, a in weights.items():
        if name.endswith(".lora_a"):
            layer = name.removesuffix(".lora_a")
            difference = lora.scale * weights[f"{layer}.lora_b"] @ a
            plain[f"{layer}.weight"] = plain[f"{layer}.weight"] + difference
    return plain


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a parameter's or a layer's name has one of the patterns."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def occurs(pattern: str, names: Iterable[str]) -> bool:
    """Whether one of the names has the pattern."""
    return any(fnmatchcase(name, pattern) for name in names)


def _check(patterns: Sequence[str], names: Mapping[str, object], key: str) -> None:
    for pattern in patterns:
        if not occurs(pattern, names):
            some = ", ".join(list(names)[:6])
            raise UserError(f"{key}: no parameter matches {pattern!r}; there are {some}, ...")
