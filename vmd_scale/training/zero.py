"""The one file that knows DeepSpeed's insides: where each rank keeps its part of the fp32 master weights.

Written against DeepSpeed 0.19. Every private attribute is read through `_get`, which fails with a clear message when
another version has moved it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Fragment:
    """A run of consecutive elements of one parameter that this rank owns."""

    name: str
    shape: tuple[int, ...]  # of the whole parameter
    start: int  # first element, in the flattened parameter
    size: int
    partition: int  # which of `ShardedMaster.partitions`
    offset: int  # where in that partition


class ShardedMaster:
    """This rank's share of the fp32 master weights, whatever the ZeRO stage.

    Attributes:
        partitions: flat fp32 tensors that the optimizer updates in place.
        fragments: what each stretch of them belongs to. Over all ranks, they cover each parameter exactly once
            (in stage 0, where every rank holds everything, only rank 0 lists them).
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._optimizer = engine.optimizer
        self._stage = int(engine.zero_optimization_stage())
        self._norm: Tensor | None = None
        self._names = {id(p): name for name, p in engine.module.named_parameters()}
        if self._stage == 0:
            self.partitions = [p.data.view(-1) for p in engine.module.parameters()]
            self.fragments = list(self._replicated()) if engine.global_rank == 0 else []
        elif self._stage == 3:
            self.partitions = _get(self._optimizer, "fp32_partitioned_groups_flat")
            self.fragments = list(self._stage3())
        else:
            self._bf16 = hasattr(self._optimizer, "fp32_groups_flat_partition")  # BF16_Optimizer: stage 1 in bf16
            flat = "fp32_groups_flat_partition" if self._bf16 else "single_partition_of_fp32_groups"
            self.partitions = _get(self._optimizer, flat)
            self.fragments = list(self._stage12())

    @torch.no_grad()
    def publish(self) -> None:
        """Make the weights that the forward pass uses follow the masters, after these were changed from outside."""
        if self._stage in (1, 2):
            _get(self._optimizer, "update_lp_params")()
        elif self._stage == 3:
            _get(self._optimizer, "_partition_all_parameters")()
            for group in range(len(self.partitions)):
                _get(self._optimizer, "_reassign_or_swap_out_partitioned_parameters")(group)
            persistent = _get(self._optimizer, "persistent_parameters")
            if persistent:  # small parameters stay whole on every rank
                persistent[0].all_gather(persistent)

    def before_step(self) -> None:
        """Call before ``engine.step()``: stage 0 keeps no gradient norm, and the gradients are gone afterwards."""
        if self._stage == 0 and self._engine.is_gradient_accumulation_boundary():
            gradients = [p.grad for p in self._engine.module.parameters() if p.grad is not None]
            self._norm = torch.nn.utils.get_total_norm(gradients)

    def gradient_norm(self) -> float | None:
        """Global norm before clipping of the last step. Waits for the device."""
        norm = self._norm if self._stage == 0 else self._engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    def _replicated(self) -> Iterator[Fragment]:
        for number, (name, p) in enumerate(self._engine.module.named_parameters()):
            yield Fragment(name, tuple(p.shape), 0, p.numel(), number, 0)

    def _stage12(self) -> Iterator[Fragment]:
        groups = _get(self._optimizer, "bf16_groups" if self._bf16 else "bit16_groups")
        for number, group in enumerate(groups):
            for p in group:
                mapping = _get(p, "_hp_mapping")
                if mapping is not None:  # some of this parameter lies in this rank's partition
                    inside, address = mapping.lp_fragment_address, mapping.hp_fragment_address
                    name, shape = self._names[id(p)], tuple(p.shape)
                    yield Fragment(name, shape, inside.start, inside.numel, number, address.start)

    def _stage3(self) -> Iterator[Fragment]:
        positions = _get(self._optimizer, "grad_position")
        rank = self._engine.global_rank
        for p in self._engine.module.parameters():
            number, offset, size = positions[_get(self._optimizer, "get_param_id")(p)]
            start = rank * _get(p, "ds_tensor").ds_numel
            size = min(size, p.ds_numel - start)  # the last rank's partition is padded
            if size > 0:
                yield Fragment(self._names[id(p)], tuple(p.ds_shape), start, size, number, offset)


def fragment_values(fragment: Fragment, partitions: list[Tensor]) -> Tensor:
    """The elements of `fragment` in flat tensors laid out like `ShardedMaster.partitions` (the EMA's, say)."""
    return partitions[fragment.partition].narrow(0, fragment.offset, fragment.size)


def _get(owner: Any, name: str) -> Any:
    if not hasattr(owner, name):
        import deepspeed

        raise RuntimeError(
            f"DeepSpeed {deepspeed.__version__} has no {type(owner).__name__}.{name}: this project was written "
            "against DeepSpeed 0.19 (see vmd_scale/training/zero.py)"
        )
    return getattr(owner, name)
