"""docs/results/TASK.md: the table of a task beside the published figures, and how it was made."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vmd_scale.build import build_architecture
from vmd_scale.files import write_atomically, write_json
from vmd_scale.planning.activations import count_parameters, without_memory
from vmd_scale.planning.workload import flops_of
from vmd_scale.provenance import command
from vmd_scale.reproduction.runs import Job, Measured
from vmd_scale.reproduction.task import Measurement, Row, Task
from vmd_scale.reproduction.verdicts import verdict_table
from vmd_scale.tokenization import load_tokenizer

WHAT = ("variant", "method", "objective", "blocks", "steps", "latent", "law", "tokens", "split", "metric", "k")


def rows_of(task: Task, jobs: Sequence[Job], results: Sequence[Measured]) -> list[Row]:
    """Mean and spread over seeds, in the order of variants, methods and measurements."""
    grouped: dict[tuple, list[Measurement]] = {}
    for job, result in zip(jobs, results, strict=True):
        of_model = (job.variant, job.method, job.config.diffusion.objective, job.config.groups)
        for m in result.measurements:
            key = (*of_model, m.steps, m.latent, m.law, m.tokens, m.split, m.metric, m.k)
            grouped.setdefault(key, []).append(m)
    rows = []
    for key, found in grouped.items():
        what: dict[str, Any] = dict(zip(WHAT, key, strict=True))
        values = [m.value for m in found]
        errors = [m.standard_error for m in found if m.standard_error is not None]
        nats = [m.row_nats for m in found if m.row_nats]
        rows.append(
            Row(
                task=task.name,
                **what,
                mean=float(np.mean(values)),
                std=float(np.std(values, ddof=1)) if len(values) > 1 else None,
                standard_error=float(np.mean(errors)) if errors else None,
                seeds=len(values),
                published=None if jobs[0].changes_data else task.published_beside(what, jobs[0].fast),
                scaled_down=jobs[0].fast,
                row_nats=tuple(nats) if len(nats) == len(found) else (),
            )
        )
    return rows


def write_page(
    task: Task, jobs: Sequence[Job], results: Sequence[Measured], rows: Sequence[Row], folder: Path, copy: Path | None
) -> Path:
    """Write TASK.md, TASK.json, and TASK.png where there is a figure; `copy` gets the JSON too. Returns the page."""
    page, picture = folder / f"{task.name}.md", folder / f"{task.name}.png"
    scaled_down = " (scaled down)" if jobs[0].fast else ""
    lines = [f"# {task.title}{scaled_down}", "", *(f"{note}\n" for note in task.notes)]
    if scaled_down:
        lines += [f"Scaled down to two CPU cores: `{' '.join(task.fast)}`.", ""]
    if task.plot is not None and task.plot(rows, picture):
        lines += [f"![{task.title}]({picture.name})", ""]
    lines += [markdown_table(rows), ""]
    if verdicts := verdict_table(task, rows):
        lines += ["## Goals", "", verdicts, ""]
    lines += ["## Cost", "", cost_table(jobs), "", "Made by", "", f"    {command()}", ""]
    dates, places = sorted({result.date for result in results}), sorted({result.hardware for result in results})
    when = f"on {dates[0]}" if len(dates) == 1 else f"between {dates[0]} and {dates[-1]}"
    lines += [f"{when} on {'; '.join(places)}.", ""]
    for path in (folder / f"{task.name}.json", copy):
        if path is not None:
            write_json(path, [row.to_dict() for row in rows])
    write_atomically(page, "\n".join(lines))
    return page


def markdown_table(rows: Sequence[Row]) -> str:
    """A line for each model and sampler, a column for each metric; what is the same everywhere is said once, above."""
    setting = ("variant", "method", "objective", "blocks", "latent", "split", "law", "steps")
    shown = [c for c in setting if c in ("method", "steps") or len({getattr(r, c) for r in rows} - {""}) > 1]
    same = [f"{c} {next(iter(found))}" for c in setting if c not in shown and (found := _values(rows, c))]
    columns = list(dict.fromkeys(_column(r) for r in rows))
    lines: dict[tuple, dict[str, str]] = {}
    for r in rows:
        lines.setdefault(tuple(getattr(r, c) for c in shown), {})[_column(r)] = _cell(r)
    head = [*shown, *columns]
    text = [f"In all lines: {', '.join(same)}.", ""] if same else []
    text += [_legend(rows), "", "| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for key, cells in lines.items():
        text.append("| " + " | ".join([*map(str, key), *(cells.get(c, "") for c in columns)]) + " |")
    return "\n".join(text)


def _values(rows: Sequence[Row], name: str) -> set[object]:
    return {getattr(r, name) for r in rows} - {""}


def _column(r: Row) -> str:
    return " ".join([r.metric, *([r.tokens] if r.tokens else []), *([f"(K = {r.k})"] if r.k is not None else [])])


def _cell(r: Row) -> str:
    return r.value if r.published is None else f"{r.value} [{r.published:g}]"


def _legend(rows: Sequence[Row]) -> str:
    seeds = max(r.seeds for r in rows)
    spread = (
        f"the standard deviation over {seeds} seeds" if seeds > 1 else "the standard error of the estimate (1 seed)"
    )
    brackets = " In brackets: the published figure." if any(r.published is not None for r in rows) else ""
    return f"After ±: {spread}.{brackets}"


def cost_table(jobs: Sequence[Job]) -> str:
    """Parameters and training work of each method: who compares them should know."""
    lines = [
        "| method | blocks | denoiser parameters | encoder and prior | steps | training FLOPs |",
        "|" + " --- |" * 6,
    ]
    seen = set()
    for job in jobs:
        config = job.config
        key = (job.method, config.groups)
        if key in seen:
            continue
        seen.add(key)
        architecture = build_architecture(config, load_tokenizer(config.data.tokenizer).vocab_size)
        model, steps, batch = without_memory(architecture), config.training.steps, config.training.global_batch
        flops = flops_of(config, architecture).total * config.data.row_length * batch * steps
        denoiser, others = count_parameters(model.denoiser), count_parameters(model) - count_parameters(model.denoiser)
        cells = (f"{denoiser:,}", f"{others:,}", f"{steps:,}", f"{flops:.2e}")
        lines.append(f"| {job.method} | {config.groups} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
