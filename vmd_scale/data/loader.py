"""Rows to the training loop: each rank's micro-batches of every step, read and prepared one thread ahead.

Step n is positions n*G .. (n+1)*G - 1 of the sample order, whatever the ranks, the micro-batch or the accumulation:

    global batch of step n   | micro 0 | micro 1 | micro 2 | micro 3 | ...
    goes to (2 ranks)           rank 0    rank 1    rank 0    rank 1
"""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch

from vmd_scale.errors import UserError
from vmd_scale.planning.workload import fitting_micro_batch

T = TypeVar("T")

PREFETCHED_STEPS = 2


@dataclass(frozen=True)
class Batch:
    """Rows of a micro-batch.

    tokens:    int64 [B, L]
    roles:     uint8 [B, L] of `Role`, or None where every position is ordinary
    positions: int64 [B], in the global batch of the step (0 .. global_batch - 1)
    rows:      int64 [B], row numbers in the corpus
    """

    tokens: torch.Tensor
    roles: torch.Tensor | None
    positions: torch.Tensor
    rows: np.ndarray


class RowReader(Protocol):
    """What `ShardReader` is to the loader."""

    def read(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Ids int64 [n, L] and roles uint8 [n, L] of row numbers int64 [n]."""


class RowOrder(Protocol):
    """What `SampleOrder` is to the loader."""

    def row_numbers(self, positions: np.ndarray) -> np.ndarray:
        """Row numbers int64 [n] of positions int64 [n] >= 0."""


class TrainLoader(Generic[T]):
    """This rank's part of every step.

    Args:
        transform: makes of (step, batch) what the loop wants (corrupt, pin, move); it runs in the loader's thread.

    Attributes:
        wait_seconds: how long the consumer has waited for data in all.

    Raises:
        UserError: see `accumulation_steps`.
    """

    def __init__(
        self,
        reader: RowReader,
        order: RowOrder,
        global_batch: int,
        micro_batch: int,
        rank: int,
        world_size: int,
        transform: Callable[[int, Batch], T],
    ) -> None:
        accumulation_steps(global_batch, micro_batch, world_size)
        self._reader = reader
        self._order = order
        self._global_batch = global_batch
        self._micro_batch = micro_batch
        self._rank = rank
        self._world_size = world_size
        self._transform = transform
        self.wait_seconds = 0.0

    def steps(self, first: int, last: int) -> Iterator[list[T]]:
        """For each step first .. last - 1, the transformed micro-batches of this rank, in accumulation order.

        An exception in the reading thread is raised here, at the step it belongs to. Closing the iterator (leaving a
        ``for`` loop does) stops the thread.
        """
        ready: queue.Queue[list[T] | BaseException | None] = queue.Queue(maxsize=PREFETCHED_STEPS)
        stop = threading.Event()
        thread = threading.Thread(target=self._produce, args=(first, last, ready, stop), name="loader", daemon=True)
        thread.start()
        try:
            while True:
                started = time.perf_counter()
                item = ready.get()
                self.wait_seconds += time.perf_counter() - started
                if item is None:
                    return
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stop.set()
            thread.join()

    def _produce(
        self, first: int, last: int, ready: "queue.Queue[list[T] | BaseException | None]", stop: threading.Event
    ) -> None:
        try:
            for step in range(first, last):
                batches = []
                for micro in range(self._rank, self._global_batch // self._micro_batch, self._world_size):
                    if stop.is_set():
                        return
                    batches.append(self._transform(step, self._micro(step, micro)))
                if not _put(ready, batches, stop):
                    return
            _put(ready, None, stop)
        except BaseException as error:  # whatever it is, the consumer must hear of it instead of waiting forever
            _put(ready, error, stop)

    def _micro(self, step: int, micro: int) -> Batch:
        positions = np.arange(micro * self._micro_batch, (micro + 1) * self._micro_batch, dtype=np.int64)
        rows = self._order.row_numbers(step * self._global_batch + positions)
        return _batch(self._reader, rows, positions)


def accumulation_steps(global_batch: int, micro_batch: int, ranks: int) -> int:
    """Micro-batches that one rank computes in a step.

    Raises:
        UserError: the global batch does not divide evenly; names what would.
    """
    per_pass = micro_batch * ranks
    if global_batch % per_pass:
        fitting = fitting_micro_batch(micro_batch, global_batch, ranks)
        way_out = f"training.micro_batch={fitting} fits" if fitting else "take a number of ranks that divides it"
        raise UserError(
            f"training.global_batch ({global_batch}) must be a multiple of training.micro_batch ({micro_batch}) x the "
            f"number of ranks ({ranks}) = {per_pass}; {way_out}"
        )
    return global_batch // per_pass


def evaluation_batches(reader: RowReader, rows: np.ndarray, micro_batch: int) -> Iterator[Batch]:
    """The rows (int64 [n]) in the order given; positions are the row numbers; the last batch may be smaller."""
    for start in range(0, len(rows), micro_batch):
        some = np.asarray(rows[start : start + micro_batch], dtype=np.int64)
        yield _batch(reader, some, some)


def _batch(reader: RowReader, rows: np.ndarray, positions: np.ndarray) -> Batch:
    tokens, roles = reader.read(rows)
    return Batch(
        tokens=torch.from_numpy(tokens),
        roles=None if roles is None else torch.from_numpy(roles),
        positions=torch.from_numpy(positions.copy()),
        rows=rows,
    )


def _put(ready: queue.Queue, item: object, stop: threading.Event) -> bool:
    """Put, but give up when the consumer has left."""
    while not stop.is_set():
        try:
            ready.put(item, timeout=0.1)
            return True
        except queue.Full:
            continue
    return False
