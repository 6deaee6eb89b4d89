"""DeepSpeed's ZeRO stage 1 in bf16 with less traffic: between ranks, and between a GPU and its memory.

DeepSpeed 0.19 sums the fp32 gradients on every rank (all-reduce) though a rank updates only its part of the weights,
and passes over all of them several more times a step, tensor by tensor. Here each rank gets its part alone
(reduce-scatter, half of the bytes), and norm and clipping read only that. Updates are the same but for the order in
which the norm is summed: tests/distributed/test_lean_bf16.py.
"""

from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from torch import Tensor


class LeanBF16Optimizer(BF16_Optimizer):
    """A gradient is written over that of the step before, which is therefore not cleared."""

    def _update_hp_grad(self, lp: Tensor, group_idx: int, param_idx: int, clear_lp_grads: bool) -> None:
        if lp.grad is None:
            return
        total = self.fp32_groups_gradients[group_idx][param_idx].view_as(lp)
        if self.fp32_groups_has_gradients[group_idx][param_idx]:
            total.add_(lp.grad)
        else:
            total.copy_(lp.grad)
        self.fp32_groups_has_gradients[group_idx][param_idx] = True
        if clear_lp_grads:
            lp.grad.zero_()

    @torch.no_grad()
    def reduce_gradients(self, pipeline_parallel: bool = False) -> None:
        """The engine calls it after the backward pass of a step's last micro-batch."""
        for gradients, known in zip(self.fp32_groups_gradients, self.fp32_groups_has_gradients, strict=True):
            unused = [gradient for gradient, is_known in zip(gradients, known, strict=True) if not is_known]
            if unused:
                torch._foreach_zero_(unused)
        ranks = dist.get_world_size(self.dp_process_group)
        if ranks == 1:
            return
        for whole, mine in zip(self.fp32_groups_gradients_flat, self._needed, strict=True):
            if mine is whole:
                dist.all_reduce(whole, group=self.dp_process_group)
            else:
                dist.reduce_scatter_tensor(mine, whole, group=self.dp_process_group)
            mine.mul_(1 / ranks)

    def get_grads_for_norm(self, for_clipping: bool = False) -> Any:
        """What is clipped; or, as if it were the only gradient, the norm of all."""
        if for_clipping:
            return self._needed
        squares = torch.stack([torch.linalg.vector_norm(part) for part in self._needed]).square().sum()
        if not self._uses_muon:
            dist.all_reduce(squares, group=self.dp_process_group)
        return [squares.sqrt()], {}

    def clear_hp_grads(self) -> None:
        self.fp32_groups_has_gradients = [[False] * len(group) for group in self.fp32_groups_gradients]

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.clear_lp_grads(set_to_none)

    @property
    def _needed(self) -> list[Tensor]:
        """Gradients that this rank's update depends on: of its part; with Muon, whose matrices may be cut, all."""
        return self.fp32_groups_gradients_flat if self._uses_muon else self.fp32_groups_gradient_flat_partition


def make_lean(engine: Any) -> None:
    """Where the engine has a `BF16_Optimizer` whose gradients are fp32, in memory and between ranks."""
    optimizer = engine.optimizer
    if type(optimizer) is not BF16_Optimizer:
        return
    summed_first = engine.postscale_gradients() and engine.gradient_predivide_factor() == 1
    if summed_first and {optimizer.grad_acc_dtype, engine.communication_data_type} == {torch.float32}:
        optimizer.__class__ = LeanBF16Optimizer
