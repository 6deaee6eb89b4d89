"""What is measured of training: the record of a logged step, over all steps since the one before."""

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist

from vmd_scale.build import build_architecture
from vmd_scale.config import Config
from vmd_scale.data.loader import TrainLoader
from vmd_scale.data.manifest import Manifest
from vmd_scale.data.mixture import attended_positions
from vmd_scale.model import VMD
from vmd_scale.model.attention import Flash
from vmd_scale.planning.flops import FlopsPerToken
from vmd_scale.planning.hardware import peak_flops
from vmd_scale.planning.peaks import peak_of_process
from vmd_scale.planning.workload import flops_of
from vmd_scale.training.launch import World
from vmd_scale.training.optim import learning_rate_at
from vmd_scale.training.progress import Progress


def flops_per_token(
    config: Config, model: VMD, vocab_size: int, precision: str, manifests: Sequence[Manifest], device: torch.device
) -> FlopsPerToken:
    """Of a training step. Varlen kernels do not compute what lies outside of a document.

    Args:
        manifests: of each corpus.
    """
    varlen = precision == "bf16" and isinstance(model.denoiser.blocks.kernel, Flash)
    attended = attended_positions(config.data, manifests) if varlen else None
    return flops_of(config, build_architecture(config, vocab_size), device.type == "cuda", attended)


class Stopwatch:
    """Seconds since the last lap, without those inside `paused`."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        now = time.perf_counter()
        elapsed, self._last = now - self._last, now
        return elapsed

    @contextmanager
    def paused(self) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self._last += time.perf_counter() - started


class Meter:
    """Losses, speed and memory of a run. All ranks have one, and call it together.

    Args:
        loader: is asked for how long training has waited for data.
        flops: see `flops_per_token`.
        precision: fp32 | bf16, whose peak MFU is of.
    """

    def __init__(
        self, config: Config, world: World, loader: TrainLoader[Any], flops: FlopsPerToken, precision: str
    ) -> None:
        self._config, self._world, self._loader, self._flops = config, world, loader, flops
        self._peak_flops = peak_flops(world.device, precision)
        self._watch, self._waited = Stopwatch(), 0.0  # and, like these, as of the last record:
        self._step = self._tokens = 0

    def start(self, step: int, progress: Progress) -> None:
        """The clock runs from now on, at `step` completed steps."""
        self._watch.lap()
        self._waited = self._loader.wait_seconds
        self.went_back_to(step, progress)

    def went_back_to(self, step: int, progress: Progress) -> None:
        """The next record is of the steps after this one."""
        self._step, self._tokens = step, int(progress.tokens)

    def paused(self) -> AbstractContextManager[None]:
        """What happens inside (evaluation, saving) is no training: its time does not count."""
        return self._watch.paused()

    def record(
        self, step: int, losses: torch.Tensor, progress: Progress, gradient_norm: float | None
    ) -> dict[str, Any]:
        """Of a logged step, in the units of docs/metrics.md: one collective, the only one that logging adds.

        Args:
            step: completed steps.
            losses: this rank's sums [total, reconstruction, KL, tokens] of the last one; float64, added up in place.
        """
        if self._world.size > 1:
            dist.all_reduce(losses)
        total, reconstruction, kl, counted = losses.tolist()
        seconds, tokens = self._watch.lap(), int(progress.tokens)
        waited, self._waited = self._loader.wait_seconds - self._waited, self._loader.wait_seconds
        steps, self._step = step - self._step, step
        new_tokens, self._tokens = tokens - self._tokens, tokens
        # Padding and given tokens go through the network too, though not through its head: work, but not progress.
        positions = steps * self._config.training.global_batch * self._config.data.row_length
        work = positions * (self._flops.total - self._flops.head) + new_tokens * self._flops.head
        return {
            "step": step,
            "tokens": tokens,
            "loss": total / counted,
            "reconstruction": reconstruction / counted,
            "kl": kl / counted,
            "kl_weight": self._config.diffusion.kl_weight.at(step - 1),
            "lr": learning_rate_at(step - 1, self._config.training),
            "grad_norm": gradient_norm,
            "tokens_per_second": new_tokens / seconds,
            "mfu": work / (seconds * self._peak_flops * self._world.size),
            "data_wait_fraction": waited / seconds,
            "peak_memory_gib": peak_of_process(self._world.device) / 2**30,  # of rank 0, since this start
            "skipped_steps": progress.skipped_steps,
        }
