"""Memory on paper against what the allocator sees, what the compiler keeps, and what DeepSpeed is told."""

import functools
import itertools
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from planned_runs import PACKED, VOCABULARY, config_of, inputs_of
from torch.profiler import ProfilerActivity, profile

from vmd_scale.build import build_architecture, build_model
from vmd_scale.model import VMD, head
from vmd_scale.model.head import masked_nll, weighted_nll
from vmd_scale.planning import memory, workload
from vmd_scale.planning.activations import (
    _of_compiled_blocks,
    activations_of_row,
    count_parameters,
    kept_of,
    without_memory,
)
from vmd_scale.planning.flops import mlp_width
from vmd_scale.planning.memory import logits_bytes, memory_of
from vmd_scale.planning.peaks import peak_bytes

# ---- of a rank


def test_zero_divides_what_it_says():
    def parts(stage):
        config = config_of(deepspeed={"zero_optimization": {"stage": stage}})
        cost = memory_of(config, build_architecture(config, VOCABULARY), 4, "bf16", on_gpu=True)
        return cost.weights, cost.gradients, cost.optimizer, cost.ema

    weights, gradients, optimizer, ema = parts(1)
    assert parts(2) == (weights, gradients / 4, optimizer, ema)
    assert parts(3) == (weights / 4, gradients / 4, optimizer, ema)
    whole = parts(0)
    assert (whole[1], whole[3]) == (gradients, 4 * ema)
    parameters = weights / 2
    assert optimizer + ema == 16 * parameters / 4  # masters, two moments and the average, in fp32


def on_two_ranks(precision, **deepspeed):
    """Of a network with more parameters than activations."""
    config = config_of(
        model={"width": 512, "heads": 8}, training={"micro_batch": 1, "global_batch": 2}, deepspeed=deepspeed
    )
    return memory_of(config, build_architecture(config, VOCABULARY), 2, precision, on_gpu=True)


def test_settings_of_deepspeed_change_what_is_held():
    usual = on_two_ranks("bf16", zero_optimization={"stage": 1})
    parameters = usual.weights / 2
    freed = usual.activations + usual.transient
    assert freed < 2 * parameters
    assert (usual.gradients, usual.buffers) == (4 * parameters, 0)
    kept = on_two_ranks("bf16", zero_optimization={"stage": 1}, bf16={"immediate_grad_update": False})
    assert kept.total - usual.total == 2 * parameters - freed  # gradients of the backward pass, when it has ended
    rounded = on_two_ranks("bf16", zero_optimization={"stage": 1}, communication_data_type="bf16")
    assert rounded.total - usual.total == (4 + 2) * parameters - freed  # summed by DeepSpeed itself: flat, and rounded
    for stage, shard in ((1, 1), (2, 2), (3, 2)):
        summed = {"data_types": {"grad_accum_dtype": "bf16"}, "zero_optimization": {"stage": stage}}
        in_bucket = stage < 3
        assert on_two_ranks("bf16", **summed).gradients == (0 if in_bucket else 2 * parameters / shard)
    sent = {"zero_optimization": {"stage": 3}}
    wide, narrow = (on_two_ranks("bf16", **sent, communication_data_type=kind).buffers for kind in ("fp32", "bf16"))
    assert wide - narrow >= 2 * parameters  # of the bucket


def test_a_bucket_is_allocated_whole():
    """However few parameters there are, where the user asks for a large one."""
    for stage in (1, 2, 3):
        of = {}
        for size in (10**6, 10**9):
            zero = {"stage": stage, "reduce_bucket_size": size}
            config = config_of(deepspeed={"zero_optimization": zero}, training={"precision": "fp32"})
            of[size] = memory_of(config, build_architecture(config, VOCABULARY), 4, "fp32", on_gpu=True).buffers
        assert of[10**9] - of[10**6] == pytest.approx(4e9, rel=0.01)


def test_the_optimizer_keeps_what_the_plan_says():
    config = config_of(deepspeed={"zero_optimization": {"stage": 0}})
    model = build_model(config, VOCABULARY)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    kept = peak_bytes(optimizer.step, torch.device("cpu"))
    predicted = memory_of(config, build_architecture(config, VOCABULARY), 1, "fp32", on_gpu=False)
    assert predicted.optimizer == pytest.approx(kept, rel=0.01)


def test_a_plan_counts_every_parameter_once():
    config = config_of()
    parameters = sum(p.numel() for p in build_model(config, VOCABULARY).parameters())
    assert count_parameters(without_memory(build_architecture(config, VOCABULARY))) == parameters


# ---- forward and backward


def importance_weighted(rows):
    return {
        "diffusion": {"objective": "iw", "steps": [1, 2, 4], "importance_samples": 3},
        "training": {"micro_batch": rows, "global_batch": rows},
    }


SHAPES = {
    "characters": (27, {}),
    "mdm": (27, {"latent": {"width": 0}}),
    "large vocabulary": (20_000, {"diffusion": {"steps": [1]}, "training": {"micro_batch": 24, "global_batch": 24}}),
    "selective": (27, {"training": {"activation_checkpointing": "selective"}}),
    "full": (27, {"training": {"activation_checkpointing": "full"}}),
    "swiglu": (27, {"model": {"layers": 4, "mlp": "swiglu", "norm": "rmsnorm", "attention": "sdpa"}}),
    "blocks": (27, {"latent": {"scope": "block"}, "diffusion": {"block_size": 32}}),
    "documents": (27, {"data": PACKED}),
    "importance weighted, one row": (27, importance_weighted(1)),
    "importance weighted, seven rows": (27, importance_weighted(7)),
}


@pytest.mark.parametrize("name", SHAPES)
def test_predicted_memory_is_the_measured_peak(name):
    """Of forward and backward, above weights and what an optimizer keeps: activations, logits and gradients."""
    vocabulary, changes = SHAPES[name]
    changes = {**changes, "model": {"layers": 4, "attention": "sdpa", **changes.get("model", {})}}
    changes["deepspeed"] = {"zero_optimization": {"stage": 0}}  # no buffers
    config = config_of(**{**changes, "training": {"micro_batch": 8, **changes.get("training", {})}})
    model = build_model(config, vocabulary)
    model.checkpoint_activations(config.training.activation_checkpointing)
    objective, x = inputs_of(config, vocabulary)

    def step():
        objective(model, x, 1.0).total.backward()

    step()  # gradients exist from here on, as where they are accumulated
    measured = peak_bytes(step, torch.device("cpu"))
    predicted = memory_of(config, build_architecture(config, vocabulary), 1, "fp32", on_gpu=False)
    parameters = count_parameters(model)
    assert predicted.gradients == sum(p.grad.nbytes for p in model.parameters()) == 4 * parameters
    assert predicted.weights == 4 * parameters
    assert predicted.activations + predicted.transient == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pieces", [2, 3])
def test_logits_in_pieces_take_what_the_plan_says(fused, dtype, pieces, monkeypatch):
    symbols, width, rows, length, low = 4000, 32, 4, 256, dtype.itemsize
    matrix = torch.randn(symbols, width).to(dtype).requires_grad_()
    hidden = torch.randn(rows, length, width).to(dtype).requires_grad_()
    targets, index = torch.zeros(rows, length, dtype=torch.int64), torch.arange(rows * length // 2)
    positions = len(index) if fused else targets.numel()  # it is the shape that tells how to recompute
    for module in (head, memory, workload):
        monkeypatch.setattr(module, "CHUNK_ELEMENTS", -(-positions // pieces) * symbols)

    def step():
        if fused:
            weighted_nll(hidden, targets, index, matrix, torch.ones(rows, 1)).backward()
        else:
            masked_nll(hidden, targets, index, lambda h: (h @ matrix.T).float(), symbols).sum().backward()

    step()
    measured = peak_bytes(step, torch.device("cpu"))
    a = replace(build_architecture(config_of(), VOCABULARY), vocab_size=symbols, width=width)
    assert logits_bytes(a, targets.numel(), len(index), low, False, fused, False) == pytest.approx(measured, rel=0.03)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("compiled", [False, True])
def test_predicted_memory_is_the_measured_peak_of_a_gpu(compiled):
    model = {"layers": 6, "width": 256, "heads": 4, "attention": "sdpa"}
    config = config_of(model=model, training={"micro_batch": 8, "compile": compiled})
    model = build_model(config, VOCABULARY).cuda().bfloat16()
    model.compiled_loss = compiled
    if compiled:
        model.compile_blocks(dynamic=False)
    objective, x = inputs_of(config)
    x = x.to(torch.device("cuda"))

    def step():
        objective(model, x, 1.0).total.backward()

    step()
    measured = peak_bytes(step, torch.device("cuda"))
    predicted = memory_of(config, build_architecture(config, VOCABULARY), 1, "bf16", on_gpu=True)
    assert predicted.activations + predicted.transient == pytest.approx(measured, rel=0.1)


# ---- activations


def test_activations_grow_with_layers_and_shrink_with_checkpointing():
    kept = {}
    for layers, how in ((3, "none"), (6, "none"), (6, "selective"), (6, "full")):
        config = config_of(model={"layers": layers, "attention": "sdpa"})
        kept[layers, how] = activations_of_row(build_architecture(config, 27), torch.float32, how).denoiser
    one = kept[6, "none"] - kept[3, "none"]
    assert kept[3, "none"] == pytest.approx(one, rel=0.1)
    assert 4 * kept[6, "full"] < kept[6, "selective"] < 0.7 * kept[6, "none"]
    assert kept[6, "full"] >= 6 * 128 * 128 * 4  # the blocks' inputs


@pytest.mark.parametrize("compiled", [False, True])
def test_a_layer_that_is_computed_again_takes_what_it_would_have_kept(compiled):
    a = build_architecture(config_of(model={"layers": 1, "attention": "sdpa"}), 27)
    none, full = (activations_of_row(a, torch.float32, how, compiled) for how in ("none", "full"))
    assert full.denoiser + full.one_layer == pytest.approx(none.denoiser + none.one_layer)
    assert none.one_layer == 128 * 4 * 128 * 4  # the gradient of the MLP's hidden units, fp32


LAYERS = list(itertools.product(("layernorm", "rmsnorm"), ("gelu", "swiglu"), ("adaln", "add"), (0.0, 0.1)))
EVEN = [kinds for kinds in LAYERS if sum(kind in ("rmsnorm", "swiglu", "add", 0.1) for kind in kinds) % 2 == 0]


@pytest.mark.parametrize(("norm", "mlp", "injection", "dropout"), EVEN)  # any two of them in all ways
def test_compiled_blocks_keep_what_their_formula_says(norm, mlp, injection, dropout):
    """Bytes of a token and unit of width, in bf16, derived by hand: what the backward pass cannot do without.

    Ten vectors: what comes into attention and into the MLP, before and after its normalization; rotated queries and
    keys; their product with values, in which these lie (three wide); and what attention makes of them. Of the MLP,
    what its nonlinearity reads and makes. Gates need the products that they multiply, which the MLP's input is made of.
    With `selective`, a layer's input and its products, of which only a gate has any use for the last one.
    """
    model = {"layers": 1, "width": 128, "heads": 2, "attention": "auto", "norm": norm, "mlp": mlp, "dropout": dropout}
    a = build_architecture(config_of(model=model, latent={"injection": injection}), 27)
    keeping = {
        how: _of_compiled_blocks(a, torch.bfloat16, how, False)[0] / (a.row_length * a.width)
        for how in ("none", "selective")
    }
    hidden = 2 * mlp_width(a.width, a.mlp_ratio, mlp) / a.width
    gated, normalizers = (2 if injection == "adaln" else 0), 4 / a.head_width  # of attention, fp32 a head
    up = 2 if mlp == "swiglu" else 1
    masks, statistics = (2 if dropout else 0), (16 if norm == "layernorm" else 8) / a.width
    wanted = 10 * 2 + (up + 1) * hidden + gated + masks + normalizers + statistics
    assert keeping["none"] == pytest.approx(wanted, rel=0.01)
    assert keeping["selective"] == pytest.approx(6 * 2 + up * hidden + gated + normalizers, rel=0.01)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize(("how", "of_eager"), [("none", 0.95), ("selective", 1.01)])
def test_compiled_blocks_keep_what_the_compiler_is_asked_about(how, of_eager):
    """Counted on tensors without memory; here really compiled and run."""
    a = build_architecture(config_of(model={"layers": 1, "attention": "sdpa"}), 27)
    counted = activations_of_row(a, torch.float32, how, compiled=True).denoiser
    assert counted < of_eager * activations_of_row(a, torch.float32, how).denoiser
    measured = []
    for rows in (2, 4):
        model = VMD(a)
        model.checkpoint_activations(how)
        model.compile_blocks(dynamic=False)
        clean = torch.zeros(rows, a.row_length, dtype=torch.int64)
        z, ratio = torch.zeros(rows, a.groups, a.latent_width), torch.zeros(rows, a.groups)
        forward = functools.partial(model.denoiser, clean, z, None, ratio, clean)
        forward()
        measured.append(kept_bytes(forward))
    assert counted == pytest.approx((measured[1] - measured[0]) / 2, rel=0.02)


def test_a_conditional_prior_keeps_as_much_as_the_encoder():
    """Two networks of the same shapes are both compiled, and both counted."""
    kept = {}
    for prior in ("standard", "conditional"):
        a = build_architecture(config_of(latent={"width": 8, "prior": prior}, model={"layers": 4}), 27)
        kept[prior] = activations_of_row(a, torch.float32, "none", compiled=True).encoder
    assert kept["conditional"] == pytest.approx(2 * kept["standard"], rel=0.05)


@pytest.mark.parametrize("compiled", [False, True])
def test_flash_attention_inside_documents_keeps_no_mask(compiled):
    """As much of a token whatever the row's length; in fp32, which flash attention does not have, a mask as well."""
    of_token = {}
    for precision, length in itertools.product(("bf16", "fp32"), (128, 512)):
        changes = {"model": {"attention": "auto"}, "training": {"compile": compiled}}
        config = config_of(data={**PACKED, "row_length": length}, **changes)
        kept = kept_of(config, build_architecture(config, 27), precision, on_gpu=True)
        of_token[precision, length] = (kept.denoiser + kept.encoder) / length
    assert of_token["bf16", 512] == pytest.approx(of_token["bf16", 128], rel=0.01)
    assert of_token["fp32", 512] > of_token["fp32", 128] + 512 - 128


def kept_bytes(forward):
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        result = forward()
    events = profiler.profiler.kineto_results.events()
    del result
    return sum(event.nbytes() for event in events if event.name() == "[memory]")


def test_the_peak_of_a_process_is_its_own_and_does_not_fall():
    script = """
import torch
from vmd_scale.planning.peaks import peak_of_process
peaks = [peak_of_process(torch.device("cpu"))]
x = torch.ones(2**26)
peaks.append(peak_of_process(torch.device("cpu")))
del x
print(*peaks, peak_of_process(torch.device("cpu")))
"""
    larger = torch.ones(2**28)  # of the process that starts it
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    before, with_more, after = map(int, done.stdout.split())
    assert before < 4 * larger.numel()
    assert 2**28 <= with_more - before <= 1.1 * 2**28
    assert after == pytest.approx(with_more, rel=1e-3)  # the kernel counts pages roughly
