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
    alone = config.training.global_batch <= rows * world_size
    in_bucket = stage in (1, 2) and low == 4 and alone  # nothing is accumulated: gradients have no other place
    zero = config.deepspeed.get("zero_optimization", {})
    return Memory(
        weights=low * parameters / shard["weights"],
        gradients=0.0 if in_bucket else 4 * parameters / shard["gradients"],
        optimizer=((8 + (4 if stage > 0 else 0)) * parameters - 4 * by_muon) / shard["optimizer"],
        ema=(4 * parameters / shard["optimizer"]) if config.training.ema_decay else 0.0,
        buffers=buffers_of(stage, low, parameters, world_size, zero, activations + logits, on_gpu),
        activations=activations,
        logits=logits,
    )


# ZeRO (arXiv 1910.02054): the stage from which on each rank holds 1/N of it.
SHARDED_FROM = {"weights": 3, "gradients": 2, "optimizer": 1}
# DeepSpeed's defaults, in elements. The engine asks for no larger bucket than there are parameters.
BUCKET = 500_000_000
DEFAULTS = {
    "reduce_bucket_size": BUCKET,
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_max_live_parameters": 1_000_000_000,
}


def buffers_of(
    stage: int, low: int, parameters: int, ranks: int, zero: dict[str, Any], freed: float, on_gpu: bool
) -> float:
    """Where gradients and weights travel in DeepSpeed 0.19, as benchmarks/memory.py finds it.

    The peak is before the backward pass, which frees `freed` bytes, or when gradients are reduced: the first time,
    after a share `done` of the backward pass, or the last time. This is what either takes above the former without
    buffers.
    """
    bucket, prefetched, live = (min(float(zero.get(key, value)), parameters) for key, value in DEFAULTS.items())
    done = bucket / parameters
    all_at_once = 4 * min(BUCKET, parameters)  # flattened in fp32 when the backward pass has ended
    if stage == 0:
        return max(0.0, all_at_once - freed)
    if stage == 1 and low < 4:  # beside them, those in bf16
        return max(0.0, low * parameters + all_at_once - freed)
    if stage == 1:
        not_yet_reduced = low * (parameters - bucket)
        return low * bucket + max(0.0, low * parameters - freed, not_yet_reduced + low * parameters / ranks - freed)
    if stage == 2:
        travelling = (low + (4 if low < 4 else 0)) * bucket  # a copy of the bucket, and its sum in fp32
        first = low * parameters / ranks if low == 4 else 0.0  # the shard, where it was not there before
        return low * bucket + max(0.0, travelling - done * freed, first - done * freed)
    # Weights that were gathered stay until their last use; gloo's reduce-scatter makes a copy.
    gathered = low * live
    reduced = (1 - done) * (gathered + freed) + (4 if on_gpu else 8) * bucket
    return 4 * bucket + max(gathered + low * prefetched, reduced - freed)


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
