"""Exponential moving average of the weights, sharded like the fp32 masters: no communication, 1/N of the memory."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from vmd_scale.training.zero import ShardedMaster


class ShardedEMA:
    """Each rank averages the partition that it owns.

    The decay after n updates is min(decay, (1 + n) / (10 + n)), so that short runs are not dominated by the
    initialization.
    """

    def __init__(self, master: ShardedMaster, decay: float) -> None:
        self.master, self.decay = master, decay
        self.updates = 0
        self.partitions = [p.detach().clone() for p in master.partitions]

    @torch.no_grad()
    def update(self) -> None:
        """Call once after every optimizer step that was really applied."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.partitions, [p.detach() for p in self.master.partitions], 1 - decay)
        self.updates += 1

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the engine's model computes with the averaged weights; the masters come back untouched."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for average, master in zip(self.partitions, self.master.partitions, strict=True):
            kept = master.detach().clone()
            master.data.copy_(average)
            average.copy_(kept)
        self.master.publish()
