"""Worker processes that do not outlive whoever started them, and whose death is noticed."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import cycle, islice
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class WorkerDied(Exception):
    """A worker process ended before its work was done: killed, or not able to start."""


def end_with_parent(first: Callable[[], object] | None = None) -> None:
    """In a worker: end with exit code 1 when the parent has ended, whatever this process is doing then.

    A parent that was killed cannot end its workers, and they would wait for work forever.

    Args:
        first: done before the end.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        if first is not None:
            first()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def map_in_processes(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int, ahead: int
) -> Iterator[Result]:
    """`map` in spawned processes, each with its own pickled copy of `function`; results in the order of the items.

    Args:
        ahead: items for each worker that may be read while their results are not yet taken.

    Raises:
        WorkerDied: instead of the result that a dead worker had in hand.
        Exception: what `function` raised, instead of its result.
    """
    # A pipe for each worker, not the queues that the pools of the standard library share among theirs: what a killed
    # worker had half written to a shared queue keeps everybody waiting forever. Spawned, not forked: the parent may
    # have threads, and a forked child would hold the locks of a killed parent.
    spawn = multiprocessing.get_context("spawn")
    pipes: list[Connection] = []
    processes = []
    items = iter(items)
    try:
        for _ in range(workers):
            ours, theirs = spawn.Pipe()
            processes.append(spawn.Process(target=_work, args=(function, theirs), daemon=True))
            processes[-1].start()
            theirs.close()  # so that the worker's death closes the pipe
            pipes.append(ours)
        turns = cycle(pipes)
        pending: deque[Connection] = deque()
        for item in islice(items, workers * ahead):
            pending.append(next(turns))
            with _worker_alive():
                pending[-1].send(item)
        while pending:
            pipe = pending.popleft()
            with _worker_alive():
                result, error = pipe.recv()
            if error is not None:
                raise error
            yield result
            for item in islice(items, 1):
                with _worker_alive():
                    pipe.send(item)
                pending.append(pipe)
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.join()
        for pipe in pipes:
            pipe.close()


@contextmanager
def _worker_alive() -> Iterator[None]:
    try:
        yield
    except (EOFError, OSError) as error:
        raise WorkerDied from error


def _work(function: Callable[[Item], Result], pipe: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which ends its workers
    inbox: SimpleQueue[Item] = SimpleQueue()

    def receive() -> None:  # in a thread: the parent must be able to send while this process sends
        try:
            while True:
                inbox.put(pipe.recv())
        except (EOFError, OSError):  # the parent has ended
            os._exit(1)

    threading.Thread(target=receive, daemon=True).start()
    while True:
        item = inbox.get()
        try:
            answer: tuple[Result | None, Exception | None] = function(item), None
        except Exception as error:
            answer = None, error
        pipe.send(answer)
