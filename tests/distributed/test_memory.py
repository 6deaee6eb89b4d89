"""What `launchers/plan.py` says of memory, beside what real steps of two ranks take."""

import os
import sys
from pathlib import Path

import pytest
from ranks import run_in_processes

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def memory(folder, stage, precision, settings):
    os.chdir(folder)
    sys.path.insert(0, str(BENCHMARKS))
    from memory import one_case

    return one_case(stage, precision, settings)


@pytest.mark.parametrize(
    ("stage", "precision", "settings"),
    [
        (2, "bf16", ["deepspeed.zero_optimization.reduce_bucket_size=2000000"]),
        (3, "fp32", []),  # a bucket, were it DeepSpeed's default, would take 2 GB
    ],
)
def test_a_step_takes_the_memory_that_was_predicted(tmp_path, stage, precision, settings):
    case, _ = run_in_processes(memory, 2, tmp_path, stage, precision, settings)
    assert case["kept"] < case["peak"]
    assert case["predicted / peak"] == pytest.approx(1, abs=0.1)
