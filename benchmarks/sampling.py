"""Tokens per second of the T-step sampler, VMD and MDM in turns, as they are and compiled; and what a forward takes.

    python benchmarks/sampling.py --json sampling.json
    python benchmarks/sampling.py --steps 8 --batches 1 --vocab 50257 --no-compile

`ms a forward` is the time of the whole sampler over its T forwards: noise, choice of positions and draws included.
`compiled` is with the option `--compile` of sample.py, once everything is compiled. Half of the rounds' ratios
VMD / MDM lie between the `quartiles`. A case has at least 5 rounds, and more as long as its `--seconds` last: on two
cores it all takes about 20 minutes, and with `--batches 64` over an hour.
"""

import argparse
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from comparing import Clock, Report, in_turns, medians, quartiles, ratio, table
from workload import VOCAB, shape

from vmd_scale.diffusion.noise import Noise
from vmd_scale.diffusion.sampler import Sampler, sample
from vmd_scale.model import VMD


def measure(
    models: Mapping[str, VMD], batch: int, steps: int, law: str, rounds: int, seconds: float | None = None
) -> dict[str, Any]:
    """Tokens/s of "mdm" and "vmd" in turns, milliseconds a forward, their ratio and its quartiles."""
    sampler, numbers = Sampler(steps, law=law), torch.arange(batch)
    cases = {name: partial(sample, model, sampler, Noise(0), numbers) for name, model in models.items()}
    times = in_turns(cases, rounds, warmup=0, seconds=seconds)
    found: dict[str, Any] = {}
    for name, taken in medians(times).items():
        found[f"{name}_tokens_per_second"] = batch * models[name].architecture.row_length / taken
        found[f"{name}_ms_a_forward"] = 1e3 * taken / steps
    low, high = quartiles(times, "mdm", "vmd")
    return {**found, "vmd_of_mdm": ratio(times, "mdm", "vmd"), "quartiles": [low, high], "rounds": len(times["mdm"])}


def warm_up(models: Mapping[str, VMD], batch: int, law: str) -> None:
    for model in models.values():  # a few steps do
        sample(model, Sampler(2, law=law), Noise(0), torch.arange(batch))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--steps", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64 if on_gpu else 16])
    parser.add_argument("--vocab", type=int, default=VOCAB if on_gpu else 27)
    parser.add_argument("--law", default="balanced")
    parser.add_argument("--rounds", type=int, default=25, help="at most")
    parser.add_argument("--seconds", type=float, default=60, help="after which a case with 5 rounds begins no more")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--processor-time", action="store_true", help="instead of the wall clock: for a busy CPU")
    args = parser.parse_args()
    if args.processor_time:
        Clock.count_processor_time()
    device = torch.device("cuda" if on_gpu else "cpu")
    dtype = torch.bfloat16 if on_gpu else torch.float32
    layers, width, heads, length = (12, 768, 12, 1024) if on_gpu else (4, 256, 4, 256)
    kinds: dict[str, dict[str, VMD]] = {}
    for kind in ("", ", compiled") if args.compile else ("",):
        kinds[kind] = {}
        for name, latent in (("mdm", False), ("vmd", True)):
            torch.manual_seed(0)
            model = VMD(shape(layers, width, heads, length, args.vocab, latent)).to(device, dtype).eval()
            if kind:
                model.compile_blocks()
            kinds[kind][name] = model
    shown = {"processor_time": args.processor_time, "shape": [layers, width, length], "vocab": args.vocab}
    report = Report(__doc__, args.json, **shown)
    rows: list[tuple[object, ...]] = []
    result: dict[str, Any] = {}
    for batch in args.batches:
        for models in kinds.values():
            warm_up(models, batch, args.law)
        for steps in args.steps:
            for kind, models in kinds.items():
                found = measure(models, batch, steps, args.law, args.rounds, args.seconds)
                result[f"batch {batch}, T = {steps}{kind}"] = found
                low, high = found["quartiles"]
                shown = [value for name, value in found.items() if name not in ("quartiles", "rounds")]
                rows.append((f"{batch}, {steps}{kind}", *shown, f"{low:.3f}-{high:.3f}"))
            report.save("sampling", result)
    header = ("batch, T", "MDM tokens/s", "ms a forward", "VMD tokens/s", "ms a forward", "VMD / MDM", "quartiles")
    report.add("sampling", result, table(header, rows))


if __name__ == "__main__":
    main()
