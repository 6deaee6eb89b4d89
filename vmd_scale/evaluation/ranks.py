"""Rows dealt out to the ranks like cards, and what becomes of each gathered on all of them."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.distributed as dist


@dataclass(frozen=True)
class Ranks:
    """Those among which rows are dealt out: row n goes to rank n modulo `size`. By default there is one."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None  # gloo

    def gathered(self, mine: Any) -> list[Any]:
        """What every rank has, in the order of the ranks."""
        if self.size == 1:
            return [mine]
        shares: list[Any] = [None] * self.size
        dist.all_gather_object(shares, mine, group=self.group)
        return shares

    def share(self, rows: Any) -> Any:
        """This rank's part of a sequence, an array or a tensor."""
        return rows[self.rank :: self.size]

    def together(self, mine: np.ndarray) -> np.ndarray:
        """Values [n, ...] of all rows, in their order, of which every rank has those of its `share`."""
        shares = self.gathered(mine)
        values = np.empty((sum(map(len, shares)), *mine.shape[1:]), dtype=mine.dtype)
        for rank, share in enumerate(shares):
            values[rank :: self.size] = share
        return values
