"""The pictures beside the tables."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from vmd_scale.files import write_atomically
from vmd_scale.report.figures import COLORS, MARKERS, draw_png
from vmd_scale.reproduction.task import Plot, Row

Curves = dict[str, list[tuple[float, float, float]]]  # name: (x, mean, spread over seeds)


def kl_against_p(rows: Sequence[Row], output: Path) -> bool:
    """KL(data, samples) in one step against the correlation p of two tokens."""
    curves: Curves = {}
    for r in rows:
        p = "1" if r.variant == "uniform" else r.variant
        if r.metric == "kl" and r.steps == 1 and r.tokens == "drawn" and p.replace(".", "", 1).isdigit():
            curves.setdefault(r.method, []).append((float(p), r.mean, r.std or 0.0))
    return _save(curves, output, "correlation p of the two tokens", "KL(data, samples), nats", steps=False)


def against_steps(metric: str, label: str) -> Plot:
    """A figure of one upper bound against the number of steps, a curve for each method; that of the largest K."""

    def plot(rows: Sequence[Row], output: Path) -> bool:
        curves: Curves = {}
        tightest: dict[tuple[str, float], Row] = {}
        for r in rows:
            if r.metric == metric and r.steps != "inf":
                name = r.method if r.blocks == 1 else f"{r.method}, {r.blocks} blocks"
                best = tightest.setdefault((name, float(r.steps)), r)
                tightest[name, float(r.steps)] = max(best, r, key=lambda row: row.k or 0)
        for (name, steps), r in tightest.items():
            curves.setdefault(name, []).append((steps, r.mean, r.spread or 0.0))
        return _save(curves, output, "sampling steps of a row", label, steps=True)

    return plot


def _save(curves: Curves, output: Path, xlabel: str, ylabel: str, steps: bool) -> bool:
    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for n, (name, points) in enumerate(curves.items()):
            x, y, error = zip(*sorted(points), strict=True)
            color, marker = COLORS[n % len(COLORS)], MARKERS[n % len(MARKERS)]
            axes.errorbar(x, y, error, capsize=3, label=name, color=color, marker=marker, markersize=4)
        if steps:
            axes.set_xscale("log", base=2)
        else:
            axes.set_yscale("log")
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)

    if curves:
        write_atomically(output, draw_png(draw))
    return bool(curves)
