"""Transformer blocks, with optional modulation (adaLN) by a condition that is shared within a latent group."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from vmd_scale.model.attention import Flash, Mask, apply_rotary, attention, resolved


class Norm(nn.Module):
    """LayerNorm or RMSNorm, computed in fp32 whatever the precision of the parameters."""

    def __init__(self, width: int, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, modulation: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """x: [B, L, D]; modulation: shift and scale, see `modulate`; where each is one vector, a LayerNorm does it."""
        weight, bias = self.weight.float(), None
        if modulation is not None and self.kind == "layernorm" and modulation[1].shape[:2] == (1, 1):
            shift, scale = (vector[0, 0].float() for vector in modulation)
            weight, bias, modulation = weight * (1 + scale), shift, None
        if self.kind == "rmsnorm":
            y = F.rms_norm(x.float(), x.shape[-1:], weight, eps=1e-6)
        else:
            y = F.layer_norm(x.float(), x.shape[-1:], weight, bias, eps=1e-5)
        y = y.to(x.dtype)
        return y if modulation is None else modulate(y, *modulation)


class MLP(nn.Module):
    """Two layers with GELU, or SwiGLU of the same number of parameters."""

    def __init__(self, width: int, ratio: float, kind: str, bias: bool = False) -> None:
        super().__init__()
        self.gated = kind == "swiglu"
        hidden = 8 * math.ceil(width * ratio * (2 / 3 if self.gated else 1) / 8)
        self.up = nn.Linear(width, 2 * hidden if self.gated else hidden, bias=bias)
        self.down = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        if self.gated:
            value, gate = h.chunk(2, dim=-1)
            return self.down(value * F.silu(gate))
        return self.down(F.gelu(h, approximate="tanh"))


@dataclass
class KeyValues:
    """What one layer remembers of the blocks before: keys and values [B, S, heads, head width]."""

    k: Tensor | None = None
    v: Tensor | None = None
    growing: bool = False  # whether what passes is remembered

    def join(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if self.k is not None and self.v is not None:
            k, v = torch.cat((self.k, k), dim=1), torch.cat((self.v, v), dim=1)
        if self.growing:
            self.k, self.v = k, v
        return k, v

    def rows(self, index: Tensor) -> "KeyValues":
        """The same of some rows only."""
        if self.k is None or self.v is None:
            return self
        return KeyValues(self.k[index], self.v[index])


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int, kernel: str) -> None:
        super().__init__()
        self.heads = heads
        # Found here, not in the forward pass: a compiler would trace the search.
        self.kernel = resolved(kernel, width // heads)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Mask, past: KeyValues | None = None) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3 * self.heads, -1))
        qk, v = qkv.split((2 * self.heads, self.heads), dim=2)
        q, k = apply_rotary(qk, rotary).chunk(2, dim=2)
        if past is not None:
            k, v = past.join(k, v)
        return self.out(attention(q, k, v, mask, self.kernel).flatten(2))


class Condition(NamedTuple):
    """What modulates the blocks: a vector for each latent, and which positions are its own."""

    vectors: Tensor  # [B, G, C], each of a group of L / G positions; with `members` [B, N, C]
    members: Tensor | None = None  # [B, L, N], one-hot, of rows of several documents

    def through(self, layer: nn.Module) -> Tensor:
        """What a layer makes of each vector: [B, G, D], of documents [B, L, D]."""
        made: Tensor = layer(self.vectors)
        return made if self.members is None else self.members @ made


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift: x [B, L, D], scale [B, G, D] of groups of L / G positions, shift of either shape."""
    groups = scale.shape[1]
    of_groups = shift.unflatten(1, (groups, -1))  # [B, G, 1 or L / G, D]
    return torch.addcmul(of_groups, x.unflatten(1, (groups, -1)), 1 + scale.unsqueeze(2)).flatten(1, 2)


class Block(nn.Module):
    """Pre-norm transformer block. With a condition, adaLN: starts as the unconditioned block (zero modulation).

    With `keep_products`, the backward pass keeps matrix products and attention, and computes the rest again.
    """

    keep_products = False  # here rather than in `Stack`: a compiled block decides for itself what it keeps

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_ratio: float,
        mlp: str,
        norm: str,
        dropout: float,
        kernel: str,
        condition: int,
        biases: bool = False,
    ) -> None:
        super().__init__()
        self.norm_attention, self.norm_mlp = Norm(width, norm), Norm(width, norm)
        self.attention = SelfAttention(width, heads, kernel)
        self.mlp = MLP(width, mlp_ratio, mlp, biases)
        self.dropout = nn.Dropout(dropout)
        self.modulation = nn.Linear(condition, 6 * width) if condition else None

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Mask,
        condition: Condition | Tensor | None = None,
        past: KeyValues | None = None,
    ) -> Tensor:
        """x: [B, L, D]; condition: or what `modulation` makes of it, [B, G, 6 D]."""
        if self.keep_products and torch.is_grad_enabled():
            return checkpoint(
                self._forward, x, rotary, mask, condition, past, use_reentrant=False, context_fn=_keeping_products
            )
        return self._forward(x, rotary, mask, condition, past)

    def _forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Mask,
        condition: Condition | Tensor | None,
        past: KeyValues | None,
    ) -> Tensor:
        if self.modulation is None:
            x = x + self.dropout(self.attention(self.norm_attention(x), rotary, mask, past))
            return x + self.dropout(self.mlp(self.norm_mlp(x)))
        assert condition is not None
        made = condition.through(self.modulation) if isinstance(condition, Condition) else condition
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = made.chunk(6, dim=-1)
        h = self.attention(self.norm_attention(x, (shift_a, scale_a)), rotary, mask, past)
        x = modulate(self.dropout(h), x, gate_a)
        h = self.mlp(self.norm_mlp(x, (shift_m, scale_m)))
        return modulate(self.dropout(h), x, gate_m)


# By name: flash-attn's are there only where it is installed.
_PRODUCTS = {
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "aten::_scaled_mm",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "flash_attn::_flash_attn_forward",
    "flash_attn::_flash_attn_varlen_forward",
    "flash_attn_3::fwd",
    "flash_attn_3::_flash_attn_forward",
    "torch_attn::_varlen_attn",
    "flex_attention",
}


def _policy(context: Any, operation: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    kept = operation.name() in _PRODUCTS
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


_keeping_products = functools.partial(create_selective_checkpoint_contexts, _policy)


class Stack(nn.ModuleList):
    """Blocks one after the other."""

    recompute = False  # all of a block in the backward pass, of which only the input is kept

    @property
    def kernel(self) -> str | Flash:
        """The kernel of attention; blocks of one's own get masks."""
        block = self[0]
        return block.attention.kernel if isinstance(block, Block) else "sdpa"

    def checkpoint_activations(self, kind: str) -> None:
        """none | selective (keep matrix products and attention) | full (keep the blocks' inputs)."""
        self.recompute = kind == "full"
        for block in self:
            if isinstance(block, Block):  # of another kind: all or nothing
                block.keep_products = kind == "selective"

    def modulations(self, condition: Condition) -> list[Tensor] | None:
        """What each layer makes of it, [B, G, 6 D]; None where it is not known what a layer does with it."""
        known = [
            condition.through(block.modulation)
            for block in self
            if isinstance(block, Block) and block.modulation is not None
        ]
        return known if len(known) == len(self) else None

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Mask,
        condition: Condition | list[Tensor] | None = None,
        past: Sequence[KeyValues | None] | None = None,
    ) -> Tensor:
        """x: [B, L, D]; condition: one for all layers, or their `modulations`."""
        conditions = condition if isinstance(condition, list) else [condition] * len(self)
        for block, of_layer, remembered in zip(self, conditions, past or [None] * len(self), strict=True):
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, rotary, mask, of_layer, use_reentrant=False)
            else:
                x = block(x, rotary, mask, of_layer, remembered)
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
