"""What a reference task is made of: data, methods, measurements and published figures."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vmd_scale.checkpoints import TrainedModel


@dataclass(frozen=True)
class Measurement:
    """One number about one trained model.

    `steps` counts those of the whole row. `tokens` says how a sampler took tokens, argmax or drawn (the distribution
    whose likelihood is bounded); it is empty for what is not sampled. `law` is that of the paths.
    """

    metric: str
    value: float
    steps: int | str
    tokens: str = ""
    law: str = ""
    latent: str = "fixed"  # fixed | fresh | none
    split: str = ""  # where it was measured, if not on what the model was trained for


@dataclass(frozen=True)
class Method:
    """A model by name, as overrides (KEY=VALUE) of the task's configuration."""

    name: str
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Sizes:
    """How much is measured: all of it for a table, less for a quick look."""

    samples: int
    importance_samples: int  # K
    rows: int  # scored or solved


@dataclass(frozen=True)
class Row:
    """A line of the table: mean and spread of a measurement over seeds."""

    task: str
    variant: str
    method: str
    blocks: int
    steps: int | str
    latent: str
    tokens: str
    law: str
    split: str
    metric: str
    mean: float
    std: float | None  # over seeds; None for a single one
    seeds: int
    published: float | None


Measure = Callable[[TrainedModel, str, Sizes], Sequence[Measurement]]  # (model, variant, sizes)
Plot = Callable[[Sequence[Row], Path], None]
# by variant, method, blocks, steps, tokens or law or "", metric
Published = Mapping[tuple[str, str, int, int | str, str, str], float]


@dataclass(frozen=True)
class Task:
    """`variants` are values of data.source: one model is trained for each, method and seed."""

    name: str
    title: str
    config: str  # file in configs/
    variants: tuple[str, ...]  # "" for the configuration's own data.source
    methods: tuple[Method, ...]
    measure: Measure
    sizes: Sizes
    fast: tuple[str, ...]  # overrides that make it small enough for two CPU cores
    fast_sizes: Sizes
    published: Published = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    plot: Plot | None = None
