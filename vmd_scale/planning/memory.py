"""Memory of a rank, by part.

What depends on the number of parameters follows from the precision and the ZeRO stage. What the backward pass needs is
not estimated but counted (see planning/activations.py).
"""

import math
from dataclasses import asdict, dataclass

from vmd_scale.config import Config
from vmd_scale.model import Architecture
from vmd_scale.model.head import CHUNK_ELEMENTS, GPU_CHUNK_ELEMENTS, VOCAB_MULTIPLE
from vmd_scale.planning.activations import Kept, kept_of, without_memory
from vmd_scale.planning.workload import denoiser_passes, head_pieces, masked_share
from vmd_scale.planning.zero import Zero


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank."""

    weights: float
    gradients: float
    optimizer: float  # with the fp32 masters
    ema: float
    buffers: float  # in which gradients and weights travel
    activations: float  # from the forward pass to the backward pass
    transient: float  # beside them, by turns: logits with their gradients, one layer of the backward pass

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
    zero, rows = Zero.of(config, precision), config.training.micro_batch
    shards = zero.shards(world_size)
    kept = kept or kept_of(config, a, precision, on_gpu)
    parameters, passes = kept.parameters, denoiser_passes(config, rows)
    # Muon has one moment, Adam two. Its workspace, of one matrix at a time, comes after the activations and is smaller.
    by_muon = sum(p.numel() for p in without_memory(a).hidden_matrices) if config.training.optimizer == "muon" else 0
    activations = rows * (passes * kept.denoiser + kept.encoder)
    compiled = on_gpu and config.training.compile
    fused = config.diffusion.objective != "iw" and zero.stage < 3
    wanted = masked_share(config) * rows * a.row_length
    logits = logits_bytes(a, passes * rows * a.row_length, wanted, zero.low, on_gpu, fused, compiled)
    transient = max(logits, rows * passes * kept.one_layer)
    accumulating = config.training.global_batch > rows * world_size
    # Between two micro-batches gradients lie where they are summed; those of one alone are counted in the buckets.
    in_bucket = zero.stage in (1, 2) and zero.low == zero.summed and not accumulating
    buffers = buffers_of(zero, parameters, world_size, activations + transient, in_bucket, on_gpu)
    return Memory(
        weights=zero.low * parameters / shards["weights"],
        gradients=0.0 if in_bucket else zero.summed * parameters / shards["gradients"],
        optimizer=((8 + (4 if zero.stage > 0 else 0)) * parameters - 4 * by_muon) / shards["optimizer"],
        ema=(4 * parameters / shards["optimizer"]) if config.training.ema_decay else 0.0,
        buffers=buffers,
        activations=activations,
        transient=transient,
    )


# DeepSpeed 0.19's, in elements.
AT_ONCE = 500_000_000  # of gradients that are reduced when the backward pass has ended
PREFETCHED, LIVE = 50_000_000, 1_000_000_000


def buffers_of(zero: Zero, parameters: int, ranks: int, freed: float, in_bucket: bool, on_gpu: bool) -> float:
    """Where gradients and weights travel in DeepSpeed 0.19, as its code says and benchmarks/memory.py finds.

    Args:
        freed: bytes that are there when the backward pass begins, and no more when it ends.
        in_bucket: whether gradients have no other place.
    """
    low, sent, share = zero.low, zero.sent, parameters / ranks
    converted = sent if sent != low else 0  # beside gradients in another type than they travel in
    if zero.stage == 0:
        return max(0.0, (low + converted) * min(AT_ONCE, parameters) - freed)
    if zero.apart:
        if zero.lean:
            at_the_end = 4 * parameters if zero.scattered and not on_gpu else 0  # gloo's reduce-scatter makes a copy
        else:  # one flat tensor, which is copied only where small ones lie beside it
            at_the_end = (4 * parameters if parameters <= AT_ONCE else 0) + (sent * parameters if sent < 4 else 0)
        return max(0.0, at_the_end + (low * parameters if zero.keeps_low else 0) - freed)
    bucket = zero.bucket(parameters)
    allocated = (sent if zero.stage == 3 else low) * bucket * (2 if zero.stage < 3 and zero.overlaps else 1)
    filled = min(bucket, parameters)
    done = filled / parameters  # share of the backward pass after which the bucket is full for the first time
    if zero.stage == 1:
        held = 0 if in_bucket else low * parameters  # counted elsewhere; copied into a bucket, they are freed there
        reduced = max(low * parameters, low * (parameters - filled) + low * share) + converted * filled
        return allocated + max(0.0, reduced - held - freed)
    if zero.stage == 2:
        new_share = low * share if low == zero.summed else 0.0
        return allocated + max(0.0, max((low + converted) * filled, new_share) - done * freed)
    # Weights that were gathered stay until their last use, beside the flat buffer in which the last of them came.
    live, prefetched = (
        low * min(float(zero.settings.get(f"stage3_{key}", value)), parameters)
        for key, value in (("max_live_parameters", LIVE), ("prefetch_bucket_size", PREFETCHED))
    )
    copies = (1 if on_gpu else 2) * sent * filled  # gloo's reduce-scatter makes one more
    return allocated + max(live + prefetched, (1 - done) * (live + freed) + copies - freed)


def logits_bytes(
    a: Architecture, positions: float, wanted: float, low: int, on_gpu: bool, fused: bool, compiled: bool
) -> float:
    """At most at once in the head and the loss, forward and backward; see model/head.py.

    Args:
        positions: of a micro-batch; wanted: those whose logits are computed.
        low: bytes of a weight.
        fused: whether loss and gradient are made in one pass where logits are large.
    """
    head = a.vocab_size * a.width
    gathered = 2 * low * a.width * wanted  # hidden states, and their gradient
    pieces = head_pieces(a, positions)
    if pieces == 1 or not fused:  # log-probabilities in fp32, their gradient, and that of the logits
        return gathered + 12 * a.vocab_size * wanted / pieces + (low * head if pieces > 1 else 0)
    symbols = a.vocab_size + (-a.vocab_size % VOCAB_MULTIPLE["cuda"] if on_gpu else 0)
    filled_up = low * symbols * a.width if symbols > a.vocab_size else 0
    pieces = math.ceil(wanted / max(1, (GPU_CHUNK_ELEMENTS if on_gpu else CHUNK_ELEMENTS) // symbols))
    logits = symbols * wanted / pieces
    # Uncompiled, logits in bf16 are made fp32 before their log-probabilities are. The head's gradient is summed in it.
    scored = (10 if low < 4 and not compiled else 2 * low) * logits + (4 * head if pieces > 1 else 0)
    multiplied = 2 * low * logits + (4 + (low if low < 4 else 0)) * head
    return gathered + max(filled_up + max(scored, multiplied), (4 + low) * head)
