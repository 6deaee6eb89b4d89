"""GPUs and the nets between them, from data sheets; and the measured peak of what is at hand."""

import re
import time
from dataclasses import dataclass

import torch

GIB = 2**30

# Dense peaks in FLOP/s by precision, from the vendors' data sheets, by a part of the GPU's name; the longest that fits
# counts. fp32 is that of the CUDA cores: PyTorch uses TF32 only where it is told to, and nothing here tells it. (V100s
# have no bf16; theirs is of fp16.)
PEAK_FLOPS = {
    "B200": {"bf16": 2250e12, "fp32": 75e12},
    "H200": {"bf16": 989e12, "fp32": 67e12},
    "H200 NVL": {"bf16": 835e12, "fp32": 60e12},
    "H100": {"bf16": 989e12, "fp32": 67e12},  # SXM
    "H100 PCIe": {"bf16": 756e12, "fp32": 51e12},
    "H100 NVL": {"bf16": 835e12, "fp32": 60e12},
    "H800": {"bf16": 989e12, "fp32": 67e12},
    "A100": {"bf16": 312e12, "fp32": 19.5e12},
    "A800": {"bf16": 312e12, "fp32": 19.5e12},
    "L40": {"bf16": 181e12, "fp32": 90.5e12},
    "L40S": {"bf16": 362e12, "fp32": 91.6e12},
    "4090": {"bf16": 165e12, "fp32": 82.6e12},
    "V100": {"bf16": 125e12, "fp32": 15.7e12},
}


@dataclass(frozen=True)
class GPU:
    """One GPU of a node of eight. Bandwidths are bytes per second and GPU, those of links of one direction.

    The price is only an order of magnitude, for comparisons: rented on demand in 2025, US dollars an hour.
    """

    name: str
    peak_flops: dict[str, float]  # dense, by precision
    memory: float  # bytes, as PyTorch reports them (total_memory): a little less than the data sheet's
    hbm: float  # between the GPU and its own memory
    inside: float  # NVLink: half of the data sheet's total of both directions
    between: float  # one InfiniBand or RoCE port for each GPU
    price: float
    in_node: int = 8


# Data sheets: NVIDIA A100 80GB SXM (2.04 TB/s; NVLink 3, 600 GB/s), H100 SXM (3.35 TB/s; NVLink 4, 900 GB/s; DGX H100:
# 8 x 400 Gb/s), H200 SXM (4.8 TB/s), HGX B200 (64 TB/s of eight; NVLink 5, 1.8 TB/s; 400 Gb/s a GPU as in DGX B200);
# DGX A100: 8 x 200 Gb/s.
GPUS = {
    "a100": GPU("a100", PEAK_FLOPS["A100"], 79.1 * GIB, 2.04e12, 300e9, 25e9, 1.8),
    "h100": GPU("h100", PEAK_FLOPS["H100"], 79.1 * GIB, 3.35e12, 450e9, 50e9, 2.5),
    "h200": GPU("h200", PEAK_FLOPS["H200"], 139.8 * GIB, 4.8e12, 450e9, 50e9, 3.2),
    "b200": GPU("b200", PEAK_FLOPS["B200"], 178.3 * GIB, 8.0e12, 900e9, 50e9, 5.5),
}


def peak_flops(device: torch.device, precision: str = "bf16") -> float:
    """Peak FLOP/s of a device: from the data sheet for a known GPU, else measured with one matrix product.

    `precision`: fp32 | bf16. On a CPU it is fp32 that is measured, whatever is asked for.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = [key for key in PEAK_FLOPS if re.search(rf"\b{key}(?![0-9])", name)]  # an A1000 is no A100
        if known:
            return PEAK_FLOPS[max(known, key=len)][precision]
    return measured_flops(device, precision)


def measured_flops(device: torch.device, precision: str = "bf16", size: int = 768, repeats: int = 30) -> float:
    """FLOP/s of a square matrix product, on a CPU in fp32: the best of some, as another process may slow down any."""
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu and precision == "bf16" else torch.float32
    size = 8 * size if on_gpu else size
    a = torch.randn(size, size, device=device, dtype=dtype)
    best = 0.0
    for _ in range(repeats):
        if on_gpu:
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        a @ a
        if on_gpu:
            torch.cuda.synchronize(device)
        best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best
