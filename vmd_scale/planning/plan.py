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
from vmd_scale.planning.workload import fitting_micro_batch, flops_of

USABLE = 0.92  # of a GPU's memory: the rest goes to the CUDA context, the collectives and fragmentation
ATTAINED_MFU = 0.4  # what computation alone is expected to reach, unless said otherwise
HIDDEN = 0.7  # share of the gradients' communication that runs beside the backward pass
CURVE = (1, 8, 64, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class Speed:
    """Expected, not measured."""

    gpus: int
    rows_in_step: int
    micro_batch: int
    fits: bool  # into the memory of a GPU
    step_seconds: float
    exposed_seconds: float  # of a step: communication that no computation hides
    tokens_per_second: float
    mfu: float
    days: float
    price: float  # US dollars

    @property
    def efficiency(self) -> float:
        """Against GPUs that need not talk to each other."""
        return 1 - self.exposed_seconds / self.step_seconds

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "efficiency": self.efficiency}


class Plan:
    """Of one configuration on GPUs of one kind."""

    def __init__(self, config: Config, a: Architecture, gpu: GPU, precision: str, mfu: float = ATTAINED_MFU) -> None:
        self.config, self.architecture, self.gpu, self.precision, self.mfu = config, a, gpu, precision, mfu
        model = without_memory(a)
        self.denoiser = count_parameters(model.denoiser)
        self.parameters = count_parameters(model)
        self.flops: FlopsPerToken = flops_of(config, a, on_gpu=True)
        self.kept: Kept = kept_of(config, a, precision, on_gpu=True)

    @property
    def room(self) -> float:
        """Bytes of a GPU that a plan may fill."""
        return USABLE * self.gpu.memory

    @property
    def tokens(self) -> int:
        """That the run sees, padding and tokens that come again included."""
        training = self.config.training
        return training.steps * training.global_batch * self.config.data.row_length

    def memory(self, gpus: int, stage: int | None = None, micro_batch: int | None = None) -> Memory:
        config = _with(self.config, stage, micro_batch)
        return memory_of(config, self.architecture, gpus, self.precision, on_gpu=True, kept=self.kept)

    def largest_micro_batch(self, gpus: int, stage: int | None = None) -> int:
        """Rows that fit; 0 if not even one does."""
        fits = 0
        step = 1 << 24
        while step:
            if self.memory(gpus, stage, fits + step).total <= self.room:
                fits += step
            step //= 2
        return fits

    def speed(self, gpus: int, stage: int | None = None, rows: int | None = None) -> Speed:
        """With `rows` in a step: by default the global batch, or the next number that these GPUs can share evenly."""
        training, length = self.config.training, self.config.data.row_length
        rows = rows or -(-training.global_batch // gpus) * gpus
        of_rank = rows // gpus
        micro_batch = fitting_micro_batch(training.micro_batch, of_rank, 1) or 1
        compute = of_rank * length * self.flops.total / (self.gpu.peak_flops * self.mfu)
        if training.activation_checkpointing == "full":
            compute *= 4 / 3  # every forward is made twice
        low = 2 if self.precision == "bf16" else 4
        stage = self.config.zero_stage if stage is None else stage
        hideable, exposed = seconds_per_step(
            stage,
            low * self.parameters,
            4 * self.parameters,  # accumulated and reduced in fp32
            of_rank // micro_batch,
            self.architecture.layers,
            gpus,
            self.gpu,
        )
        overlaps = self.config.deepspeed.get("zero_optimization", {}).get("overlap_comm", stage == 3)
        hidden = min(HIDDEN * hideable, 2 / 3 * compute) if overlaps else 0.0  # the backward pass is two thirds
        exposed += hideable - hidden
        tokens_per_second = rows * length / (compute + exposed)
        days = self.tokens / tokens_per_second / 86_400
        return Speed(
            gpus=gpus,
            rows_in_step=rows,
            micro_batch=micro_batch,
            fits=self.memory(gpus, stage, micro_batch).total <= self.room,
            step_seconds=compute + exposed,
            exposed_seconds=exposed,
            tokens_per_second=tokens_per_second,
            mfu=tokens_per_second * self.flops.total / (gpus * self.gpu.peak_flops),
            days=days,
            price=days * 24 * gpus * self.gpu.price,
        )

    def weak_efficiency(self, gpus: int) -> float:
        """Where the batch grows with the GPUs: at least a micro-batch each."""
        of_rank = max(-(-self.config.training.global_batch // gpus), self.config.training.micro_batch)
        return self.speed(gpus, rows=gpus * of_rank).efficiency

    def curve(self, counts: Sequence[int] = CURVE) -> list[Speed]:
        return [self.speed(count) for count in counts]

    def to_dict(self, gpus: int) -> dict[str, Any]:
        stages = {
            str(stage): {
                "memory": asdict(self.memory(gpus, stage)),
                "total": self.memory(gpus, stage).total,
                "largest_micro_batch": self.largest_micro_batch(gpus, stage),
                "expected": self.speed(gpus, stage).to_dict(),
            }
            for stage in range(4)
        }
        return {
            "parameters": {"denoiser": self.denoiser, "encoder": self.parameters - self.denoiser},
            "tokens": self.tokens,
            "flops_per_token": {**asdict(self.flops), "total": self.flops.total},
            "gpu": asdict(self.gpu),
            "precision": self.precision,
            "assumed_mfu": self.mfu,
            "zero_stages": stages,
            "expected": self.speed(gpus).to_dict(),
            "curve": [
                {**speed.to_dict(), "efficiency_with_a_micro_batch_each": self.weak_efficiency(speed.gpus)}
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
