"""Memory of a rank, by part.

What depends on the number of parameters follows from the precision and the ZeRO stage. What the backward pass needs is
not estimated but counted: the networks run once on tensors without memory, and autograd says what it keeps.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vmd_scale.config import Config
from vmd_scale.model import VMD, Architecture
from vmd_scale.model.head import CHUNK_ELEMENTS, GPU_CHUNK_ELEMENTS, VOCAB_MULTIPLE
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


def count_parameters(module: nn.Module | None) -> int:
    return 0 if module is None else sum(p.numel() for p in module.parameters())


def without_memory(a: Architecture) -> VMD:
    """The network, to be counted."""
    with torch.device("meta"):
        return VMD(a)


def memory_of(
    config: Config, a: Architecture, world_size: int, precision: str, on_gpu: bool, kept: "Kept | None" = None
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
    kept = kept or kept_of(config, a, precision)
    parameters = kept.parameters
    # Muon has one moment, Adam two. Its workspace, of one matrix at a time, comes after the activations and is smaller.
    by_muon = sum(p.numel() for p in without_memory(a).hidden_matrices) if config.training.optimizer == "muon" else 0
    bucket = float(config.deepspeed.get("zero_optimization", {}).get("reduce_bucket_size", BUCKET))
    activations = rows * (denoiser_passes(config) * (kept.denoiser + kept.recomputed) + kept.encoder)
    compiled = on_gpu and config.training.compile
    weighted = config.diffusion.objective != "iw"
    logits = logits_bytes(a, rows, masked_share(config), low, on_gpu, weighted, stage, compiled)
    return Memory(
        weights=low * parameters / shard["weights"],
        gradients=4 * parameters / shard["gradients"],
        optimizer=((8 + (4 if stage > 0 else 0)) * parameters - 4 * by_muon) / shard["optimizer"],
        ema=(4 * parameters / shard["optimizer"]) if config.training.ema_decay else 0.0,
        buffers=buffers_of(stage, low, parameters, bucket, activations + logits),
        activations=activations,
        logits=logits,
    )


# ZeRO (arXiv 1910.02054): the stage from which on each rank holds 1/N of it.
SHARDED_FROM = {"weights": 3, "gradients": 2, "optimizer": 1}
BUCKET = 500_000_000  # elements, DeepSpeed's default; the engine asks for no more than there are parameters


def buffers_of(stage: int, low: int, parameters: int, bucket: float, freed: float) -> float:
    """Where gradients travel in DeepSpeed 0.19, as benchmarks/memory.py finds it.

    Stage 0, and stage 1 in bf16, flatten them in fp32 after the backward pass, when `freed` bytes of activations are
    gone; the latter has those in bf16 beside, twice. The others fill a bucket meanwhile, with the gradients that wait
    for it.
    """
    in_bucket = min(bucket, parameters)
    if stage == 0 or (stage == 1 and low < 4):
        beside = 2 * low * parameters if stage == 1 else 0
        return beside + max(0.0, 4 * in_bucket - freed)
    return low * in_bucket * (1 if stage == 1 else 2)


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


@dataclass(frozen=True)
class Kept:
    """Number of parameters, and bytes that the backward pass needs of the forward pass of one row."""

    parameters: int
    denoiser: float
    encoder: float  # with a conditional prior's
    recomputed: float = 0.0  # of one layer at a time, with activation checkpointing


def kept_of(config: Config, a: Architecture, precision: str) -> Kept:
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return activations_of_row(a, dtype, config.training.activation_checkpointing)


def activations_of_row(a: Architecture, dtype: torch.dtype, checkpointing: str) -> Kept:
    """What autograd keeps. All layers are alike: two small networks tell what any number of them keeps."""
    shallow, deep = (_kept(replace(a, layers=n, encoder_layers=n), dtype, checkpointing) for n in (1, 2))
    recomputed = 0.0
    if checkpointing != "none":
        one, two = (_kept(replace(a, layers=n), dtype, "none") for n in (1, 2))
        recomputed = two.denoiser - one.denoiser - (deep.denoiser - shallow.denoiser)
    return Kept(
        recomputed=recomputed,
        parameters=count_parameters(without_memory(a)),
        denoiser=shallow.denoiser + (a.layers - 1) * (deep.denoiser - shallow.denoiser),
        encoder=shallow.encoder + (a.encoder_layers - 1) * (deep.encoder - shallow.encoder),
    )


def _kept(a: Architecture, dtype: torch.dtype, checkpointing: str) -> Kept:
    rows = 2  # what does not grow with the rows cancels
    found = []
    for n in (rows, 2 * rows):
        with FakeTensorMode():
            model = _in(dtype, a)
            model.checkpoint_activations(checkpointing)
            clean = torch.zeros(n, a.row_length, dtype=torch.int64)
            ratio = torch.zeros(n, a.groups)
            masked = torch.ones(n, a.row_length, dtype=torch.bool)
            z = torch.zeros(n, max(a.groups, a.documents), a.latent_width) if a.latent_width else None
            attend = torch.ones(n, a.row_length, dtype=torch.int32) if a.documents > 1 else None
            of_denoiser = _kept_bytes(lambda: model.denoiser(clean, z, attend, ratio, clean))  # noqa: B023
            of_encoder = _kept_bytes(lambda: model.encode(clean, masked, attend)) if model.encoder else 0  # noqa: B023
        found.append((of_denoiser, of_encoder))
    (d, e), (dd, ee) = found
    return Kept(0, (dd - d) / rows, (ee - e) / rows)


def _in(dtype: torch.dtype, a: Architecture) -> VMD:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return VMD(a)
    finally:
        torch.set_default_dtype(before)


class _Live(TorchDispatchMode):
    """Sees every tensor that is made inside; `bytes` is what of it is still alive."""

    def __init__(self) -> None:
        super().__init__()
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self._storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return result

    @property
    def bytes(self) -> int:
        return sum(size for reference, size in self._storages.values() if not reference.expired())


def _kept_bytes(forward: Callable[[], object]) -> int:
    with _Live() as live:
        result = forward()
        found = live.bytes
    del result
    return found
