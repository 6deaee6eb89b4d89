"""Parts of a check, one after the other, in a process of their own: what breaks costs one part, not those after it."""

import contextlib
import json
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Collection, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from vmd_scale.files import write_json

Parts = Mapping[str, tuple[Callable[[], dict[str, Any]], float]]  # by name: what is done, and a guess of its seconds


class Skipped(Exception):
    """Why a part was left out."""


def run_parts(
    make: Callable[[], Parts], only: Collection[str] | None, seconds: float, output: Path
) -> dict[str, dict[str, Any]]:
    """What the parts found, by name, in their order; written to `output` after each of them.

    Args:
        make: makes the parts, here and in the process that does them.
        only: names of those that are wanted; None for all.
        seconds: no part is begun that would end later, by its guess.
    """
    started, worker = time.perf_counter(), None
    result: dict[str, dict[str, Any]] = {}
    for name, (_, guess) in make().items():
        if only and name not in only:
            continue
        began = time.perf_counter()
        left = seconds - (began - started)
        if left < guess:
            answer: dict[str, Any] | None = {"skipped": f"{left:.0f} s left, about {guess} s needed"}
        else:
            worker = worker or Worker(make)
            answer = worker.ask(name, min(left, 3 * guess + 60))
            if answer is None or "failed" in answer:  # what broke CUDA's context would break all that comes after it
                how, worker = worker.end(), None
                answer = answer or {"failed": how}
        result[name] = {**answer, "seconds": round(time.perf_counter() - began, 1)}
        write_json(output, result)
        print(f"== {name} ({result[name]['seconds']} s)\n{json.dumps(result[name], indent=1)[:2500]}", flush=True)
    if worker is not None:
        worker.end()
    return result


class Worker:
    """The process: a crash, a broken CUDA context or a part without end are its own."""

    def __init__(self, make: Callable[[], Parts]) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.pipe, theirs = spawn.Pipe()
        self.process = spawn.Process(target=_serve, args=(theirs, make))
        self.process.start()
        theirs.close()

    def ask(self, part: str, seconds: float) -> dict[str, Any] | None:
        """What it found; None if there is no answer in that time, or never will be."""
        try:
            self.pipe.send(part)
            return self.pipe.recv() if self.pipe.poll(seconds) else None
        except (EOFError, OSError):
            return None

    def end(self) -> str:
        """Kill it, with all that it started. Returns how it ended, or that it had not."""
        self.process.join(1)
        how = "did not end in time" if self.process.exitcode is None else f"exit code {self.process.exitcode}"
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.join()
        return how


def _serve(pipe: Connection, make: Callable[[], Parts]) -> None:
    os.setsid()
    parts = make()
    while True:
        try:
            run, _ = parts[pipe.recv()]
        except EOFError:
            return
        try:
            answer = run()
        except Skipped as reason:
            answer = {"skipped": str(reason)}
        except Exception:
            answer = {"failed": traceback.format_exc()[-3000:]}
        pipe.send(answer)


def verdict(part: Mapping[str, Any]) -> str:
    """In a word or a line."""
    if "failed" in part:
        return "FAILED"
    if "skipped" in part:
        return f"skipped: {part['skipped']}"
    return "NOT OK" if part.get("ok") is False else "ok"
