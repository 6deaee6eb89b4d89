"""Bounds over a whole split, with standard errors over sequences."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from vmd_scale.build import masks_of
from vmd_scale.data.loader import evaluation_batches
from vmd_scale.data.order import SampleOrder
from vmd_scale.data.shards import ShardReader
from vmd_scale.diffusion.likelihood import Rows, elbo, importance_weighted, vmd_surrogate
from vmd_scale.diffusion.noise import Noise
from vmd_scale.diffusion.paths import LAWS, RANDOM_LAWS
from vmd_scale.diffusion.sampler import Sampler
from vmd_scale.errors import UserError
from vmd_scale.model import VMD

Score = Callable[[Rows], torch.Tensor]


@dataclass(frozen=True)
class Result:
    """One number that is true, and what it is a number of."""

    protocol: str
    split: str
    steps: int | str  # T; "inf"
    latent: str  # fixed | fresh | none
    k: int
    bound: str  # elbo | iw | exact (nothing is random)
    nats_per_token: float
    bits_per_token: float
    perplexity: float
    standard_error: float  # of nats_per_token, over sequences
    tokens: int  # counted
    rows: int
    weights: str
    step: int
    paths: str  # law of the paths
    interval: str  # of t: full is (0, 1]
    draws: int
    seed: int
    vmd_surrogate: float | None = None  # nats per token; NOT a bound

    def to_dict(self) -> dict[str, Any]:
        values = asdict(self)
        if values["vmd_surrogate"] is None:
            del values["vmd_surrogate"]
        return values


@dataclass(frozen=True)
class Request:
    """What to compute. `rows` limits the rows (a fixed random choice); None takes all."""

    protocol: str
    split: str
    steps: tuple[float, ...]
    latent: str = "fixed"
    samples: tuple[int, ...] = (1,)  # K
    draws: int = 1
    rows: int | None = None
    paths: str = "balanced"
    seed: int = 0
    micro_batch: int = 64
    surrogate: bool = False


def chosen_rows(total: int, limit: int | None) -> np.ndarray:
    """Row numbers to score, sorted: all of them, or a random choice that is always the same."""
    if limit is None or limit >= total:
        return np.arange(total, dtype=np.int64)
    return np.sort(SampleOrder(total, seed=0).row_numbers(np.arange(limit, dtype=np.int64)))


@dataclass(frozen=True)
class Ranks:
    """Among which ranks rows are dealt out; by default there is one."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None  # gloo


def evaluate(
    model: VMD, reader: ShardReader, request: Request, weights: str, step: int, ranks: Ranks | None = None
) -> list[Result]:
    """One `Result` for each K and T of the request, the same on every rank.

    Rows are dealt out to the ranks, each exactly once; the result does not depend on their number.

    Raises:
        UserError: fewer than two rows, no draws, or a latent or paths that do not exist.
    """
    if request.draws < 1:
        raise UserError(f"--draws {request.draws}: must be at least 1")
    if request.latent not in ("fixed", "fresh"):
        raise UserError(f"--latent {request.latent!r}: allowed: fixed, fresh")
    if request.paths not in LAWS:
        raise UserError(f"--paths {request.paths!r}: allowed: {', '.join(LAWS)}")
    if reader.manifest.packing == "document" and model.architecture.latent_width:
        held, most = reader.manifest.documents_per_row, model.architecture.documents
        if held is None or held > most:
            raise UserError(f"rows hold up to {held} documents, this model has latents for {most}")
        if request.latent == "fresh":
            raise UserError("--latent fresh is not scored where a row holds several documents; use fixed")
    rows = chosen_rows(reader.rows, request.rows)
    if len(rows) < 2:
        raise UserError(f"split {request.split!r}: {len(rows)} row(s) to score, at least 2 are needed")
    noise, total, draws = Noise(request.seed), len(rows), range(request.draws)
    score_all = partial(_score_all, reader, rows, request.micro_batch, ranks or Ranks())
    surrogate = None
    if request.surrogate:
        if request.paths not in RANDOM_LAWS:
            raise UserError(f"--surrogate is defined for paths {' and '.join(RANDOM_LAWS)}, not {request.paths!r}")
        surrogate, _ = _mean_and_error(*score_all(lambda some: vmd_surrogate(model, some, noise, total, request.paths)))
    results = []
    for k, steps in product(request.samples, request.steps):
        sampler = Sampler(steps, request.latent, request.paths)

        def bound(some: Rows, k: int = k, sampler: Sampler = sampler) -> torch.Tensor:
            if k > 1 or sampler.by_confidence:  # of a replayed path there is no random step
                estimates = [importance_weighted(model, some, sampler, noise, k, draw) for draw in draws]
            else:
                estimates = [elbo(model, some, sampler, noise, total, draw) for draw in draws]
            return torch.stack(estimates).mean(0)

        nats, tokens = score_all(bound)
        mean, error = _mean_and_error(nats, tokens)
        certain = not model.architecture.latent_width and (sampler.by_confidence or steps == 1)
        results.append(
            Result(
                protocol=request.protocol,
                split=request.split,
                steps="inf" if math.isinf(steps) else int(steps),
                latent=request.latent if model.architecture.latent_width else "none",
                k=k,
                bound="exact" if certain else "iw" if k > 1 else "elbo",
                nats_per_token=mean,
                bits_per_token=mean / math.log(2),
                perplexity=math.exp(min(mean, 700.0)),
                standard_error=error,
                tokens=int(tokens.sum()),
                rows=total,
                weights=weights,
                step=step,
                paths=request.paths,
                interval="full",
                draws=request.draws,
                seed=request.seed,
                vmd_surrogate=surrogate,
            )
        )
    return results


def _score_all(
    reader: ShardReader, rows: np.ndarray, micro_batch: int, ranks: Ranks, score: Score
) -> tuple[np.ndarray, np.ndarray]:
    """Nats and counted tokens of all rows, float64 and int64 [n], gathered from all ranks."""
    nats, tokens = np.zeros(len(rows)), np.zeros(len(rows), dtype=np.int64)
    mine = np.arange(len(rows), dtype=np.int64)[ranks.rank :: ranks.size]
    most = -(-len(rows) // ranks.size)  # rows of the rank that has most
    for start in range(0, most, micro_batch):
        dealt = mine[start : start + micro_batch]
        # All batches of all ranks have one shape, filled up with rows that are not counted: under ZeRO-3 a forward is a
        # collective, and compiled blocks like it too.
        numbers = np.zeros(min(micro_batch, most), dtype=np.int64)
        numbers[: len(dealt)] = dealt
        (batch,) = evaluation_batches(reader, rows[numbers], micro_batch)
        maskable, attend = masks_of(batch, reader.manifest)
        scored = score(Rows(batch.tokens, maskable, attend, torch.from_numpy(numbers)))
        nats[dealt] = scored[: len(dealt)].numpy()
        tokens[dealt] = maskable[: len(dealt)].sum(-1).numpy()
    if ranks.size > 1:
        shares: list[Any] = [None] * ranks.size
        dist.all_gather_object(shares, (nats, tokens), group=ranks.group)
        nats, tokens = sum(share[0] for share in shares), sum(share[1] for share in shares)
    return nats, tokens


def _mean_and_error(nats: np.ndarray, tokens: np.ndarray) -> tuple[float, float]:
    """Nats per token over all rows, and its standard error over rows (of a ratio of sums)."""
    mean = nats.sum() / tokens.sum()
    residuals = nats - mean * tokens
    variance = residuals.var(ddof=1) * len(nats)
    return float(mean), float(math.sqrt(variance) / tokens.sum())


def table(results: Sequence[Result]) -> str:
    """A text table for people."""
    head = ("T", "latent", "paths", "K", "bound", "bits/token", "+-", "perplexity", "rows")
    lines = ["{:>6} {:>7} {:>9} {:>4} {:>5} {:>11} {:>7} {:>11} {:>7}".format(*head)]
    for r in results:
        lines.append(
            f"{r.steps:>6} {r.latent:>7} {r.paths:>9} {r.k:>4} {r.bound:>5} {r.bits_per_token:>11.4f} "
            f"{r.standard_error / math.log(2):>7.4f} {r.perplexity:>11.4f} {r.rows:>7}"
        )
    return "\n".join(lines)
