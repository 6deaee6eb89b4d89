"""Tokens per second of the T-step sampler, VMD and MDM in turns, as they are and compiled; and what a forward takes.

    python benchmarks/sampling.py --json sampling.json
    python benchmarks/sampling.py --steps 8 --batches 1 --vocab 50258 --no-compile

`ms a forward` is the time of the whole sampler over its T forwards: noise, choice of positions and draws included.
`compiled` is with the option `--compile` of sample.py, once everything is compiled.
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from comparing import Clock, Report, in_turns, medians, ratio, table
from workload import shape

from vmd_scale.diffusion.noise import Noise
from vmd_scale.diffusion.sampler import Sampler, sample
from vmd_scale.model import VMD


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--steps", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--vocab", type=int, default=50_258 if on_gpu else 27)
    parser.add_argument("--law", default="balanced")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--processor-time", action="store_true", help="instead of the wall clock: for a busy CPU")
    args = parser.parse_args()
    if args.processor_time:
        Clock.count_processor_time()
    device = torch.device("cuda" if on_gpu else "cpu")
    dtype = torch.bfloat16 if on_gpu else torch.float32
    layers, width, heads, length = (12, 768, 12, 1024) if on_gpu else (4, 256, 4, 256)
    models, kinds = {}, ("", ", compiled") if args.compile else ("",)
    for compiled in kinds:
        for name, latent in (("mdm", False), ("vmd", True)):
            torch.manual_seed(0)
            model = VMD(shape(layers, width, heads, length, args.vocab, latent)).to(device, dtype).eval()
            if compiled:
                model.compile_blocks()
            models[f"{name}{compiled}"] = model
    shown = {"processor_time": args.processor_time, "shape": [layers, width, length], "vocab": args.vocab}
    report = Report(__doc__, args.json, **shown)
    rows, result = [], {}
    for batch in args.batches:
        numbers = torch.arange(batch)
        for model in models.values():  # to warm up, a few steps do
            sample(model, Sampler(2, law=args.law), Noise(0), numbers)
        for steps in args.steps:
            sampler = Sampler(steps, law=args.law)
            cases = {key: partial(sample, model, sampler, Noise(0), numbers) for key, model in models.items()}
            # Of what takes little time, more: the rest of the machine is heard in it.
            times = in_turns(cases, args.rounds * (5 if batch == 1 else 1), warmup=0)
            seconds = medians(times)
            for compiled in kinds:
                found = {}
                for name in ("mdm", "vmd"):
                    taken = seconds[f"{name}{compiled}"]
                    found[f"{name}_tokens_per_second"] = batch * length / taken
                    found[f"{name}_ms_a_forward"] = 1e3 * taken / steps
                found["vmd_of_mdm"] = ratio(times, f"mdm{compiled}", f"vmd{compiled}")
                result[f"batch {batch}, T = {steps}{compiled}"] = found
                rows.append((f"{batch}, {steps}{compiled}", *found.values()))
            report.save("sampling", result)
    header = ("batch, T", "MDM tokens/s", "ms a forward", "VMD tokens/s", "ms a forward", "VMD / MDM")
    report.add("sampling", result, table(header, rows))


if __name__ == "__main__":
    main()
