"""What a checkpoint costs: how long training waits for it, how long the writing takes, how long a resume takes.

    python benchmarks/checkpoint.py                                        100 M parameters, one rank
    deepspeed --num_gpus 2 benchmarks/checkpoint.py --json result.json     two ranks

Medians over some saves. `written_in` is the time until the checkpoint is whole, checksums included; training goes on
meanwhile, and `step_while_writing` is what a step then takes.
"""

import argparse
import math
import statistics
import time
from pathlib import Path

from comparing import Report, table
from real_step import RealStep

from vmd_scale.config_file import load_config
from vmd_scale.training.launch import leave_world

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "quickstart.json"
SETTINGS = (
    "data.row_length=16",
    "data.shards=runs/checkpoint-benchmark/shards",
    "model.layers=13",
    "model.width=768",
    "model.heads=12",
    "training.global_batch=2",
    "training.micro_batch=1",
    "evaluation.every=null",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    config = load_config(CONFIG, [*SETTINGS, *args.set])
    step = RealStep(config, Path("runs/checkpoint-benchmark/run"))
    world, trainer = step.world, step.trainer
    times: dict[str, list[float]] = {
        name: [] for name in ("step", "training_waits", "written_in", "step_while_writing")
    }

    def timed_step() -> float:
        started = time.perf_counter()
        step()
        return time.perf_counter() - started

    timed_step()
    for number in range(1, args.saves + 1):
        times["step"] += [timed_step() for _ in range(3)]
        started = time.perf_counter()
        trainer._save(number, math.inf)
        times["training_waits"].append(time.perf_counter() - started)
        while any(world.any(trainer.checkpoints.writing)):
            times["step_while_writing"].append(timed_step())
        trainer.checkpoints.finish()
        times["written_in"].append(time.perf_counter() - started)
    started = time.perf_counter()
    found = trainer.checkpoints.find_latest()
    verified = time.perf_counter()
    trainer.checkpoints.load(found)
    loaded = time.perf_counter()
    size = sum(path.stat().st_size for path in found.rglob("*"))
    result = {f"{name}_seconds": statistics.median(values) for name, values in times.items() if values}
    result |= {"verify_seconds": verified - started, "load_seconds": loaded - verified}
    result |= {
        "parameters": step.parameters,
        "checkpoint_bytes": size,
        "ranks": world.size,
    }
    if world.is_main:
        Report(__doc__, args.json).add("checkpoint", result, table(("", "seconds, or count"), result.items()))
    leave_world()


if __name__ == "__main__":
    main()
