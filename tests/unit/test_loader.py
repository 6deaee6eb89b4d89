import threading
import time

import numpy as np
import pytest
import torch

from vmd_scale.data.loader import Batch, TrainLoader, evaluation_batches
from vmd_scale.data.order import SampleOrder
from vmd_scale.errors import UserError

ROWS = 37


class FakeReader:
    """Row r is [r, r, r]; its roles, if any, are r % 3."""

    def __init__(self, has_roles: bool = False) -> None:
        self.has_roles = has_roles

    def read(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        tokens = np.repeat(rows[:, None], 3, axis=1)
        return tokens, (tokens % 3).astype(np.uint8) if self.has_roles else None


def loader(
    micro_batch: int, rank: int = 0, world_size: int = 1, global_batch: int = 24, transform: object = None
) -> TrainLoader:
    return TrainLoader(
        FakeReader(),
        SampleOrder(ROWS, seed=1),
        global_batch,
        micro_batch,
        rank,
        world_size,
        transform or (lambda step, batch: (step, batch)),  # type: ignore[arg-type]
    )


def global_rows(micro_batch: int, world_size: int, step: int) -> dict[int, int]:
    """Position in the global batch -> row, put together from all ranks."""
    found: dict[int, int] = {}
    for rank in range(world_size):
        (batches,) = loader(micro_batch, rank, world_size).steps(step, step + 1)
        for made_for, batch in batches:
            assert made_for == step
            found |= dict(zip(batch.positions.tolist(), batch.rows.tolist(), strict=True))
    return found


@pytest.mark.parametrize(("micro_batch", "world_size"), [(24, 1), (1, 1), (4, 2), (3, 8), (1, 4), (12, 2)])
def test_the_global_batch_does_not_depend_on_how_it_is_cut(micro_batch: int, world_size: int) -> None:
    for step in (0, 5, 1000):
        expected = SampleOrder(ROWS, 1).row_numbers(step * 24 + np.arange(24))
        assert global_rows(micro_batch, world_size, step) == dict(enumerate(expected.tolist()))


def test_micro_batches_go_round_the_ranks() -> None:
    (batches,) = loader(4, rank=1, world_size=2).steps(0, 1)
    assert [batch.positions.tolist() for _, batch in batches] == [[4, 5, 6, 7], [12, 13, 14, 15], [20, 21, 22, 23]]


def test_an_epoch_visits_every_row_once() -> None:
    rows = [row for step in loader(8).steps(0, 37) for _, batch in step for row in batch.rows]
    assert all(sorted(rows[epoch * ROWS : (epoch + 1) * ROWS]) == list(range(ROWS)) for epoch in range(24))


def test_starting_later_continues() -> None:
    whole = [batch.rows.tolist() for step in loader(8).steps(0, 6) for _, batch in step]
    late = [batch.rows.tolist() for step in loader(8).steps(4, 6) for _, batch in step]
    assert whole[-len(late) :] == late


def test_batches_are_tensors() -> None:
    with_roles = TrainLoader(FakeReader(True), SampleOrder(ROWS, 0), 4, 4, 0, 1, lambda step, batch: batch)
    ((batch,),) = with_roles.steps(0, 1)
    assert isinstance(batch, Batch)
    assert batch.tokens.dtype == torch.int64
    assert batch.tokens.shape == (4, 3)
    assert batch.tokens[:, 0].tolist() == batch.rows.tolist()
    assert batch.roles is not None
    assert batch.roles.dtype == torch.uint8
    assert batch.positions.dtype == torch.int64


def test_batches_must_divide_evenly() -> None:
    with pytest.raises(UserError, match=r"training\.global_batch \(24\).*training\.micro_batch \(5\)"):
        loader(5)
    with pytest.raises(UserError, match="number of ranks"):
        loader(8, world_size=2)


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "loader"]


def test_errors_reach_the_consumer_at_their_step() -> None:
    def fails(step: int, batch: Batch) -> int:
        if step == 3:
            raise UserError("row 3 is bad")
        return step

    steps = loader(24, transform=fails).steps(0, 10)
    assert [next(steps) for _ in range(3)] == [[0], [1], [2]]
    with pytest.raises(UserError, match="row 3 is bad"):
        next(steps)
    assert not loader_threads()


def test_leaving_early_stops_the_thread() -> None:
    for n, _ in enumerate(loader(8).steps(0, 10**9)):
        if n == 3:
            break
    assert not loader_threads()


def test_prefetch_is_bounded() -> None:
    made: list[int] = []
    steps = loader(24, transform=lambda step, batch: made.append(step)).steps(0, 100)
    next(steps)
    time.sleep(0.2)
    assert max(made) <= 4  # one consumed, two in the queue, one in the hand
    steps.close()  # type: ignore[attr-defined]


def test_waiting_is_counted() -> None:
    def slow(step: int, batch: Batch) -> int:
        time.sleep(0.05)
        return step

    waiting = loader(24, transform=slow)
    assert sum(len(step) for step in waiting.steps(0, 3)) == 3
    assert 0.1 < waiting.wait_seconds < 2


def test_evaluation_batches() -> None:
    rows = np.array([5, 3, 9, 30, 1])
    batches = list(evaluation_batches(FakeReader(), rows, 2))
    assert [len(batch.rows) for batch in batches] == [2, 2, 1]
    assert torch.cat([batch.positions for batch in batches]).tolist() == rows.tolist()
    assert torch.cat([batch.tokens for batch in batches])[:, 0].tolist() == rows.tolist()
