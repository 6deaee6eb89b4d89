"""Plans on paper against what PyTorch counts; hardware and communication; learning rates and hosts."""

import itertools
import json
from dataclasses import replace

import pytest
import torch
from planned_runs import PACKED, VOCABULARY, config_of, inputs_of
from torch.utils.flop_counter import FlopCounterMode

from vmd_scale.build import build_architecture, build_model
from vmd_scale.diffusion.corruption import INDEX_MULTIPLE
from vmd_scale.model import head
from vmd_scale.model.attention import block_diffusion_mask
from vmd_scale.planning import hardware, workload
from vmd_scale.planning.communication import Communication, all_gather, all_reduce, communication_of
from vmd_scale.planning.computation import passes_seconds, update_seconds
from vmd_scale.planning.describe import describe, describe_several
from vmd_scale.planning.flops import FlopsPerToken
from vmd_scale.planning.hardware import GPUS, peak_flops
from vmd_scale.planning.plan import Plan
from vmd_scale.planning.workload import denoiser_passes, masked_share
from vmd_scale.planning.zero import Zero
from vmd_scale.training.launch import first_host
from vmd_scale.training.optim import learning_rate_at

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


# ---- computation of a step


def flops_of_step(config, fused=True):
    """Counted, of a micro-batch; and what a plan takes for it, in seconds at 1 FLOP/s."""
    model = build_model(config, VOCABULARY)
    model.fused_loss = fused
    model.checkpoint_activations(config.training.activation_checkpointing)
    objective, x = inputs_of(config)
    # In place, PyTorch does not count it.
    in_place = {torch.ops.aten.addmm_: lambda total, a, b, **_: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        objective(model, x, 1.0).total.backward()
    a, zero = build_architecture(config, VOCABULARY), Zero.of(config, "fp32")
    return counter.get_total_flops(), passes_seconds(config, a, zero, config.training.micro_batch, 1.0)


ALL_MASKED = {"diffusion": {"steps": [1]}}


def test_the_fused_loss_computes_the_head_three_times_and_the_recomputed_one_four(monkeypatch):
    for module in (head, workload):
        monkeypatch.setattr(module, "CHUNK_ELEMENTS", 100 * VOCABULARY)
    found = {}
    for stage in (1, 3):
        config = config_of(**ALL_MASKED, deepspeed={"zero_optimization": {"stage": stage}})
        found[stage], planned = flops_of_step(config, fused=stage < 3)
        assert sum(planned) == pytest.approx(found[stage], rel=1e-9)
    flops = workload.flops_of(config, build_architecture(config, VOCABULARY))
    assert found[3] - found[1] == pytest.approx(flops.head / 3 * 8 * 128, rel=1e-9)


@pytest.mark.parametrize("rows", [1, 5])
def test_importance_weighting_computes_what_fills_a_micro_batch_and_the_head_of_large_ones_four_times(
    rows, monkeypatch
):
    changes = {
        "diffusion": {"objective": "iw", "steps": [1, 2, 4], "importance_samples": 3},
        "training": {"micro_batch": rows, "global_batch": rows},
    }
    config = config_of(**changes)
    for elements in (2**25, 100 * VOCABULARY):
        for module in (head, workload):
            monkeypatch.setattr(module, "CHUNK_ELEMENTS", elements)
        found, planned = flops_of_step(config)
        assert sum(planned) == pytest.approx(found, rel=0.01)
    assert rows * denoiser_passes(config, rows) == pytest.approx(3 * -(-rows // 3) * 7)


def test_full_checkpointing_computes_blocks_again_and_the_head_not():
    none, full = (
        flops_of_step(config_of(**ALL_MASKED, training={"activation_checkpointing": how})) for how in ("none", "full")
    )
    assert sum(full[1]) == pytest.approx(full[0], rel=0.01)
    assert sum(none[1]) == pytest.approx(none[0], rel=1e-9)
    assert full[1][0] == none[1][0]  # the forward pass


def test_the_update_moves_bytes_by_stage():
    """By hand, of a parameter: what each micro-batch adds, what is clipped, AdamW, copies and the average."""
    gpu = replace(GPUS["h100"], hbm=1 / 0.8)  # a byte a second
    of = {}
    for precision, stage in (("fp32", 0), ("bf16", 1), ("bf16", 2), ("bf16", 3)):
        zero = Zero.of(config_of(deepspeed={"zero_optimization": {"stage": stage}}), precision)
        of[stage] = update_seconds(zero, 8, 3, True, 4, gpu) / 8
    assert of[0] == 3 * 12 + 12 + 28 + 12
    assert of[1] == 3 * 10 + (12 + 28 + 6 + 12) / 4
    assert of[2] == of[3] == 3 * (4 + 10 / 4) + (12 + 28 + 6 + 12) / 4
    muon = config_of(deepspeed={"zero_optimization": {"stage": 1}}, training={"optimizer": "muon"})
    assert update_seconds(Zero.of(muon, "bf16"), 8, 3, True, 4, gpu) / 8 == of[1] + 12 * 3 / 4  # clips all of them


# ---- communication


def sent_by(stage, precision="fp32", parameters=10**9, micro_batches=1, ranks=64, **deepspeed):
    config = config_of(deepspeed={"zero_optimization": {"stage": stage}, **deepspeed})
    return communication_of(Zero.of(config, precision), parameters, micro_batches, 12, ranks, GPUS["h100"])


def test_collectives_cost_what_their_bytes_and_steps_cost():
    gpu = GPUS["h100"]
    assert all_reduce(1e9, 1, gpu) == all_gather(1e9, 1, gpu) == 0
    assert sent_by(1, ranks=1) == (0, 0, 0)
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
    once = all_reduce(4e9, 64, GPUS["h100"])
    updated = all_gather(4e9, 64, GPUS["h100"])
    assert sum(sent_by(1, micro_batches=4)) == sum(sent_by(2)) == pytest.approx(once + updated)
    assert sum(sent_by(2, micro_batches=4)) == pytest.approx(4 * once + updated)


def test_stage_1_in_bf16_sends_each_rank_its_part_alone():
    """Half of what a sum on all ranks takes; not where DeepSpeed itself sums, nor for Muon's whole matrices."""
    gpu = GPUS["h100"]
    updated = all_gather(2e9, 64, gpu)
    assert sum(sent_by(1, "bf16")) == pytest.approx(all_gather(4e9, 64, gpu) + updated)
    rounded = sum(sent_by(1, "bf16", communication_data_type="bf16"))
    assert rounded == pytest.approx(all_reduce(2e9, 64, gpu) + updated)
    muon = Zero.of(config_of(training={"optimizer": "muon"}), "bf16")
    assert sum(communication_of(muon, 10**9, 1, 12, 64, gpu)) == pytest.approx(all_reduce(4e9, 64, gpu) + updated)


def test_what_is_sent_takes_as_many_bytes_as_it_is_told_to():
    for stage in (2, 3):
        wide, narrow = (sent_by(stage, "bf16", communication_data_type=kind) for kind in ("fp32", "bf16"))
        assert wide.forward == narrow.forward
        twice, once = (sum(sent) - 2 * sent.forward for sent in (wide, narrow))  # but for weights
        updated = all_gather(2e9, 64, GPUS["h100"]) if stage == 2 else 0.0
        assert twice - updated == pytest.approx(2 * (once - updated), rel=0.05)


def test_gathers_hide_behind_the_pass_that_they_are_for():
    sent = Communication(forward=3.0, backward=5.0, alone=1.0)
    assert sent.exposed(forward=1.0, backward=10.0, hidden=0.7) == pytest.approx(9 - 1 - 3.5)
    assert sent.exposed(forward=10.0, backward=2.0, hidden=0.7) == pytest.approx(9 - 2.1 - 2)
    assert sent.exposed(forward=10.0, backward=10.0, hidden=0.0) == 9


def test_only_what_deepspeed_overlaps_is_hidden():
    """And the last bucket of gradients is not: it is full when the backward pass ends."""

    def exposed(stage, precision, overlaps, bucket):
        zero = {"stage": stage, "overlap_comm": overlaps, "reduce_bucket_size": bucket}
        config = config_of(
            model={"layers": 12, "width": 768, "heads": 12, "attention": "auto"},
            training={"global_batch": 512, "micro_batch": 4},
            deepspeed={"zero_optimization": zero},
        )
        return Plan(config, build_architecture(config, VOCABULARY), GPUS["h100"], precision).speed(64).exposed_seconds

    for stage, precision in ((1, "fp32"), (2, "fp32"), (2, "bf16"), (3, "bf16")):
        assert exposed(stage, precision, True, 10**6) < 0.9 * exposed(stage, precision, False, 10**6)
    assert exposed(1, "bf16", True, 10**6) == exposed(1, "bf16", False, 10**6)
    for stage, precision in ((1, "fp32"), (2, "bf16")):
        assert exposed(stage, precision, True, 10**9) == exposed(stage, precision, False, 10**9)


# ---- the whole plan


def plan_of(**changes):
    config = config_of(model={"attention": "auto"}, training={"global_batch": 64, "micro_batch": 4}, **changes)
    return Plan(config, build_architecture(config, VOCABULARY), GPUS["h100"], "bf16")


def test_the_largest_micro_batch_just_fits():
    config = config_of(model={"attention": "auto"}, training={"global_batch": 2**24, "micro_batch": 4})
    plan = Plan(config, build_architecture(config, VOCABULARY), GPUS["h100"], "bf16")
    for stage in range(4):
        largest = plan.largest_micro_batch(8, stage)
        room = 0.92 * plan.gpu.memory
        assert plan.memory(8, stage, largest).total <= room < plan.memory(8, stage, largest + 1).total
    assert plan.largest_micro_batch(8, 3) >= plan.largest_micro_batch(8, 0)
    assert plan_of().largest_micro_batch(16) == 64 / 16  # a GPU has no more rows in a step


def test_a_plan_adds_up():
    plan = plan_of()
    one, eight = plan.speed(1), plan.speed(8)
    assert one.exposed_seconds == 0 < one.update_seconds
    computing = 64 * 128 * plan.flops.total / (0.4 * 989e12)
    assert one.step_seconds == pytest.approx(computing + one.update_seconds)
    assert one.tokens_per_second == pytest.approx(64 * 128 / one.step_seconds)
    assert one.efficiency == pytest.approx(computing / one.step_seconds)
    assert one.days == pytest.approx(100 * 64 * 128 / one.tokens_per_second / 86_400)
    assert one.price == pytest.approx(one.days * 24 * plan.gpu.price)
    assert eight.tokens_per_second < 8 * one.tokens_per_second
    assert all(a.efficiency >= b.efficiency for a, b in itertools.pairwise(plan.curve()))
    for speed in (one, eight):
        assert speed.mfu == pytest.approx(0.4 * speed.efficiency)
    found = json.loads(json.dumps(plan.to_dict(8)))
    assert found["zero_stages"]["1"]["total"] == sum(found["zero_stages"]["1"]["memory"].values())
    assert found["parameters"]["denoiser"] + found["parameters"]["encoder"] == plan.parameters


def test_fp32_is_planned_at_its_own_peak():
    config = plan_of().config
    fast, slow = (Plan(config, plan_of().architecture, GPUS["h100"], kind) for kind in ("bf16", "fp32"))
    assert (fast.peak_flops, slow.peak_flops) == (989e12, 67e12)
    computing = [plan.speed(1).step_seconds - plan.speed(1).update_seconds for plan in (fast, slow)]
    assert computing[1] / computing[0] == pytest.approx(989 / 67)
    assert slow.speed(1).mfu == pytest.approx(0.4 * slow.speed(1).efficiency)


def test_a_plan_divides_the_batch_as_a_run_would():
    """64 rows in micro-batches of 4: with more ranks they become smaller, then the batch grows to a row each."""
    plan = plan_of()
    shares = {gpus: (speed.rows_in_step, speed.micro_batch) for gpus in (1, 8, 16, 32, 24, 128)
              for speed in [plan.speed(gpus)]}  # fmt: skip
    assert shares == {1: (64, 4), 8: (64, 4), 16: (64, 4), 32: (64, 2), 24: (72, 3), 128: (128, 1)}


def marked(text, mark):
    """GPUs of the rows of the second table that have this mark."""
    rows = text.split("weak scaling", 2)[2].splitlines()
    return [int(row.split()[0]) for row in rows if mark in row and row.split()[0].isdigit()]


def test_gpus_that_no_run_would_take_are_marked():
    plan = plan_of()
    assert marked(describe(plan, 24), "other batch") == [24, 256, 512, 1024, 2048, 4096]
    assert marked(describe(plan, 32), "other batch") == [256, 512, 1024, 2048, 4096]
    for text in (describe(plan, 24), describe_several({"small": plan}, 24)):
        assert "note: other batch" in text
    assert "other batch" not in describe_several({"small": plan}, 32)


def test_few_tokens_are_marked():
    """Micro-batches of 32 rows of 128, of 1,024 rows: less from 64 GPUs on."""
    config = config_of(model={"attention": "auto"}, training={"global_batch": 1024, "micro_batch": 32})
    plan = Plan(config, build_architecture(config, VOCABULARY), GPUS["h100"], "bf16")
    assert marked(describe(plan, 8), "few tokens") == [64, 256, 512, 1024, 2048, 4096]
    assert "note: few tokens" not in describe_several({"small": plan}, 8)
    assert "note: few tokens" in describe_several({"small": plan}, 64)


def test_memory_and_speed_are_of_one_micro_batch():
    """Of 512 rows a GPU where the batch has but one for each."""
    config = config_of(model={"attention": "auto"}, training={"global_batch": 1024, "micro_batch": 512})
    plan = Plan(config, build_architecture(config, VOCABULARY), GPUS["h100"], "bf16")
    text, found = describe(plan, 1024), plan.to_dict(1024)
    assert "micro-batch 1 of 1 rows a GPU" in text
    (configured,) = (line for line in text.splitlines() if "configured" in line)
    assert f"{plan.memory(1024, micro_batch=1).total / 2**30:.2f} " in configured
    assert f"{plan.memory(1024).total / 2**30:.2f} " not in configured
    assert found["zero_stages"]["1"]["total"] == plan.memory(1024, micro_batch=1).total
    assert found["zero_stages"]["1"]["largest_micro_batch"] == 1


def test_side_by_side_a_line_is_of_one_micro_batch():
    """Of 512 rows a GPU where the batch has but one for each."""
    config = config_of(model={"attention": "auto"}, training={"global_batch": 1024, "micro_batch": 512})
    plan = Plan(config, build_architecture(config, VOCABULARY), GPUS["h100"], "bf16")
    assert plan.speed(1024).micro_batch == 1
    (line,) = (line for line in describe_several({"small": plan}, 1024).splitlines() if line.startswith("small"))
    assert f"{plan.memory(1024, micro_batch=1).total / 2**30:.1f} " in line
    assert f"{plan.memory(1024).total / 2**30:.1f} " not in line


def test_a_plan_says_what_it_does_not_count():
    def zero(**settings):
        return {"deepspeed": {"zero_optimization": {"stage": 3, **settings}}}

    for changes, words in (
        ({}, None),
        (zero(zero_quantized_weights=False, zero_hpz_partition_size=1), None),
        (zero(offload_param={"device": "cpu"}), "offloaded"),
        (zero(zero_quantized_weights=True), "ZeRO++"),
        (zero(zero_hpz_partition_size=8), "ZeRO++"),
        ({"training": {"init_from": "w.pt", "lora": {"rank": 2}}}, "frozen weights"),
        ({"training": {"fp8": True}}, "fp8"),
        ({"training": {"optimizer": "muon"}}, "Muon"),
        ({"data": PACKED}, "documents"),
    ):
        config = config_of(
            **{**changes, "training": {"global_batch": 2**17, "micro_batch": 32, **changes.get("training", {})}}
        )
        plan = Plan(config, build_architecture(config, VOCABULARY), GPUS["h100"], "bf16")
        always, *notes = (line for line in describe(plan, 8).splitlines() if line.startswith("note: "))
        assert "evaluation, checkpoints, restarts and waiting for data" in always
        assert len(notes) == (words is not None)
        assert all(words in note for note in notes)


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
    assert "<- too large" in alone


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
    ("name", "bf16", "fp32"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12, 67e12),
        ("NVIDIA H100 PCIe", 756e12, 51e12),
        ("NVIDIA H100 NVL", 835e12, 60e12),
        ("NVIDIA H200", 989e12, 67e12),
        ("NVIDIA H200 NVL", 835e12, 60e12),
        ("NVIDIA L40", 181e12, 90.5e12),
        ("NVIDIA L40S", 362e12, 91.6e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, 19.5e12),
        ("NVIDIA RTX A1000", 2.0, 1.0),  # not known: measured
    ],
)
def test_a_card_has_its_own_peak_not_that_of_a_shorter_name(name, bf16, fp32, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(hardware, "measured_flops", lambda device, precision: {"bf16": 2.0, "fp32": 1.0}[precision])
    device = torch.device("cuda")
    assert (peak_flops(device), peak_flops(device, "bf16"), peak_flops(device, "fp32")) == (bf16, bf16, fp32)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("node1", "node1"), ("gpu[007-010,12],x1", "gpu007"), ("a-b[3,5]", "a-b3"), ("n1,n2", "n1")],
)
def test_first_host_of_a_slurm_node_list(nodes, first):
    assert first_host(nodes) == first
