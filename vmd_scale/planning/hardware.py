"""GPUs and the nets between them, from data sheets; and the measured peak of what is at hand."""

import re
import time
from dataclasses import dataclass

import torch

GIB = 2**30

# Dense bf16 peak in FLOP/s, from the vendors' data sheets, by a part of the GPU's name; the longest that fits counts.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H200 NVL": 835e12,
    "H100": 989e12,  # SXM
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40": 181e12,
    "L40S": 362e12,
    "4090": 165e12,
    "V100": 125e12,
}


@dataclass(frozen=True)
class GPU:
    """One GPU of a node of eight. Bandwidths are of one direction, bytes per second and GPU.

    The price is only an order of magnitude, for comparisons: rented on demand in 2025, US dollars an hour.
    """

    name: str
    peak_flops: float  # dense bf16
    memory: float  # bytes, as PyTorch reports them (total_memory): a little less than the data sheet's
    inside: float  # NVLink: half of the data sheet's total of both directions
    between: float  # one InfiniBand or RoCE port for each GPU
    price: float
    in_node: int = 8


# Data sheets: NVIDIA A100 80GB (NVLink 3, 600 GB/s), H100 SXM (NVLink 4, 900 GB/s; DGX H100: 8 x 400 Gb/s), H200 SXM,
# HGX B200 (NVLink 5, 1.8 TB/s; 400 Gb/s a GPU as in DGX B200); DGX A100: 8 x 200 Gb/s.
GPUS = {
    "a100": GPU("a100", PEAK_FLOPS["A100"], 79.1 * GIB, 300e9, 25e9, 1.8),
    "h100": GPU("h100", PEAK_FLOPS["H100"], 79.1 * GIB, 450e9, 50e9, 2.5),
    "h200": GPU("h200", PEAK_FLOPS["H200"], 139.8 * GIB, 450e9, 50e9, 3.2),
    "b200": GPU("b200", PEAK_FLOPS["B200"], 178.3 * GIB, 900e9, 50e9, 5.5),
}


def peak_flops(device: torch.device) -> float:
    """Peak FLOP/s of a device: from the data sheet for a known GPU, else measured with one matrix product."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = [key for key in PEAK_FLOPS if re.search(rf"\b{key}(?![0-9])", name)]  # an A1000 is no A100
        if known:
            return PEAK_FLOPS[max(known, key=len)]
    return measured_flops(device)


def measured_flops(device: torch.device, size: int = 768, repeats: int = 30) -> float:
    """FLOP/s of a square fp32 matrix product (bf16 on GPU): the best of some, as another process may slow down any."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    size = 8 * size if device.type == "cuda" else size
    a = torch.randn(size, size, device=device, dtype=dtype)
    best = 0.0
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best
