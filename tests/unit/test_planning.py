"""Plans on paper against what PyTorch counts and the allocator sees; learning rates; where a rank finds its master."""

import functools
import itertools
import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from vmd_scale.build import build_architecture, build_model, build_objective
from vmd_scale.config_file import parse_config
from vmd_scale.diffusion.corruption import INDEX_MULTIPLE
from vmd_scale.model import VMD, head
from vmd_scale.model.attention import block_diffusion_mask
from vmd_scale.model.head import CHUNK_ELEMENTS, _nll_and_gradient
from vmd_scale.planning import hardware
from vmd_scale.planning.activations import activations_of_row, count_parameters, without_memory
from vmd_scale.planning.communication import all_gather, all_reduce, seconds_per_step
from vmd_scale.planning.describe import describe, describe_several
from vmd_scale.planning.flops import FlopsPerToken
from vmd_scale.planning.hardware import GPUS, peak_flops
from vmd_scale.planning.memory import logits_bytes, memory_of
from vmd_scale.planning.peaks import peak_bytes
from vmd_scale.planning.plan import Plan
from vmd_scale.planning.workload import denoiser_passes, masked_share
from vmd_scale.training.launch import first_host
from vmd_scale.training.optim import learning_rate_at

VOCABULARY = 600


def config_of(**changes):
    values = {
        "data": {"corpus": "text", "tokenizer": "text8", "row_length": 128, "shards": "s"},
        "model": {"layers": 2, "width": 128, "heads": 2, "attention": "reference"},
        "latent": {"width": 8},
        "diffusion": {"objective": "nelbo", "steps": ["inf"]},
        "training": {"steps": 100, "global_batch": 8, "micro_batch": 8, "learning_rate": 1.0, "warmup_steps": 10},
    }
    for section, keys in changes.items():
        values[section] = {**values.get(section, {}), **keys}
    return parse_config(values, "test")


def inputs_of(config, vocabulary=VOCABULARY):
    rows, length = config.training.micro_batch, config.data.row_length
    clean = torch.randint(0, vocabulary, (rows, length), generator=torch.Generator().manual_seed(0))
    everything = torch.ones_like(clean, dtype=torch.bool)
    objective, attend = build_objective(config, vocabulary), None
    if config.documents > 1:
        of_each = torch.arange(1, config.documents + 1).repeat_interleave(length // config.documents)
        attend = of_each.int().expand(rows, -1)
    return objective, objective.prepare(clean, everything, attend, 0, torch.arange(rows), rows)


PACKED = {"packing": "document", "documents_per_row": 4}


# ---- FLOPs


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"latent": {"width": 0}},
        {"diffusion": {"steps": [1, 4]}},
        {"model": {"layers": 4, "mlp": "swiglu", "mlp_ratio": 3.3}},
        {"model": {"time_conditioning": True}},
        {"latent": {"injection": "add", "encoder_layers": 2, "encoder_width": 192}},
        {"latent": {"prior": "conditional"}},
        {"latent": {"scope": "block"}, "diffusion": {"block_size": 32}},
        {"diffusion": {"objective": "iw", "steps": [1, 4], "importance_samples": 3}},
        {"data": PACKED},
        {"data": PACKED, "latent": {"injection": "add", "prior": "conditional"}},
        {"data": PACKED, "latent": {"width": 0}},
    ],
    ids=[
        *("vmd", "mdm", "small T", "swiglu", "time", "add", "conditional prior", "blocks", "importance weighted"),
        *("documents", "documents, add", "documents, mdm"),
    ],
)
def test_flops_per_token_are_what_a_training_step_computes(changes):
    config = config_of(**changes)
    model = build_model(config, VOCABULARY)
    objective, x = inputs_of(config)
    counter = FlopCounterMode(display=False)
    with counter:
        objective(model, x, 1.0).total.backward()
    share = len(x.index) / x.clean.numel()  # what was masked in this batch, instead of its mean
    passes = 1 if x.owner is None else 3 * len(x.owner) / 8
    expected = FlopsPerToken.of(build_architecture(config, VOCABULARY), share, passes).total * x.clean.numel()
    # iw sums paths by a small product of its own.
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-3 if x.owner is not None else 1e-9)
    assert denoiser_passes(config) == pytest.approx(passes, rel=0.2)
    assert masked_share(config) == pytest.approx(share, abs=INDEX_MULTIPLE / x.clean.numel() + 0.1)


@pytest.mark.parametrize("groups", [1, 2, 16])
def test_flops_where_attention_skips_what_is_hidden_are_those_of_the_pairs_that_the_mask_allows(groups):
    length = 128
    block = {"latent": {"scope": "block"}, "diffusion": {"block_size": length // groups}} if groups > 1 else {}
    a = build_architecture(config_of(**block), VOCABULARY)
    dense, found = FlopsPerToken.of(a, 0.5), FlopsPerToken.of(a, 0.5, skips=True)
    assert (found.head, found.encoder, found.latent) == (dense.head, dense.encoder, dense.latent)
    pairs = 0.0
    if groups > 1:
        hidden = ~block_diffusion_mask(length, groups, None, "reference", torch.device("cpu"))
        pairs = float(hidden.sum())
    assert dense.denoiser - found.denoiser == pytest.approx(3 * a.layers * 4 * a.width * pairs / length)


@pytest.mark.parametrize("latent", [0, 16])
def test_flops_where_attention_stays_inside_documents_are_those_of_shorter_rows(latent):
    a = build_architecture(config_of(latent={"width": latent}, diffusion={"objective": "nelbo"}), VOCABULARY)
    found, shorter = FlopsPerToken.of(a, 0.5, attended=20), FlopsPerToken.of(replace(a, row_length=20), 0.5)
    assert found.denoiser == shorter.denoiser < FlopsPerToken.of(a, 0.5).denoiser
    assert found.head == shorter.head
    pooled = 3 * 2 * a.encoder_width * 2 * latent
    assert found.encoder - pooled / a.row_length == pytest.approx(shorter.encoder - pooled / 20)


def test_the_fused_loss_computes_the_head_three_times_and_the_recomputed_one_four(monkeypatch):
    config = config_of()
    model, found = build_model(config, VOCABULARY), []
    objective, x = inputs_of(config)
    monkeypatch.setattr(head, "CHUNK_ELEMENTS", 100 * VOCABULARY)
    for model.fused_loss in (True, False):
        with FlopCounterMode(display=False) as counter:
            objective(model, x, 1.0).total.backward()
        found.append(counter.get_total_flops())
    flops = FlopsPerToken.of(build_architecture(config, VOCABULARY), len(x.index) / x.clean.numel())
    assert found[0] == pytest.approx(flops.total * x.clean.numel(), rel=1e-9)
    assert found[1] - found[0] == pytest.approx(flops.head / 3 * x.clean.numel(), rel=1e-9)


# ---- memory


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


SHAPES = {
    "characters": (27, {}),
    "mdm": (27, {"latent": {"width": 0}}),
    "large vocabulary": (20_000, {"training": {"micro_batch": 24, "global_batch": 24}}),
    "selective": (27, {"training": {"activation_checkpointing": "selective"}}),
    "swiglu": (27, {"model": {"layers": 4, "mlp": "swiglu", "norm": "rmsnorm", "attention": "sdpa"}}),
    "blocks": (27, {"latent": {"scope": "block"}, "diffusion": {"block_size": 32}}),
    "documents": (27, {"data": PACKED}),
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
    assert predicted.activations + predicted.logits == pytest.approx(measured, rel=0.1)


def test_uncompiled_logits_in_bf16_are_fp32_twice():
    """Above the logits themselves; the fused loss of a chunk, as it is without a compiler."""
    logits, targets, weight = torch.randn(64, 4096).bfloat16(), torch.zeros(64, dtype=torch.int64), torch.ones(64)
    measured = peak_bytes(lambda: _nll_and_gradient(logits, targets, weight), torch.device("cpu"))
    a = replace(build_architecture(config_of(), VOCABULARY), vocab_size=4096, row_length=2**15, width=1)
    one, two = (logits_bytes(a, rows, 0.5, 2, False, True, 1, compiled=False) for rows in (1, 2))
    assert one == two  # a chunk, whatever the batch
    assert one / CHUNK_ELEMENTS - 2 == pytest.approx(measured / logits.numel(), rel=0.02)


def test_the_optimizer_keeps_what_the_plan_says():
    config = config_of(deepspeed={"zero_optimization": {"stage": 0}})
    model = build_model(config, VOCABULARY)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    kept = peak_bytes(optimizer.step, torch.device("cpu"))
    predicted = memory_of(config, build_architecture(config, VOCABULARY), 1, "fp32", on_gpu=False)
    assert predicted.optimizer == pytest.approx(kept, rel=0.01)


def test_activations_grow_with_layers_and_shrink_with_checkpointing():
    kept = {}
    for layers, how in ((3, "none"), (6, "none"), (6, "selective"), (6, "full")):
        config = config_of(model={"layers": layers, "attention": "sdpa"})
        kept[layers, how] = activations_of_row(build_architecture(config, 27), torch.float32, how).denoiser
    one = kept[6, "none"] - kept[3, "none"]
    assert kept[3, "none"] == pytest.approx(one, rel=0.1)
    assert 4 * kept[6, "full"] < kept[6, "selective"] < 0.7 * kept[6, "none"]
    assert kept[6, "full"] >= 6 * 128 * 128 * 4  # the blocks' inputs


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_compiled_blocks_keep_what_the_compiler_is_asked_about():
    """Counted on tensors without memory; here really compiled and run."""
    a = build_architecture(config_of(model={"layers": 1, "attention": "sdpa"}), 27)
    counted = activations_of_row(a, torch.float32, "none", compiled=True).denoiser
    assert counted < 0.95 * activations_of_row(a, torch.float32, "none").denoiser
    measured = []
    for rows in (2, 4):
        model = VMD(a)
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


def test_a_bucket_is_allocated_whole():
    """However few parameters there are, where the user asks for a large one."""
    for stage in (1, 2, 3):
        of = {}
        for size in (10**6, 10**9):
            zero = {"stage": stage, "reduce_bucket_size": size}
            config = config_of(deepspeed={"zero_optimization": zero}, training={"precision": "fp32"})
            of[size] = memory_of(config, build_architecture(config, VOCABULARY), 4, "fp32", on_gpu=True).buffers
        assert of[10**9] - of[10**6] == pytest.approx(4e9, rel=0.01)


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
    assert predicted.activations + predicted.logits == pytest.approx(measured, rel=0.1)


# ---- communication and the whole plan


def test_collectives_cost_what_their_bytes_and_steps_cost():
    gpu = GPUS["h100"]
    assert all_reduce(1e9, 1, gpu) == all_gather(1e9, 1, gpu) == 0
    assert seconds_per_step(1, 1e9, 1e9, 1, 12, 1, gpu) == (0, 0)
    inside = 2 * 7 / 8 * 1e9 / (0.8 * gpu.inside)
    assert all_reduce(1e9, 8, gpu) == pytest.approx(inside, rel=0.02)
    assert all_reduce(1e9, 8, gpu) == pytest.approx(2 * all_gather(1e9, 8, gpu))
    # On many nodes the slower of the two nets decides, an eighth of the bytes through each port: 2 x 1/8 of them.
    assert all_reduce(1e10, 512, gpu) == pytest.approx(2 * 1e10 / 8 / (0.8 * gpu.between), rel=0.02)
    assert all_reduce(1e9, 16, gpu) > all_reduce(1e9, 8, gpu)
    # Large messages: bandwidth alone. Small ones over many nodes: latency, which a tree keeps to its logarithm.
    assert all_reduce(1e10, 1024, gpu) < 1.3 * all_reduce(1e10, 64, gpu)
    assert all_reduce(1e3, 4096, gpu) < 4 * all_reduce(1e3, 64, gpu)
    assert all_gather(1e3, 4096, gpu) > 20 * all_gather(1e3, 64, gpu)


def test_stage_2_sums_the_gradients_of_every_micro_batch_on_all_ranks():
    """As DeepSpeed does it: no less than stage 1 with one micro-batch, and that many times more with several."""
    gpu = GPUS["h100"]
    one, four = (seconds_per_step(2, 1e9, 2e9, micro_batches, 12, 64, gpu)[0] for micro_batches in (1, 4))
    assert one == seconds_per_step(1, 1e9, 2e9, 4, 12, 64, gpu)[0] == all_reduce(2e9, 64, gpu)
    assert four == 4 * one


def plan_of(**changes):
    config = config_of(model={"attention": "auto"}, training={"global_batch": 64, "micro_batch": 4}, **changes)
    return Plan(config, build_architecture(config, VOCABULARY), GPUS["h100"], "bf16")


def test_the_largest_micro_batch_just_fits():
    plan = plan_of()
    for stage in range(4):
        largest = plan.largest_micro_batch(8, stage)
        room = 0.92 * plan.gpu.memory
        assert plan.memory(8, stage, largest).total <= room < plan.memory(8, stage, largest + 1).total
    assert plan.largest_micro_batch(8, 3) >= plan.largest_micro_batch(8, 0)


def test_a_plan_adds_up():
    plan = plan_of()
    one, eight = plan.speed(1), plan.speed(8)
    assert one.efficiency == 1
    assert one.tokens_per_second == pytest.approx(0.4 * 989e12 / plan.flops.total)
    assert one.days == pytest.approx(100 * 64 * 128 / one.tokens_per_second / 86_400)
    assert one.price == pytest.approx(one.days * 24 * plan.gpu.price)
    assert eight.tokens_per_second < 8 * one.tokens_per_second
    large, full = (
        Plan(config, build_architecture(config, VOCABULARY), GPUS["h100"], "bf16").speed
        for config in (
            config_of(
                model={"layers": 12, "width": 768, "heads": 12},
                training={"global_batch": 512, "micro_batch": 64, "activation_checkpointing": kind},
            )
            for kind in ("none", "full")
        )
    )
    assert large(1).tokens_per_second < large(8).tokens_per_second < 8 * large(1).tokens_per_second
    assert full(1).tokens_per_second == pytest.approx(0.75 * large(1).tokens_per_second)
    assert all(a.efficiency >= b.efficiency for a, b in itertools.pairwise(plan.curve()))
    assert one.mfu == pytest.approx(0.4)
    assert eight.mfu == pytest.approx(0.4 * eight.efficiency)
    found = json.loads(json.dumps(plan.to_dict(8)))
    assert found["zero_stages"]["1"]["total"] == sum(found["zero_stages"]["1"]["memory"].values())
    assert found["parameters"]["denoiser"] + found["parameters"]["encoder"] == plan.parameters


def test_a_plan_divides_the_batch_as_a_run_would():
    """64 rows in micro-batches of 4: with more ranks they become smaller, then the batch grows to a row each."""
    plan = plan_of()
    shares = {gpus: (speed.rows_in_step, speed.micro_batch) for gpus in (1, 8, 16, 32, 24, 128)
              for speed in [plan.speed(gpus)]}  # fmt: skip
    assert shares == {1: (64, 4), 8: (64, 4), 16: (64, 4), 32: (64, 2), 24: (72, 3), 128: (128, 1)}


def test_side_by_side_a_line_is_of_one_micro_batch():
    """Of 512 rows a GPU where the batch has but one for each."""
    config = config_of(model={"attention": "auto"}, training={"global_batch": 1024, "micro_batch": 512})
    plan = Plan(config, build_architecture(config, VOCABULARY), GPUS["h100"], "bf16")
    assert plan.speed(1024).micro_batch == 1
    line = describe_several({"small": plan}, 1024).splitlines()[-1]
    assert f"{plan.memory(1024, micro_batch=1).total / 2**30:.1f} " in line
    assert f"{plan.memory(1024).total / 2**30:.1f} " not in line


def test_a_plan_says_what_it_does_not_count():
    offload = {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}
    frozen = {"init_from": "w.pt", "lora": {"rank": 2}}
    for changes, words in (
        ({}, []),
        ({"deepspeed": offload}, ["offloaded"]),
        ({"training": frozen}, ["frozen weights"]),
    ):
        config = config_of(**changes)
        plan = Plan(config, build_architecture(config, VOCABULARY), GPUS["h100"], "bf16")
        notes = [line for line in describe(plan, 8).splitlines() if line.startswith("note: ")]
        assert len(notes) == len(words)
        assert all(word in note for word, note in zip(words, notes, strict=True))


def test_what_does_not_fit_is_marked():
    values = {"layers": 48, "width": 4096, "heads": 32}
    config = config_of(model={"attention": "auto", **values}, training={"global_batch": 64, "micro_batch": 1})
    plan = Plan(config, build_architecture(config, VOCABULARY), GPUS["h100"], "bf16")
    assert not plan.speed(1).fits
    assert plan.speed(64, stage=3).fits
    text = describe(plan, 64)
    stages = {line[0]: line for line in text.splitlines() if line[:1].isdigit()}
    assert "too large" in stages["0"]
    assert "not with bf16" in stages["0"]
    assert "too large" not in stages["3"]
    alone = next(line for line in text.splitlines() if line.startswith(f"{1:>6}"))
    assert alone.endswith("too large")


def test_a_plan_counts_every_parameter_once():
    config = config_of()
    parameters = sum(p.numel() for p in build_model(config, VOCABULARY).parameters())
    assert count_parameters(without_memory(build_architecture(config, VOCABULARY))) == parameters


# ---- learning rate and hosts


@pytest.mark.parametrize(("schedule", "last"), [("constant", 1.0), ("cosine", 0.1), ("linear", 0.1)])
def test_the_learning_rate_is_a_pure_function_of_the_step(schedule, last):
    training = config_of(training={"lr_schedule": schedule, "final_lr_ratio": 0.1}).training
    rates = [learning_rate_at(step, training) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[10] == pytest.approx(1.0)
    assert rates[100] == pytest.approx(last)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA RTX A1000", 1.0),  # not known: measured
    ],
)
def test_a_card_has_its_own_peak_not_that_of_a_shorter_name(name, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(hardware, "measured_flops", lambda device: 1.0)
    assert peak_flops(torch.device("cuda")) == peak


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("node1", "node1"), ("gpu[007-010,12],x1", "gpu007"), ("a-b[3,5]", "a-b3"), ("n1,n2", "n1")],
)
def test_first_host_of_a_slurm_node_list(nodes, first):
    assert first_host(nodes) == first
