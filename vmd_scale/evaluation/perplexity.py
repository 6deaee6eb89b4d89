"""Bounds over a whole split, with standard errors over sequences."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vmd_scale.build import masks_of
from vmd_scale.data.loader import evaluation_batches
from vmd_scale.data.order import SampleOrder
from vmd_scale.data.shards import ShardReader
from vmd_scale.diffusion.compat import compat_estimate
from vmd_scale.diffusion.likelihood import Rows, elbo, importance_weighted, vmd_surrogate
from vmd_scale.diffusion.noise import Noise
from vmd_scale.diffusion.paths import RANDOM_LAWS
from vmd_scale.diffusion.sampler import Sampler
from vmd_scale.errors import UserError
from vmd_scale.evaluation.protocols import Protocol, get_protocol
from vmd_scale.evaluation.ranks import Ranks
from vmd_scale.files import checked, read_json
from vmd_scale.model import VMD
from vmd_scale.precision import precision_of

Score = Callable[[Rows, Tensor], Tensor]  # rows and their counted positions -> nats [B]

PILOT = 128  # rows, that tell how many a wanted standard error needs
MARGIN = 1.25  # times so many, since the pilot only estimates it


@dataclass(frozen=True)
class Result:
    """One number that is true, and what it is a number of."""

    protocol: str
    split: str
    steps: int | str  # T; "inf"
    latent: str  # fixed | fresh | none
    k: int
    bound: str  # elbo | iw | exact (nothing is random) | compat (published code's estimate, not a bound)
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
    vmd_surrogate_error: float | None = None  # standard error of it
    caveat: str | None = None  # why it does not compare with published figures of this protocol
    data: str | None = None  # corpus, tokenizer and rows: see `Manifest.described`
    checkpoint: str | None = None  # `checkpoint_id` of what was evaluated; a run that evaluates itself has none yet
    row_nats: tuple[float, ...] | None = None  # of each row, if asked for: two models are best compared row by row
    precision: str | None = None  # that the network computed in; results of older versions do not know

    def to_dict(self) -> dict[str, Any]:
        """Optional values are left out where there are none."""
        optional = ("vmd_surrogate", "vmd_surrogate_error", "caveat", "data", "checkpoint", "row_nats", "precision")
        return {k: v for k, v in asdict(self).items() if v is not None or k not in optional}


def read_results(path: Path) -> list[Result]:
    """The bounds of a file that evaluate.py wrote; figures of samples in it (protocol generation) are passed over.

    Raises:
        UserError: see `read_json`.
    """
    records = read_json(path, list[dict[str, Any]])
    return checked(list[Result], [r for r in records if r.get("protocol") != "generation"], str(path))


@dataclass(frozen=True)
class Request:
    """What to compute.

    Attributes:
        rows: limits the rows (a fixed random choice); None takes all.
        interval: of t: full, or mdlm_compat, see `diffusion/compat.py`.
        until_error: a random choice of rows, as many as this standard error is likely to need, nats per token; None
            scores all.
        keep_rows: results hold the nats of each row.
    """

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
    interval: str = "full"
    until_error: float | None = None
    keep_rows: bool = False


def chosen_rows(total: int, limit: int | None) -> np.ndarray:
    """Row numbers to score, sorted: all of them, or a random choice that is always the same."""
    if limit is None or limit >= total:
        return np.arange(total, dtype=np.int64)
    return np.sort(SampleOrder(total, seed=0).row_numbers(np.arange(limit, dtype=np.int64)))


def evaluate(
    model: VMD,
    reader: ShardReader,
    request: Request,
    weights: str,
    step: int,
    ranks: Ranks | None = None,
    after_batch: Callable[[], None] = lambda: None,
) -> list[Result]:
    """One `Result` for each K and T of the request, the same on every rank.

    Rows are dealt out to the ranks, each exactly once; the result does not depend on their number.

    Args:
        after_batch: called on every rank after each of its batches, of which all ranks have the same number.

    Raises:
        UserError: fewer than two rows, or what is not defined for these rows, this model or this protocol; with
            `until_error`, a bound that is not finite.
        ValueError: see `Sampler`.
    """
    protocol = get_protocol(request.protocol)
    rows = _checked_rows(model, reader, request, protocol)
    score_all = partial(_score_until, reader, rows, protocol, request, ranks or Ranks(), after_batch)
    surrogate = surrogate_error = None
    if request.surrogate:
        noise, total = Noise(request.seed), len(rows)
        surrogate, surrogate_error = mean_and_error(
            *score_all(lambda some, _: vmd_surrogate(model, some, noise, total, request.paths))
        )
    results = []
    for k, steps in product(request.samples, request.steps):
        bound, score = _estimator(model, request, protocol, steps, k, len(rows))
        nats, tokens = score_all(score)
        mean, error = mean_and_error(nats, tokens)
        results.append(
            Result(
                protocol=request.protocol,
                split=request.split,
                steps="inf" if math.isinf(steps) else int(steps),
                latent=request.latent if model.architecture.latent_width else "none",
                k=k,
                bound=bound,
                nats_per_token=mean,
                bits_per_token=mean / math.log(2),
                perplexity=math.exp(min(mean, 700.0)),
                standard_error=error,
                tokens=int(tokens.sum()),
                rows=len(nats),
                weights=weights,
                step=step,
                paths=request.paths,
                interval=request.interval,
                draws=request.draws,
                seed=request.seed,
                vmd_surrogate=surrogate,
                vmd_surrogate_error=surrogate_error,
                caveat=protocol.caveat(reader.manifest, request.split),
                data=reader.manifest.described(reader.split),
                row_nats=tuple(nats.tolist()) if request.keep_rows else None,
                precision=precision_of(model),
            )
        )
    return results


def _checked_rows(model: VMD, reader: ShardReader, request: Request, protocol: Protocol) -> np.ndarray:
    """Numbers of the rows that may be scored, int64 [n]; with `until_error` any beginning of them is a random choice.

    Raises:
        UserError: see `evaluate`.
    """
    manifest = reader.manifest
    if manifest.packing == "document" and model.architecture.latent_width:
        held, most = manifest.documents_per_row, model.architecture.documents
        if held is None or held > most:
            raise UserError(f"rows hold up to {held} documents, this model has latents for {most}")
        if request.latent == "fresh":
            raise UserError("--latent fresh is not scored where a row holds several documents; use fixed")
    rows = chosen_rows(reader.rows, request.rows)
    if len(rows) < 2:
        raise UserError(f"split {request.split!r}: {len(rows)} row(s) to score, at least 2 are needed")
    protocol.check(manifest)
    if _is_compat(request, protocol):
        _check_compat(request, protocol)
        if manifest.packing == "document":
            raise UserError(f"--interval {request.interval} is for rows of one text, not for data.packing 'document'")
    if request.surrogate and request.paths not in RANDOM_LAWS:
        raise UserError(f"--surrogate is defined for paths {' and '.join(RANDOM_LAWS)}, not {request.paths!r}")
    if request.until_error is None:
        return rows
    return rows[SampleOrder(len(rows), seed=0).row_numbers(np.arange(len(rows), dtype=np.int64))]


def _is_compat(request: Request, protocol: Protocol) -> bool:
    return protocol.pads_attended or request.interval != "full"


def _check_compat(request: Request, protocol: Protocol) -> None:
    """`UserError` for what the published estimates do not define."""
    what = f"protocol {protocol.name}" if protocol.pads_attended else f"--interval {request.interval}"
    wanted = {"--steps": request.steps == (math.inf,), "--k": request.samples == (1,)}
    wanted |= {"--paths": request.paths == "bernoulli", "--latent": request.latent == "fixed"}
    wanted |= {"--surrogate": not request.surrogate}
    wrong = [option for option, right in wanted.items() if not right]
    if wrong:
        raise UserError(
            f"{what} is an estimate of the published code and no likelihood: it is defined for --steps inf --k 1 "
            f"--paths bernoulli --latent fixed, without --surrogate; change {', '.join(wrong)}"
        )


def _estimator(model: VMD, request: Request, protocol: Protocol, steps: float, k: int, total: int) -> tuple[str, Score]:
    """What is computed of a row with T `steps` and `k` importance samples: its name, see `Result.bound`, and how.

    Args:
        total: rows that may be scored.
    """
    noise, sampler = Noise(request.seed), Sampler(steps, request.latent, request.paths)
    compat = _is_compat(request, protocol)

    def estimate(some: Rows, counted: Tensor, draw: int) -> Tensor:
        if compat:
            return compat_estimate(model, some, counted, request.interval, noise, total, draw)
        if k > 1 or sampler.by_confidence:  # a replayed path has no random step
            return importance_weighted(model, some, sampler, noise, k, draw)
        return elbo(model, some, sampler, noise, total, draw)

    def score(some: Rows, counted: Tensor) -> Tensor:
        return torch.stack([estimate(some, counted, draw) for draw in range(request.draws)]).mean(0)

    certain = not model.architecture.latent_width and (sampler.by_confidence or steps == 1)
    return "compat" if compat else "exact" if certain else "iw" if k > 1 else "elbo", score


def _score_until(
    reader: ShardReader,
    rows: np.ndarray,
    protocol: Protocol,
    request: Request,
    ranks: Ranks,
    after_batch: Callable[[], None],
    score: Score,
) -> tuple[np.ndarray, np.ndarray]:
    """Nats and counted tokens of the rows, float64 and int64 [n]: of all, or of as many as a pilot says will suffice.

    The rows of the pilot are not among the results, unless all rows are needed: who stops when a number looks good
    reports one that is too good. Neither ranks nor micro-batch decide anything.
    """
    some = partial(_score_rows, reader, rows, protocol, request.micro_batch, ranks, after_batch, score)
    if request.until_error is None:
        return some(np.arange(len(rows), dtype=np.int64))
    pilot = min(PILOT, len(rows))
    nats, tokens = some(np.arange(pilot, dtype=np.int64))
    _, error = mean_and_error(nats, tokens)
    if not math.isfinite(error):
        raise UserError("--until-error: the bound of the first rows is not finite; the weights have diverged")
    enough = max(PILOT, math.ceil(MARGIN * pilot * (error / request.until_error) ** 2))
    if pilot + enough < len(rows):
        return some(np.arange(pilot, pilot + enough, dtype=np.int64))
    more = some(np.arange(pilot, len(rows), dtype=np.int64))
    return np.concatenate((nats, more[0])), np.concatenate((tokens, more[1]))


def _score_rows(
    reader: ShardReader,
    rows: np.ndarray,
    protocol: Protocol,
    micro_batch: int,
    ranks: Ranks,
    after_batch: Callable[[], None],
    score: Score,
    numbers: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """The same of ``rows[numbers]``, each scored on exactly one rank, gathered on all."""
    mine = ranks.share(numbers)
    nats, tokens = np.zeros(len(mine)), np.zeros(len(mine), dtype=np.int64)
    most = -(-len(numbers) // ranks.size)  # rows of the rank that has most
    for start in range(0, most, micro_batch):
        dealt = mine[start : start + micro_batch]
        part = slice(start, start + len(dealt))
        # All batches of all ranks have one shape, filled up with rows that are not counted: under ZeRO-3 a forward is a
        # collective, and compiled blocks like it too.
        filled = np.full(min(micro_batch, most), numbers[0], dtype=np.int64)
        filled[: len(dealt)] = dealt
        (batch,) = evaluation_batches(reader, rows[filled], micro_batch)
        scored = protocol.score(*masks_of(batch, reader.manifest))
        some = Rows(batch.tokens, scored.maskable, scored.attend, torch.from_numpy(filled))
        nats[part] = score(some, scored.counted)[: len(dealt)].numpy()
        tokens[part] = scored.counted[: len(dealt)].sum(-1).numpy()
        after_batch()
    return ranks.together(nats), ranks.together(tokens)


def mean_and_error(nats: np.ndarray, tokens: np.ndarray) -> tuple[float, float]:
    """Nats per token over all rows, and its standard error over rows (of a ratio of sums)."""
    mean = nats.sum() / tokens.sum()
    residuals = nats - mean * tokens
    variance = residuals.var(ddof=1) * len(nats)
    return float(mean), float(math.sqrt(variance) / tokens.sum())
