"""What a reference task is made of: data, methods, measurements and published figures."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from vmd_scale.checkpoints import TrainedModel
from vmd_scale.config import Config, DataConfig


@dataclass(frozen=True)
class Measurement:
    """One number about one trained model."""

    metric: str
    value: float
    steps: int | str  # of the whole row
    latent: str  # fixed | fresh | none
    law: str  # of the paths
    tokens: str = ""  # argmax | drawn (the distribution that is bounded); empty for what is not sampled
    split: str = ""
    k: int | None = None  # importance samples of a bound
    standard_error: float | None = None  # of the estimate, for this one model
    row_nats: tuple[float, ...] | None = None  # nats per token of each row, of a bound


@dataclass(frozen=True)
class Method:
    """A model by name, as overrides (KEY=VALUE) of the task's configuration."""

    name: str
    overrides: tuple[str, ...] = ()
    fast: tuple[str, ...] = ()  # more of them, where the task is scaled down

    def decides(self, fast: bool) -> tuple[str, ...]:
        return (*self.overrides, *(self.fast if fast else ()))


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    samples: int = 0
    rows: int = 0  # scored or solved
    importance_samples: int = 1  # K


@dataclass(frozen=True)
class Published:
    """A figure of a paper, and the rows that it stands beside; None is any."""

    value: float
    method: str
    metric: str
    steps: int | str
    blocks: int = 1
    variant: str | None = None
    law: str | None = None
    tokens: str | None = None
    split: str | None = None


@dataclass(frozen=True)
class Goal:
    """What a measurement should reach: a limit, or more than the same measurement of another method.

    Of the ways to take tokens the better one counts, unless named; of bounds that with the largest K.
    """

    metric: str
    steps: int | str
    at_most: float | None = None
    at_least: float | None = None
    better_than: str | None = None  # a method
    slack: int = 0  # so many standard errors beyond the limit do no harm
    method: str = "vmd"
    blocks: int = 1
    variant: str | None = None
    law: str | None = None
    tokens: str | None = None
    split: str | None = None


@dataclass(frozen=True)
class Row:
    """A line of the table: mean and spread of a measurement over seeds."""

    task: str
    variant: str
    method: str
    objective: str
    blocks: int
    steps: int | str
    latent: str
    law: str
    tokens: str
    split: str
    metric: str
    k: int | None
    mean: float
    std: float | None  # over seeds; None for a single one
    standard_error: float | None  # of one model's estimate, their mean
    seeds: int
    published: float | None
    scaled_down: bool = False
    row_nats: tuple[tuple[float, ...], ...] = ()  # of each seed's model, where all have them

    @property
    def spread(self) -> float | None:
        """Over seeds where there are several, else the standard error."""
        return self.standard_error if self.std is None else self.std

    @property
    def value(self) -> str:
        """The mean with its spread, for a table."""
        return f"{self.mean:.4f}" if self.spread is None else f"{self.mean:.4f} ± {self.spread:.4f}"

    def to_dict(self) -> dict[str, Any]:
        """For the JSON file, without what belongs to single rows of the data."""
        return {k: v for k, v in asdict(self).items() if k != "row_nats"}


@dataclass(frozen=True)
class MeasuredModel:
    """A model of a task, trained: what a measure is given."""

    trained: TrainedModel
    variant: str
    sizes: Sizes
    other_data: Mapping[str, DataConfig]  # prepared, by name


Measure = Callable[[MeasuredModel], Sequence[Measurement]]
Plot = Callable[[Sequence[Row], Path], bool]  # whether there was anything to draw


def no_other_data(config: Config, sizes: Sizes) -> dict[str, DataConfig]:
    return {}


@dataclass(frozen=True)
class Task:
    """`variants` are values of data.source: one model is trained for each, method and seed."""

    name: str
    title: str
    config: str  # file in configs/
    methods: tuple[Method, ...]
    measure: Measure
    sizes: Sizes
    fast: tuple[str, ...]  # overrides that make it small enough for two CPU cores
    fast_sizes: Sizes
    fast_changes_data: bool = False  # so that no published figure compares with what it gives
    variants: tuple[str, ...] = ("",)  # "" for the configuration's own
    one_source: bool = False  # what is measured and published is of the configuration's data and no other
    published: tuple[Published, ...] = ()
    goals: tuple[Goal, ...] = ()
    notes: tuple[str, ...] = ()
    plot: Plot | None = None
    other_data: Callable[[Config, Sizes], dict[str, DataConfig]] = no_other_data  # measured on, beside the task's own

    def published_beside(self, row: Mapping[str, object], fast: bool) -> float | None:
        """The figure that belongs beside a row, given as {field: value}; the papers keep one z for the whole path."""
        if (fast and self.fast_changes_data) or row["latent"] == "fresh":
            return None
        conditions = [f.name for f in fields(Published) if f.name != "value"]
        for figure in self.published:
            if all(getattr(figure, name) in (None, row[name]) for name in conditions):
                return figure.value
        return None
