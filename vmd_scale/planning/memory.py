"""Memory of a rank, by part.

What depends on the number of parameters follows from the precision and the ZeRO stage. What the backward pass needs is
not estimated but counted (see planning/activations.py).
"""

from dataclasses import asdict, dataclass
from typing import Any

from vmd_scale.config import Config
from vmd_scale.model import Architecture
from vmd_scale.model.head import CHUNK_ELEMENTS, GPU_CHUNK_ELEMENTS, VOCAB_MULTIPLE
from vmd_scale.planning.activations import Kept, kept_of, without_memory
from vmd_scale.planning.workload import denoiser_passes, masked_share


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank."""

    weights: float
    gradients: float
    optimizer: float  # with the fp32 masters
    ema: float
    buffers: float  # in which gradients and weights travel
    activations: float
    logits: float

    @property
    def total(self) -> float:
        return sum(asdict(self).values())


def memory_of(
    config: Config, a: Architecture, world_size: int, precision: str, on_gpu: bool, kept: Kept | None = None
) -> Memory:
    """
    Args:
        precision: fp32 | bf16.
        on_gpu: how large the chunks of logits are.
        kept: what `kept_of` found, where it is known already.
    """
    stage, rows = config.zero_stage, config.training.micro_batch
    low = 2 if precision == "bf16" else 4
    shard = {part: world_size if stage >= first else 1 for part, first in SHARDED_FROM.items()}
    kept = kept or kept_of(config, a, precision, on_gpu)
    parameters = kept.parameters
    # Muon has one moment, Adam two. Its workspace, of one matrix at a time, comes after the activations and is smaller.
    by_muon = sum(p.numel() for p in without_memory(a).hidden_matrices) if config.training.optimizer == "muon" else 0
    activations = rows * (denoiser_passes(config) * (kept.denoiser + kept.recomputed) + kept.encoder)
    compiled = on_gpu and config.training.compile
    weighted = config.diffusion.objective != "iw"
    logits = logits_bytes(a, rows, masked_share(config), low, on_gpu, weighted, stage, compiled)
    accumulating = config.training.global_batch > rows * world_size
    in_bucket = stage in (1, 2) and low == 4 and not accumulating  # gradients have no other place
    zero = config.deepspeed.get("zero_optimization", {})
    return Memory(
        weights=low * parameters / shard["weights"],
        gradients=0.0 if in_bucket else 4 * parameters / shard["gradients"],
        optimizer=((8 + (4 if stage > 0 else 0)) * parameters - 4 * by_muon) / shard["optimizer"],
        ema=(4 * parameters / shard["optimizer"]) if config.training.ema_decay else 0.0,
        buffers=buffers_of(stage, low, parameters, world_size, zero, activations + logits, accumulating, on_gpu),
        activations=activations,
        logits=logits,
    )


# ZeRO (arXiv 1910.02054): the stage from which on each rank holds 1/N of it.
SHARDED_FROM = {"weights": 3, "gradients": 2, "optimizer": 1}
# DeepSpeed 0.19's, in elements. Where the user asks for no bucket, the engine asks for one of at most all parameters.
BUCKET = 500_000_000
AT_ONCE = 500_000_000  # of gradients that are reduced when the backward pass has ended
PREFETCHED, LIVE = 50_000_000, 1_000_000_000


def buffers_of(
    stage: int,
    low: int,
    parameters: int,
    ranks: int,
    zero: dict[str, Any],
    freed: float,
    accumulating: bool,
    on_gpu: bool,
) -> float:
    """Where gradients and weights travel in DeepSpeed 0.19, as its code says and benchmarks/memory.py finds.

    Args:
        low: bytes of a weight.
        zero: the user's `zero_optimization`.
        freed: bytes that are there when the backward pass begins, and no more when it ends.
        accumulating: whether a step has several micro-batches.
    """
    at_the_end = 4 * min(AT_ONCE, parameters)  # gradients flattened in fp32
    if stage == 0:
        return max(0.0, at_the_end - freed)
    if stage == 1 and low < 4:  # those in bf16 are there beside: at the end, or from one micro-batch to the next
        of_weights = low * parameters
        return of_weights + max(0.0, at_the_end - freed) if accumulating else max(0.0, of_weights + at_the_end - freed)
    bucket = float(zero.get("reduce_bucket_size", min(BUCKET, parameters)))
    allocated = (4 if stage == 3 else low) * bucket * (2 if stage < 3 and zero.get("overlap_comm") else 1)
    filled = min(bucket, parameters)
    done = filled / parameters  # share of the backward pass after which the bucket is full for the first time
    if stage == 1:
        waiting = low * (parameters - filled)  # gradients that are not yet in it
        return allocated + max(0.0, low * parameters - freed, waiting + low * parameters / ranks - freed)
    if stage == 2:
        copy_and_sum = (low + (4 if low < 4 else 0)) * filled
        new_shard = low * parameters / ranks if low == 4 else 0.0
        return allocated + max(0.0, max(copy_and_sum, new_shard) - done * freed)
    # Weights that were gathered stay until their last use, beside the flat buffer in which the last of them came.
    live, prefetched = (
        low * min(float(zero.get(f"stage3_{key}", value)), parameters)
        for key, value in (("max_live_parameters", LIVE), ("prefetch_bucket_size", PREFETCHED))
    )
    copies = (4 if on_gpu else 8) * filled  # gloo's reduce-scatter makes one more
    return allocated + max(live + prefetched, (1 - done) * (live + freed) + copies - freed)


def logits_bytes(
    a: Architecture, rows: int, masked: float, low: int, on_gpu: bool, weighted: bool, stage: int, compiled: bool
) -> float:
    """Logits of a chunk, their log-probabilities in fp32, and the gradient of the head (see model/head.py)."""
    positions = rows * a.row_length
    wanted = masked * positions * a.vocab_size
    in_pieces = positions * a.vocab_size > CHUNK_ELEMENTS
    if not in_pieces or not weighted or stage == 3:
        # Logits, their log-probabilities and the gradients of both, in fp32; a chunk's gradient of the head in `low`.
        chunk = min(wanted, CHUNK_ELEMENTS)
        return chunk * (4 * 3 + (low if low < 4 else 0))
    chunk = min(wanted, GPU_CHUNK_ELEMENTS if on_gpu else CHUNK_ELEMENTS)
    # Uncompiled, logits in `low` are made fp32 before their log-probabilities are.
    filled_up = low if on_gpu and a.vocab_size % VOCAB_MULTIPLE["cuda"] else 0
    return chunk * (low + (8 if low < 4 and not compiled else 4)) + (4 + low + filled_up) * a.vocab_size * a.width
