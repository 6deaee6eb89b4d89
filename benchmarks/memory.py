"""The memory that `launchers/plan.py` predicts beside what a real DeepSpeed step takes, by ZeRO stage and precision.

    python benchmarks/memory.py --zero 1 --precision fp32
    deepspeed --num_gpus 2 benchmarks/memory.py --zero 2 --precision bf16 --set model.width=768

`kept` lives between steps (weights, optimizer, EMA, gradients that are kept), `peak` is the most at once in a step.
"""

import argparse
import gc
from dataclasses import asdict
from pathlib import Path

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
    parser.add_argument("--zero", type=int, choices=[0, 1, 2, 3], default=1)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    chosen = [f"deepspeed.zero_optimization.stage={args.zero}", f"training.precision={args.precision}"]
    config = load_config(CONFIG, [*SETTINGS, *chosen, *args.set])
    step = RealStep(config, FOLDER / "run")
    world = step.world
    for _ in range(2):
        step()
    kept = bytes_alive()
    peak = kept + peak_bytes(step, world.device)
    architecture = build_architecture(config, step.tokenizer.vocab_size)
    predicted = memory_of(config, architecture, world.size, args.precision, world.device.type == "cuda")
    counts = {
        "zero": args.zero,
        "precision": args.precision,
        "ranks": world.size,
        "parameters": step.parameters,
        "kept_bytes": kept,
        "peak_bytes": peak,
        "predicted_of_peak": predicted.total / peak,
    }
    if world.is_main:
        text = table(("", "bytes, or value"), [*counts.items(), *asdict(predicted).items()])
        Report(__doc__, args.json).add("memory", {**counts, "predicted": asdict(predicted)}, text)
    leave_world()


if __name__ == "__main__":
    main()
