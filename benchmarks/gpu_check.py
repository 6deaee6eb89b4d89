"""Everything that only a GPU can tell, in one command of at most nine minutes.

    python benchmarks/gpu_check.py --output gpu_check.json
    python benchmarks/gpu_check.py --cpu --output gpu_check.json     tiny, to see that it works at all

Needs torch and numpy; what needs DeepSpeed or flash-attn is reported as skipped where they are missing. The file is
written after every part, so that a time limit loses nothing. A part that would not end in time is left out, and named:
the last ones have a run of their own (`--only`).
"""

import argparse
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import attention  # noqa: E402
import sampling  # noqa: E402
import torch  # noqa: E402
import train_step  # noqa: E402
from comparing import Times, in_turns, medians, ratio, table  # noqa: E402
from isolated import Parts, Skipped, run_parts, verdict  # noqa: E402
from kernel_times import kernel_times  # noqa: E402
from real_runs import resumed, trained  # noqa: E402
from workload import LENGTH, ROWS, SIZES, VOCAB, BareStep, shape  # noqa: E402

from vmd_scale.model import VMD, Architecture  # noqa: E402
from vmd_scale.model.attention import flash_available  # noqa: E402
from vmd_scale.planning.flops import FlopsPerToken  # noqa: E402
from vmd_scale.planning.hardware import peak_flops  # noqa: E402
from vmd_scale.planning.peaks import peak_bytes  # noqa: E402
from vmd_scale.provenance import provenance  # noqa: E402
from vmd_scale.training.fp8 import convert_to_fp8  # noqa: E402

# What is wanted of a Hopper GPU: a figure of a part, and the least that it should be.
GOALS = (
    ("VMD step, 110 M: MFU", "throughput 110M", ("vmd", "mfu"), 0.45),
    ("the same in pretrain.py", "trainer 110M", ("mfu",), 0.45),
    ("VMD step, 1 B: MFU", "throughput 1B", ("vmd", "mfu"), 0.5),
    ("the same in pretrain.py", "trainer 1B", ("mfu",), 0.5),
    (
        "MDM step, 110 M: tokens/s; published for MDLM small: about 50,000 an H100",
        "throughput 110M",
        ("mdm", "tokens_per_second"),
        5e4,
    ),
)
GPU_TESTS = ("test_attention_kernels.py", "test_step_causes.py", "test_determinism.py", "test_sampler.py")
GPU_TESTS_WITH_PYDANTIC = ("test_head.py", "test_memory_plan.py", "test_fp8.py")


def need(*packages: str) -> None:
    """Raises `Skipped` where one is missing."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise Skipped(f"{package} is not installed")


class Check:
    """Sizes of what is measured: real ones on a GPU, tiny ones on a CPU."""

    def __init__(self, tiny: bool) -> None:
        self.tiny = tiny
        self.device = torch.device("cpu" if tiny else "cuda")
        self.dtype = torch.float32 if tiny else torch.bfloat16
        self.repeats = 2 if tiny else 10

    def shape(self, size: str, latent: bool) -> Architecture:
        if self.tiny:
            return shape(2, 32, 2, 32, 300, latent)
        return shape(*SIZES[size], LENGTH, VOCAB, latent)

    def rows(self, size: str) -> int:
        return 2 if self.tiny else ROWS[size]

    def step(self, size: str, latent: bool, compiled: bool = True, fp8: bool = False, **changes: Any) -> BareStep:
        torch._dynamo.reset()
        torch.manual_seed(0)
        a = replace(self.shape(size, latent), **changes)
        model = VMD(a).to(self.device, self.dtype)
        if fp8:
            convert_to_fp8(model)
        compiled = compiled and not self.tiny
        return BareStep(a, self.rows(size), self.device, self.dtype, compiled=compiled, model=model)

    def parts(self) -> Parts:
        """In the order of what is wanted most; with guesses of the seconds that a part takes."""
        return {
            "environment": (self.environment, 1),
            "ceilings": (self.ceilings, 5),
            "throughput 110M": (lambda: self.throughput("110M"), 90),
            "attention": (self.attention, 30),
            "head": (self.head, 30),
            "tests": (self.tests, 60),
            "where the time goes": (self.where_the_time_goes, 30),
            "trainer 110M": (lambda: self.trainer("110M"), 80),
            "throughput 1B": (lambda: self.throughput("1B"), 90),
            "synchronisation": (self.synchronisation, 15),
            "sampling": (self.sampling, 60),
            "resume": (self.resume, 60),
            "110M without compile": (lambda: self.throughput("110M", compiled=False), 20),
            "110M by kernel": (self.by_kernel, 80),
            "110M in fp8": (self.in_fp8, 80),
            "trainer 110M, Muon": (lambda: self.trainer("110M", optimizer="muon"), 80),
            "checkpointing": (self.checkpointing, 60),
            "configs/ladder/110m.json": (lambda: self.trainer("110m.json"), 80),
            "trainer 1B": (lambda: self.trainer("1B"), 150),
        }

    # ---- parts

    def environment(self) -> dict[str, Any]:
        names = ("torch", "triton", "deepspeed", "flash-attn", "flash-attn-3", "liger-kernel", "torchao", "numpy")
        versions = {}
        for name in names:
            try:
                versions[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                versions[name] = None
        return {**provenance(), "cuda": torch.version.cuda, "packages": versions}

    def ceilings(self) -> dict[str, float]:
        """What this device reaches at all, on random numbers."""
        n = 256 if self.tiny else 8192
        a, b = (torch.randn(n, n, device=self.device, dtype=self.dtype) for _ in range(2))
        source = torch.randn(2**16 if self.tiny else 2**30, device=self.device)
        target = torch.empty_like(source)
        times = in_turns({"product": lambda: a @ b, "copy": lambda: target.copy_(source)}, self.repeats, warmup=3)
        best = {name: min(values) for name, values in times.items()}
        return {"tflops": 2 * n**3 / best["product"] / 1e12, "copy_gb_s": 8 * source.numel() / best["copy"] / 1e9}

    def tests(self) -> dict[str, Any]:
        """The tests that CPUs skip."""
        need("pytest")
        with_pydantic = importlib.util.find_spec("pydantic") is not None
        names = (*GPU_TESTS, *(GPU_TESTS_WITH_PYDANTIC if with_pydantic else ()))
        files = [str(ROOT / "tests" / "unit" / name) for name in names]
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "gpu", *files]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=150)
        if done.returncode == 5:
            raise Skipped("no test was collected")
        return {"ok": done.returncode == 0, "files": names, "end": done.stdout.strip().splitlines()[-20:]}

    def resume(self) -> dict[str, Any]:
        need("deepspeed", "pydantic")
        return resumed(self.tiny)

    def trainer(self, size: str, optimizer: str = "adamw") -> dict[str, Any]:
        need("deepspeed", "pydantic")
        stage = 0 if self.tiny and optimizer == "muon" else 1
        changes = {"training.optimizer": optimizer, "deepspeed.zero_optimization.stage": stage}
        return trained(self.tiny, size, changes)

    def attention(self) -> dict[str, Any]:
        """Milliseconds forward and backward of each kernel and mask; L = 1024."""
        sizes = (32, 2, 2, 16) if self.tiny else (LENGTH, 32, 12, 64)
        found = attention.measure(*sizes, rounds=self.repeats, device=self.device)
        return {**found, "ok": not any("failed" in case for case in found.values())}

    def head(self) -> dict[str, Any]:
        """Milliseconds forward and backward of the loss from hidden states, half of them masked: several ways."""
        sizes = {"length": 32, "width": 32} if self.tiny else {"length": LENGTH, "width": 768}
        vocab, rows = (300, 2) if self.tiny else (VOCAB, 32)
        return train_step.head_only_where_masked(vocab, rows, self.repeats, self.device, **sizes)

    def throughput(self, size: str, compiled: bool = True) -> dict[str, Any]:
        """Tokens/s and MFU of VMD and MDM steps, in turns."""
        found, times = self.speeds(
            {name: self.step(size, latent, compiled) for name, latent in (("mdm", False), ("vmd", True))}
        )
        return {"vmd_of_mdm": ratio(times, "mdm", "vmd"), **found}

    def by_kernel(self) -> dict[str, Any]:
        """VMD steps with the attention that is chosen, with flash-attn where it is installed, and with SDPA."""
        kernels = ("auto", *(("flash",) if flash_available(64) else ()), "sdpa")
        return self.speeds({kernel: self.step("110M", True, attention=kernel) for kernel in kernels})[0]

    def in_fp8(self) -> dict[str, Any]:
        """VMD steps with the blocks' linear layers in fp8, and without; `mfu` is of the peak of bf16."""
        need("torchao")
        if self.tiny or torch.cuda.get_device_capability() < (8, 9):
            raise Skipped("needs a GPU that has fp8")
        return self.speeds({"bf16": self.step("110M", True), "fp8": self.step("110M", True, fp8=True)})[0]

    def speeds(self, steps: dict[str, BareStep]) -> tuple[dict[str, Any], Times]:
        started = time.perf_counter()
        several = 1 if self.tiny else 4  # between two waits for the device, as in training

        def run(step: BareStep) -> Callable[[], object]:
            return lambda: [step() for _ in range(several)]

        times = in_turns({name: run(step) for name, step in steps.items()}, self.repeats, warmup=2)
        found: dict[str, Any] = {"seconds_with_compiling": time.perf_counter() - started}
        for name, seconds in medians(times).items():
            seconds, step = seconds / several, steps[name]
            tokens, flops = step.rows * step.a.row_length, FlopsPerToken.of(step.a, step.masked_share).total
            found[name] = {
                "milliseconds": 1e3 * seconds,
                "tokens_per_second": tokens / seconds,
                "mfu": flops * tokens / seconds / peak_flops(self.device),
                "parameters": sum(p.numel() for p in step.parameters),
                "peak_gib_of_a_step": peak_bytes(step, self.device) / 2**30,
            }
        return found, times

    def where_the_time_goes(self) -> dict[str, Any]:
        """Device time of VMD steps at 110 M by kind of kernel, and the slowest kernels."""
        return kernel_times(self.step("110M", latent=True))

    def checkpointing(self) -> dict[str, Any]:
        """Seconds and peak of a step with each kind of activation checkpointing."""
        found = {}
        for kind in ("none", "selective", "full"):
            step = self.step("110M", latent=True)
            step.model.checkpoint_activations(kind)
            times = in_turns({kind: step}, self.repeats, warmup=3)
            found[kind] = {
                "milliseconds": 1e3 * medians(times)[kind],
                "peak_gib": peak_bytes(step, self.device) / 2**30,
            }
        return found

    def synchronisation(self) -> dict[str, Any]:
        """Whether anything in the forward and backward pass of a step makes the host wait."""
        if self.tiny:
            raise Skipped("needs a GPU")
        step = self.step("110M", latent=True)
        step()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step.loss(step.batches[0]).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return {"ok": True}

    def sampling(self) -> dict[str, Any]:
        """Tokens/s against T, VMD and MDM in turns."""
        counts, batches = ((2,), (2,)) if self.tiny else ((8, 32, 128), (1, 64))
        models = {
            name: VMD(self.shape("110M", latent)).to(self.device, self.dtype).eval()
            for name, latent in (("mdm", False), ("vmd", True))
        }
        torch._dynamo.reset()
        for model in models.values() if not self.tiny else ():
            model.compile_blocks()
        found: dict[str, Any] = {}
        for batch in batches:
            sampling.warm_up(models, batch, "balanced")
            for steps in counts:
                found[f"batch {batch}, T = {steps}"] = sampling.measure(models, batch, steps, "balanced", rounds=3)
        return found


def parts_of(tiny: bool) -> Parts:
    """Those of a `Check`; after each, a GPU's memory is given back."""

    def clean(run: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
        def run_and_clean() -> dict[str, Any]:
            try:
                return run()
            finally:
                if not tiny:
                    torch.cuda.empty_cache()

        return run_and_clean

    return {name: (clean(run), guess) for name, (run, guess) in Check(tiny).parts().items()}


def beside_goals(result: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, object, float, str]]:
    """Of each goal what is wanted, what was found ("-" where the part did not run), the goal, and whether it is met."""
    rows = []
    for what, part, path, goal in GOALS:
        found: Any = result.get(part, {})
        for key in path:
            found = found.get(key, {})
        met = "-" if not found else "met" if found >= goal else "missed"
        rows.append((what, found or "-", goal, met))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("gpu_check.json"))
    parser.add_argument("--cpu", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--only", nargs="+", metavar="PART")
    parser.add_argument("--seconds", type=float, default=520, help="no part is begun that would end later")
    args = parser.parse_args()
    if not args.cpu and not torch.cuda.is_available():
        sys.exit("error: no GPU; --cpu tries the script itself with tiny sizes")
    parts = partial(parts_of, args.cpu)
    unknown = set(args.only or ()) - set(parts())
    if unknown:
        sys.exit(f"error: --only {sorted(unknown)}: parts are {', '.join(parts())}")
    result = run_parts(parts, args.only, args.seconds, args.output)
    rows = [(name, verdict(part), part["seconds"]) for name, part in result.items()]
    print("\n" + table(("part", "result", "seconds"), rows))
    print("\n" + table(("of a Hopper GPU", "found", "goal", ""), beside_goals(result)))
    sys.exit(any("failed" in part or part.get("ok") is False for part in result.values()))


if __name__ == "__main__":
    main()
