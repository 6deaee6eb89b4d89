"""docs/results/TASK.md: the table of a task beside the published figures, and how it was made."""

import math
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

from vmd_scale.files import write_atomically, write_json
from vmd_scale.reproduction.runs import Job
from vmd_scale.reproduction.task import Measurement, Row, Task


def rows_of(task: Task, jobs: Sequence[Job], results: Sequence[Sequence[Measurement]]) -> list[Row]:
    """Mean and spread over seeds, in the order of variants, methods and measurements."""
    grouped: dict[tuple, list[float]] = {}
    for job, measured in zip(jobs, results, strict=True):
        for m in measured:
            of_model = (job.variant, job.method, job.config.groups)
            key = (*of_model, m.steps, m.latent, m.tokens, m.law, m.split, m.metric)
            grouped.setdefault(key, []).append(m.value)
    rows = []
    for key, values in grouped.items():
        variant, method, blocks, steps, latent, tokens, law, split, metric = key
        rows.append(
            Row(
                task=task.name,
                variant=variant,
                method=method,
                blocks=blocks,
                steps=steps,
                latent=latent,
                tokens=tokens,
                law=law,
                split=split,
                metric=metric,
                mean=float(np.mean(values)),
                std=float(np.std(values, ddof=1)) if len(values) > 1 else None,
                seeds=len(values),
                published=_published(task, variant, method, blocks, steps, law, metric),
            )
        )
    return rows


def _published(
    task: Task, variant: str, method: str, blocks: int, steps: int | str, law: str, metric: str
) -> float | None:
    for which in (law, ""):
        if (variant, method, blocks, steps, which, metric) in task.published:
            return task.published[variant, method, blocks, steps, which, metric]
    return None


def write_page(task: Task, rows: Sequence[Row], command: str, folder: Path, json_file: Path | None) -> Path:
    """Write TASK.md and TASK.json, and TASK.png where the task has a figure; returns the page."""
    page, picture = folder / f"{task.name}.md", folder / f"{task.name}.png"
    lines = [f"# {task.title}", "", *(f"{note}\n" for note in task.notes)]
    if task.plot is not None:
        task.plot(rows, picture)
        if picture.exists():
            lines += [f"![{task.title}]({picture.name})", ""]
    lines += [
        markdown_table(rows),
        "",
        f"Made on {datetime.now(UTC):%Y-%m-%d} by",
        "",
        f"    {command}",
        "",
        _hardware(),
        "",
    ]
    write_json(json_file or folder / f"{task.name}.json", [asdict(row) for row in rows])
    write_atomically(page, "\n".join(lines))
    return page


def _hardware() -> str:
    if torch.cuda.is_available():
        where = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    else:
        where = f"{os.cpu_count()} CPU cores ({platform.machine()}), no GPU"
    return f"on {where}; PyTorch {torch.__version__}, Python {platform.python_version()}."


def markdown_table(rows: Sequence[Row]) -> str:
    """Markdown; columns that say the same everywhere are left out."""
    columns = ["variant", "split", "method", "blocks", "latent", "law", "tokens", "steps", "metric"]
    told = [c for c in columns if c in ("method", "steps", "metric") or len({getattr(r, c) for r in rows}) > 1]
    head = [*told, "mean ± spread over seeds", "seeds", "published"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for r in rows:
        value = _number(r.mean) if r.std is None else f"{_number(r.mean)} ± {_number(r.std)}"
        published = "" if r.published is None else _number(r.published)
        cells = [str(getattr(r, c)) for c in told] + [value, str(r.seeds), published]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _number(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else str(value)
