"""Bidirectional attention: one function, several kernels, and rotary position embedding."""

import functools
import math

import torch
from torch import Tensor
from torch.nn import functional as F


@functools.cache
def flash_available() -> bool:
    """Whether flash-attn can be used. It is really imported: a build that does not fit this PyTorch fails only then."""
    if not torch.cuda.is_available():
        return False
    try:
        import flash_attn  # noqa: F401
    except (ImportError, OSError):
        return False
    return True


def choose_kernel(wanted: str) -> str:
    """``auto`` becomes flash where flash-attn and a GPU are at hand, else PyTorch's own SDPA."""
    if wanted == "auto":
        return "flash" if flash_available() else "sdpa"
    if wanted == "flash" and not flash_available():
        raise RuntimeError("model.attention is 'flash', but flash-attn is not installed or there is no GPU; use 'auto'")
    return wanted


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, kernel: str) -> Tensor:
    """Softmax attention, bidirectional.

    Args:
        q, k, v: [B, L, heads, head width].
        mask: bool, broadcastable to [B, heads, L, L], true where attention is allowed; None allows all.
        kernel: flash | sdpa | reference. Flash has no general mask: SDPA takes over where there is one.

    Returns:
        [B, L, heads, head width].
    """
    if kernel == "flash" and mask is None and q.dtype in (torch.bfloat16, torch.float16):
        from flash_attn import flash_attn_func

        return flash_attn_func(q, k, v)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if kernel == "reference":
        scores = (q @ k.transpose(-1, -2)).float() / math.sqrt(q.shape[-1])
        if mask is not None:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)  # finite: a row may be all padding
        out = scores.softmax(-1).to(v.dtype) @ v
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.transpose(1, 2)


def rotary_table(positions: Tensor, head_width: int, base: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines for rotary embedding (RoFormer, arXiv 2104.09864), in fp32.

    Computed anew each forward: a buffer would be cast to bf16 with the parameters and lose far positions.

    Args:
        positions: [L] int64.

    Returns:
        Two tensors [L, 1, head width / 2].
    """
    powers = torch.arange(0, head_width, 2, device=positions.device, dtype=torch.float32) / head_width
    angles = positions.float()[:, None] * base**-powers
    return angles.cos()[:, None, :], angles.sin()[:, None, :]


def apply_rotary(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate pairs (i, i + width/2) of x [B, L, heads, head width] by their position's angle."""
    cos, sin = table
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1).to(x.dtype)


def block_diffusion_mask(length: int, groups: int, device: torch.device) -> Tensor:
    """Who sees whom in one forward over [noisy ; clean] (BD3-LM, arXiv 2503.09573).

    A noisy block sees itself and the clean blocks before it; a clean block sees itself and the clean blocks before it.

    Returns:
        bool [1, 1, 2L, 2L].
    """
    block = torch.arange(length, device=device) // (length // groups)
    query, key = block[:, None], block[None, :]
    noisy = torch.cat((query == key, key < query), dim=1)
    clean = torch.cat((torch.zeros_like(query == key), key <= query), dim=1)
    return torch.cat((noisy, clean))[None, None]
