"""Why a step is fast, asserted without a clock: what is never allocated, never waited for, never computed twice."""

import math
from collections import Counter

import pytest
import torch
from tiny_models import architecture
from watching import Watch

from vmd_scale.diffusion.corruption import INDEX_MULTIPLE
from vmd_scale.diffusion.noise import Noise
from vmd_scale.diffusion.objective import Nelbo, Surrogate
from vmd_scale.model import VMD, head, vmd

ROWS, LENGTH, VOCAB = 4, 64, 3000


def network(latent=8, **changes):
    values = {"layers": 2, "width": 32, "mlp_ratio": 4.0, "attention": "auto", "condition_width": 16}
    values |= {"vocab_size": VOCAB, "row_length": LENGTH, "latent_width": latent, "encoder_width": 16}
    torch.manual_seed(0)
    return VMD(architecture(**{**values, **changes}))


def prepared(model, kind="vmd", step=0):
    a = model.architecture
    shared = {"law": "balanced", "groups": a.groups, "latent_width": a.latent_width, "mask_id": a.mask_id}
    shared |= {"noise": Noise(0), "documents": a.documents}
    objective = Nelbo(steps=(1, 4, math.inf), **shared) if kind == "nelbo" else Surrogate(**shared)
    clean = torch.randint(VOCAB, (ROWS, LENGTH), generator=torch.Generator().manual_seed(step))
    everything, attend = torch.ones_like(clean, dtype=torch.bool), None
    if a.documents > 1:
        attend = (torch.arange(LENGTH) * a.documents // LENGTH + 1).int().expand(ROWS, -1)
    return objective, objective.prepare(clean, everything, attend, step, torch.arange(ROWS), ROWS)


def watched(model, kind="vmd"):
    objective, x = prepared(model, kind)
    with Watch() as watch:
        objective(model, x, 1.0).total.backward()
    return watch, x


CHUNK = 16 * VOCAB


@pytest.mark.parametrize("kind", ["vmd", "nelbo"])
@pytest.mark.parametrize("fused", [True, False])
def test_full_logits_are_never_allocated(kind, fused, monkeypatch):
    monkeypatch.setattr(head, "CHUNK_ELEMENTS", CHUNK)
    model = network()
    model.fused_loss = fused
    watch, _ = watched(model, kind)
    assert CHUNK / 2 <= watch.largest <= max(CHUNK, VOCAB * 32 + 32)  # a chunk, or a matrix
    with Watch() as naive:  # the watch would have seen them
        model.logits(torch.zeros(ROWS, LENGTH, dtype=torch.int64), torch.zeros(ROWS, 1, 8))
    assert naive.largest == ROWS * LENGTH * VOCAB


def test_the_head_multiplies_masked_positions_only_and_each_once(monkeypatch):
    """Three products a chunk: logits, and the gradients of hidden states and of the head."""
    monkeypatch.setattr(head, "CHUNK_ELEMENTS", CHUNK)
    model = network()
    rows = []
    original = head._nll_and_gradient
    monkeypatch.setattr(head, "_nll_and_gradient", lambda *a: (rows.append(len(a[0])), original(*a))[1])
    watch, x = watched(model)
    assert sum(rows) == len(x.index)
    assert len(x.index) - int((x.index < ROWS * LENGTH).sum()) < INDEX_MULTIPLE
    chunks = len(rows)
    model.fused_loss = False
    other, _ = watched(model)
    pieces = -(-ROWS * LENGTH // 16)
    difference = sum(other.operations[op] - watch.operations[op] for op in ("mm", "addmm", "addmm_"))
    assert difference == 4 * pieces - 3 * chunks  # recomputed logits: four products a piece


@pytest.mark.parametrize("latent", [0, 8])
@pytest.mark.parametrize("kind", ["vmd", "nelbo"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"prior": "conditional"}, {"groups": 4}, {"documents": 3}],
    ids=["row", "prior", "blocks", "documents"],
)
def test_nothing_in_a_step_waits_for_the_device(latent, kind, changes, monkeypatch):
    if (not latent and (kind == "vmd" or "prior" in changes)) or (changes and kind == "vmd"):
        pytest.skip("no such model")
    monkeypatch.setattr(head, "CHUNK_ELEMENTS", CHUNK)
    watch, x = watched(network(latent, **changes), kind)
    assert watch.waits == {}
    with Watch() as waiting:
        assert x.index.max().item() >= 0
        x.noisy.nonzero()
        hidden = x.noisy.clone()
        hidden[x.noisy == 0] = hidden[x.noisy == 0].repeat_interleave(torch.ones_like(hidden[x.noisy == 0]))
        hidden[torch.arange(2)] = 0  # this does not
    assert set(waiting.waits) == {"_local_scalar_dense", "nonzero", "index", "repeat_interleave", "index_put_"}


@pytest.mark.parametrize(("latent", "forwards"), [(0, (1, 0, 0)), (8, (1, 1, 0))])
def test_one_forward_of_each_network_and_one_modulation_of_each_block(latent, forwards):
    model, calls = network(latent), Counter()
    for name, module in model.named_modules():
        module.register_forward_hook(lambda m, i, o, name=name: calls.update([name]))
    widths = []
    for block in model.denoiser.blocks:
        if block.modulation is not None:
            block.modulation.register_forward_hook(lambda m, i, o: widths.append(o.shape[:2]))
    watched(model, "vmd" if latent else "nelbo")
    assert tuple(calls[name] for name in ("denoiser", "encoder", "prior_network")) == forwards
    assert widths == [(ROWS, 1)] * (2 if latent else 0)  # once a latent group, not a token


def test_each_block_is_modulated_once_a_document():
    model, widths = network(documents=3), []
    for block in model.denoiser.blocks:
        block.modulation.register_forward_hook(lambda m, i, o: widths.append(o.shape[:2]))
    attend = torch.arange(LENGTH).mul(4).div(LENGTH, rounding_mode="floor").int().expand(ROWS, -1)  # 0 is padding
    model.denoiser(torch.zeros(ROWS, LENGTH, dtype=torch.int64), torch.zeros(ROWS, 3, 8), attend)
    assert widths == [(ROWS, 3)] * 2


def test_rotary_angles_are_computed_once_for_each_network():
    watch, _ = watched(network())
    assert watch.operations["cos"] == 2
    watch, _ = watched(network(0), "nelbo")
    assert watch.operations["cos"] == 1


def test_blocks_see_one_shape_whatever_is_masked():
    """They are compiled: a shape that follows the number of masked positions would compile them again and again."""
    model, shapes, masked = network(), set(), set()
    for block in (*model.denoiser.blocks, *model.encoder.blocks):
        block.register_forward_pre_hook(lambda m, i: shapes.add((id(m), tuple(i[0].shape))))
    for step in range(6):
        objective, x = prepared(model, "nelbo", step)
        masked.add(int((x.index < ROWS * LENGTH).sum()))
        objective(model, x, 1.0)
    assert len(masked) > 1
    assert len(shapes) == 3


@pytest.mark.parametrize("kind", ["selective", "full"])
@pytest.mark.parametrize("changes", [{}, {"mlp": "swiglu", "norm": "rmsnorm"}, {"groups": 4}])
def test_checkpointing_changes_memory_and_nothing_else(kind, changes):
    model = network(**changes)
    objective, x = prepared(model, "nelbo")
    found = []
    for how in ("none", kind):
        model.checkpoint_activations(how)
        model.zero_grad()
        with Watch() as watch:
            objective(model, x, 1.0).total.backward()
        found.append((watch, [p.grad.clone() for p in model.parameters()]))
    (plain, one), (checkpointed, other) = found
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    again = checkpointed.operations["mm"] - plain.operations["mm"]
    blocks = len(model.denoiser.blocks) + len(model.encoder.blocks)
    # Of qkv, out, up and down; the last of a block is made again only where its gate needs it.
    assert (3 * blocks <= again <= 4 * blocks) if kind == "full" else again == 0
    assert checkpointed.operations["mul"] > plain.operations["mul"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("documents", [1, 3])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_nothing_in_a_step_waits_for_a_gpu(fused, compiled, documents, monkeypatch):
    """Logits in one piece, and in chunks by the fused loss; blocks and loss compiled; rows of several documents."""
    losses = []
    monkeypatch.setattr(vmd, "weighted_nll", lambda *a: losses.append(a[5]) or head.weighted_nll(*a))
    if fused:
        monkeypatch.setattr(head, "CHUNK_ELEMENTS", CHUNK)
        monkeypatch.setattr(head, "GPU_CHUNK_ELEMENTS", CHUNK)
    torch._dynamo.reset()
    model = network(documents=documents).cuda().bfloat16()
    if compiled:
        model.compiled_loss = True
        model.compile_blocks(dynamic=False)
    objective, x = prepared(model)
    x = x.to(torch.device("cuda"))
    for _ in range(2):
        objective(model, x, 1.0).total.backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        objective(model, x, 1.0).total.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert losses == ([compiled] * 3 if fused else [])
