"""Attention kernels, forward and backward, in turns: milliseconds by row length and mask.

    python benchmarks/attention.py --json attention.json
    python benchmarks/attention.py --lengths 256 --rows 4 --heads 4

Masks: none, several documents a row, and that of block diffusion over [noisy ; clean]. On a GPU in bf16, with whatever
flash-attn is installed; on a CPU in fp32, without FlexAttention, which has no backward pass there.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from comparing import Report, in_turns, medians, table
from workload import attention_flops

from vmd_scale.model.attention import (
    Documents,
    Mask,
    attention,
    block_diffusion_mask,
    document_boundaries,
    flash_kernels,
    kernel_name,
)


def measure(length: int, rows: int, heads: int, width: int, rounds: int, device: torch.device) -> dict[str, Any]:
    """Milliseconds of every kernel with every mask that it has; the others are measured where one fails."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    # As in a block: views of one product, and a gradient that lies in memory as a product made it.
    qkv = torch.randn(rows, length, 3, heads, width, device=device, dtype=dtype, requires_grad=True)
    direction = torch.randn(rows, length, heads, width, device=device, dtype=dtype)
    segments = (torch.arange(length) // (length // 4)).expand(rows, length)  # four documents a row
    documents = Documents(segments.to(device), document_boundaries(segments, 4).to(device))
    masks: dict[tuple[str, str], Mask] = {("none", "reference"): None, ("none", "sdpa"): None}
    masks |= {("documents", "sdpa"): documents}
    for kernel in ("auto", "flash"):
        if flash_kernels(width, kernel == "auto") is not None:
            masks |= {("none", kernel): None, ("documents", kernel): documents}
    for kernel in ("sdpa", "flex") if device.type == "cuda" else ("sdpa",):
        masks["blocks", kernel] = block_diffusion_mask(length // 2, 8, None, kernel, device)

    def case(kernel: str, mask: Mask) -> Callable[[], object]:
        return lambda: torch.autograd.grad(attention(*qkv.unbind(2), mask, kernel), qkv, direction)

    cases = {f"{mask}: {kernel_name(kernel, head_width=width)}": case(kernel, m) for (mask, kernel), m in masks.items()}
    failed: dict[str, Any] = {}
    for name, run in list(cases.items()):
        try:
            run()
        except Exception as error:
            failed[name] = {"failed": repr(error)[:500]}
            del cases[name]
    flops = attention_flops(rows, heads, width, length)
    times = medians(in_turns(cases, rounds, warmup=2))
    return {name: {"milliseconds": 1e3 * s, "dense_tflops": flops / s / 1e12} for name, s in times.items()} | failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 1024, 4096] if on_gpu else [128, 256])
    parser.add_argument("--rows", type=int, default=32 if on_gpu else 4)
    parser.add_argument("--heads", type=int, default=12 if on_gpu else 4)
    parser.add_argument("--width", type=int, default=64, help="of a head")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = torch.device("cuda" if on_gpu else "cpu")
    report = Report(__doc__, args.json, rows=args.rows, heads=args.heads, head_width=args.width)
    for length in args.lengths:
        found = measure(length, args.rows, args.heads, args.width, args.rounds, device)
        rows = [(name, *values.values()) for name, values in found.items() if "failed" not in values]
        text = table(("", "milliseconds", "dense TFLOP/s"), rows)
        report.add(f"length {length}", found, f"{length} positions\n{text}")


if __name__ == "__main__":
    main()
