"""What all benchmarks share: both sides of a comparison in one run, in turns, medians, a JSON file and a page."""

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vmd_scale.files import check_writable, write_atomically, write_json
from vmd_scale.provenance import provenance

Times = dict[str, list[float]]


LEAST_ROUNDS = 5  # below that a median is noise


def in_turns(
    cases: Mapping[str, Callable[[], object]], repeats: int, warmup: int = 1, seconds: float | None = None
) -> Times:
    """Seconds of every call of every case. Each round runs all of them, every second one backwards.

    Args:
        repeats: rounds; with `seconds` at most: none is begun after that time, once there are `LEAST_ROUNDS`.
    """
    for _ in range(warmup):
        for run in cases.values():
            run()
    times: Times = {name: [] for name in cases}
    started = time.perf_counter()
    for number in range(repeats):
        if seconds is not None and number >= LEAST_ROUNDS and time.perf_counter() - started > seconds:
            break
        for name in list(cases)[:: 1 if number % 2 == 0 else -1]:
            times[name].append(seconds_of(cases[name]))
    return times


class Clock:
    """The wall clock; or the processor time of this process, for a busy machine without a GPU."""

    now: Callable[[], float] = staticmethod(time.perf_counter)

    @classmethod
    def count_processor_time(cls) -> None:
        cls.now = staticmethod(time.process_time)


def seconds_of(run: Callable[[], object]) -> float:
    """One call, to the end of what it started on a GPU."""
    wait_for_device()
    started = Clock.now()
    run()
    wait_for_device()
    return Clock.now() - started


def wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def medians(times: Times) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in times.items()}


def ratio(times: Times, above: str, below: str) -> float:
    """The median over rounds of one case's time over another's: what slows both down for a while cancels."""
    return statistics.median(_ratios(times, above, below))


def quartiles(times: Times, above: str, below: str) -> tuple[float, float]:
    """Between which half of the rounds' ratios lie: how much the median is worth."""
    ratios = _ratios(times, above, below)
    if len(ratios) < 2:
        return ratios[0], ratios[0]
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return low, high


def _ratios(times: Times, above: str, below: str) -> list[float]:
    return [a / b for a, b in zip(times[above], times[below], strict=True)]


class Report:
    """What a benchmark found: printed part by part; with --json a file, and a page of the same name beside it."""

    def __init__(self, description: str | None, path: Path | None, **settings: Any) -> None:
        """`description` is the script's docstring."""
        check_writable(path, "--json")
        self.title, _, self.text = (description or "").partition("\n")
        self.path, self.printed = path, []
        self.result: dict[str, Any] = {**provenance(), "threads": torch.get_num_threads(), **settings}

    def save(self, name: str, part: Any) -> None:
        """Write what there is of a part that is still being measured."""
        self.result[name] = part
        if self.path is not None:
            write_json(self.path, self.result)

    def add(self, name: str, part: Any, text: str) -> None:
        """One part more: printed and written; what was found before is kept if a later part fails."""
        self.save(name, part)
        self.printed.append(text)
        print(f"\n{text}", flush=True)
        if self.path is not None:
            made = f"Made on {self.result['date']} by\n\n    {self.result['command']}\n\non {self.result['hardware']}."
            tables = "\n\n".join(self.printed)
            page = f"# {self.title}\n{self.text.rstrip()}\n\n```\n{tables}\n```\n\n{made}\n"
            write_atomically(self.path.with_suffix(".md"), page)


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Columns of text, the first to the left, the others to the right."""
    cells = [[_cell(value) for value in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(c.ljust(w) if n == 0 else c.rjust(w) for n, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in cells
    ]
    return "\n".join((lines[0], "-" * len(lines[0]), *lines[1:]))


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)
