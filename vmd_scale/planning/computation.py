"""Seconds that one GPU computes in a step: matrix products at an assumed share of its peak, and the update's traffic.

Element-wise work of the network is in the assumed share. That of gradients, optimizer and averages is not: it depends
on the number of parameters alone, and shows where a rank has few tokens. Launching kernels takes time too, which is not
counted and shows there as well (see `FEW_TOKENS`).
"""

from vmd_scale.config import Config
from vmd_scale.model import Architecture
from vmd_scale.planning.hardware import GPU
from vmd_scale.planning.workload import denoiser_passes, flops_of, head_pieces
from vmd_scale.planning.zero import Zero

ATTAINED = 0.8  # of the bandwidth between a GPU and its memory, by kernels that read and write long rows
FEW_TOKENS = 4096  # of a micro-batch, below which launching kernels may take as long as they do


def passes_seconds(
    config: Config, a: Architecture, zero: Zero, micro_batch: int, flops_per_second: float
) -> tuple[float, float]:
    """Of the forward and of the backward pass of a micro-batch, with what is computed again there."""
    tokens = micro_batch * config.data.row_length
    flops = flops_of(config, a, on_gpu=True, rows=micro_batch)
    again = 0.0
    if config.training.activation_checkpointing == "full":
        again += (flops.denoiser + flops.encoder) / 3
    recomputed = zero.stage == 3 or config.diffusion.objective == "iw"
    if recomputed and head_pieces(a, denoiser_passes(config, micro_batch) * tokens) > 1:
        again += flops.head / 3
    return tokens * flops.total / 3 / flops_per_second, tokens * (flops.total * 2 / 3 + again) / flops_per_second


def update_seconds(zero: Zero, parameters: int, micro_batches: int, averaged: bool, ranks: int, gpu: GPU) -> float:
    """Of adding up gradients, clipping, AdamW and the average: bytes that are read and written, at the memory's speed.

    Args:
        averaged: whether there is an average (EMA).
    """
    whole, share = float(parameters), parameters / (ranks if zero.stage > 0 else 1)
    added = zero.low + 2 * zero.summed  # a gradient is read; the sum is, and written
    copied = 2 * zero.low if zero.stage >= 2 else 0  # into a bucket; what leaves it is added to the rank's share
    size = micro_batches * (copied * whole + added * (share if zero.stage >= 2 else whole))
    size += 12 * (whole if zero.apart and not zero.scattered else share)  # norm, clipping
    size += 28 * share  # AdamW reads weight, gradient and two moments, and writes all but the gradient; all in fp32
    size += (4 + zero.low) * share if zero.stage > 0 else 0  # weights of the forward pass, from their masters
    size += 12 * share if averaged else 0
    return size / (ATTAINED * gpu.hbm)
