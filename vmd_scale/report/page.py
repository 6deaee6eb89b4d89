"""One HTML page about a run, or several: what it is, how it trained, which bounds it reached, what it writes.

The page holds its pictures itself (PNG, so that its size does not grow with the length of the run).
"""

import base64
import html
import math
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from vmd_scale.evaluation.classification import Accuracy
from vmd_scale.evaluation.perplexity import Result
from vmd_scale.files import check_writable, write_atomically
from vmd_scale.report.comparison import comparison_figures, differing_settings
from vmd_scale.report.events import events_section
from vmd_scale.report.figures import Picture, figures_of
from vmd_scale.report.run import (
    CONFIG,
    FINAL,
    LATENT_NAMES,
    SAMPLES,
    Run,
    column,
    distinctly_named,
    newest,
    read_run,
    unit_of,
)
from vmd_scale.training.telemetry import LOG, METRICS

BOUND_NOTE = (
    "Every number here that is called a bound is, in expectation, an upper bound on the negative log-likelihood of "
    "the sampler that it names: T steps, latent fixed or fresh, law of the paths. K = 1 is the ELBO; K > 1 is the "
    "importance-weighted bound, which is tighter; 'compat' marks an estimate of published code, which bounds nothing. "
    "The error bar is one standard error, over rows."
)
SURROGATE_NOTE = (
    "vmd_surrogate is the training objective of the VMD and VADD papers, in nats per token. It is not a bound on "
    "anything and must not be compared with one."
)
PLAIN = {"temperature": 1.0, "nucleus": 1.0, "order_noise": 0.0, "remask": 0.0}  # what does not change the distribution
NUMBER = ' class="number"'
ACCURACY_COLUMNS = ("split", "rows", "labels", "accuracy", "± s.e.", "label NLL, nats")

CSS = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 1120px; margin: 0 auto;
       padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; margin: 0 0 .3rem; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap: 1.5rem; }
.figures figure:first-child:last-child { max-width: 40rem; }
figure { margin: 0; } img { max-width: 100%; height: auto; display: block; }
figcaption { font-size: .85rem; color: #555; }
.scroll { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; font-size: .9rem; overflow-wrap: normal; }
th, td { padding: .25rem .7rem .25rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid #e6e6e6; }
thead th { font-weight: 600; white-space: nowrap; } tbody th { font-weight: 400; color: #555; white-space: nowrap; }
.settings td { overflow-wrap: anywhere; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.sample, pre { font: .85rem/1.45 ui-monospace, monospace; white-space: pre-wrap; background: #f6f6f4;
               padding: .5rem .7rem; margin: .4rem 0; }
.note { border-left: 3px solid #1f4e79; padding-left: .8rem; } summary { cursor: pointer; }
.run { border-top: 3px solid #e6e6e6; margin-top: 2rem; padding-top: .6rem; } .run > summary { font-size: 1.2rem; }
"""


def write_report(
    runs: Path | Sequence[Path], output: Path | None = None, png: Path | None = None, refresh: int | None = None
) -> Path:
    """Write the page of one run folder or of several, by default as report.html in the first, and return where it is.

    Args:
        runs: what launchers/pretrain.py wrote with --output; they may still be going on.
        output: the HTML file.
        png: a folder; every picture is written there as well.
        refresh: seconds after which a browser loads the page again.

    Raises:
        UserError: not a run folder, or a file in it that is not what it should be.
    """
    folders = [runs] if isinstance(runs, Path) else list(runs)
    output = output or folders[0] / "report.html"
    check_writable(output, "--output")
    check_writable(None if png is None else png / "loss.png", "--png")
    found = distinctly_named([read_run(folder) for folder in folders], folders)
    figures = [figures_of(run) for run in found]
    together = comparison_figures(found) if len(found) > 1 else {}
    if png is not None:
        for run, pictures in zip(found, figures, strict=True):
            _write_pictures(png if len(found) == 1 else png / run.name.lstrip("/"), pictures)
        _write_pictures(png, together)
    # "replace": a sample may hold half a surrogate pair, which no file can
    write_atomically(output, _page(found, figures, together, refresh).encode("utf-8", "replace"))
    return output


def _write_pictures(folder: Path, pictures: Mapping[str, Picture]) -> None:
    for name, picture in pictures.items():
        write_atomically(folder / f"{name}.png", picture.png)


def _page(
    runs: Sequence[Run], figures: Sequence[Mapping[str, Picture]], together: Mapping[str, Picture], refresh: int | None
) -> str:
    title = html.escape(" and ".join(run.name for run in runs))
    parts = []
    if len(runs) > 1:
        states = "".join(f"<h3>{html.escape(run.label)}</h3>{_state(run)}" for run in runs)
        parts = [
            f"<h1>{len(runs)} runs side by side</h1>{states}",
            f"<h2>Where they differ</h2>{differing_settings(runs)}",
            f"<h2>Together</h2>{_grid(together, list(together))}",
        ]
    for run, pictures in zip(runs, figures, strict=True):
        sections = _sections(run, pictures)
        if len(runs) > 1:
            name = html.escape(run.label)
            sections = f'<details class="run"><summary>{name} alone</summary>{sections}</details>'
        parts.append(sections)
    again = f'<meta http-equiv="refresh" content="{refresh}">\n' if refresh else ""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"{again}<title>{title}</title>\n<style>{CSS}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def _sections(run: Run, figures: Mapping[str, Picture]) -> str:
    training = [name for name in figures if name != "bound_against_steps"]
    return "\n".join(
        (
            f"<h1>{html.escape(run.name)}</h1>{_state(run)}",
            f"<h2>The run</h2>{_settings(run)}",
            f"<h2>Bounds</h2>{_bounds(run, figures)}",
            f"<h2>Labels</h2>{_accuracies(run.accuracies)}" if run.accuracies else "",
            f"<h2>Training</h2>{_grid(figures, training) if training else '<p>Nothing is logged yet.</p>'}",
            f"<h2>Events</h2>{events_section(run)}",
            f"<h2>Samples</h2>{_samples(run)}",
            f"<h2>Files</h2>{_folded(f'Last lines of {LOG}', run.log) if run.log else ''}",
            _folded(f"The whole configuration ({CONFIG})", run.config.to_json()),
        )
    )


def _state(run: Run) -> str:
    """How far the run is, in a sentence or two."""
    now = f"Page written {datetime.now(UTC):%Y-%m-%d %H:%M} UTC."
    steps, state = run.config.training.steps, _standing(run)
    if not run.metrics:
        known = f" The run is recorded as {state}." if state else ""
        return f"<p>Nothing is logged yet: {METRICS} is empty or not there.{known} {now}</p>"
    last = run.metrics[-1]
    state = state or ("finished" if last["step"] >= steps else "not finished: still going on, or stopped")
    tokens, loss, skipped = (column([last], key)[0] for key in ("tokens", "loss", "skipped_steps"))
    text = f"Step {last['step']:,} of {steps:,} ({state}); {_number(tokens, ',.0f')} tokens seen; "
    text += f"last logged loss {_number(loss, '.4f')} nats per token."
    if skipped > 0:
        text += f" {skipped:,.0f} steps were skipped because the loss or a gradient was not finite."
    return f"<p>{text} {now}</p>"


def _standing(run: Run) -> str:
    """What is recorded, as HTML; empty where nothing is, or where the metrics say it."""
    if run.has_died:
        return "running, but its processes are gone (killed, or out of memory): run it again to continue"
    if run.status is None or (run.status.state == "finished" and run.metrics):
        return ""
    return run.status.state + (f": {html.escape(run.status.reason)}" if run.status.reason else "")


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
        z += f"encoder {config.encoder_layers} layers × {config.encoder_width}, prior {latent.prior}"
        weight = diffusion.kl_weight
        kl = f"{weight.start:g} to {weight.end:g} over {weight.warmup_steps:,} steps; {diffusion.free_bits:g} nats free"
    else:
        z, kl = "none: a plain masked diffusion model (MDM)", "no latent"
    if diffusion.objective != "vmd":
        samples = f", K = {diffusion.importance_samples}" if diffusion.objective == "iw" else ""
        whole = not latent.width or (diffusion.kl_weight.end >= 1 and not diffusion.free_bits)
        kind = "valid bound" if whole else "no bound: the KL is not counted whole"
        objective = f"{diffusion.objective} ({kind}), T from {', '.join(map(str, diffusion.steps))}{samples}"
    else:
        objective = "vmd (the papers' surrogate, not a bound)"
    optimizer = "AdamW"
    if training.optimizer == "muon":
        optimizer = f"Muon for matrices, learning rate {training.muon_learning_rate:g}; AdamW for all else"
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
        "optimizer": f"{optimizer}; betas {training.betas[0]:g}, {training.betas[1]:g}; "
        f"weight decay {training.weight_decay:g}; clip {training.gradient_clip:g}; EMA {training.ema_decay:g}",
        "precision": f"{training.precision}; ZeRO stage {config.zero_stage}",
        "seed": str(training.seed),
    }
    if training.init_from is not None:
        adapters = (f"adapters of rank {training.lora.rank}",) if training.lora else ()
        parts = ", ".join((*adapters, *training.trainable)) or "all weights"
        rows["started from"] = f"{training.init_from}; trained: {parts}"
    if run.facts.unigram_bits_per_token is not None:
        rows["unigram entropy"] = f"{run.facts.unigram_bits_per_token:.4f} bits per {unit_of(config)}"
    body = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in rows.items())
    return f'<div class="scroll"><table class="settings"><tbody>{body}</tbody></table></div>'


def _bounds(run: Run, figures: Mapping[str, Picture]) -> str:
    results = newest(run)
    how = f"python launchers/evaluate.py --checkpoint RUN --steps 1,4,16,inf --json RUN/{FINAL}"
    if not results:
        return f"<p>No bound is computed yet. To compute some: <code>{how}</code></p>"
    notes = f'<p class="note">{BOUND_NOTE}</p>'
    if any(r.vmd_surrogate is not None for r in results):
        notes += f'<p class="note">{SURROGATE_NOTE}</p>'
    if not run.final:
        notes += f"<p>There is no final evaluation ({FINAL}); these bounds are the last ones that training made. "
        notes += f"To compute it: <code>{how}</code></p>"
    return notes + _grid(figures, ["bound_against_steps"]) + _bound_table(results, unit_of(run.config))


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
        "precision": lambda r: r.precision or "not recorded",
        "step": lambda r: f"{r.step:,}",
        "paths": lambda r: r.paths,
        "protocol": lambda r: r.protocol,
        "split": lambda r: r.split,
    }
    if any(r.vmd_surrogate is not None for r in results):
        columns["vmd_surrogate (not a bound)"] = lambda r: "" if r.vmd_surrogate is None else f"{r.vmd_surrogate:.4f}"
    words = {"latent", "bound", "weights", "precision", "paths", "protocol", "split"}
    kind = {name: "" if name in words else NUMBER for name in columns}
    head = "".join(f"<th{kind[name]}>{html.escape(name)}</th>" for name in columns)
    body = "".join(
        "<tr>" + "".join(f"<td{kind[name]}>{html.escape(show(r))}</td>" for name, show in columns.items()) + "</tr>"
        for r in results
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _accuracies(results: Sequence[Accuracy]) -> str:
    head = "".join(f"<th{'' if n == 0 else NUMBER}>{name}</th>" for n, name in enumerate(ACCURACY_COLUMNS))
    rows = [
        (r.split, f"{r.rows:,}", f"{r.labels:,}", f"{r.accuracy:.4f}", f"{r.standard_error:.4f}", f"{r.label_nll:.4f}")
        for r in results
    ]
    body = "".join(
        f"<tr><td>{html.escape(split)}</td>" + "".join(f"<td{NUMBER}>{value}</td>" for value in values) + "</tr>"
        for split, *values in rows
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
        changed = [f"{name} {getattr(drawn, name):g}" for name, plain in PLAIN.items() if getattr(drawn, name) != plain]
        title = ", ".join([f"T = {steps}", latent, *([drawn.law] if drawn.law else []), *changed, f"seed {drawn.seed}"])
        parts.append(f"<h3>{html.escape(title)}</h3>")
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
