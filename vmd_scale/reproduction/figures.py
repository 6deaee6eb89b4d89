"""The pictures beside the tables."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from vmd_scale.files import write_atomically
from vmd_scale.report.figures import COLORS, HEIGHT, MARKERS, draw_png
from vmd_scale.reproduction.task import Plot, Row

Curves = dict[tuple[str, int], list[tuple[float, float, float]]]  # method and blocks: (x, mean, spread over seeds)
LINES = ["-", "--", ":"]


def kl_against_p(rows: Sequence[Row], output: Path) -> bool:
    """KL(data, samples) in one step against the correlation p of two tokens."""
    curves: Curves = {}
    for r in rows:
        p = "1" if r.variant == "uniform" else r.variant
        if r.metric == "kl" and r.steps == 1 and r.tokens == "drawn" and p.replace(".", "", 1).isdigit():
            curves.setdefault((r.method, r.blocks), []).append((float(p), r.mean, r.std or 0.0))
    return _save(curves, output, "correlation p of the two tokens", "KL(data, samples), nats", steps=False)


def against_steps(metric: str, label: str) -> Plot:
    """A figure of one upper bound against the number of steps, a curve for each method; that of the largest K."""

    def plot(rows: Sequence[Row], output: Path) -> bool:
        tightest: dict[tuple[str, int, float], Row] = {}
        for r in rows:
            if r.metric == metric and r.steps != "inf":
                best = tightest.setdefault((r.method, r.blocks, float(r.steps)), r)
                tightest[r.method, r.blocks, float(r.steps)] = max(best, r, key=lambda row: row.k or 0)
        curves: Curves = {}
        for (method, blocks, steps), r in tightest.items():
            curves.setdefault((method, blocks), []).append((steps, r.mean, r.spread or 0.0))
        return _save(curves, output, "sampling steps of a row", label, steps=True)

    return plot


def _save(curves: Curves, output: Path, xlabel: str, ylabel: str, steps: bool) -> bool:
    """A color for each method, a kind of line for each number of blocks."""
    if not curves:
        return False
    methods, numbers = (list(dict.fromkeys(key)) for key in zip(*curves, strict=True))

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for (method, blocks), points in curves.items():
            x, y, error = zip(*sorted(points), strict=True)
            n, kind = methods.index(method), numbers.index(blocks)
            name = method if blocks == 1 else f"{method}, {blocks} blocks"
            axes.errorbar(
                x, y, error, capsize=3, label=name, color=COLORS[n], marker=MARKERS[n], markersize=4,
                linestyle=LINES[kind % len(LINES)],
            )  # fmt: skip
        if steps:
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter("{x:g}")
        else:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
        axes.set(xlabel=xlabel, ylabel=ylabel)
        figure.legend(loc="outside upper left", ncols=2, frameon=False)

    write_atomically(output, draw_png(draw, HEIGHT + 0.1 * len(curves)))
    return True
