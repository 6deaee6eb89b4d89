"""Real steps of two ranks, through DeepSpeed: the memory that they take, and what they wait for."""

import os
import sys
import traceback
from pathlib import Path

import pytest
from ranks import run_in_processes

ROOT = Path(__file__).resolve().parents[2]


def memory(folder, stage, precision, settings):
    os.chdir(folder)
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from memory import one_case

    return one_case(stage, precision, settings)


@pytest.mark.parametrize(
    ("stage", "precision", "settings"),
    [
        (2, "bf16", []),
        (3, "fp32", []),  # a bucket, were it DeepSpeed's default, would take 2 GB
    ],
)
def test_a_step_takes_the_memory_that_was_predicted(tmp_path, stage, precision, settings):
    case, _ = run_in_processes(memory, 2, tmp_path, stage, precision, settings, timeout=300)
    assert case["kept"] < case["peak"]
    assert case["predicted / peak"] == pytest.approx(1, abs=0.1)


def waits(folder):
    """Of the third step, by the code that asked for them; and of what does wait, to see that it is seen."""
    os.chdir(folder)
    sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests" / "unit")]
    from deepspeed.accelerator import get_accelerator
    from memory import CONFIG, SETTINGS
    from real_step import RealStep
    from watching import Watch

    from vmd_scale.config_file import load_config

    step = RealStep(load_config(CONFIG, [*SETTINGS, "training.global_batch=16", "model.width=96"]), folder / "run")
    for _ in range(2):
        step()
    synchronized: list[str] = []  # on a CPU it does nothing, and is no operation that a watch could see
    get_accelerator().synchronize = lambda *_: synchronized.append("".join(traceback.format_stack(limit=3)))
    with Watch() as watch:
        step()
    with Watch() as seen:
        int(step.trainer.progress.tokens)
    return dict(watch.waiting), dict(seen.waiting), synchronized


def test_a_step_waits_for_nothing_that_deepspeed_does_not_wait_for(tmp_path):
    """The gradient's norm and its overflow are DeepSpeed's; it waits for them once a step, whatever is accumulated."""
    for of_step, seen, synchronized in run_in_processes(waits, 2, tmp_path, timeout=300):
        assert synchronized == []
        assert [where for where in of_step if "/deepspeed/" not in where] == []
        assert 0 < sum(of_step.values()) <= 4
        assert seen == {f"{__file__}:waits": 1}
