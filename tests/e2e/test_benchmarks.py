"""The scripts in benchmarks/ run, tiny. What they measure is for a quiet machine, and for a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run(*command, timeout=300, first_on_path=None, expected=0):
    path = os.pathsep.join(map(str, filter(None, (first_on_path, ROOT))))
    environment = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == expected, (done.stdout + done.stderr)[-3000:]
    return done.stdout


def test_gpu_check_tries_every_part_where_little_is_installed(tmp_path):
    """As on a bare machine with a GPU, which has torch and numpy alone; parts that need more are skipped."""
    parts = ("environment", "ceilings", "throughput 110M", "attention", "where the time goes", "throughput 1B")
    parts += ("110M without compile", "synchronisation", "sampling", "checkpointing", "trainer 110M", "resume")
    file, bare = tmp_path / "check.json", tmp_path / "bare"
    for package in ("pydantic", "deepspeed", "tqdm"):
        (bare / package).mkdir(parents=True)
        (bare / package / "__init__.py").write_text(f"raise ImportError('no {package} here')")
    run("benchmarks/gpu_check.py", "--cpu", "--output", file, "--only", *parts, first_on_path=bare, expected=1)
    found = json.loads(file.read_text())
    assert set(found) == set(parts)
    failed = {name: part["failed"] for name, part in found.items() if "failed" in part}
    assert set(failed) == {"trainer 110M", "resume"}, failed  # these packages can be found, and not be imported
    assert [name for name, part in found.items() if "skipped" in part] == ["synchronisation"]
    assert sum(found["where the time goes"]["share"].values()) > 0.99
    assert {"mdm", "vmd"} <= set(found["throughput 110M"])


def test_gpu_check_trains_and_resumes(tmp_path):
    file = tmp_path / "check.json"
    run("benchmarks/gpu_check.py", "--cpu", "--output", file, "--only", "trainer 110M", "resume")
    found = json.loads(file.read_text())
    assert found["trainer 110M"]["tokens_per_second"] > 0
    assert found["resume"]["ok"]
    assert len(found["resume"]["whole"]) == 6


def test_gpu_check_outlives_parts_that_crash_or_never_end(tmp_path):
    script = """
import os, sys, time
sys.path.insert(0, "benchmarks")
import gpu_check

class Check(gpu_check.Check):
    def parts(self):
        wanted = {"crash": lambda: os._exit(3), "endless": lambda: time.sleep(600), "good": lambda: {"found": 1}}
        return {name: (run, -19 if name == "endless" else 60) for name, run in wanted.items()}

gpu_check.Check = Check
if __name__ == "__main__":
    gpu_check.main()
"""
    (tmp_path / "check.py").write_text(script)
    file = tmp_path / "check.json"
    done = run(tmp_path / "check.py", "--cpu", "--output", file, expected=1)
    found = json.loads(file.read_text())
    assert found["crash"]["failed"] == "exit code 3"
    assert found["endless"]["failed"] == "did not end in time"
    assert found["good"]["found"] == 1
    assert "crash" in done


def test_gpu_check_begins_nothing_that_it_could_not_end(tmp_path):
    file = tmp_path / "check.json"
    run("benchmarks/gpu_check.py", "--cpu", "--output", file, "--seconds", "3", "--only", "environment", "sampling")
    found = json.loads(file.read_text())
    assert "packages" in found["environment"]
    assert "needed" in found["sampling"]["skipped"]
