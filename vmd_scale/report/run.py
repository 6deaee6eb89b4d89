"""What a run folder says, read whole: while the run goes on, after it, and for folders of older versions."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from vmd_scale.config import Config
from vmd_scale.config_file import load_config
from vmd_scale.errors import UserError
from vmd_scale.evaluation.classification import CLASSIFICATION, Accuracy
from vmd_scale.evaluation.latent import LatentUsage
from vmd_scale.evaluation.perplexity import Result, read_results
from vmd_scale.files import checked, read_json
from vmd_scale.training.status import Status, has_died, read_status
from vmd_scale.training.telemetry import EVALUATIONS, EVENTS, FACTS, LATENT, LOG, METRICS
from vmd_scale.training.telemetry import SAMPLES as DRAWN

CONFIG, FINAL, SAMPLES = "config.json", "evaluation.json", "samples.json"
LOG_LINES = 40
LATENT_NAMES = {"fixed": "fixed z", "fresh": "fresh z", "none": "no latent"}

Item = TypeVar("Item")


@dataclass(frozen=True)
class SampleSet:
    """What launchers/sample.py writes for one T."""

    steps: int | str
    latent: str
    seed: int
    texts: list[str]
    law: str = ""
    temperature: float = 1.0
    nucleus: float = 1.0
    order_noise: float = 0.0
    remask: float = 0.0


@dataclass(frozen=True)
class Facts:
    """Numbers about the data, which a run writes down at its start."""

    unigram_bits_per_token: float | None = None


@dataclass(frozen=True)
class Run:
    """What a run folder says; whatever is not there yet is empty."""

    name: str
    config: Config
    metrics: list[dict[str, Any]]
    validation: list[Result]  # during training
    latent: list[LatentUsage]  # during training
    final: list[Result]
    samples: list[SampleSet]
    facts: Facts = field(default_factory=Facts)
    accuracies: list[Accuracy] = field(default_factory=list)  # of a run on labels
    log: str = ""
    events: list[dict[str, Any]] = field(default_factory=list)
    status: Status | None = None
    has_died: bool = False  # the record says running, and nothing is

    @property
    def label(self) -> str:
        """The name, and that it is the baseline where it is one."""
        return self.name if self.config.latent.width else f"{self.name} (MDM)"


def read_run(folder: Path) -> Run:
    """Read a run folder.

    Raises:
        UserError: not a run folder, or a file in it that is not what it should be.
    """
    if not (folder / CONFIG).is_file():
        what = "holds no config.json" if folder.is_dir() else "there is no such folder"
        raise UserError(f"{folder}: not a run folder, {what}; expected what launchers/pretrain.py wrote with --output")
    if "model_type" in read_json(folder / CONFIG, dict[str, Any]):  # as transformers wants it
        raise UserError(
            f"{folder}: an exported model, not a run; a report is made of the run folder that it comes from"
        )
    validation = [checked(Result, r, str(folder / EVALUATIONS)) for r in _read_lines(folder / EVALUATIONS)]
    final = read_results(folder / FINAL) if (folder / FINAL).is_file() else []
    for where, results in ((EVALUATIONS, validation), (FINAL, final)):
        for result in results:
            _check_steps(result.steps, folder / where)
    log, status = folder / LOG, read_status(folder)
    return Run(
        name=folder.resolve().name,
        config=load_config(folder / CONFIG),
        metrics=_read_lines(folder / METRICS),
        validation=validation,
        latent=[checked(LatentUsage, r, str(folder / LATENT)) for r in _read_lines(folder / LATENT)],
        final=final,
        samples=_optional(folder / SAMPLES, list[SampleSet], []) or _of_training(folder / DRAWN),
        facts=_optional(folder / FACTS, Facts, Facts()),
        accuracies=_optional(folder / CLASSIFICATION, list[Accuracy], []),
        log="\n".join(log.read_text("utf-8", "replace").splitlines()[-LOG_LINES:]) if log.is_file() else "",
        events=_read_lines(folder / EVENTS),
        status=status,
        has_died=has_died(folder, status),
    )


def distinctly_named(runs: Sequence[Run], folders: Sequence[Path]) -> list[Run]:
    """Runs of the same folder name get as many names of the folders above in front as tell them apart.

    Raises:
        UserError: one folder twice.
    """
    parts = [folder.resolve().parts for folder in folders]
    for number, path in enumerate(parts):
        if path in parts[:number]:
            raise UserError(f"{folders[number]}: the same run twice")
    named = []
    for run, path in zip(runs, parts, strict=True):
        count = next(n for n in range(1, len(path) + 1) if [p[-n:] for p in parts].count(path[-n:]) == 1)
        named.append(replace(run, name="/".join(path[-count:]).replace("//", "/")))
    return named


def _of_training(path: Path) -> list[SampleSet]:
    """What the newest evaluation drew."""
    return [checked(SampleSet, record, str(path)) for record in _read_lines(path)[-1:]]


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


def _optional(path: Path, kind: type[Item], default: Item) -> Item:
    return read_json(path, kind) if path.is_file() else default


def _check_steps(steps: int | str, path: Path) -> None:
    if steps != "inf" and not (str(steps).isdigit() and int(steps) > 0):
        raise UserError(f"{path}: steps {steps!r}: expected a positive whole number or 'inf'")


def column(records: Sequence[Mapping[str, Any]], key: str) -> np.ndarray:
    """One key of all records, float64 [n]; nan where it is missing or null."""
    values = (record.get(key) for record in records)
    return np.array([v if isinstance(v, int | float) else math.nan for v in values], dtype=np.float64)


def unit_of(config: Config) -> str:
    """What a token of this run is called."""
    tokenizer = config.data.tokenizer
    return (
        "character"
        if tokenizer in ("text8", "text8_mdlm", "sudoku") or (Path(tokenizer) / "characters.json").is_file()
        else "token"
    )


def newest(run: Run) -> list[Result]:
    """The final evaluation, or else the last one that training made."""
    last = max((r.step for r in run.validation), default=None)
    return run.final or [r for r in run.validation if r.step == last]
