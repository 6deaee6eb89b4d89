"""The memory that `launchers/plan.py` predicts beside what a real DeepSpeed step takes, by ZeRO stage and precision.

    python benchmarks/memory.py --ranks 2 --json memory.json
    python benchmarks/memory.py --ranks 2 --set model.width=768
    deepspeed --num_gpus 2 benchmarks/memory.py --zero 2 --precision bf16       one case alone

Of rank 0, in bytes of tensors: `kept` lives between steps (weights, optimizer, EMA, gradients that are kept), `peak` is
the most at once in a step, the median of three: a thread of gloo may let go of a buffer late. `accumulated` are the
micro-batches of a step; a small `bucket` (elements, of gradients that are reduced at once) is what a large model has in
proportion. Where `rows` are long, it is activations that decide.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import torch
from comparing import Report, table
from real_step import RealStep

from vmd_scale.build import build_architecture
from vmd_scale.config_file import load_config
from vmd_scale.planning.memory import memory_of
from vmd_scale.planning.peaks import peak_bytes
from vmd_scale.training.launch import leave_world

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "quickstart.json"
FOLDER = Path("runs/memory-benchmark")
SETTINGS = (
    "data.row_length=64",
    f"data.shards={FOLDER / 'shards'}",
    "model.layers=6",
    "model.width=384",
    "model.heads=6",
    "training.global_batch=8",
    "training.micro_batch=4",
    "evaluation.every=null",
)


def bytes_alive() -> int:
    """Of all tensors that Python can reach; on a GPU what is allocated there."""
    gc.collect()
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zero", type=int, choices=[0, 1, 2, 3], help="this case alone, on the ranks there are")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.zero is None:
        report = Report(__doc__, args.json, ranks=args.ranks)
        found = all_cases(args.ranks, args.set)
        report.add("memory", found, table(COLUMNS, [[case[column] for column in COLUMNS] for case in found]))
        return
    case = one_case(args.zero, args.precision, args.set)
    if case is not None:
        Report(__doc__, args.json).add("memory", case, table(("", "bytes, or value"), list(case.items())))
    leave_world()


COLUMNS = ("zero", "precision", "accumulated", "bucket", "rows", "kept", "peak", "predicted", "predicted / peak")
LONG = ("data.row_length=512", f"data.shards={FOLDER / 'shards_of_long_rows'}", "training.micro_batch=8")


def all_cases(ranks: int, settings: list[str]) -> list[dict[str, Any]]:
    """Each in processes of its own, which no other case has left anything in."""
    found = []
    for stage, precision, (accumulated, bucket) in product(range(4), ("fp32", "bf16"), ((1, ""), (2, ""), (1, "2e6"))):
        if (stage, precision) == (0, "bf16") or (bucket and (stage == 0 or (stage, precision) == (1, "bf16"))):
            continue  # DeepSpeed cannot, or has no bucket
        changes = ["training.micro_batch=4", f"training.global_batch={4 * ranks * accumulated}"]
        changes += [f"deepspeed.zero_optimization.reduce_bucket_size={bucket}"] if bucket else []
        case = in_processes(stage, precision, ranks, [*settings, *changes])
        found.append({**case, "accumulated": accumulated, "bucket": bucket, "rows": ""})
    for checkpointing in ("none", "selective", "full"):
        changes = [*LONG, f"training.global_batch={8 * ranks}", f"training.activation_checkpointing={checkpointing}"]
        case = in_processes(1, "bf16", ranks, [*settings, *changes])
        found.append({**case, "accumulated": 1, "bucket": "", "rows": f"long, checkpointing {checkpointing}"})
    return found


def in_processes(stage: int, precision: str, ranks: int, settings: list[str]) -> dict[str, Any]:
    """One case on so many ranks."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "case.json"
        command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks), __file__]
        command += ["--zero", str(stage), "--precision", precision, "--json", str(file)]
        command += [part for setting in settings for part in ("--set", setting)]
        subprocess.run(command, check=True, stdout=sys.stderr)
        case: dict[str, Any] = json.loads(file.read_text())["memory"]
    return case


def one_case(stage: int, precision: str, settings: list[str]) -> dict[str, Any] | None:
    """On rank 0."""
    chosen = [f"deepspeed.zero_optimization.stage={stage}", f"training.precision={precision}"]
    config = load_config(CONFIG, [*SETTINGS, *chosen, *settings])
    step = RealStep(config, FOLDER / "run")
    world = step.world
    for _ in range(2):
        step()
    kept = bytes_alive()
    peak = kept + int(statistics.median(peak_bytes(step, world.device) for _ in range(3)))
    if not world.is_main:
        return None
    architecture = build_architecture(config, step.tokenizer.vocab_size)
    predicted = memory_of(config, architecture, world.size, precision, world.device.type == "cuda")
    return {
        "zero": stage,
        "precision": precision,
        "ranks": world.size,
        "parameters": step.parameters,
        "kept": kept,
        "peak": peak,
        "predicted": predicted.total,
        "predicted / peak": predicted.total / peak,
        **asdict(predicted),
    }


if __name__ == "__main__":
    main()
