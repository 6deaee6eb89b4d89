"""The whole plan of a run: fits it, how fast, how long, how dear, on how many GPUs."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vmd_scale.config import Config
from vmd_scale.model import Architecture
from vmd_scale.planning.activations import Kept, count_parameters, kept_of, without_memory
from vmd_scale.planning.communication import seconds_per_step
from vmd_scale.planning.flops import FlopsPerToken
from vmd_scale.planning.hardware import GPU
from vmd_scale.planning.memory import Memory, memory_of
from vmd_scale.planning.workload import flops_of

MIB, GIB = 2**20, 2**30
USABLE = 0.92  # of a GPU's memory: the rest goes to the CUDA context, the collectives and fragmentation
ATTAINED_MFU = 0.4  # what computation alone is expected to reach, unless said otherwise
HIDDEN = 0.7  # share of the gradients' communication that runs beside the backward pass
CURVE = (1, 8, 64, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class Speed:
    """Expected, not measured."""

    gpus: int
    tokens_per_second: float
    days: float
    price: float  # US dollars
    efficiency: float  # against GPUs that need not talk to each other
    rows_in_step: int


class Plan:
    """Of one configuration on GPUs of one kind."""

    def __init__(self, config: Config, a: Architecture, gpu: GPU, precision: str, mfu: float = ATTAINED_MFU) -> None:
        self.config, self.architecture, self.gpu, self.precision, self.mfu = config, a, gpu, precision, mfu
        model = without_memory(a)
        self.denoiser = count_parameters(model.denoiser)
        self.parameters = count_parameters(model)
        self.flops: FlopsPerToken = flops_of(config, a, on_gpu=True)
        self.kept: Kept = kept_of(config, a, precision, on_gpu=True)

    def memory(self, gpus: int, stage: int | None = None, micro_batch: int | None = None) -> Memory:
        config = _with(self.config, stage, micro_batch)
        return memory_of(config, self.architecture, gpus, self.precision, on_gpu=True, kept=self.kept)

    def largest_micro_batch(self, gpus: int, stage: int | None = None) -> int:
        """Rows that fit; 0 if not even one does."""
        room = USABLE * self.gpu.memory
        fits = 0
        step = 1 << 24
        while step:
            if self.memory(gpus, stage, fits + step).total <= room:
                fits += step
            step //= 2
        return fits

    def speed(self, gpus: int, stage: int | None = None, rows: int | None = None) -> Speed:
        """With the configured global batch, or the smallest that gives every GPU a row; or with so many rows a step."""
        training, length = self.config.training, self.config.data.row_length
        rows = rows or max(training.global_batch, gpus)
        of_rank = rows / gpus
        micro_batches = max(1, round(of_rank / training.micro_batch))
        compute = of_rank * length * self.flops.total / (self.gpu.peak_flops * self.mfu)
        if training.activation_checkpointing == "full":
            compute *= 4 / 3  # every forward is made twice
        low = 2 if self.precision == "bf16" else 4
        stage = self.config.zero_stage if stage is None else stage
        hideable, exposed = seconds_per_step(
            stage,
            low * self.parameters,
            4 * self.parameters,  # accumulated and reduced in fp32
            micro_batches,
            self.architecture.layers,
            gpus,
            self.gpu,
        )
        overlaps = self.config.deepspeed.get("zero_optimization", {}).get("overlap_comm", stage == 3)
        hidden = min(HIDDEN * hideable, 2 / 3 * compute) if overlaps else 0.0  # the backward pass is two thirds
        seconds = compute + hideable - hidden + exposed
        tokens_per_second = rows * length / seconds
        days = training.steps * training.global_batch * length / tokens_per_second / 86_400
        price = days * 24 * gpus * self.gpu.price
        return Speed(gpus, tokens_per_second, days, price, compute / seconds, rows)

    def weak_efficiency(self, gpus: int) -> float:
        """Where the batch grows with the GPUs: at least a micro-batch each."""
        rows = max(self.config.training.global_batch, gpus * self.config.training.micro_batch)
        return self.speed(gpus, rows=rows).efficiency

    def curve(self, counts: Sequence[int] = CURVE) -> list[Speed]:
        return [self.speed(count) for count in counts]

    def to_dict(self, gpus: int) -> dict[str, Any]:
        stages = {
            str(stage): {
                "memory": asdict(self.memory(gpus, stage)),
                "total": self.memory(gpus, stage).total,
                "largest_micro_batch": self.largest_micro_batch(gpus, stage),
            }
            for stage in range(4)
        }
        return {
            "parameters": {"denoiser": self.denoiser, "encoder": self.parameters - self.denoiser},
            "flops_per_token": {**asdict(self.flops), "total": self.flops.total},
            "gpu": asdict(self.gpu),
            "precision": self.precision,
            "assumed_mfu": self.mfu,
            "zero_stages": stages,
            "expected": asdict(self.speed(gpus)),
            "curve": [
                {**asdict(speed), "efficiency_with_a_micro_batch_each": self.weak_efficiency(speed.gpus)}
                for speed in self.curve()
            ],
        }


def _with(config: Config, stage: int | None, micro_batch: int | None) -> Config:
    """The same with another ZeRO stage or micro-batch; not validated: a plan asks for what nobody would run."""
    changes: dict[str, Any] = {}
    if stage is not None:
        zero = {**config.deepspeed.get("zero_optimization", {}), "stage": stage}
        changes["deepspeed"] = {**config.deepspeed, "zero_optimization": zero}
    if micro_batch is not None:
        changes["training"] = config.training.model_copy(update={"micro_batch": micro_batch})
    return config.model_copy(update=changes)


def describe(plan: Plan, gpus: int) -> str:
    """The text of ``launchers/plan.py``."""
    config, gpu, flops = plan.config, plan.gpu, plan.flops
    shares = ", ".join(f"{name} {value / flops.total:.0%}" for name, value in asdict(flops).items() if value)
    lines = [
        f"parameters        denoiser {plan.denoiser:,}   encoder {plan.parameters - plan.denoiser:,}",
        f"FLOPs per token   {flops.total:,.0f} (forward and backward: {shares})",
        "",
        f"memory of a GPU in GiB, {gpus} x {gpu.name} ({gpu.memory / GIB:.0f} GiB), {plan.precision}, "
        f"micro-batch {config.training.micro_batch}, checkpointing {config.training.activation_checkpointing}",
    ]
    parts = list(asdict(plan.memory(gpus)))
    lines.append(f"{'ZeRO':<6}" + "".join(f"{part:>12}" for part in (*parts, "total")) + "   largest micro")
    for stage in range(4):
        memory = plan.memory(gpus, stage)
        values = "".join(f"{value / GIB:>12.2f}" for value in (*asdict(memory).values(), memory.total))
        mark = " <- configured" if stage == config.zero_stage else ""
        lines.append(f"{stage:<6}{values}{plan.largest_micro_batch(gpus, stage):>16}{mark}")
    lines += [
        "",
        f"expected, computation at {plan.mfu:.0%} of {gpu.peak_flops / 1e12:,.0f} TFLOP/s, ${gpu.price:.2f} a GPU-hour",
        f"{'GPUs':>6}{'tokens/s':>15}{'days':>12}{'dollars':>14}{'rows a step':>13}{'efficiency':>12}"
        f"{'with a micro-batch a GPU':>26}",
    ]
    for speed in plan.curve(sorted({*CURVE, gpus})):
        mark = " <-" if speed.gpus == gpus else ""
        lines.append(
            f"{speed.gpus:>6}{speed.tokens_per_second:>15,.0f}{speed.days:>12,.2f}{speed.price:>14,.0f}"
            f"{speed.rows_in_step:>13,}{speed.efficiency:>12.0%}{plan.weak_efficiency(speed.gpus):>26.0%}{mark}"
        )
    return "\n".join(lines)


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
    return "\n".join(lines)
