"""All attention kernels compute one function, forward and backward, to the tolerance of their precision."""

import importlib.util

import pytest
import torch
from tiny_models import architecture

from vmd_scale.model import VMD, encoder, layers
from vmd_scale.model import attention as module
from vmd_scale.model.attention import (
    Documents,
    Flash,
    attention,
    block_diffusion_mask,
    choose_kernel,
    document_boundaries,
    flash_kernels,
    kernel_name,
    rotary_table,
)
from vmd_scale.model.documents import attention_mask, members_of

SEGMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2], [5, 5, 5, 5, 5, 5, 5, 5], [0, 1, 2, 2, 2, 0, 0, 0]])


def tensors(rows, length, heads, width, dtype, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(rows, length, heads, width, generator=generator).to(device, dtype).requires_grad_()
        for _ in range(3)
    ]


def with_gradients(qkv, mask, kernel):
    out = attention(*qkv, mask, kernel)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return [out.detach(), *torch.autograd.grad((out * direction).sum(), qkv)]


def far(one, other):
    return max(((a.float() - b.float()).norm() / b.float().norm()).item() for a, b in zip(one, other, strict=True))


def test_the_log_names_the_kernel_that_really_runs(monkeypatch):
    """Of every network; flash-attn has neither fp32 nor padding, block masks are FlexAttention's business."""
    monkeypatch.setattr(module, "flash_kernels", lambda *_: Flash("flash-attn 3", None, None, "cpu"))
    monkeypatch.setattr(encoder, "choose_kernel", lambda *_, **__: "flash")
    a = architecture(groups=3, attention="flex", encoder_layers=1)
    model = VMD(a)
    assert model.attention_kernels(torch.bfloat16, padded=False) == {"denoiser": "flex", "encoder": "flash-attn 3"}
    for dtype, padded in ((torch.float32, False), (torch.bfloat16, True)):
        assert model.attention_kernels(dtype, padded) == {"denoiser": "flex", "encoder": "PyTorch SDPA"}
    assert kernel_name(Flash(module.OWN, None, None)) != kernel_name("sdpa")  # which has a mask for documents
    model = VMD(architecture(attention="reference", latent_width=0))
    assert model.attention_kernels(torch.float32, padded=False) == {"denoiser": "reference"}


# ---- documents


def test_boundaries_are_where_documents_begin_in_a_shape_that_is_always_the_same():
    bounds = document_boundaries(SEGMENTS, most=4)
    assert bounds.tolist() == [0, 3, 7, 8, 16, 17, 18, 21, *[24] * 5]
    assert bounds.dtype == torch.int32
    assert document_boundaries(SEGMENTS[1:2], most=4).tolist() == [0, 8, 8, 8, 8]
    one_each = document_boundaries(torch.arange(6).view(2, 3), most=3)
    assert one_each.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert document_boundaries(torch.arange(2).view(1, 2), most=4).tolist() == [0, 1, 2, 2, 2]


@pytest.mark.parametrize("kernel", ["reference", "sdpa"])
def test_documents_do_not_see_each_other(kernel):
    qkv = tensors(3, 8, 2, 4, torch.float64, "cpu")
    whole = with_gradients(qkv, Documents(SEGMENTS), kernel)
    for row, segments in enumerate(SEGMENTS):
        for document in segments.unique_consecutive():
            places = slice(None) if (segments == document).all() else segments == document
            if row == 2 and document == 0:
                continue  # number 0 twice in a row: not a document of its own (see `Documents`)
            alone = [x[row : row + 1, places].detach().requires_grad_() for x in qkv]
            out = attention(*alone, None, kernel)
            assert torch.allclose(out[0], whole[0][row, places], atol=1e-10)


def by_pieces(q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
    """What a varlen kernel is specified to compute."""
    assert (max_seqlen_q, max_seqlen_k) == (8, 8)
    assert cu_seqlens_q is cu_seqlens_k
    pieces = []
    for start, end in zip(cu_seqlens_q[:-1].tolist(), cu_seqlens_q[1:].tolist(), strict=True):
        if start < end:
            pieces.append(attention(*(x[start:end].unsqueeze(0) for x in (q, k, v)), None, "reference")[0])
    return torch.cat(pieces)


def test_the_varlen_path_equals_the_mask_path(monkeypatch):
    """Here with a stand-in for the kernel: what is handed to it, and what becomes of its answer."""
    segments = torch.where(SEGMENTS == 0, SEGMENTS + 10 * (torch.arange(8) > 4), SEGMENTS)  # no number twice in a row
    monkeypatch.setattr(module, "flash_kernels", lambda *_: Flash("stand-in", None, by_pieces, "cpu"))
    qkv = tensors(3, 8, 2, 4, torch.bfloat16, "cpu")
    packed = with_gradients(qkv, Documents(segments, document_boundaries(segments, 4)), "flash")
    masked = with_gradients(qkv, Documents(segments), "reference")
    assert far(packed, masked) < 1e-2
    assert far(packed, with_gradients(qkv, None, "reference")) > 0.1


@pytest.mark.parametrize("returned", ["tensor", "with normalisers"])
def test_every_version_of_flash_attention_is_understood(returned, monkeypatch):
    def dense(q, k, v):
        out = attention(q, k, v, None, "reference")
        return out if returned == "tensor" else (out, torch.zeros(1))

    monkeypatch.setattr(module, "flash_kernels", lambda *_: Flash("stand-in", dense, None, "cpu"))
    qkv = tensors(2, 5, 2, 4, torch.bfloat16, "cpu")
    assert torch.equal(attention(*qkv, None, "flash"), attention(*qkv, None, "reference"))


@pytest.mark.parametrize("kernel", ["sdpa", "flash", "deterministic flash"])
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_a_block_is_compiled_in_one_piece(kernel, checkpointed, packed, monkeypatch):
    """Whatever breaks the graph here (a search for kernels, a value read on the host) breaks it in every layer."""

    def dense(q, k, v, deterministic=False):
        assert deterministic == (kernel == "deterministic flash")
        return attention(q, k, v, None, "reference")

    def varlen(q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, deterministic=False):
        assert deterministic == (kernel == "deterministic flash")
        inside = torch.bucketize(torch.arange(len(q)), cu_seqlens_q, right=True)
        mask = (inside[:, None] == inside[None, :])[None, None]
        return attention(*(x.unsqueeze(0) for x in (q, k, v)), mask, "reference")[0]

    functions = (dense, varlen) if kernel != "deterministic flash" else map(module._deterministic, (dense, varlen))
    flash = Flash("stand-in", *functions, "cpu")
    monkeypatch.setattr(module, "flash_kernels", lambda *_: flash)
    taken = kernel.split()[-1]
    segments = torch.tensor([[1, 1, 2, 2, 2, 0], [1, 2, 3, 3, 3, 3]])
    mask = attention_mask(segments, 3, layers.SelfAttention(32, 2, taken).kernel) if packed else None
    torch.manual_seed(0)
    block = layers.Block(32, 2, 2.0, "gelu", "layernorm", 0.0, taken, condition=8).bfloat16()
    block.keep_products = checkpointed
    x = torch.randn(2, 6, 32, dtype=torch.bfloat16)
    table = rotary_table(torch.arange(6), 16)
    of_documents = members_of(segments, 3).bfloat16() if packed else None
    condition = layers.Condition(torch.randn(2, 3 if packed else 1, 8, dtype=torch.bfloat16), of_documents)
    torch._dynamo.reset()
    found = []
    for run in (block, torch.compile(block, backend="aot_eager", fullgraph=True, dynamic=False)):
        block.zero_grad()
        run(x, table, mask, condition).square().sum().backward()
        found.append([p.grad.clone() for p in block.parameters()])
    assert far(*found) < 1e-2


# ---- on a GPU

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 2e-2}  # fp32 products may be made in tf32


@cuda
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("kernel", ["sdpa", "auto", "flash"])
@pytest.mark.parametrize("mask", ["none", "padding", "documents"])
def test_gpu_kernels_equal_the_reference(kernel, dtype, mask):
    if kernel == "flash" and flash_kernels(own=False) is None:
        pytest.skip("no flash-attn works here")
    rows, length = 3, 192
    qkv = tensors(rows, length, 4, 64, dtype, "cuda")
    segments = torch.arange(length).div(torch.tensor([[70], [33], [200]]), rounding_mode="floor")
    masks = {
        "none": None,
        "padding": (torch.arange(length) < torch.tensor([[192], [100], [1]]))[:, None, None, :].cuda(),
        "documents": Documents(segments.cuda(), document_boundaries(segments.cuda(), 7)),
    }
    exact = [x.detach().double().requires_grad_() for x in qkv]
    assert (
        far(with_gradients(qkv, masks[mask], kernel), with_gradients(exact, masks[mask], "reference"))
        < (TOLERANCE[dtype])
    )


@cuda
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("padded", [False, True])
def test_gpu_flex_attention_equals_the_mask_of_block_diffusion(dtype, padded):
    length, groups = 128, 8
    qkv = tensors(2, 2 * length, 4, 64, dtype, "cuda")
    attend = (torch.arange(length) < torch.tensor([[128], [100]])).cuda() if padded else None
    flex, dense = (
        block_diffusion_mask(length, groups, attend, kernel, torch.device("cuda")) for kernel in ("flex", "sdpa")
    )
    exact = [x.detach().double().requires_grad_() for x in qkv]
    assert far(with_gradients(qkv, flex, "flex"), with_gradients(exact, dense, "reference")) < TOLERANCE[dtype]


@cuda
def test_gpu_kernels_are_chosen_by_what_is_there():
    """PyTorch brings a flash attention of its own, for GPUs from Ampere on."""
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("needs a newer GPU")
    assert choose_kernel("auto", blocks=True) == "flex"
    assert choose_kernel("auto", blocks=True, head_width=8) != "flex"
    assert choose_kernel("auto") == "auto"
    installed = any(importlib.util.find_spec(name.split(".")[0]) for name in module.MODULES.values())
    assert installed or kernel_name("auto") == module.OWN
    assert kernel_name("auto", torch.float32) == kernel_name("auto", masked=True) == "PyTorch SDPA"


def test_kernels_are_chosen_for_the_heads_that_there_are(monkeypatch):
    """Here by a stand-in, which works with heads of 64 alone: others are SDPA's."""
    monkeypatch.setattr(module, "flash_kernels", lambda width=64, own=True: flash if width == 64 else None)
    flash = Flash("stand-in", None, None, "cpu")
    assert [choose_kernel("auto", head_width=width) for width in (64, 96)] == ["auto", "sdpa"]
    assert [kernel_name("flash", head_width=width) for width in (64, 96)] == ["stand-in", "PyTorch SDPA"]
