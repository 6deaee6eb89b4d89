"""What the backward pass needs of the forward pass, counted rather than estimated.

The networks run once on tensors without memory, and autograd says what it keeps; or, where blocks are compiled, the
compiler says what it would.
"""

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vmd_scale.config import Config
from vmd_scale.model import VMD, Architecture
from vmd_scale.model.attention import Flash
from vmd_scale.model.layers import SelfAttention
from vmd_scale.planning.flops import mlp_width

ROWS = (2, 4)  # what does not grow with them, as parameters, cancels


def count_parameters(module: nn.Module | None) -> int:
    return 0 if module is None else sum(p.numel() for p in module.parameters())


def without_memory(a: Architecture) -> VMD:
    """The network, to be counted."""
    with torch.device("meta"):
        return VMD(replace(a, attention="auto"))  # of whatever this machine has: a plan is made elsewhere


@dataclass(frozen=True)
class Kept:
    """Number of parameters, and bytes that the backward pass needs of the forward pass of one row."""

    parameters: int
    denoiser: float
    encoder: float  # with a conditional prior's
    one_layer: float  # of the denoiser, while the backward pass is in it: what is computed again, gradients in its MLP


def kept_of(config: Config, a: Architecture, precision: str, on_gpu: bool) -> Kept:
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    compiled = on_gpu and config.training.compile
    flash = on_gpu and precision == "bf16" and config.model.attention in ("auto", "flash")
    return activations_of_row(a, dtype, config.training.activation_checkpointing, compiled, flash)


@functools.cache
def activations_of_row(
    a: Architecture, dtype: torch.dtype, checkpointing: str, compiled: bool = False, flash: bool = False
) -> Kept:
    """All layers are alike: two small networks tell what any number of them keeps.

    Args:
        flash: whether a varlen kernel keeps attention inside of documents, instead of a mask.
    """
    one, two = (_of_eager(replace(a, layers=n, encoder_layers=n), dtype, checkpointing, flash) for n in (1, 2))
    block = tuple(more - less for more, less in zip(two, one, strict=True))
    outside = tuple(less - of_block for less, of_block in zip(one, block, strict=True))
    single = replace(a, layers=1, encoder_layers=1)
    if compiled and checkpointing != "full":  # whose blocks are computed again from outside of what is compiled
        block = _of_compiled_blocks(single, dtype, checkpointing, flash)
    whole = block  # what a block would keep that computes nothing again
    if checkpointing != "none" and compiled:
        whole = _of_compiled_blocks(single, dtype, "none", flash)
    elif checkpointing != "none":
        one, two = (_of_eager(replace(a, layers=n), dtype, "none", flash) for n in (1, 2))
        whole = tuple(more - less for more, less in zip(two, one, strict=True))
    return Kept(
        parameters=count_parameters(without_memory(a)),
        denoiser=outside[0] + a.layers * block[0],
        encoder=outside[1] + a.encoder_layers * block[1],
        one_layer=max(0.0, whole[0] - block[0]) + _mlp_gradients(a, dtype),
    )


def _mlp_gradients(a: Architecture, dtype: torch.dtype) -> float:
    """Bytes of a row, where a layer's MLP has most of them at once: of its hidden units (SwiGLU's value and gate)."""
    positions = (2 if a.groups > 1 else 1) * a.row_length
    units = (2 if a.mlp == "swiglu" else 1) * mlp_width(a.width, a.mlp_ratio, a.mlp)
    return positions * units * dtype.itemsize


PerRow = tuple[float, ...]  # of the denoiser, and of the encoder


def _of_eager(a: Architecture, dtype: torch.dtype, checkpointing: str, flash: bool) -> PerRow:
    def count(model: VMD, network: Callable[[], object]) -> int:
        model.checkpoint_activations(checkpointing)
        return _kept_bytes(network)

    return _per_row(a, dtype, flash, count)


def _of_compiled_blocks(a: Architecture, dtype: torch.dtype, checkpointing: str, flash: bool) -> PerRow:
    """As the compiler cuts forward from backward: it keeps less than autograd, and computes the rest again."""
    from functorch.compile import min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.decomposition import select_decomp_table

    def count(model: VMD, network: Callable[[], object]) -> int:
        found = []

        def forward(graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
            _, *kept = tree_leaves(graph.graph.output_node().args)  # the block's result comes first
            storages = [node.meta["val"].untyped_storage() for node in kept]
            sizes = {storage._cdata: storage.nbytes() for storage in storages}
            found.append(sum(size for size in sizes.values() if isinstance(size, int)))  # but for random states, small
            return graph.forward

        model.checkpoint_activations(checkpointing)
        # It warns of operations in place, which blocks do not have.
        logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
        torch._dynamo.reset()  # else, after a few counts, blocks of one more shape would run uncompiled
        for stack in model.stacks:
            # One for each: with the same one, a second block of the same shapes is not compiled.
            backend = aot_autograd(
                fw_compiler=forward,
                bw_compiler=lambda graph, _: graph.forward,
                partition_fn=functools.partial(min_cut_rematerialization_partition, compiler="inductor"),
                decompositions=select_decomp_table(),
            )
            for block in stack:
                block.compile(backend=backend, dynamic=False)
        network()
        return sum(found)

    return _per_row(a, dtype, flash, count)


def _per_row(
    a: Architecture, dtype: torch.dtype, flash: bool, count: Callable[[VMD, Callable[[], object]], int]
) -> PerRow:
    """What `count` finds of a network, with each of the two numbers of rows."""
    found = []
    for rows in ROWS:
        with FakeTensorMode():
            model = _built_in(dtype, a, flash)
            clean = torch.zeros(rows, a.row_length, dtype=torch.int64)
            ratio = torch.zeros(rows, a.groups)
            masked = torch.ones(rows, a.row_length, dtype=torch.bool)
            z = torch.zeros(rows, max(a.groups, a.documents), a.latent_width) if a.latent_width else None
            attend = torch.ones(rows, a.row_length, dtype=torch.int32) if a.documents > 1 else None
            of_denoiser = count(model, lambda: model.denoiser(clean, z, attend, ratio, clean))  # noqa: B023
            of_encoder = count(model, lambda: model.encode(clean, masked, attend)) if model.encoder else 0  # noqa: B023
        found.append((of_denoiser, of_encoder))
    less, more = found
    return tuple((m - n) / (ROWS[1] - ROWS[0]) for n, m in zip(less, more, strict=True))


def _built_in(dtype: torch.dtype, a: Architecture, flash: bool) -> VMD:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = VMD(replace(a, attention="auto"))
    finally:
        torch.set_default_dtype(before)
    if flash and a.documents > 1:
        for module in model.modules():
            if isinstance(module, SelfAttention):
                module.kernel = VARLEN
    return model


def _without_mask(q: Tensor, k: Tensor, v: Tensor, **bounds: Any) -> Tensor:
    """What a varlen kernel keeps: queries, keys, values, the result and its normalizers."""
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).squeeze(0).transpose(0, 1)


VARLEN = Flash("stands for flash-attn", _without_mask, _without_mask, device="cpu")


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
