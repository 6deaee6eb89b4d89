"""What a run says of itself: metrics.jsonl and a log file always, a progress bar on a terminal, wandb when asked."""

import json
import logging
import os
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from vmd_scale.config import Config
from vmd_scale.files import write_atomically
from vmd_scale.training.wandb_log import WandbLog

METRICS, EVALUATIONS, LATENT, EVENTS = "metrics.jsonl", "evaluations.jsonl", "latent.jsonl", "events.jsonl"
SAMPLES, FACTS = "samples.jsonl", "facts.json"
LOG = "log.txt"
log = logging.getLogger(__name__)


def start_logging(run_folder: Path, rank: int) -> None:
    """Rank 0 logs to the terminal and ``log.txt``; the others only what went wrong."""
    root = logging.getLogger("vmd_scale")
    root.setLevel(logging.INFO if rank == 0 else logging.ERROR)
    root.propagate = False
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if rank == 0:
        handlers.append(logging.FileHandler(run_folder / LOG, encoding="utf-8"))
    root.handlers.clear()
    for handler in handlers:
        handler.setFormatter(logging.Formatter(f"%(asctime)s rank {rank} %(levelname)s %(message)s"))
        root.addHandler(handler)


class Telemetry:
    """Rank 0's record of the run. On other ranks, every method does nothing."""

    def __init__(self, run_folder: Path, config: Config, is_main: bool, first_step: int) -> None:
        self._folder, self._is_main, self._has_latent = run_folder, is_main, config.latent.width > 0
        self._bar: tqdm | None = None
        self._wandb: WandbLog | None = None
        if not is_main:
            return
        self.went_back_to(first_step)
        drop_records_after(run_folder / EVENTS, sys.maxsize)  # none but one that was torn: they did happen
        self._steps = config.training.steps
        self._bar = tqdm(
            total=config.training.steps,
            initial=first_step,
            disable=None,  # where there is no terminal: a bar is one endless line of a batch job's log
            unit="step",
            dynamic_ncols=True,
            mininterval=1.0,
            bar_format="{percentage:3.0f}% step {n:,}/{total:,} [{elapsed}, {remaining} left]{postfix}",
        )
        self._redirect = logging_redirect_tqdm(loggers=[logging.getLogger("vmd_scale")])
        self._redirect.__enter__()
        self._wandb = WandbLog.start(run_folder, config)

    def step(self) -> None:
        if self._bar is not None:
            self._bar.update()

    def log(self, record: Mapping[str, Any]) -> None:
        """One object a logged step, in ``metrics.jsonl``, and a line for people."""
        if not self._is_main:
            return
        self._append(METRICS, record)
        if self._wandb is not None:
            self._wandb.metrics(record)
        kl = f", KL {record['kl']:.4f}" if self._has_latent else ""
        said = f"loss {record['loss']:.4f}{kl}, {record['tokens_per_second']:,.0f} tokens/s, MFU {share(record['mfu'])}"
        said += f", {record['peak_memory_gib']:.1f} GiB"
        log.info("step %d of %d: %s, %s left", record["step"], self._steps, said, self._time_left(record["step"]))
        if self._bar is not None:
            self._bar.set_postfix_str(said)

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """One object a bound, in ``evaluations.jsonl``."""
        if self._is_main:
            self._append(EVALUATIONS, record)
            if self._wandb is not None:
                self._wandb.evaluation(record)

    def latent(self, record: Mapping[str, Any]) -> None:
        """How much the latent is used, in ``latent.jsonl``: one object an evaluation."""
        if self._is_main:
            self._append(LATENT, record)
            if self._wandb is not None:
                self._wandb.latent(record)

    def samples(self, record: Mapping[str, Any]) -> None:
        """What an evaluation drew, in ``samples.jsonl``: one object an evaluation."""
        if self._is_main:
            self._append(SAMPLES, record)
            if self._wandb is not None:
                self._wandb.samples(record["step"], record["steps"], record["texts"])

    def event(self, kind: str, step: int, **details: Any) -> None:
        """Something that a curve does not show (resumed, skipped, rolled back, ...), in ``events.jsonl``."""
        if self._is_main:
            self._append(EVENTS, {"event": kind, "step": step, "time": round(time.time(), 3), **details})
            if self._wandb is not None:
                self._wandb.event(kind, step)

    def went_back_to(self, step: int) -> None:
        """What was recorded after `step` is forgotten: these steps are made again."""
        if self._is_main:
            for name in (METRICS, EVALUATIONS, LATENT, SAMPLES):
                drop_records_after(self._folder / name, step)
            self._first, self._started = step, time.monotonic()
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._redirect.__exit__(None, None, None)
            self._bar.close()
        if self._wandb is not None:
            self._wandb.close(failed=sys.exc_info()[0] is not None)

    def _time_left(self, step: int) -> str:
        """At the mean speed so far, evaluations and saves included."""
        seconds = (time.monotonic() - self._started) / max(1, step - self._first)
        return tqdm.format_interval(seconds * (self._steps - step))

    def _append(self, name: str, record: Mapping[str, Any]) -> None:
        path = self._folder / name
        size = path.stat().st_size if path.exists() else 0
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:  # a full disk costs records, not the run
            log.error("%s: a record of step %s is lost: %s", name, record["step"], error)
            with suppress(OSError):
                os.truncate(path, size)  # half a line would spoil the next one


def share(value: float) -> str:
    """A share of something, in percent: with one decimal below 10 %, where it would be a round number or nothing."""
    return f"{value:.0%}" if value >= 0.0995 else f"{value:.1%}"


def drop_records_after(path: Path, step: int) -> None:
    """Forget what a killed run wrote after its last checkpoint: these steps are made again."""
    if not path.exists():
        return
    kept = [line for line in path.read_text().splitlines() if _step_of(line) <= step]
    write_atomically(path, "".join(line + "\n" for line in kept))


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):  # a line that a kill tore
        return float("inf")
