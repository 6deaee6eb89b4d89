"""The pictures of the report: loss, KL, throughput, and the signature curve of bits per token against T."""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

from vmd_scale.errors import UserError
from vmd_scale.evaluation.latent import LatentUsage
from vmd_scale.evaluation.perplexity import Result
from vmd_scale.files import write_atomically
from vmd_scale.report.run import LATENT_NAMES, Run, column, newest, unit_of

COLORS = ["#1f4e79", "#c0504d", "#4f8a5b", "#8064a2", "#b8860b", "#3b9ab2", "#7f7f7f", "#d17ba8", "#2f2f2f"]
MARKERS = "osD^vP*Xh"
EVENT_COLORS = {"skipped": "#c0504d", "spike": "#c0504d", "rolled back": "#b8860b", "checkpoint failed": "#c0504d"}
STYLE: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.edgecolor": "#888888",
    "axes.prop_cycle": cycler(color=COLORS),
    "lines.linewidth": 1.4,
    "legend.fontsize": 9,
    "text.parse_math": False,  # names of runs may hold dollars
}
# small on purpose: the same picture is read on a phone, and half a wide page is not much more
WIDTH, HEIGHT, DPI = 5.2, 3.4, 220
LONGEST_NAME = 40  # characters of a run's name in a legend


def plot_bound_against_steps(
    output: Path,
    runs: Mapping[str, Sequence[Result]],
    unit: str = "token",
    unigram_bits: float | None = None,
) -> Path:
    """Write the curve of bits per token against T, for one or several runs, as a PNG file.

    Args:
        output: the PNG file.
        runs: results of each run by the name that the legend shows; "" for a run alone.
        unit: what a token is, for the axis: "token" or "character".
        unigram_bits: entropy of the unigram distribution, drawn as a line.

    Raises:
        UserError: there is nothing to draw.
    """
    if not any(runs.values()):
        raise UserError(f"{output}: no evaluation results to draw")
    write_atomically(output, draw_png(lambda figure: bound_panel(figure.subplots(), runs, unit, unigram_bits)))
    return output


@dataclass(frozen=True)
class Picture:
    title: str
    caption: str
    png: bytes


def draw_png(draw: Callable[[Figure], object], height: float = HEIGHT) -> bytes:
    """A PNG of what `draw` puts on an empty figure."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        draw(figure)
        buffer = io.BytesIO()
        # without the version in it, the same run gives the same bytes
        figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


def figures_of(run: Run) -> dict[str, Picture]:
    """The pictures for which there are numbers, by file name."""
    config, records, unit = run.config, run.metrics, unit_of(run.config)
    pictures = {}
    if bounds := newest(run):
        caption = f"Bits per {unit} against the number of sampling steps T; bars are standard errors."
        if config.diffusion.block_size:
            caption += f" T counts the steps of each block of {config.diffusion.block_size} tokens."
        png = draw_png(lambda f: bound_panel(f.subplots(), {"": bounds}, unit, run.facts.unigram_bits_per_token))
        pictures["bound_against_steps"] = Picture("Bound against sampling steps", caption, png)
    if run.validation:
        png = draw_png(lambda f: _validation_panel(f.subplots(), run.validation, unit))
        caption = "Bounds on validation rows, computed during training."
        pictures["validation"] = Picture("Validation bound during training", caption, png)
    if not records:
        return pictures

    if config.diffusion.objective == "vmd":
        caption = "With objective vmd the loss is the papers' training surrogate. It is not a bound."
    else:
        caption = "The loss is what training minimizes, over all T of diffusion.steps and with the KL weight of the "
        caption += "step. It is a noisy average, not a number to quote."
    curves = {"loss": "loss", "reconstruction": "reconstruction"}
    if run.events:
        caption += " Vertical lines are events: see below."
    pictures["loss"] = Picture("Loss", caption, draw_png(lambda f: _loss_panel(f.subplots(), run, curves)))
    if config.latent.width:
        caption = "The KL as the objective counts it, before its weight (dashed, right axis)."
        pictures["kl"] = Picture("KL of the latent", caption, draw_png(lambda f: _kl_panel(f.subplots(), records)))
    if run.latent:
        caption = "KL(q || prior) of a latent group at several mask ratios on validation rows, and the active units: "
        caption += "those whose posterior mean varies from row to row. Both near zero: the latent has collapsed."
        pictures["latent_usage"] = Picture(
            "Use of the latent", caption, draw_png(lambda f: _latent_panels(f, run.latent), 4.2)
        )
    caption = "Learning rate, and the global gradient norm before clipping"
    caption += f" at {config.training.gradient_clip:g}." if config.training.gradient_clip else " (clipping is off)."
    png = draw_png(lambda f: _stacked(f, records, OPTIMIZER_PANELS), height=4.2)
    pictures["optimizer"] = Picture("Learning rate and gradient norm", caption, png)
    caption = (
        "Tokens a second over all ranks; share of the peak FLOP/s (MFU); share of the time spent waiting for data."
    )
    png = draw_png(lambda f: _stacked(f, records, SPEED_PANELS), height=4.2)
    pictures["throughput"] = Picture("Throughput", caption, png)
    return pictures


OPTIMIZER_PANELS = (({"lr": "learning rate"}, "learning rate"), ({"grad_norm": "gradient norm"}, "gradient norm"))
SPEED_PANELS = (
    ({"tokens_per_second": "tokens/s"}, "tokens/s"),
    ({"mfu": "MFU", "data_wait_fraction": "data wait"}, "share"),
)


def _stacked(
    figure: Figure, records: Sequence[Mapping[str, Any]], panels: Sequence[tuple[Mapping[str, str], str]]
) -> None:
    axes = figure.subplots(len(panels), sharex=True)
    for n, (panel, (curves, label)) in enumerate(zip(axes, panels, strict=True)):
        _panel(panel, records, curves, label, color=n)
        if n < len(panels) - 1:
            panel.set_xlabel("")
        if label == "tokens/s":
            panel.yaxis.set_major_formatter(EngFormatter(sep=""))
        if label == "share":
            panel.yaxis.set_major_formatter(PercentFormatter(1))
        if label != "learning rate":
            panel.set_ylim(bottom=0)
    figure.align_ylabels(axes)


def _panel(
    axes: Axes, records: Sequence[Mapping[str, Any]], curves: Mapping[str, str], label: str, color: int = 0
) -> None:
    """Some keys of the metrics against the step; the later ones lie beneath and are wider, so as not to be hidden."""
    steps = column(records, "step")
    axes.set(xlabel="step", ylabel=label)
    _step_axis(axes)
    for n, (key, name) in enumerate(curves.items(), start=color):
        _curve(axes, steps, column(records, key), name, COLORS[n], zorder=3 - 0.1 * n, width=1.4 * (1 + n - color))
    if len(curves) > 1:
        _legend(axes)


def _loss_panel(axes: Axes, run: Run, curves: Mapping[str, str]) -> None:
    _panel(axes, run.metrics, curves, "nats per token")
    for event in run.events:
        axes.axvline(event["step"], color=EVENT_COLORS.get(event.get("event", ""), "#999999"), linestyle=":", lw=1)


def _curve(
    axes: Axes, x: np.ndarray, y: np.ndarray, name: str, color: str, zorder: float = 3, width: float = 1.4
) -> None:
    """A curve; of a long run the points are pale and a running mean stands out."""
    if not np.isfinite(y).any():
        height = 0.5 - 0.1 * len(axes.texts)
        axes.text(0.5, height, f"{name}: no finite value", transform=axes.transAxes, ha="center", color="#666666")
        axes.set_yticks([])
        return
    if len(x) <= 100:
        axes.plot(x, y, color=color, label=name, zorder=zorder, linewidth=width, marker="o", markersize=1.8 * width)
        return
    axes.plot(x, y, color=color, alpha=0.25, linewidth=0.7, zorder=zorder - 1)
    axes.plot(x, running_mean(y, max(5, len(y) // 50)), color=color, label=name, zorder=zorder, linewidth=width)


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over the window around each value, of what is finite in it; shorter at both ends."""
    finite = np.isfinite(values)
    ones = np.ones(min(window, len(values)))
    counts = np.convolve(finite, ones, mode="same")
    sums = np.convolve(np.where(finite, values, 0.0), ones, mode="same")
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _kl_panel(axes: Axes, records: Sequence[Mapping[str, Any]]) -> None:
    _panel(axes, records, {"kl": "KL"}, "KL, nats per token")
    axes.set_ylim(bottom=0)
    right = axes.twinx()
    steps, weights = column(records, "step"), column(records, "kl_weight")
    (line,) = right.plot(steps, weights, color=COLORS[1], linestyle="--", label="KL weight")
    right.grid(False)
    right.set_ylabel("KL weight")
    right.set_ylim(0, 1.05 * max(1.0, float(np.nanmax(weights, initial=0.0))))
    handles, _ = axes.get_legend_handles_labels()
    _legend(axes, [*handles, line])


def _latent_panels(figure: Figure, records: Sequence[LatentUsage]) -> None:
    above, below = figure.subplots(2, sharex=True)
    steps = [r.step for r in records]
    for n, ratio in enumerate(records[-1].kl_by_mask_ratio):
        values = [r.kl_by_mask_ratio.get(ratio, math.nan) for r in records]
        above.plot(steps, values, color=COLORS[n], marker=MARKERS[n], markersize=3, label=f"mask ratio {ratio}")
    above.set(ylabel="KL, nats")
    above.set_ylim(bottom=0)
    _legend(above)
    active = [r.active_units for r in records]
    below.plot(steps, active, color=COLORS[0], marker="o", markersize=3)
    below.set(xlabel="step", ylabel=f"active units of {records[-1].latent_width}", ylim=(0, 1.05 * max(1, *active)))
    below.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    _step_axis(below)
    figure.align_ylabels([above, below])


def bound_panel(axes: Axes, runs: Mapping[str, Sequence[Result]], unit: str, unigram_bits: float | None = None) -> None:
    """Bits against T. T is on a log axis, with infinity as its last place, behind a gap."""
    finite = sorted({int(r.steps) for rs in runs.values() for r in rs if r.steps != "inf"})
    infinite = any(r.steps == "inf" for rs in runs.values() for r in rs)
    infinity = (math.log2(finite[-1]) + max(1.0, 0.2 * math.log2(finite[-1] / finite[0]))) if finite else 0.0

    def place(steps: int | str) -> float:
        return infinity if steps == "inf" else math.log2(int(steps))

    curves = [
        (f"{legend_name(run)} {name}".strip(), rs)
        for run, results in runs.items()
        for name, rs in _curves(results).items()
    ]
    for n, (name, results) in enumerate(curves):
        color, marker = COLORS[n % len(COLORS)], MARKERS[n % len(MARKERS)]
        results = sorted(results, key=lambda r: place(r.steps))
        x, y = [place(r.steps) for r in results], [r.bits_per_token for r in results]
        error = [r.standard_error / math.log(2) for r in results]
        axes.errorbar(x, y, error, color=color, marker=marker, markersize=4, linestyle="", capsize=3, label=name)
        cut = len(x) - 1 if infinite and results[-1].steps == "inf" else len(x)
        axes.plot(x[:cut], y[:cut], color=color)
        axes.plot(x[max(0, cut - 1) :], y[max(0, cut - 1) :], color=color, linestyle=":")  # across the gap
    if unigram_bits is not None:
        axes.axhline(unigram_bits, color="#555555", linestyle="--", linewidth=1, label="unigram entropy")
    axes.set(xlabel="sampling steps T", ylabel=f"bits per {unit} (upper bound)")
    ticks: list[int | str] = [*finite, *(["inf"] if infinite else [])]
    kept: list[int | str] = []  # labels that have room
    span = max(1.0, place(ticks[-1]) - place(ticks[0]))
    for tick in reversed(ticks):
        if not kept or place(kept[-1]) - place(tick) > 0.06 * span:
            kept.append(tick)
    axes.set_xticks([place(t) for t in kept], ["∞" if t == "inf" else str(t) for t in kept])
    axes.margins(x=0.06, y=0.08)
    _legend(axes)


def _curves(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Results that differ only in T make one curve, named by the latent, K and whatever else is not always the same."""
    told = [
        key
        for key in ("protocol", "split", "weights", "step", "paths", "interval")
        if len({getattr(r, key) for r in results}) > 1
    ]
    curves: dict[str, list[Result]] = {}
    for r in results:
        kind = "no bound" if r.bound == "compat" else "ELBO" if r.k == 1 else f"K = {r.k}"
        parts = [LATENT_NAMES.get(r.latent, r.latent), kind]
        parts += [f"{key} {getattr(r, key)}" if key == "step" else str(getattr(r, key)) for key in told]
        curves.setdefault(", ".join(parts), []).append(r)
    return curves


def _validation_panel(axes: Axes, results: Sequence[Result], unit: str) -> None:
    curves: dict[str, list[Result]] = {}
    several = len({r.protocol for r in results}) > 1
    for r in results:
        name = f"T = {'∞' if r.steps == 'inf' else r.steps}" + (f", {r.protocol}" if several else "")
        curves.setdefault(name, []).append(r)
    for n, (name, rs) in enumerate(curves.items()):
        errors = [r.standard_error / math.log(2) for r in rs]
        style: dict[str, Any] = {"color": COLORS[n % len(COLORS)], "marker": MARKERS[n % len(MARKERS)]}
        x, y = [r.step for r in rs], [r.bits_per_token for r in rs]
        axes.errorbar(x, y, errors, markersize=3.5, capsize=2, label=name, **style)
    axes.set(xlabel="step", ylabel=f"bits per {unit} (upper bound)")
    _step_axis(axes)
    _legend(axes)


def legend_name(name: str) -> str:
    """A run's name as the label of a curve: matplotlib omits those that begin with an underscore from its legends."""
    shown = name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME // 2]}…{name[-LONGEST_NAME // 2 :]}"
    return f"\u200b{shown}" if shown.startswith("_") else shown


def finish_axes(axes: Axes, from_zero: bool = False, large: bool = False) -> None:
    """Finish the axes of labeled curves against the step; `large` numbers are written as 20k."""
    if from_zero:
        axes.set_ylim(bottom=0)
    if large:
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    _step_axis(axes)
    _legend(axes)


def _step_axis(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def _legend(axes: Axes, handles: Sequence[Any] | None = None) -> None:
    """Above the plot, where it can hide nothing; none where no curve has a finite value."""
    found = handles or axes.get_legend_handles_labels()[0]
    if not found:
        return
    widest = max(len(str(handle.get_label())) for handle in found)
    columns = 1 if widest > 34 else 2 if widest > 12 else 4
    axes.legend(handles=found, loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, frameon=False, borderaxespad=0.2)
