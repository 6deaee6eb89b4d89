"""One HTML page about a run: what it is, how it trained, which bounds it reached, what it writes.

Everything is read from the run folder, so that the page can be made while the run goes on, and again at any time.
The page holds its pictures itself (PNG, so that its size does not grow with the length of the run).
"""

import base64
import html
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter
from pydantic import TypeAdapter, ValidationError

from vmd_scale.config import Config, load_config
from vmd_scale.errors import UserError
from vmd_scale.evaluation.perplexity import Result
from vmd_scale.files import write_atomically
from vmd_scale.training.telemetry import EVALUATIONS, LOG, METRICS

CONFIG, FINAL, SAMPLES, FACTS = "config.json", "evaluation.json", "samples.json", "facts.json"
LOG_LINES = 40
COLORS = ["#1f4e79", "#c0504d", "#4f8a5b", "#8064a2", "#b8860b", "#3b9ab2", "#7f7f7f", "#d17ba8"]
MARKERS = "osD^vP*X"
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.edgecolor": "#888888",
    "axes.prop_cycle": matplotlib.cycler(color=COLORS),
    "lines.linewidth": 1.4,
    "legend.fontsize": 9,
}
# small on purpose: the same picture is read on a phone, and half a wide page is not much more
WIDTH, HEIGHT, DPI = 5.2, 3.4, 220
LATENT_NAMES = {"fixed": "fixed z", "fresh": "fresh z", "none": "no latent"}
BOUND_NOTE = (
    "Every number here that is called a bound is, in expectation, an upper bound on the negative log-likelihood of "
    "the sampler that it names: T steps, latent fixed or fresh, law of the paths. K = 1 is the ELBO; K > 1 is the "
    "importance-weighted bound, which is tighter. The error bar is one standard error, over rows."
)
SURROGATE_NOTE = (
    "vmd_surrogate is the training objective of the VMD and VADD papers, in nats per token. It is not a bound on "
    "anything and must not be compared with one."
)

Item = TypeVar("Item")


@dataclass(frozen=True)
class SampleSet:
    """What launchers/sample.py writes for one T."""

    steps: int | str
    latent: str
    seed: int
    texts: list[str]


@dataclass(frozen=True)
class Facts:
    """Numbers about the data that no run computes."""

    unigram_bits_per_token: float | None = None


@dataclass(frozen=True)
class Run:
    """What a run folder says; whatever is not there yet is empty."""

    name: str
    config: Config
    metrics: list[dict[str, Any]]
    validation: list[Result]  # during training
    final: list[Result]
    samples: list[SampleSet]
    facts: Facts = field(default_factory=Facts)
    log: str = ""


def write_report(run: Path, output: Path | None = None, png: Path | None = None) -> Path:
    """Write the page of a run folder, by default as RUN/report.html, and return where it is.

    Args:
        run: what launchers/pretrain.py wrote with --output; the run may still be going on.
        output: the HTML file.
        png: a folder; every picture is written there as well.

    Raises:
        UserError: not a run folder, or a file in it that is not what it should be.
    """
    output = output or run / "report.html"
    for path, wrong in ((output, output.is_dir()), (png, png is not None and png.is_file())):
        if wrong:
            raise UserError(f"{path}: is a {'folder' if path == output else 'file'}; give another name")
    found = read_run(run)
    figures = _figures(found)
    for name, figure in figures.items():
        if png is not None:
            write_atomically(png / f"{name}.png", figure.png)
    # "replace": a sample may hold half a surrogate pair, which no file can
    write_atomically(output, _page(found, figures).encode("utf-8", "replace"))
    return output


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
    write_atomically(output, _draw(lambda figure: _bound_panel(figure.subplots(), runs, unit, unigram_bits)))
    return output


# ---------------------------------------------------------------------------------------------------------- reading


def read_run(folder: Path) -> Run:
    """Read a run folder.

    Raises:
        UserError: not a run folder, or a file in it that is not what it should be.
    """
    if not (folder / CONFIG).is_file():
        what = "holds no config.json" if folder.is_dir() else "there is no such folder"
        raise UserError(f"{folder}: not a run folder, {what}; expected what launchers/pretrain.py wrote with --output")
    validation = [_checked(Result, r, f"{folder / EVALUATIONS}") for r in _read_lines(folder / EVALUATIONS)]
    final = _read_json(folder / FINAL, list[Result], [])
    for where, results in ((EVALUATIONS, validation), (FINAL, final)):
        for result in results:
            _check_steps(result.steps, folder / where)
    log = folder / LOG
    return Run(
        name=folder.resolve().name,
        config=load_config(folder / CONFIG),
        metrics=_read_lines(folder / METRICS),
        validation=validation,
        final=final,
        samples=_read_json(folder / SAMPLES, list[SampleSet], []),
        facts=_read_json(folder / FACTS, Facts, Facts()),
        log="\n".join(log.read_text("utf-8", "replace").splitlines()[-LOG_LINES:]) if log.is_file() else "",
    )


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a .jsonl file. The last line may be torn: the run is writing it, or was killed."""
    if not path.is_file():
        return []
    records, lines = [], path.read_text("utf-8", "replace").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                raise ValueError("not an object with a step")
        except ValueError as error:
            if number == len(lines):
                break
            raise UserError(f"{path}, line {number}: {error}") from None
        records.append(record)
    return records


def _read_json(path: Path, kind: type[Item], default: Item) -> Item:
    if not path.is_file():
        return default
    try:
        return _checked(kind, json.loads(path.read_bytes()), str(path))
    except ValueError as error:
        raise UserError(f"{path}: not a readable JSON file: {error}") from None


def _checked(kind: type[Item], values: object, origin: str) -> Item:
    """Plain values as `kind`; keys that it does not know are left out, they are a newer version's."""
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{origin}: {'.'.join(map(str, first['loc']))}: {first['msg'].lower()}") from None


def _check_steps(steps: int | str, path: Path) -> None:
    if steps != "inf" and not (str(steps).isdigit() and int(steps) > 0):
        raise UserError(f"{path}: steps {steps!r}: expected a positive whole number or 'inf'")


def _column(records: Sequence[Mapping[str, Any]], key: str) -> np.ndarray:
    """One key of all records, float64 [n]; nan where it is missing or null."""
    values = (record.get(key) for record in records)
    return np.array([v if isinstance(v, int | float) else math.nan for v in values], dtype=np.float64)


def _unit(config: Config) -> str:
    """What a token of this run is called."""
    tokenizer = config.data.tokenizer
    return (
        "character" if tokenizer in ("text8", "sudoku") or (Path(tokenizer) / "characters.json").is_file() else "token"
    )


def _newest(run: Run) -> list[Result]:
    """The final evaluation, or else the last one that training made."""
    last = max((r.step for r in run.validation), default=None)
    return run.final or [r for r in run.validation if r.step == last]


# ---------------------------------------------------------------------------------------------------------- pictures


@dataclass(frozen=True)
class Picture:
    title: str
    caption: str
    png: bytes


def _draw(draw: Callable[[Figure], object], height: float = HEIGHT) -> bytes:
    """A PNG of what `draw` puts on an empty figure."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        draw(figure)
        buffer = io.BytesIO()
        # without the version in it, the same run gives the same bytes
        figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


def _figures(run: Run) -> dict[str, Picture]:
    """The pictures for which there are numbers, by file name."""
    config, records, unit = run.config, run.metrics, _unit(run.config)
    pictures = {}
    if bounds := _newest(run):
        caption = f"Bits per {unit} against the number of sampling steps T. {BOUND_NOTE}"
        if config.diffusion.block_size:
            caption += f" T counts the steps of each block of {config.diffusion.block_size} tokens."
        png = _draw(lambda f: _bound_panel(f.subplots(), {"": bounds}, unit, run.facts.unigram_bits_per_token))
        pictures["bound_against_steps"] = Picture("Bound against sampling steps", caption, png)
    if run.validation:
        png = _draw(lambda f: _validation_panel(f.subplots(), run.validation, unit))
        caption = "Bounds on validation rows, computed during training."
        pictures["validation"] = Picture("Validation bound during training", caption, png)
    if not records:
        return pictures

    if config.diffusion.objective == "vmd":
        caption = "With objective vmd the loss is the papers' training surrogate. It is not a bound."
    else:
        caption = "The loss is what training minimises, over all T of diffusion.steps and with the KL weight of the "
        caption += "step. It is a noisy average, not a number to quote."
    curves = {"loss": "loss", "reconstruction": "reconstruction"}
    pictures["loss"] = Picture(
        "Loss", caption, _draw(lambda f: _panel(f.subplots(), records, curves, "nats per token"))
    )
    if config.latent.width:
        caption = "The KL as the objective counts it, before its weight (dashed, right axis)."
        pictures["kl"] = Picture("KL of the latent", caption, _draw(lambda f: _kl_panel(f.subplots(), records)))
    caption = "Learning rate, and the global gradient norm before clipping"
    caption += f" at {config.training.gradient_clip:g}." if config.training.gradient_clip else " (clipping is off)."
    png = _draw(lambda f: _stacked(f, records, OPTIMIZER_PANELS), height=4.2)
    pictures["optimizer"] = Picture("Learning rate and gradient norm", caption, png)
    caption = (
        "Tokens a second over all ranks; share of the peak FLOP/s (MFU); share of the time spent waiting for data."
    )
    png = _draw(lambda f: _stacked(f, records, SPEED_PANELS), height=4.2)
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
    """Some keys of the metrics against the step."""
    steps = _column(records, "step")
    axes.set(xlabel="step", ylabel=label)
    _step_axis(axes)
    for n, (key, name) in enumerate(curves.items(), start=color):
        _curve(axes, steps, _column(records, key), name, COLORS[n], zorder=3 - 0.1 * n)
    if len(curves) > 1:
        _legend(axes)


def _curve(axes: Axes, x: np.ndarray, y: np.ndarray, name: str, color: str, zorder: float = 3) -> None:
    """A curve; of a long run the points are pale and a running mean stands out."""
    if not np.isfinite(y).any():
        axes.text(0.5, 0.5, f"{name}: not recorded", transform=axes.transAxes, ha="center", color="#666666")
        axes.set_yticks([])
        return
    if len(x) <= 100:
        axes.plot(x, y, color=color, label=name, zorder=zorder, marker="o", markersize=2.5)
        return
    axes.plot(x, y, color=color, alpha=0.25, linewidth=0.7, zorder=zorder - 1)
    axes.plot(x, running_mean(y, max(5, len(y) // 50)), color=color, label=name, zorder=zorder)


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
    steps, weights = _column(records, "step"), _column(records, "kl_weight")
    (line,) = right.plot(steps, weights, color=COLORS[1], linestyle="--", label="KL weight")
    right.grid(False)
    right.set_ylabel("KL weight")
    right.set_ylim(0, 1.05 * max(1.0, float(np.nanmax(weights, initial=0.0))))
    handles, _ = axes.get_legend_handles_labels()
    _legend(axes, [*handles, line])


def _bound_panel(
    axes: Axes, runs: Mapping[str, Sequence[Result]], unit: str, unigram_bits: float | None = None
) -> None:
    """Bits against T. T is on a log axis, with infinity as its last place, behind a gap."""
    finite = sorted({int(r.steps) for rs in runs.values() for r in rs if r.steps != "inf"})
    infinite = any(r.steps == "inf" for rs in runs.values() for r in rs)
    infinity = (math.log2(finite[-1]) + max(1.0, 0.2 * math.log2(finite[-1] / finite[0]))) if finite else 0.0

    def place(steps: int | str) -> float:
        return infinity if steps == "inf" else math.log2(int(steps))

    curves = {
        " ".join((run, name)).strip(): rs for run, results in runs.items() for name, rs in _curves(results).items()
    }
    for n, (name, results) in enumerate(curves.items()):
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
    ticks = [*finite, *(["inf"] if infinite else [])]
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
        parts = [LATENT_NAMES.get(r.latent, r.latent), "ELBO" if r.k == 1 else f"K = {r.k}"]
        parts += [f"{key} {getattr(r, key)}" if key == "step" else str(getattr(r, key)) for key in told]
        curves.setdefault(", ".join(parts), []).append(r)
    return curves


def _validation_panel(axes: Axes, results: Sequence[Result], unit: str) -> None:
    curves: dict[str, list[Result]] = {}
    for r in results:
        name = f"T = {'∞' if r.steps == 'inf' else r.steps}"
        curves.setdefault(name, []).append(r)
    for n, (name, rs) in enumerate(curves.items()):
        errors = [r.standard_error / math.log(2) for r in rs]
        style: dict[str, Any] = {"color": COLORS[n % len(COLORS)], "marker": MARKERS[n % len(MARKERS)]}
        x, y = [r.step for r in rs], [r.bits_per_token for r in rs]
        axes.errorbar(x, y, errors, markersize=3.5, capsize=2, label=name, **style)
    axes.set(xlabel="step", ylabel=f"bits per {unit} (upper bound)")
    _step_axis(axes)
    _legend(axes)


def _step_axis(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def _legend(axes: Axes, handles: Sequence[Any] | None = None) -> None:
    """Above the plot, where it can hide nothing."""
    found = handles or axes.get_legend_handles_labels()[0]
    widest = max(len(str(handle.get_label())) for handle in found)
    columns = 1 if widest > 34 else 2 if widest > 12 else 4
    axes.legend(handles=found, loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, frameon=False, borderaxespad=0.2)


# ---------------------------------------------------------------------------------------------------------- the page

CSS = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 1120px; margin: 0 auto;
       padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; margin: 0 0 .3rem; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap: 1.5rem; }
.figures figure:first-child:last-child { max-width: 40rem; }
figure { margin: 0; } img { max-width: 100%; height: auto; display: block; }
figcaption { font-size: .85rem; color: #555; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; overflow-wrap: normal; }
th, td { padding: .25rem .7rem .25rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid #e6e6e6; }
thead th { font-weight: 600; white-space: nowrap; } tbody th { font-weight: 400; color: #555; white-space: nowrap; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.sample, pre { font: .85rem/1.45 ui-monospace, monospace; white-space: pre-wrap; background: #f6f6f4; padding: .5rem .7rem;
          margin: .4rem 0; }
.note { border-left: 3px solid #1f4e79; padding-left: .8rem; } summary { cursor: pointer; }
"""


def _page(run: Run, figures: Mapping[str, Picture]) -> str:
    title = html.escape(run.name)
    training = [name for name in figures if name != "bound_against_steps"]
    sections = [
        f"<h1>{title}</h1>{_state(run)}",
        f"<h2>The run</h2>{_settings(run)}",
        f"<h2>Bounds</h2>{_bounds(run, figures)}",
        f"<h2>Training</h2>{_grid(figures, training) if training else '<p>Nothing is logged yet.</p>'}",
        f"<h2>Samples</h2>{_samples(run)}",
        f"<h2>Files</h2>{_folded(f'Last lines of {LOG}', run.log) if run.log else ''}",
        _folded(f"The whole configuration ({CONFIG})", run.config.to_json()),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{CSS}</style>\n</head>\n<body>\n"
        + "\n".join(sections)
        + "\n</body>\n</html>\n"
    )


def _state(run: Run) -> str:
    """How far the run is, in a sentence or two."""
    now = f"Page written {datetime.now(UTC):%Y-%m-%d %H:%M} UTC."
    if not run.metrics:
        return f"<p>Nothing is logged yet: {METRICS} is empty or not there. {now}</p>"
    last, steps = run.metrics[-1], run.config.training.steps
    state = "finished" if last["step"] >= steps else "not finished: still going on, or stopped"
    tokens, loss, skipped = (_column([last], key)[0] for key in ("tokens", "loss", "skipped_steps"))
    text = f"Step {last['step']:,} of {steps:,} ({state}); {_number(tokens, ',.0f')} tokens seen; "
    text += f"last logged loss {_number(loss, '.4f')} nats per token."
    if skipped > 0:
        text += f" {skipped:,.0f} steps were skipped because the loss or a gradient was not finite."
    return f"<p>{text} {now}</p>"


def _number(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else "?"


def _settings(run: Run) -> str:
    config = run.config
    data, model, latent, diffusion, training = (
        config.data,
        config.model,
        config.latent,
        config.diffusion,
        config.training,
    )
    if latent.width:
        z = f"{latent.width} wide, one a {latent.scope}, injected by {latent.injection}; "
        z += f"encoder {config.encoder_layers} layers × {config.encoder_width}"
        weight = diffusion.kl_weight
        kl = f"{weight.start:g} to {weight.end:g} over {weight.warmup_steps:,} steps; {diffusion.free_bits:g} nats free"
    else:
        z, kl = "none: a plain masked diffusion model (MDM)", "no latent"
    objective = diffusion.objective
    if objective == "nelbo":
        objective = f"nelbo (valid bound), T from {', '.join(map(str, diffusion.steps))}"
    elif objective == "vmd":
        objective = "vmd (the papers' surrogate, not a bound)"
    rows = {
        "corpus": data.corpus,
        "tokenizer": data.tokenizer,
        "rows": f"{data.row_length:,} tokens, packing {data.packing}",
        "denoiser": f"{model.layers} layers × {model.width}, {model.heads} heads, {model.mlp}, {model.norm}, "
        f"dropout {model.dropout:g}",
        "latent z": z,
        "blocks": f"of {diffusion.block_size} tokens" if diffusion.block_size else "none: the row is one block",
        "objective": objective,
        "paths": diffusion.paths,
        "KL weight": kl,
        "steps": f"{training.steps:,}",
        "batch": f"{training.global_batch:,} rows ({training.global_batch * data.row_length:,} tokens), "
        f"micro-batch {training.micro_batch:,}",
        "learning rate": f"{training.learning_rate:g}, {training.lr_schedule}, {training.warmup_steps:,} warm-up steps",
        "optimizer": f"betas {training.betas[0]:g}, {training.betas[1]:g}; weight decay {training.weight_decay:g}; "
        f"clip {training.gradient_clip:g}; EMA {training.ema_decay:g}",
        "precision": f"{training.precision}; ZeRO stage {config.zero_stage}",
        "seed": str(training.seed),
    }
    if run.facts.unigram_bits_per_token is not None:
        rows["unigram entropy"] = f"{run.facts.unigram_bits_per_token:.4f} bits per {_unit(config)}"
    body = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in rows.items())
    return f"<table><tbody>{body}</tbody></table>"


def _bounds(run: Run, figures: Mapping[str, Picture]) -> str:
    results = _newest(run)
    how = f"python launchers/evaluate.py --checkpoint RUN --steps 1,4,16,inf --json RUN/{FINAL}"
    if not results:
        return f"<p>No bound is computed yet. To compute some: <code>{how}</code></p>"
    notes = f'<p class="note">{BOUND_NOTE}</p>'
    if any(r.vmd_surrogate is not None for r in results):
        notes += f'<p class="note">{SURROGATE_NOTE}</p>'
    if not run.final:
        notes += f"<p>There is no final evaluation ({FINAL}); these bounds are the last ones that training made. "
        notes += f"To compute it: <code>{how}</code></p>"
    return notes + _grid(figures, ["bound_against_steps"]) + _bound_table(results, _unit(run.config))


def _bound_table(results: Sequence[Result], unit: str) -> str:
    columns: dict[str, Callable[[Result], str]] = {
        "T": lambda r: "∞" if r.steps == "inf" else str(r.steps),
        "latent": lambda r: r.latent,
        "K": lambda r: f"{r.k:,}",
        "bound": lambda r: r.bound,
        f"bits/{unit}": lambda r: f"{r.bits_per_token:.4f}",
        "± s.e.": lambda r: f"{r.standard_error / math.log(2):.4f}",
        "perplexity": lambda r: f"{r.perplexity:,.4f}",
        f"{unit}s": lambda r: f"{r.tokens:,}",
        "rows": lambda r: f"{r.rows:,}",
        "weights": lambda r: r.weights,
        "step": lambda r: f"{r.step:,}",
        "paths": lambda r: r.paths,
        "protocol": lambda r: r.protocol,
        "split": lambda r: r.split,
    }
    if any(r.vmd_surrogate is not None for r in results):
        columns["vmd_surrogate (not a bound)"] = lambda r: "" if r.vmd_surrogate is None else f"{r.vmd_surrogate:.4f}"
    words = {"latent", "bound", "weights", "paths", "protocol", "split"}
    kind = {name: "" if name in words else ' class="number"' for name in columns}
    head = "".join(f"<th{kind[name]}>{html.escape(name)}</th>" for name in columns)
    body = "".join(
        "<tr>" + "".join(f"<td{kind[name]}>{html.escape(show(r))}</td>" for name, show in columns.items()) + "</tr>"
        for r in results
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _samples(run: Run) -> str:
    if not run.samples:
        how = f"python launchers/sample.py --checkpoint RUN --steps 1,4,16,64 --json RUN/{SAMPLES}"
        return f"<p>No samples are drawn yet. To draw some: <code>{how}</code></p>"
    parts = []
    for drawn in run.samples:
        # the launcher notes how z would be drawn even where the model has none
        latent = LATENT_NAMES.get(drawn.latent, drawn.latent) if run.config.latent.width else LATENT_NAMES["none"]
        steps = "∞" if drawn.steps == "inf" else drawn.steps
        parts.append(f"<h3>{html.escape(f'T = {steps}, {latent}, seed {drawn.seed}')}</h3>")
        parts += [f'<div class="sample">{html.escape(text)}</div>' for text in drawn.texts]
    return "\n".join(parts)


def _grid(figures: Mapping[str, Picture], names: Sequence[str]) -> str:
    parts = []
    for name in names:
        picture = figures[name]
        data = base64.b64encode(picture.png).decode()
        title, caption = html.escape(picture.title), html.escape(picture.caption)
        parts.append(
            f'<figure id="{name}"><h3>{title}</h3><img alt="{title}" src="data:image/png;base64,{data}">'
            f"<figcaption>{caption}</figcaption></figure>"
        )
    return f'<div class="figures">{"".join(parts)}</div>'


def _folded(title: str, text: str) -> str:
    return f"<details><summary>{html.escape(title)}</summary><pre>{html.escape(text)}</pre></details>"
