"""Several runs side by side: where their settings differ, and their curves in the same pictures."""

import html
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from vmd_scale.evaluation.tables import differing
from vmd_scale.report.figures import COLORS, Picture, bound_panel, draw_png, finish_axes, legend_name, running_mean
from vmd_scale.report.run import Run, column, newest, unit_of

LEFT_OUT = ("data.shards", "data.workers", "telemetry.log_every", "telemetry.wandb", "telemetry.wandb_project")
CURVES = {
    "reconstruction": (
        "Reconstruction",
        "nats per token",
        "Without the KL: to be compared where the steps T are the same.",
    ),
    "loss": ("Loss", "nats per token", "What each run minimizes: comparable only where the objectives are the same."),
    "kl": ("KL of the latent", "nats per token", "Of the runs that have a latent."),
    "tokens_per_second": ("Throughput", "tokens/s", "Over all ranks of each run."),
}


def differing_settings(runs: Sequence[Run]) -> str:
    """HTML: a table with a column for each run, of the keys whose values are not all the same."""
    flat = [_flat(run.config.model_dump(mode="json")) for run in runs]
    keys = [key for key in dict.fromkeys(k for f in flat for k in f) if key not in LEFT_OUT]
    keys = [key for key in keys if len({f.get(key) for f in flat}) > 1]
    rows = [("last logged step", [f"{run.metrics[-1]['step']:,}" if run.metrics else "none" for run in runs])]
    rows += [(key, [f.get(key, "") for f in flat]) for key in keys]
    head = "".join(f"<th>{html.escape(run.label)}</th>" for run in runs)
    body = "".join(
        f"<tr><th>{html.escape(key)}</th>" + "".join(f"<td>{html.escape(v)}</td>" for v in values) + "</tr>"
        for key, values in rows
    )
    same = "" if keys else "<p>All settings are the same.</p>"
    table = f'<div class="scroll"><table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    return same + table


def comparison_figures(runs: Sequence[Run]) -> dict[str, Picture]:
    """Pictures with a curve for each run, for which at least one has numbers."""
    pictures = {}
    bounds = {run.label: results for run in runs if (results := newest(run))}
    if bounds:
        units = {unit_of(run.config) for run in runs}
        unit = units.pop() if len(units) == 1 else "token"
        baseline = any(not run.config.latent.width for run in runs)
        caption = "The newest bounds of each run; bars are standard errors."
        caption += " MDM is the same code without a latent." if baseline else ""
        apart = differing([result for results in bounds.values() for result in results])
        caption += f" They do not compare: {', '.join(apart)} differ." if apart else ""
        png = draw_png(lambda f: bound_panel(f.subplots(), bounds, unit), 4.2)
        pictures["all_bounds"] = Picture("Bound against sampling steps, all runs", caption, png)
    colors = {run.label: COLORS[n % len(COLORS)] for n, run in enumerate(runs)}  # of a run the same in all pictures
    for key, (title, label, caption) in CURVES.items():
        shown = [run for run in runs if run.metrics and (key != "kl" or run.config.latent.width)]
        if shown:
            png = draw_png(partial(_panel_of_runs, runs=shown, key=key, label=label, colors=colors))
            pictures[f"all_{key}"] = Picture(f"{title}, all runs", caption, png)
    return pictures


def _panel_of_runs(figure: Figure, runs: Sequence[Run], key: str, label: str, colors: Mapping[str, str]) -> None:
    axes = figure.subplots()
    for run in runs:
        steps, values = column(run.metrics, "step"), column(run.metrics, key)
        smooth = running_mean(values, max(1, len(values) // 50))
        shown = np.where(np.isfinite(values), smooth, np.nan)
        axes.plot(steps, shown, color=colors[run.label], label=legend_name(run.label))
    axes.set(xlabel="step", ylabel=label)
    finish_axes(axes, from_zero=key in ("kl", "tokens_per_second"), large=key == "tokens_per_second")


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return flat
