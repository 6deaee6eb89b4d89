"""The scripts in benchmarks/ run, tiny. What they measure is for a quiet machine, and for a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run(*command, timeout=300):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


def test_gpu_check_tries_every_part(tmp_path):
    parts = ("environment", "ceilings", "throughput 110M", "attention", "where the time goes", "throughput 1B")
    parts += ("110M without compile", "synchronisation", "sampling", "checkpointing")
    file = tmp_path / "check.json"
    run("benchmarks/gpu_check.py", "--cpu", "--output", file, "--only", *parts)
    found = json.loads(file.read_text())
    assert list(found) == sorted(found, key=list(found).index)
    assert set(found) == set(parts)
    assert [name for name, part in found.items() if "skipped" in part] == ["synchronisation"]
    assert sum(found["where the time goes"]["share"].values()) > 0.99
    assert {"mdm", "vmd"} <= set(found["throughput 110M"])


def test_gpu_check_begins_nothing_that_it_could_not_end(tmp_path):
    file = tmp_path / "check.json"
    run("benchmarks/gpu_check.py", "--cpu", "--output", file, "--seconds", "3", "--only", "environment", "sampling")
    found = json.loads(file.read_text())
    assert "packages" in found["environment"]
    assert "needed" in found["sampling"]["skipped"]
