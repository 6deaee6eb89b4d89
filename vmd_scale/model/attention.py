"""Bidirectional attention: one function, several kernels, and rotary position embedding."""

import functools
import importlib
import inspect
import logging
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Union

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

log = logging.getLogger(__name__)
Mask = Union[Tensor, BlockMask, "Documents", None]


class Documents(NamedTuple):
    """Rows of several documents, attention inside each of them.

    Args:
        segments: int [B, L], the document of every position: equal inside a document, different in its neighbors.
        boundaries: int32 [N + 1], made of `segments` by `document_boundaries`; without it there is no varlen kernel.
    """

    segments: Tensor
    boundaries: Tensor | None = None

    def mask(self) -> Tensor:
        """bool [B, 1, L, L]."""
        return (self.segments.unsqueeze(-1) == self.segments.unsqueeze(-2)).unsqueeze(1)


def document_boundaries(segments: Tensor, most: int) -> Tensor:
    """Where documents begin and end in the flattened rows, for varlen kernels: cu_seqlens, int32 [B * most + 1].

    Its shape does not depend on the data, and nothing waits for the device: after the last document come empty ones.

    Args:
        segments: int [B, L]; a document does not continue in the next row.
        most: documents of a row, padding being one.
    """
    begins = torch.ones_like(segments, dtype=torch.bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    end = segments.numel()
    starts = torch.where(begins.flatten(), torch.arange(end, device=segments.device), end).sort().values
    return F.pad(starts[: len(segments) * most], (0, 1 + max(0, len(segments) * most - end)), value=end).int()


class Flash(NamedTuple):
    """flash-attn, as it is installed, or the one that PyTorch is built with."""

    name: str
    dense: Callable[..., Any]
    varlen: Callable[..., Any]
    device: str = "cuda"


OWN = "PyTorch's flash attention"
MODULES = {"flash-attn 4": "flash_attn.cute", "flash-attn 3": "flash_attn_interface", "flash-attn 2": "flash_attn"}


def flash_kernels(head_width: int = 64, own: bool = True) -> Flash | None:
    """The fastest flash attention for this GPU that works with such heads, or None.

    Where PyTorch is told to be deterministic, it is one whose backward pass can be.

    Args:
        own: whether PyTorch's own is allowed. From Hopper on it is cuDNN's, and stands before flash-attn 2, which was
            made for Ampere (FlashAttention-3, arXiv 2407.08608, figures 5 and 6).
    """
    return _flash_kernels(head_width, torch.are_deterministic_algorithms_enabled(), own)


@functools.cache
def _flash_kernels(head_width: int, deterministic: bool, own: bool) -> Flash | None:
    if not torch.cuda.is_available():
        return None
    capability = torch.cuda.get_device_capability()[0]
    two, three, four = (f"flash-attn {version}" for version in (2, 3, 4))
    names = (three, OWN, four, two) if capability == 9 else (four, OWN, two) if capability > 9 else (two, OWN)
    for name in names:
        if name == OWN and not own:
            continue
        try:
            if name == OWN:
                flash = Flash(OWN, _sdpa, _own_varlen)
            else:
                found = importlib.import_module(MODULES[name])
                functions = found.flash_attn_func, found.flash_attn_varlen_func
                flash = Flash(name, *(map(_deterministic, functions) if deterministic else functions))
            _try(flash, head_width)
        except Exception as error:  # a build for another PyTorch, CUDA or GPU fails in ways of its own
            if not isinstance(error, ModuleNotFoundError):
                log.warning("%s does not work with heads of %d: %r", name, head_width, error)
            continue
        return flash
    return None


def _deterministic(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of flash-attn, whose gradients are to be the same each time. PyTorch's own sees to it by itself."""
    if "deterministic" not in inspect.signature(function).parameters:
        raise TypeError(f"{function.__name__} has no argument 'deterministic'")
    return functools.partial(function, deterministic=True)


def _try(flash: Flash, head_width: int) -> None:
    """Forward and backward of both kernels, tiny: as they are, and traced as in a compiled block."""
    with torch.inference_mode(False), torch.enable_grad():
        q, k, v = (
            torch.randn(1, 16, 1, head_width, device=flash.device, dtype=torch.bfloat16).requires_grad_()
            for _ in range(3)
        )
        ends = torch.tensor([0, 5, 16], dtype=torch.int32, device=flash.device)
        ways = (lambda: _first(flash.dense(q, k, v)), lambda: _varlen(flash, q, k, v, ends))
        for way in ways:
            for run in (way, torch.compile(way, backend="aot_eager", fullgraph=True, dynamic=False)):
                run().sum().backward()


def flash_available(head_width: int = 64) -> bool:
    """Whether flash-attn is installed and can be used."""
    return flash_kernels(head_width, False) is not None


def resolved(kernel: str | Flash, head_width: int = 64) -> str | Flash:
    """What `choose_kernel` chose, with the functions that auto and flash stand for here, else SDPA."""
    if kernel in ("auto", "flash"):
        return flash_kernels(head_width, kernel == "auto") or "sdpa"
    return kernel


def kernel_name(
    kernel: str | Flash, dtype: torch.dtype = torch.bfloat16, masked: bool = False, head_width: int = 64
) -> str:
    """For the log: what `attention` takes. `masked`: whether positions are left out, by a mask that is a tensor."""
    kernel = resolved(kernel, head_width)
    if isinstance(kernel, Flash) and dtype in (torch.bfloat16, torch.float16) and not masked:
        return kernel.name
    return str(kernel) if kernel in ("flex", "reference") else "PyTorch SDPA"


def choose_kernel(wanted: str, blocks: bool = False, head_width: int = 64) -> str:
    """``auto`` stays where a GPU has flash attention (flash-attn or PyTorch's own), else it becomes PyTorch's SDPA.

    With `blocks` (block diffusion's mask), it becomes flex on a GPU, whose kernel wants heads at least 16 wide;
    without, flex has nothing to do and is SDPA.
    """
    narrow = head_width < 16 and torch.cuda.is_available()
    if blocks and wanted in ("auto", "flash") and torch.cuda.is_available() and not narrow:
        return "flex"
    if wanted == "flex" and (narrow or not blocks):
        return "sdpa"
    if wanted == "auto":
        return "auto" if flash_kernels(head_width) is not None else "sdpa"
    if wanted == "flash" and not flash_available(head_width):
        raise RuntimeError("model.attention is 'flash', but flash-attn is not installed or there is no GPU; use 'auto'")
    return wanted


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Mask, kernel: str | Flash) -> Tensor:
    """Softmax attention, bidirectional.

    Args:
        q: [B, L, heads, head width]; k, v: [B, S, heads, head width].
        mask: bool, broadcastable to [B, heads, L, S], true where attention is allowed; None allows all; a `BlockMask`
            is for FlexAttention; `Documents` for rows that hold several.
        kernel: auto | flash (or what `flash_kernels` found) | sdpa | flex | reference. Flash has no general mask, no
            fp32 and no CPU: SDPA takes over there.

    Returns:
        [B, L, heads, head width].
    """
    kernel = resolved(kernel, q.shape[-1])
    flash = kernel if isinstance(kernel, Flash) else None
    if flash is not None and (q.dtype not in (torch.bfloat16, torch.float16) or q.device.type != flash.device):
        flash = None
    if flash is not None and mask is None:
        return _first(flash.dense(q, k, v))
    if isinstance(mask, Documents):
        if flash is not None and mask.boundaries is not None:
            return _varlen(flash, q, k, v, mask.boundaries)
        mask = mask.mask()
    if kernel != "reference" and not isinstance(mask, BlockMask):
        return _sdpa(q, k, v, mask)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if isinstance(mask, BlockMask):
        return _flex(q.is_cuda)(q, k, v, block_mask=mask).transpose(1, 2)
    scores = (q @ k.transpose(-1, -2)).float() / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)  # finite: a row may be all padding
    return (scores.softmax(-1).to(v.dtype) @ v).transpose(1, 2)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def _own_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    return _first(varlen_attn(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k))


def _varlen(flash: Flash, q: Tensor, k: Tensor, v: Tensor, ends: Tensor) -> Tensor:
    rows, longest = (x.flatten(0, 1) for x in (q, k, v)), q.shape[1]
    # By name: version 4 has another argument among these.
    bounds = {"cu_seqlens_q": ends, "cu_seqlens_k": ends, "max_seqlen_q": longest, "max_seqlen_k": longest}
    return _first(flash.varlen(*rows, **bounds)).view_as(q)


def _first(result: Any) -> Tensor:
    """Some versions of flash-attn return the normalizers too."""
    return result[0] if isinstance(result, tuple) else result


def rotary_table(positions: Tensor, head_width: int, base: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines for rotary embedding (RoFormer, arXiv 2104.09864), in fp32.

    Computed again in each forward: a buffer would be cast to bf16 with the parameters and lose far positions.

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


@functools.cache
def _flex(compiled: bool) -> Callable[..., Tensor]:
    """FlexAttention; on a CPU uncompiled, which is slow and needs no compiler."""
    return torch.compile(flex_attention) if compiled else flex_attention  # type: ignore[return-value]


def block_diffusion_mask(length: int, groups: int, attend: Tensor | None, kernel: str, device: torch.device) -> Mask:
    """Who sees whom in one forward over [noisy ; clean] (BD3-LM, arXiv 2503.09573).

    A noisy block sees itself and the clean blocks before it; a clean block sees itself and the clean blocks before it.

    Args:
        attend: bool [B, L], false at padding; None where there is none.

    Returns:
        bool [1 or B, 1, 2L, 2L]; with kernel flex the same as a `BlockMask`, which skips what nobody sees.
    """
    if kernel != "flex":
        at = torch.arange(2 * length, device=device)
        mask = _sees(at[:, None], at[None, :], length, groups)[None, None]
        return mask if attend is None else mask & torch.cat((attend, attend), dim=-1)[:, None, None, :]
    if attend is None:
        return _flex_mask(length, groups, device)
    seen = torch.cat((attend, attend), dim=-1)

    def allowed(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return _sees(query, key, length, groups) & seen[b, key]

    number, index = _flex_tiles(length, groups, device)  # padding is checked inside them: nothing is built again
    return BlockMask.from_kv_blocks(number, index, mask_mod=allowed, seq_lengths=(2 * length, 2 * length))


@functools.lru_cache(maxsize=4)
def _flex_tiles(length: int, groups: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of each row of tiles: how many are visible without padding, and the numbers of the tiles, visible ones first."""
    tiles = _flex_mask(length, groups, device).to_dense()
    return tiles.sum(-1, dtype=torch.int32), tiles.argsort(dim=-1, descending=True, stable=True).int()


@functools.lru_cache(maxsize=4)
def _flex_mask(length: int, groups: int, device: torch.device) -> BlockMask:
    def allowed(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return _sees(query, key, length, groups)

    return create_block_mask(allowed, None, None, 2 * length, 2 * length, device)


def _sees(query: Tensor, key: Tensor, length: int, groups: int) -> Tensor:
    """Whether a position of [noisy ; clean] attends to another one."""
    size = length // groups
    query_clean, key_clean = query >= length, key >= length
    query_block, key_block = query % length // size, key % length // size
    inside = (query_clean == key_clean) & (query_block == key_block)
    return inside | (key_clean & (key_block < query_block))
