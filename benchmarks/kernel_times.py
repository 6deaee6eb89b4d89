"""Where the device time of a training step goes, by kind of kernel."""

from collections import defaultdict
from typing import Any

import torch
from comparing import seconds_of
from torch.profiler import ProfilerActivity, profile
from workload import BareStep

STEPS = 3
KINDS = (
    # By the names of kernels; what the compiler made comes first, for it is named after all that it does.
    ("compiled element-wise", ("triton_",)),
    ("attention", ("flash", "fmha", "attention", "attn", "sdpa")),
    ("matrix products", ("gemm", "nvjet", "cutlass", "aten::mm", "aten::addmm", "cublas", "matmul")),
    ("optimizer", ("adam", "multi_tensor", "foreach", "lerp")),
    ("embedding and gather", ("embedding", "index", "scatter", "gather", "sort", "grad_weight", "krn_partial")),
    ("copies", ("memcpy", "memset", "copy")),
)


def kernel_times(step: BareStep) -> dict[str, Any]:
    """Milliseconds of a step, how busy the device is, the share of each kind of kernel, and the slowest kernels.

    On a CPU it is the time of operations.
    """
    on_gpu = step.device.type == "cuda"
    for _ in range(3):
        step()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        wall = seconds_of(lambda: [step() for _ in range(STEPS)])
    spent: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        if getattr(event, "is_user_annotation", False):  # a region that holds kernels which are counted
            continue
        if not on_gpu:
            spent[event.key] += event.self_cpu_time_total
        elif event.device_type != torch.autograd.DeviceType.CPU:
            spent[event.key] += event.self_device_time_total
    kinds: dict[str, float] = defaultdict(float)
    for name, microseconds in spent.items():
        kinds[kind_of(name)] += microseconds
    total = sum(kinds.values()) or 1.0
    slowest = sorted(spent.items(), key=lambda item: -item[1])[:25]
    return {
        "milliseconds_a_step": 1e3 * wall / STEPS,
        "busy": total / 1e6 / wall,
        "share": {k: v / total for k, v in sorted(kinds.items(), key=lambda item: -item[1])},
        "kernels": [{"name": name[:120], "share": t / total} for name, t in slowest],
    }


def kind_of(kernel: str) -> str:
    """What a kernel is for, by its name."""
    name = kernel.lower()
    return next((kind for kind, marks in KINDS if any(mark in name for mark in marks)), "other element-wise")
