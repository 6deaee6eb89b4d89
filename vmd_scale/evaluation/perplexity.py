"""Bounds over a whole split, with standard errors over sequences."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
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
    bound: str  # elbo | iw
    nats_per_token: float
    bits_per_token: float
    perplexity: float
    standard_error: float  # of nats_per_token, over sequences
    tokens: int  # counted
    rows: int
    weights: str
    step: int
    paths: str
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


def evaluate(
    model: VMD, reader: ShardReader, request: Request, weights: str, step: int, rank: int = 0, world_size: int = 1
) -> list[Result]:
    """One `Result` for each K and T of the request, the same on every rank.

    Rows are dealt out to the ranks, each exactly once; the result does not depend on their number.

    Raises:
        UserError: fewer than two rows, no draws, or a latent that is neither fixed nor fresh.
    """
    if request.draws < 1:
        raise UserError(f"--draws {request.draws}: must be at least 1")
    if request.latent not in ("fixed", "fresh"):
        raise UserError(f"--latent {request.latent!r}: allowed: fixed, fresh")
    rows = chosen_rows(reader.rows, request.rows)
    if len(rows) < 2:
        raise UserError(f"split {request.split!r}: {len(rows)} row(s) to score, at least 2 are needed")
    noise = Noise(request.seed)
    mine = np.arange(len(rows), dtype=np.int64)[rank::world_size]
    results = []
    surrogate = None
    if request.surrogate:

        def score_surrogate(some: Rows) -> torch.Tensor:
            return vmd_surrogate(model, some, noise, len(rows), request.paths)

        nats, tokens = _score(reader, rows, mine, request.micro_batch, world_size, score_surrogate)
        surrogate, _ = _mean_and_error(nats, tokens)
    for k, steps in product(request.samples, request.steps):
        sampler = Sampler(steps, request.latent, request.paths)

        def score(some: Rows, k: int = k, sampler: Sampler = sampler) -> torch.Tensor:
            if k > 1:
                draws = [importance_weighted(model, some, sampler, noise, k, d) for d in range(request.draws)]
            else:
                draws = [elbo(model, some, sampler, noise, len(rows), d) for d in range(request.draws)]
            return torch.stack(draws).mean(0)

        nats, tokens = _score(reader, rows, mine, request.micro_batch, world_size, score)
        mean, error = _mean_and_error(nats, tokens)
        results.append(
            Result(
                protocol=request.protocol,
                split=request.split,
                steps="inf" if math.isinf(steps) else int(steps),
                latent=request.latent if model.architecture.latent_width else "none",
                k=k,
                bound="iw" if k > 1 else "elbo",
                nats_per_token=mean,
                bits_per_token=mean / math.log(2),
                perplexity=math.exp(min(mean, 700.0)),
                standard_error=error,
                tokens=int(tokens.sum()),
                rows=len(rows),
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


def _score(
    reader: ShardReader, rows: np.ndarray, mine: np.ndarray, micro_batch: int, world_size: int, score: Score
) -> tuple[np.ndarray, np.ndarray]:
    """Nats and counted tokens of all rows, float64 and int64 [n], gathered from all ranks."""
    nats, tokens = np.zeros(len(rows)), np.zeros(len(rows), dtype=np.int64)
    most = -(-len(rows) // world_size)  # rows of the rank that has most
    for batch_start in range(0, most, micro_batch):
        dealt = mine[batch_start : batch_start + micro_batch]
        # Under ZeRO-3 a forward is a collective: a rank that has no rows left goes along with one that is not counted.
        numbers = dealt if len(dealt) else np.zeros(1, dtype=np.int64)
        (batch,) = evaluation_batches(reader, rows[numbers], micro_batch)
        maskable, attend = masks_of(batch)
        some = Rows(batch.tokens, maskable, attend, torch.from_numpy(numbers))
        scored = score(some).numpy()
        if len(dealt):
            nats[dealt], tokens[dealt] = scored, maskable.sum(-1).numpy()
    if world_size > 1:
        shares: list[Any] = [None] * world_size
        dist.all_gather_object(shares, (nats, tokens))
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
    head = ("T", "latent", "K", "bound", "bits/token", "+-", "perplexity", "rows")
    lines = ["{:>6} {:>7} {:>4} {:>5} {:>11} {:>7} {:>11} {:>7}".format(*head)]
    for r in results:
        lines.append(
            f"{r.steps:>6} {r.latent:>7} {r.k:>4} {r.bound:>5} {r.bits_per_token:>11.4f} "
            f"{r.standard_error / math.log(2):>7.4f} {r.perplexity:>11.4f} {r.rows:>7}"
        )
    return "\n".join(lines)
