"""Transformer blocks, with optional modulation (adaLN) by a condition that is shared within a latent group."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from vmd_scale.model.attention import apply_rotary, attention


class Norm(nn.Module):
    """LayerNorm or RMSNorm, computed in fp32 whatever the precision of the parameters."""

    def __init__(self, width: int, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "rmsnorm":
            y = F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), eps=1e-6)
        else:
            y = F.layer_norm(x.float(), x.shape[-1:], self.weight.float(), eps=1e-5)
        return y.to(x.dtype)


class MLP(nn.Module):
    """Two layers with GELU, or SwiGLU of the same number of parameters."""

    def __init__(self, width: int, ratio: float, kind: str) -> None:
        super().__init__()
        self.gated = kind == "swiglu"
        hidden = 8 * math.ceil(width * ratio * (2 / 3 if self.gated else 1) / 8)
        self.up = nn.Linear(width, 2 * hidden if self.gated else hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        if self.gated:
            value, gate = h.chunk(2, dim=-1)
            return self.down(value * F.silu(gate))
        return self.down(F.gelu(h, approximate="tanh"))


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int, kernel: str) -> None:
        super().__init__()
        self.heads, self.kernel = heads, kernel
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        mixed = attention(apply_rotary(q, rotary), apply_rotary(k, rotary), v, mask, self.kernel)
        return self.out(mixed.flatten(2))


def modulate(x: Tensor, shift: Tensor | None, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift, with x [B, L, D] and one shift and scale [B, G, D] per group of L / G positions."""
    grouped = x.unflatten(1, (scale.shape[1], -1)) * (1 + scale.unsqueeze(2))
    return (grouped if shift is None else grouped + shift.unsqueeze(2)).flatten(1, 2)


class Block(nn.Module):
    """Pre-norm transformer block. With a condition, adaLN: starts as the unconditioned block (zero modulation)."""

    def __init__(
        self, width: int, heads: int, mlp_ratio: float, mlp: str, norm: str, dropout: float, kernel: str, condition: int
    ) -> None:
        super().__init__()
        self.norm_attention, self.norm_mlp = Norm(width, norm), Norm(width, norm)
        self.attention = SelfAttention(width, heads, kernel)
        self.mlp = MLP(width, mlp_ratio, mlp)
        self.dropout = nn.Dropout(dropout)
        self.modulation = nn.Linear(condition, 6 * width) if condition else None

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None, condition: Tensor | None = None
    ) -> Tensor:
        """x: [B, L, D]; condition: [B, G, C] or None."""
        if self.modulation is None:
            x = x + self.dropout(self.attention(self.norm_attention(x), rotary, mask))
            return x + self.dropout(self.mlp(self.norm_mlp(x)))
        assert condition is not None
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(condition).chunk(6, dim=-1)
        h = self.attention(modulate(self.norm_attention(x), shift_a, scale_a), rotary, mask)
        x = x + modulate(self.dropout(h), None, gate_a)
        h = self.mlp(modulate(self.norm_mlp(x), shift_m, scale_m))
        return x + modulate(self.dropout(h), None, gate_m)


class Stack(nn.ModuleList):
    """Blocks one after the other. With `recompute`, their activations are computed again in the backward pass."""

    recompute = False

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None, condition: Tensor | None = None
    ) -> Tensor:
        for block in self:
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, rotary, mask, condition, use_reentrant=False)
            else:
                x = block(x, rotary, mask, condition)
        return x


def initialize(module: nn.Module, residual_layers: int) -> None:
    """N(0, 1 / (4 fan-in)) for matrices: GPT-2's 0.02 at its width, and not too little for small models.

    Projections back into the residual stream are scaled by 1 / sqrt(2 layers); embeddings get 0.02; modulations start
    at zero, so that a conditioned block starts as an unconditioned one.
    """
    for name, parameter in module.named_parameters():
        if parameter.dim() < 2:
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
        elif "modulation" in name:
            nn.init.zeros_(parameter)
        elif name.startswith(("embedding.", "position.", "pattern.")):
            nn.init.normal_(parameter, std=0.02)
        else:
            std = 0.5 / math.sqrt(parameter.shape[1])
            if name.endswith(("attention.out.weight", "mlp.down.weight")):
                std /= math.sqrt(2 * residual_layers)
            nn.init.normal_(parameter, std=std)
