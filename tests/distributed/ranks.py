"""Run a function in several processes that form a torch.distributed world on this machine."""

import multiprocessing
import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from typing import Any

CPU_ONLY = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}


def run_in_processes(
    function: Callable[..., Any], world_size: int, *arguments: object, timeout: float = 120
) -> list[Any]:
    """``function(*arguments)`` on every rank; what the ranks returned, in order.

    The processes are spawned with RANK and its siblings set (LOCAL_WORLD_SIZE too, so that each gets its share of the
    cores); the function joins the world itself, as a launcher does. It must be a module's own, its results picklable.

    Raises:
        RuntimeError: a rank failed, with its traceback; or died without one.
        TimeoutError: the ranks that have not answered are named. No process outlives this call.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    world = {"WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    context = multiprocessing.get_context("spawn")
    processes, pipes = [], []
    before = dict(os.environ)
    try:
        for rank in range(world_size):
            os.environ.update(CPU_ONLY | {k: str(v) for k, v in world.items()} | {"RANK": str(rank)})
            os.environ["LOCAL_RANK"] = str(rank)  # before the child imports torch
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_answer, args=(sender, function, arguments), daemon=True)
            process.start()
            sender.close()  # or the end of the child would not close the pipe
            processes.append(process)
            pipes.append(receiver)
    finally:
        os.environ.clear()
        os.environ.update(before)
    try:
        return _collect(pipes, timeout)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _collect(pipes: list[Any], timeout: float) -> list[Any]:
    deadline = time.monotonic() + timeout
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        open_pipes = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready = wait(open_pipes, max(0.0, deadline - time.monotonic()))
        if not ready:
            missing = [rank for rank in range(len(pipes)) if rank not in results]
            raise TimeoutError(f"no answer of rank(s) {missing} after {timeout:g} s")
        for pipe in ready:
            rank = pipes.index(pipe)
            try:
                failed, content = pickle.loads(pipe.recv_bytes())
            except EOFError:
                raise RuntimeError(f"rank {rank} died without a word") from None
            if failed:
                raise RuntimeError(f"rank {rank} failed:\n{content}")
            results[rank] = content
    return [results[rank] for rank in range(len(pipes))]


def _answer(sender: Any, function: Callable[..., Any], arguments: tuple[object, ...]) -> None:
    try:
        answer = pickle.dumps((False, function(*arguments)))
    except BaseException:
        answer = pickle.dumps((True, traceback.format_exc()))
    sender.send_bytes(answer)
    sender.close()
