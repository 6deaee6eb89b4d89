"""A run on paper: does it fit, how fast is it, how long does it take, what does it cost."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vmd_scale.config import Config
from vmd_scale.model import Architecture
from vmd_scale.planning.activations import Kept, count_parameters, kept_of, without_memory
from vmd_scale.planning.communication import communication_of
from vmd_scale.planning.computation import FEW_TOKENS, passes_seconds, update_seconds
from vmd_scale.planning.flops import FlopsPerToken
from vmd_scale.planning.hardware import GPU
from vmd_scale.planning.memory import Memory, memory_of
from vmd_scale.planning.workload import denoiser_passes, fitting_micro_batch, flops_of
from vmd_scale.planning.zero import Zero

USABLE = 0.92  # of a GPU's memory: the rest goes to the CUDA context, the collectives and fragmentation
ATTAINED_MFU = 0.4  # what forward and backward pass alone are expected to reach, unless said otherwise
HIDDEN = 0.7  # share of what is sent in the meantime that costs no time
CURVE = (1, 8, 64, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class Speed:
    """Expected, not measured."""

    gpus: int
    rows_in_step: int
    micro_batch: int
    fits: bool  # into the memory of a GPU
    divides: bool  # whether the GPUs share the configured batch evenly; else this is of the next batch that they do
    few_tokens: bool  # in a micro-batch: launching kernels takes time that is not counted
    step_seconds: float
    update_seconds: float  # of a step: gradients, optimizer and average in the GPU's memory
    exposed_seconds: float  # of a step: communication that no computation hides
    tokens_per_second: float
    mfu: float
    days: float
    price: float  # US dollars

    @property
    def efficiency(self) -> float:
        """Share of a step that is spent in forward and backward pass."""
        return 1 - (self.update_seconds + self.exposed_seconds) / self.step_seconds

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

    @property
    def peak_flops(self) -> float:
        """Of a GPU, a second, in the precision of the plan."""
        return self.gpu.peak_flops[self.precision]

    def rows_in_step(self, gpus: int) -> int:
        """The global batch, or the next number of rows that these GPUs can share evenly."""
        return -(-self.config.training.global_batch // gpus) * gpus

    def memory(self, gpus: int, stage: int | None = None, micro_batch: int | None = None) -> Memory:
        config = _with(self.config, stage, micro_batch)
        return memory_of(config, self.architecture, gpus, self.precision, on_gpu=True, kept=self.kept)

    def largest_micro_batch(self, gpus: int, stage: int | None = None) -> int:
        """Rows that fit, of those that a GPU has in a step; 0 if not even one does."""
        of_rank, fits = self.rows_in_step(gpus) // gpus, 0
        step = 1 << of_rank.bit_length()
        while step:
            if fits + step <= of_rank and self.memory(gpus, stage, fits + step).total <= self.room:
                fits += step
            step //= 2
        return fits

    def speed(self, gpus: int, stage: int | None = None, rows: int | None = None) -> Speed:
        """`rows`: of a step, where not `rows_in_step`."""
        config, length = _with(self.config, stage, None), self.config.data.row_length
        zero, training = Zero.of(config, self.precision), config.training
        rows = rows or self.rows_in_step(gpus)
        micro_batch = fitting_micro_batch(training.micro_batch, rows, gpus) or 1
        micro_batches = rows // gpus // micro_batch
        forward, backward = passes_seconds(config, self.architecture, zero, micro_batch, self.peak_flops * self.mfu)
        update = update_seconds(zero, self.parameters, micro_batches, training.ema_decay > 0, gpus, self.gpu)
        sent = communication_of(zero, self.parameters, micro_batches, self.architecture.layers, gpus, self.gpu)
        passes = micro_batches if zero.stage > 1 else 1  # of forward and backward, in which anything is sent
        exposed = sent.exposed(passes * forward, passes * backward, HIDDEN if zero.overlaps else 0.0)
        seconds = micro_batches * (forward + backward) + update + exposed
        tokens_per_second = rows * length / seconds
        days = self.tokens / tokens_per_second / 86_400
        return Speed(
            gpus=gpus,
            rows_in_step=rows,
            micro_batch=micro_batch,
            fits=self.memory(gpus, stage, micro_batch).total <= self.room,
            divides=training.global_batch % gpus == 0,
            few_tokens=micro_batch * length * denoiser_passes(config, micro_batch) < FEW_TOKENS,
            step_seconds=seconds,
            update_seconds=update,
            exposed_seconds=exposed,
            tokens_per_second=tokens_per_second,
            mfu=tokens_per_second * self.flops.total / (gpus * self.peak_flops),
            days=days,
            price=days * 24 * gpus * self.gpu.price,
        )

    def weak_efficiency(self, gpus: int) -> float:
        """Where the batch grows with the GPUs: at least a micro-batch each."""
        of_rank = max(self.rows_in_step(gpus) // gpus, self.config.training.micro_batch)
        return self.speed(gpus, rows=gpus * of_rank).efficiency

    def curve(self, counts: Sequence[int] = CURVE) -> list[Speed]:
        return [self.speed(count) for count in counts]

    def to_dict(self, gpus: int) -> dict[str, Any]:
        stages = {}
        for stage in range(4):
            speed = self.speed(gpus, stage)
            memory = self.memory(gpus, stage, speed.micro_batch)
            stages[str(stage)] = {
                "memory": asdict(memory),
                "total": memory.total,
                "largest_micro_batch": self.largest_micro_batch(gpus, stage),
                "expected": speed.to_dict(),
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
            "curve": [{**speed.to_dict(), "weak_scaling": self.weak_efficiency(speed.gpus)} for speed in self.curve()],
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
