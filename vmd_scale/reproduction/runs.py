"""Training the models of a task, several at once where there is no GPU, and measuring each of them once."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from tqdm import tqdm

from vmd_scale.checkpoints import load_trained, whole_checkpoints
from vmd_scale.config import Config, load_config
from vmd_scale.data.prepare import prepare
from vmd_scale.errors import UserError
from vmd_scale.files import write_json
from vmd_scale.reproduction.task import Measurement, Sizes
from vmd_scale.reproduction.tasks import TASKS

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Job:
    """One model of a task: everything that a worker needs to know, as plain values."""

    task: str
    variant: str
    method: str
    config: Config
    overrides: tuple[str, ...]
    sizes: Sizes
    folder: Path


def jobs_of(task_name: str, seeds: int, fast: bool, extra: Sequence[str], folder: Path) -> list[Job]:
    """One job for each variant, method and seed."""
    task, jobs = TASKS[task_name], []
    for variant in task.variants:
        for method in task.methods:
            for seed in range(seeds):
                # The method last: it may switch off what makes the task smaller.
                overrides = (*(task.fast if fast else ()), *method.overrides, f"training.seed={seed}")
                if variant:
                    shards = folder / task_name / variant / "shards"
                    overrides += (f'data.source="{variant}"', f"data.shards={shards}")
                sizes = task.fast_sizes if fast else task.sizes
                overrides += tuple(extra)
                config = load_config(ROOT / "configs" / task.config, overrides)
                where = folder / task_name / variant / f"{method.name}-{config.groups}-blocks-seed{seed}"
                jobs.append(Job(task_name, variant, method.name, config, overrides, sizes, where))
    return jobs


def run_jobs(jobs: Sequence[Job]) -> list[list[Measurement]]:
    """Train and measure all; what is done already is read. Without a GPU, one at a time on each CPU core.

    Raises:
        UserError: a training run failed; its folder holds the log.
    """
    for config in {job.config.data.shards: job.config for job in jobs}.values():
        prepare(config.data)
    workers = 1 if torch.cuda.is_available() else min(len(jobs), os.cpu_count() or 1)
    results: dict[int, list[Measurement]] = {}
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(run_job, job, workers): n for n, job in enumerate(jobs)}
        try:
            for future in tqdm(as_completed(futures), total=len(jobs), unit="model", desc=jobs[0].task):
                results[futures[future]] = future.result()
        except UserError:
            pool.shutdown(cancel_futures=True)
            raise
    return [results[n] for n in range(len(jobs))]


def run_job(job: Job, workers: int) -> list[Measurement]:
    """Train one model, unless its folder holds it, and measure it, unless that is done."""
    done = job.folder / "measurements.json"
    asked = {"overrides": list(job.overrides), "sizes": asdict(job.sizes)}
    if done.exists() and json.loads(done.read_text())["asked"] == asked:
        return read_json_list(done)
    if workers > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    config = job.config
    last = job.folder / "checkpoints" / f"step-{config.training.steps:08d}"
    if not any(found.name >= last.name for found in whole_checkpoints(job.folder / "checkpoints")):
        train(job, workers)
    trained = load_trained(job.folder, device="cuda" if torch.cuda.is_available() else "cpu")
    measured = list(TASKS[job.task].measure(trained, job.variant, job.sizes))
    write_json(done, {"asked": asked, "measurements": [asdict(m) for m in measured]})
    return measured


def read_json_list(path: Path) -> list[Measurement]:
    return [Measurement(**values) for values in json.loads(path.read_text())["measurements"]]


def train(job: Job, workers: int) -> None:
    """The launcher itself, as a user would start it: under `deepspeed` on GPUs, else one process."""
    job.folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable]
    environment = dict(os.environ)
    if torch.cuda.is_available():
        command = [str(Path(sys.executable).with_name("deepspeed"))]
    else:
        environment["DS_ACCELERATOR"] = "cpu"
        if workers > 1:
            environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // workers))
    command += [str(ROOT / "launchers" / "pretrain.py"), "--config", str(ROOT / "configs" / TASKS[job.task].config)]
    command += ["--output", str(job.folder)]
    command += [part for override in job.overrides for part in ("--set", override)]
    output = job.folder / "train.log"
    with open(output, "ab") as log:
        code = subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT).returncode
    if code:
        raise UserError(f"training {job.folder} failed with exit code {code}; see {output}")
