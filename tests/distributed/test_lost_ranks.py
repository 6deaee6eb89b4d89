"""Ranks that lose their launcher, or another rank, end themselves instead of waiting for ever."""

import contextlib
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from vmd_scale.checkpoints import find_checkpoint

ROOT = Path(__file__).resolve().parents[2]


def wait_for_step(folder: Path, step: int) -> None:
    metrics, deadline = folder / "metrics.jsonl", time.monotonic() + 90
    while not metrics.exists() or metrics.read_text().count("\n") < step:
        assert time.monotonic() < deadline, f"{metrics} has not come to step {step}"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("launcher", "number"),
    [
        (["-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port"], signal.SIGTERM),
        (["-m", "torch.distributed.run", "--nproc-per-node", "1", "--master-port"], signal.SIGUSR1),
    ],
    ids=["deepspeed", "torchrun"],
)
def test_ranks_whose_launcher_was_killed_write_a_checkpoint_and_end(lab, runs, launcher, number):
    """Of these signals neither launcher tells its ranks anything; deepspeed has another process between them."""
    folder, log = runs / f"orphans-{number.name}", runs / f"orphans-{number.name}.txt"
    settings = ("training.steps=100000", "training.checkpoint_every=100000")
    command = [sys.executable, *launcher, str(lab.free_port()), *lab.pretrain_arguments(folder, *settings)]
    with open(log, "wb") as file:
        started = subprocess.Popen(command, cwd=ROOT, env=lab.environment(), stdout=file, stderr=subprocess.STDOUT)
    ranks: list[psutil.Process] = []
    try:
        wait_for_step(folder, 3)
        ranks = [p for p in psutil.Process(started.pid).children(recursive=True) if "--output" in p.cmdline()]
        started.send_signal(number)
        assert started.wait(30) == -number
        assert not psutil.wait_procs(ranks, timeout=60)[1], log.read_text()[-3000:]
    finally:
        for process in (started, *ranks):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    status = json.loads((folder / "status.json").read_text())
    assert (status["state"], status["reason"]) == ("stopped", "the death of its launcher")
    assert status["step"] == lab.metrics(folder)[-1]["step"]
    assert find_checkpoint(folder).name == f"step-{status['step']:08d}"


HANG = """
import os, runpy, sys, time
from vmd_scale.training.loop import Trainer

make_step = Trainer._step

def step_or_fall_asleep(self, step, *arguments):
    if step == 4 and os.environ["RANK"] == "1":
        time.sleep(1000)
    return make_step(self, step, *arguments)

Trainer._step = step_or_fall_asleep
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_when_a_rank_hangs_all_ranks_end_themselves_and_say_where(lab, runs):
    """The one that sleeps, by its watchdog; the one that waits for it, by its own or as the other is gone."""
    script = runs / "hang.py"
    script.write_text(HANG)
    waiting, hanging = lab.start(runs / "hangs", "training.hang_timeout=6", through=script).wait()
    assert (waiting.code, hanging.code) == (1, 1)
    assert "Timeout (0:00:06)!" in hanging.text
    assert " in step_or_fall_asleep" in hanging.text
    assert re.search(r'vmd_scale/training/loop.py", line \d+ in _', waiting.text)
    assert lab.metrics(runs / "hangs")[-1]["step"] == 4
