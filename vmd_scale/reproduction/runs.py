"""Training the models of a task, as many at once as there are devices for, and measuring each of them once."""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cache
from multiprocessing import get_context
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from vmd_scale.checkpoints import find_checkpoint, load_trained, whole_checkpoints
from vmd_scale.config import Config
from vmd_scale.config_file import load_config
from vmd_scale.data.prepare import prepare
from vmd_scale.errors import UserError
from vmd_scale.files import write_json
from vmd_scale.processes import end_with_parent
from vmd_scale.provenance import hardware, today
from vmd_scale.reproduction.task import MeasuredModel, Measurement, Sizes, Task
from vmd_scale.reproduction.tasks import TASKS
from vmd_scale.training.launch import free_port
from vmd_scale.training.same_run import MOVABLE

OF_THE_MACHINE = {"workers", "cache", "cache_gib"}  # keys of data

_training: subprocess.Popen | None = None  # what this worker waits for


@dataclass(frozen=True)
class Job:
    """One model of a task: everything that a worker needs to know, as plain values."""

    task: str
    variant: str
    method: str
    config: Config
    sizes: Sizes
    fast: bool
    folder: Path
    changes_data: bool = False  # by what the user has set: no published figure is of these rows

    @property
    def asked(self) -> dict[str, object]:
        """What its measurements are of."""
        return {"config": _asked(self.config), "sizes": asdict(self.sizes), "code": _measuring_code()}


@dataclass(frozen=True)
class Measured:
    """What was found about one model, when (2026-01-31) and on what."""

    measurements: tuple[Measurement, ...]
    date: str
    hardware: str


def jobs_of(task: Task, seeds: int, fast: bool, extra: Sequence[str], configs: Path, runs: Path) -> list[Job]:
    """One job for each variant, method and seed. A folder is named by its configuration: no other model is found there.

    Args:
        extra: overrides KEY=VALUE for all of them; methods have the last word.
        configs: the folder of configuration files; runs: where models and shards go.

    Raises:
        UserError: an override of what the task or one of its methods decides.
    """
    owned = {"training.seed", "data.shards"} | ({"data.source"} if task.one_source or task.variants != ("",) else set())
    for override in extra:
        key = override.partition("=")[0]
        if key in owned:
            raise UserError(f"--set {override}: task {task.name!r} decides {key} itself")
        for method in task.methods:
            if any(key == own.partition("=")[0] for own in method.decides(fast)):
                raise UserError(f"--set {override}: method {method.name!r} of task {task.name!r} decides {key} itself")
    keys = {override.partition("=")[0] for override in extra}
    changes_data = any(key.startswith("data.") for key in keys - {f"data.{key}" for key in MOVABLE})
    jobs = []
    for variant in task.variants:
        for method in task.methods:
            for seed in range(seeds):
                overrides = [*(task.fast if fast else ()), *extra, *method.decides(fast), f"training.seed={seed}"]
                if variant:
                    overrides.append(f"data.source={json.dumps(variant)}")
                config = load_config(configs / task.config, overrides)
                config = _with_shards(config, runs / task.name)
                name = f"{variant}-{method.name}-{config.groups}-blocks-seed{seed}-{_digest(_asked(config))}"
                sizes = task.fast_sizes if fast else task.sizes
                folder = runs / task.name / name.lstrip("-")
                jobs.append(Job(task.name, variant, method.name, config, sizes, fast, folder, changes_data))
    return jobs


def _asked(config: Config) -> dict[str, Any]:
    """Without what changes no result."""
    return config.model_dump(mode="json", exclude={"data": OF_THE_MACHINE})


def _with_shards(config: Config, folder: Path) -> Config:
    """Shards of the task's own: the same for all models with the same data, and only for them."""
    values = config.data.model_dump(exclude={"shards", *OF_THE_MACHINE})
    data = config.data.model_copy(update={"shards": str(folder / f"shards-{_digest(values)}")})
    return config.model_copy(update={"data": data})


def _digest(values: dict) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


@cache
def _measuring_code() -> str:
    """Changes with the code that measures: what an older one has found is not printed under its name."""
    package, digest = Path(__file__).resolve().parents[1], hashlib.sha256()
    for part in ("model", "diffusion", "evaluation", "reproduction/measures.py"):
        for path in sorted((package / part).glob("*.py")) or [package / part]:
            digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


def run_jobs(jobs: Sequence[Job]) -> list[Measured]:
    """Train and measure all; what is done already is read.

    Without a GPU, one model is trained on each CPU core; with GPUs, each on as many as its micro-batches divide into.

    Raises:
        UserError: a training run failed; its folder holds the log.
    """
    for config in {job.config.data.shards: job.config for job in jobs}.values():
        prepare(config.data)
        for data in TASKS[jobs[0].task].other_data(config, jobs[0].sizes).values():
            prepare(data, splits=["validation"])
    slots = _slots(jobs)
    context = get_context("spawn")
    free: Queue = context.Queue()
    for slot in slots:
        free.put(slot)
    results: dict[int, Measured] = {}
    pool = ProcessPoolExecutor(len(slots), mp_context=context, initializer=_begin, initargs=(free,))
    try:
        futures = {pool.submit(_in_worker, job): n for n, job in enumerate(jobs)}
        for future in tqdm(as_completed(futures), total=len(jobs), unit="model", desc=jobs[0].task):
            results[futures[future]] = future.result()
    finally:  # after a failure, those that are being trained come to their end
        pool.shutdown(cancel_futures=True)
    return [results[n] for n in range(len(jobs))]


def _slots(jobs: Sequence[Job]) -> list[str]:
    """Where models are trained side by side: sets of GPUs ("0,1"), or CPU cores ("")."""
    gpus = torch.cuda.device_count()
    if not gpus:
        return [""] * min(len(jobs), len(os.sched_getaffinity(0)))
    micro_batches = min(job.config.training.global_batch // job.config.training.micro_batch for job in jobs)
    each = max(n for n in range(1, gpus + 1) if micro_batches % n == 0)
    return [",".join(map(str, range(first, first + each))) for first in range(0, gpus - each + 1, each)]


def _begin(free: Queue) -> None:
    """In a new worker: take the devices that are its own before touching any, and do not outlive who asked."""
    end_with_parent(_end_training)
    slot = free.get()
    if slot:
        os.environ["CUDA_VISIBLE_DEVICES"] = slot
    else:
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        torch.set_num_threads(1)


def _end_training() -> None:
    if _training is not None:
        _training.terminate()


def _in_worker(job: Job) -> Measured:
    try:
        return run_job(job)
    except KeyboardInterrupt:  # which the executor would survive, and take the next model
        os._exit(130)


def run_job(job: Job) -> Measured:
    """Train one model, unless its folder holds it, and measure it, unless that is done."""
    done = job.folder / "measurements.json"
    asked = json.loads(json.dumps(job.asked))
    if done.exists() and (found := json.loads(done.read_text()))["asked"] == asked:
        return Measured(tuple(Measurement(**m) for m in found["measurements"]), found["date"], found["hardware"])
    wanted = f"step-{job.config.training.steps:08d}"
    if not any(found.name == wanted for found in whole_checkpoints(job.folder / "checkpoints")):
        train(job)
    task, device = TASKS[job.task], "cuda" if torch.cuda.is_available() else "cpu"
    trained = load_trained(find_checkpoint(job.folder / "checkpoints" / wanted), device=device)
    measured = task.measure(MeasuredModel(trained, job.variant, job.sizes, task.other_data(job.config, job.sizes)))
    result = Measured(tuple(measured), today(), hardware())
    write_json(done, {"asked": asked, **asdict(result)})
    return result


def train(job: Job) -> None:
    """Call the launcher as a user would: under `deepspeed` on GPUs, else as one process."""
    job.folder.mkdir(parents=True, exist_ok=True)
    config = job.folder / "asked.json"
    config.write_text(job.config.to_json())
    command = [sys.executable]
    if torch.cuda.is_available():
        command = [str(Path(sys.executable).with_name("deepspeed")), "--master_port", str(free_port())]
    launcher = Path(__file__).resolve().parents[2] / "launchers" / "pretrain.py"
    command += [str(launcher), "--config", str(config), "--output", str(job.folder)]
    output = job.folder / "train.log"
    global _training
    with open(output, "ab") as log, subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT) as _training:
        code = _training.wait()
    if code:
        errors = re.findall(r"^error: (.*)$", output.read_text(errors="replace"), re.MULTILINE)
        why = f": {errors[-1]}" if errors else f"; see {output}"
        raise UserError(f"training {job.folder} ended with exit code {code}{why}")
