"""Plans in words: of one configuration, of several side by side, and of a run on the device at hand."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from vmd_scale.config import Config
from vmd_scale.model import Architecture
from vmd_scale.planning.activations import count_parameters, without_memory
from vmd_scale.planning.computation import FEW_TOKENS
from vmd_scale.planning.hardware import GIB
from vmd_scale.planning.memory import memory_of
from vmd_scale.planning.plan import CURVE, USABLE, Plan, Speed
from vmd_scale.planning.workload import flops_of

MIB = 2**20


def describe(plan: Plan, gpus: int) -> str:
    """The text of ``launchers/plan.py``."""
    config, gpu, flops, expected = plan.config, plan.gpu, plan.flops, plan.speed(gpus)
    shares = ", ".join(f"{name} {value / flops.total:.0%}" for name, value in asdict(flops).items() if value)
    lines = [
        f"parameters        denoiser {plan.denoiser:,}   encoder {plan.parameters - plan.denoiser:,}",
        f"tokens            {plan.tokens:,}, {plan.tokens / plan.parameters:,.1f} a parameter",
        f"FLOPs per token   {flops.total:,.0f} (forward and backward: {shares})",
        "",
        f"memory of a GPU in GiB, {gpus} x {gpu.name} ({gpu.memory / GIB:.0f} GiB, of which {USABLE:.0%} may be "
        f"filled), {plan.precision}, micro-batch {expected.micro_batch} of {expected.rows_in_step // gpus} rows a GPU, "
        f"checkpointing {config.training.activation_checkpointing}",
    ]
    parts = list(asdict(plan.memory(gpus)))
    lines.append(f"{'ZeRO':<6}" + "".join(f"{part:>12}" for part in (*parts, "total")) + "   largest micro  efficiency")
    for stage in range(4):
        speed = plan.speed(gpus, stage)
        memory = plan.memory(gpus, stage, speed.micro_batch)
        values = "".join(f"{value / GIB:>12.2f}" for value in (*asdict(memory).values(), memory.total))
        mark = _marks(
            {
                "configured": stage == config.zero_stage,
                TOO_LARGE: not speed.fits,
                "not with bf16": stage == 0 and plan.precision == "bf16",
            }
        )
        lines.append(f"{stage:<6}{values}{plan.largest_micro_batch(gpus, stage):>16}{speed.efficiency:>12.0%}{mark}")
    lines += [
        "",
        f"expected, computation at {plan.mfu:.0%} of {plan.peak_flops / 1e12:,.0f} TFLOP/s, "
        f"${gpu.price:.2f} a GPU-hour",
        "efficiency: share of a step spent computing, at this global batch; weak scaling: the same when the batch "
        "grows to at least one micro-batch per GPU",
        f"{'GPUs':>6}{'rows a step':>13}{'micro':>7}{'step s':>9}{'tokens/s':>13}{'a GPU':>10}{'MFU':>6}{'days':>10}"
        f"{'dollars':>11}{'efficiency':>12}{'weak scaling':>14}",
    ]
    curve = plan.curve(sorted({*CURVE, gpus}))
    for speed in curve:
        lines.append(
            f"{speed.gpus:>6}{speed.rows_in_step:>13,}{speed.micro_batch:>7}{speed.step_seconds:>9.3f}"
            f"{speed.tokens_per_second:>13,.0f}{speed.tokens_per_second / speed.gpus:>10,.0f}{speed.mfu:>6.0%}"
            f"{speed.days:>10,.2f}{speed.price:>11,.0f}{speed.efficiency:>12.0%}"
            f"{plan.weak_efficiency(speed.gpus):>14.0%}{_marks({'asked for': speed.gpus == gpus, **_doubts(speed)})}"
        )
    return "\n".join([*lines, *_notes([plan], [*curve, expected])])


def describe_several(plans: Mapping[str, Plan], gpus: int) -> str:
    """Configurations by name, a line each, on so many GPUs."""
    first, width = next(iter(plans.values())), max(map(len, plans))
    lines = [
        f"on {gpus} x {first.gpu.name} at ${first.gpu.price:.2f} a GPU-hour, computation at {first.mfu:.0%} of the "
        "peak; GiB are of a GPU",
        f"{'':<{width}}{'denoiser':>10}{'encoder':>10}{'tokens':>10}{'ZeRO':>6}{'micro':>7}{'checkpointing':>15}{'GiB':>7}"
        f"{'tokens/s':>13}{'a GPU':>10}{'days':>9}{'dollars':>11}",
    ]
    speeds = [plan.speed(gpus) for plan in plans.values()]
    for (name, plan), speed in zip(plans.items(), speeds, strict=True):
        lines.append(
            f"{name:<{width}}{_large(plan.denoiser):>10}{_large(plan.parameters - plan.denoiser):>10}"
            f"{_large(plan.tokens):>10}{plan.config.zero_stage:>6}{speed.micro_batch:>7}"
            f"{plan.config.training.activation_checkpointing:>15}"
            f"{plan.memory(gpus, micro_batch=speed.micro_batch).total / GIB:>7.1f}"
            f"{speed.tokens_per_second:>13,.0f}{speed.tokens_per_second / gpus:>10,.0f}{speed.days:>9,.2f}"
            f"{speed.price:>11,.0f}{_marks(_doubts(speed))}"
        )
    return "\n".join([*lines, *_notes(list(plans.values()), speeds)])


TOO_LARGE, OTHER_BATCH, FEW = "too large", "other batch", "few tokens"


def _doubts(speed: Speed) -> dict[str, bool]:
    return {TOO_LARGE: not speed.fits, OTHER_BATCH: not speed.divides, FEW: speed.few_tokens}


def _marks(marks: Mapping[str, bool]) -> str:
    found = [mark for mark, holds in marks.items() if holds]
    return f" <- {', '.join(found)}" if found else ""


def _notes(plans: Sequence[Plan], speeds: Sequence[Speed]) -> list[str]:
    """On the marks, and on what is not counted."""
    batches = ", ".join(sorted({f"{plan.config.training.global_batch:,}" for plan in plans}))
    notes = {
        f"{OTHER_BATCH}: these GPUs do not divide training.global_batch ({batches}), and a run is refused; planned is "
        "the next batch that they do, for as many tokens in fewer steps": any(not speed.divides for speed in speeds),
        f"{FEW}: less than {FEW_TOKENS:,} in a micro-batch; launching kernels takes time that is not counted, and "
        "speed may be far below": any(speed.few_tokens for speed in speeds),
        "evaluation, checkpoints, restarts and waiting for data are not counted": True,
        "documents are counted as whole rows": any(plan.config.documents > 1 for plan in plans),
    }
    return [f"note: {note}" for note, holds in notes.items() if holds] + _not_counted([plan.config for plan in plans])


def _not_counted(configs: Sequence[Config]) -> list[str]:
    """Notes on settings that a plan does not know of."""
    zero = [c.deepspeed.get("zero_optimization", {}) for c in configs]
    offloaded = any(
        (z.get(f"offload_{part}") or {}).get("device") == "cpu" for z in zero for part in ("optimizer", "param")
    )
    frozen = any(c.training.lora or c.training.trainable for c in configs)
    notes = {
        "frozen weights are counted as if they were trained": frozen,
        "what is offloaded, as if it were not": offloaded,
        "ZeRO++, as if it were off": any(map(_is_plus_plus, zero)),
        "linear layers in fp8, as if they were not": any(c.training.fp8 for c in configs),
        "what Muon computes of its matrices, not at all": any(c.training.optimizer == "muon" for c in configs),
    }
    return [f"note: {note}" for note, holds in notes.items() if holds]


def _is_plus_plus(zero: Mapping[str, Any]) -> bool:
    """Whether `zero_optimization` compresses what is sent, or keeps weights of stage 3 in each node."""
    compressed = any(value for key, value in zero.items() if key.startswith("zero_quantized"))
    return compressed or zero.get("zero_hpz_partition_size", 1) > 1


def _large(number: float) -> str:
    """1,234,000,000 as 1.23 B."""
    size, letter = next((s, x) for s, x in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1, "")) if number >= s or s == 1)
    return f"{number / size:.3g} {letter}"


def describe_run(
    config: Config, a: Architecture, world_size: int, precision: str, on_gpu: bool, peak: float | None = None
) -> str:
    """The text of ``pretrain.py --dry-run``: this run, on the device at hand."""
    flops, training = flops_of(config, a, on_gpu).total, config.training
    model = without_memory(a)
    denoiser, parameters = count_parameters(model.denoiser), count_parameters(model)
    tokens = training.steps * training.global_batch * config.data.row_length
    memory = memory_of(config, a, world_size, precision, on_gpu)
    lines = [
        f"parameters        denoiser {denoiser:,}   encoder {parameters - denoiser:,}",
        f"tokens            {tokens:,} in {training.steps:,} steps "
        f"of {training.global_batch} rows x {config.data.row_length}",
        f"FLOPs per token   {flops:,.0f} (forward and backward)",
        f"FLOPs in all      {flops * tokens:.3g}",
        f"memory per rank   {memory.total / MIB:,.0f} MiB on {world_size} rank(s), ZeRO stage {config.zero_stage}",
    ]
    lines += [f"    {name:<13} {value / MIB:>12,.1f} MiB" for name, value in asdict(memory).items()]
    if peak:
        hours = flops * tokens / (peak * world_size) / 3600
        lines.append(
            f"hours             {hours:,.2f} at the peak of this device ({peak / 1e12:,.2f} TFLOP/s a rank); "
            f"{hours / 0.4:,.2f} at 40 % of it"
        )
    return "\n".join([*lines, *_not_counted([config])])
