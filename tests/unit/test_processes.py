import multiprocessing
import os
import time
from itertools import count

import pytest

from vmd_scale.processes import WorkerDied, map_in_processes

LARGE = 1 << 23  # bytes; much more than a pipe holds


def doubled(number: int) -> int:
    time.sleep(0.01 if number % 3 else 0.03)
    return 2 * number


def enlarged(number: int) -> bytes:
    return bytes([number % 256]) * LARGE


def refused(number: int) -> int:
    if number == 5:
        raise ValueError("not five")
    return number


def dies(number: int) -> int:
    os._exit(3)


def test_results_come_in_the_order_of_the_items_and_no_more_is_read_than_allowed() -> None:
    read: list[int] = []
    items = (read.append(n) or n for n in range(50))  # type: ignore[func-returns-value]
    for n, result in enumerate(map_in_processes(doubled, items, workers=3, ahead=2)):
        assert result == 2 * n
        assert len(read) <= n + 6
    assert read == list(range(50))
    assert not multiprocessing.active_children()


def test_items_and_results_that_do_not_fit_into_a_pipe() -> None:
    """Both sides send at once: neither may wait for the other to receive."""
    items = [bytes([n]) * LARGE for n in range(12)]
    assert list(map_in_processes(bytes.upper, items, workers=2, ahead=3)) == items


def test_an_exception_of_the_function_is_raised_at_its_item() -> None:
    results = map_in_processes(refused, count(), workers=2, ahead=2)
    assert [next(results) for _ in range(5)] == list(range(5))
    with pytest.raises(ValueError, match="not five"):
        next(results)
    assert not multiprocessing.active_children()


def test_a_worker_killed_with_a_result_half_written_is_noticed() -> None:
    results = map_in_processes(enlarged, count(), workers=2, ahead=2)
    next(results)
    time.sleep(1)  # now the first worker is in the middle of its next result, which nobody takes
    for process in multiprocessing.active_children():
        process.kill()
    with pytest.raises(WorkerDied):
        list(results)


def test_workers_that_cannot_work_are_noticed() -> None:
    with pytest.raises(WorkerDied):
        list(map_in_processes(dies, count(), workers=2, ahead=2))


def test_workers_end_with_the_iteration() -> None:
    results = map_in_processes(doubled, count(), workers=2, ahead=2)
    next(results)
    assert len(multiprocessing.active_children()) == 2
    results.close()
    assert not multiprocessing.active_children()
