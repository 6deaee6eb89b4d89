"""What is measured on a trained model: accuracy and divergences of its samples, valid bounds, solved puzzles."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from vmd_scale.build import masks_of
from vmd_scale.data.corpora.toy2d import GRID, toy2d_distribution, toy2d_draws
from vmd_scale.data.loader import evaluation_batches
from vmd_scale.data.shards import ShardReader, shard_cache
from vmd_scale.diffusion.likelihood import Rows, importance_weighted
from vmd_scale.diffusion.noise import Noise
from vmd_scale.diffusion.sampler import Sampler, sample
from vmd_scale.evaluation.perplexity import Request, chosen_rows, evaluate
from vmd_scale.model import VMD
from vmd_scale.reproduction.task import Measure, MeasuredModel, Measurement

BATCH = 2048
SEED = 1_000_003  # not a training seed: samples and bounds meet no noise that the model was trained with

Distribution = Callable[[str], tuple[np.ndarray, np.ndarray]]


def kl_divergence(p: np.ndarray, counts: np.ndarray) -> float:
    """KL(p || samples) in nats: p float64 [n] against how often each was drawn, int64 [n] of `counts` [n + 1].

    The last count is of everything else. Each count is raised by 1/2, so that what was never drawn costs much, not
    infinitely much.
    """
    q = (counts + 0.5) / (counts + 0.5).sum()
    return float((p * np.log(p / q[:-1])).sum())


def js_divergence(p: np.ndarray, q: np.ndarray) -> float:
    """Jensen-Shannon divergence of two distributions [n] in nats: between 0 and ln 2."""
    middle = (p + q) / 2

    def kl(a: np.ndarray) -> float:
        return float((a[a > 0] * np.log(a[a > 0] / middle[a > 0])).sum())

    return (kl(p) + kl(q)) / 2


def count_rows(rows: np.ndarray, x: np.ndarray, vocab_size: int) -> np.ndarray:
    """How often each of rows [n, L] occurs in x [N, L], and how often anything else does: int64 [n + 1]."""
    powers = vocab_size ** np.arange(rows.shape[1])
    codes, order = np.unique(rows @ powers, return_index=True)
    drawn = x @ powers
    place = np.searchsorted(codes, drawn).clip(max=len(codes) - 1)
    place = np.where(codes[place] == drawn, order[place], len(rows))
    return np.bincount(place, minlength=len(rows) + 1)


def exact_bound(
    model: VMD, rows: np.ndarray, p: np.ndarray, sampler: Sampler, copies: int, samples: int
) -> tuple[float, float]:
    """IW-K bound on the cross-entropy of a listed distribution with the model, and its standard error, nats a row.

    The sum over the distribution is exact; what is random, and what the error is of, are the K latents and paths, drawn
    `copies` times for every row.
    """
    clean = torch.from_numpy(rows).repeat_interleave(copies, 0)
    parts = []
    for some in torch.arange(len(clean)).split(BATCH):
        scored = Rows(clean[some], torch.ones_like(clean[some], dtype=torch.bool), None, some)
        parts.append(importance_weighted(model, scored, sampler, Noise(SEED), samples))
    bounds = torch.cat(parts).view(len(rows), copies).numpy()
    error = np.sqrt((p**2 * bounds.var(1, ddof=1) / copies).sum())
    return float(p @ bounds.mean(1)), float(error)


def listed(distribution: Distribution) -> Measure:
    """For a task whose exact distribution is a list of rows: accuracy, KL and bounds in 1, 2 and 4 steps a block.

    With z fixed, and where there are several steps, with a fresh z at each.
    """

    def measure(model: MeasuredModel) -> list[Measurement]:
        rows, p = distribution(model.variant)
        a, law, found = model.trained.model.architecture, _law(model), []
        for per_block in [t for t in (1, 2, 4) if t <= a.row_length // a.groups]:
            for latent in _latents(model, per_block):
                measurement = partial(Measurement, steps=per_block * a.groups, latent=latent, law=law)
                for tokens, x in _samples(model, per_block, law, latent):
                    counts = count_rows(rows, x, a.vocab_size)
                    right = 1 - counts[-1] / counts.sum()
                    error = math.sqrt(right * (1 - right) / len(x))
                    found.append(measurement("accuracy", right, tokens=tokens, standard_error=error))
                    found.append(measurement("kl", kl_divergence(p, counts), tokens=tokens))
                k, copies = model.sizes.importance_samples, max(2, model.sizes.rows // len(rows))
                sampler = _sampler(per_block, law, latent=latent)
                bound, error = exact_bound(model.trained.model, rows, p, sampler, copies, k)
                found.append(measurement("bound_nats", bound, k=k, standard_error=error))
        return found

    return measure


def toy2d(model: MeasuredModel) -> list[Measurement]:
    """Jensen-Shannon divergence between samples and the exact distribution on the grid, and that of exact draws."""
    exact, count, found = toy2d_distribution(model.variant).ravel(), model.sizes.samples, []

    def divergence(x: np.ndarray) -> float:
        return js_divergence(exact, np.bincount(x[:, 0] * GRID + x[:, 1], minlength=GRID * GRID) / len(x))

    for steps, law in ((1, "balanced"), (5, "bernoulli"), (5, "balanced")):
        measurement = partial(Measurement, steps=steps, latent=_latent(model), law=law)
        for tokens, x in _samples(model, steps, law):
            found.append(measurement("js", divergence(x), tokens=tokens))
    floor = divergence(toy2d_draws(model.variant, "as many draws as samples", count))
    return [*found, Measurement("js_of_exact_draws", floor, steps="", latent="", law="")]


def solved(model: MeasuredModel) -> list[Measurement]:
    """Share of puzzles of which every cell is right, on every set of puzzles that there is."""
    own = model.trained.config.data
    found = []
    for name, data in {"validation": own, **model.other_data}.items():
        reader = ShardReader(data.shards, "validation", cache=shard_cache(data))
        for law in ("top_prob", "margin", "balanced"):
            for steps in (5, 10, 20):
                for tokens in ("argmax", "drawn"):
                    right = _right_rows(model, reader, _sampler(steps, law, tokens)).double()
                    measurement = partial(
                        Measurement, steps=steps, latent=_latent(model), law=law, tokens=tokens, split=name
                    )
                    error = float(right.std() / math.sqrt(len(right)))
                    found.append(measurement("accuracy", float(right.mean()), standard_error=error))
    return found


def bounds(
    metric: str, split: str, steps: Sequence[float], surrogate: bool = False, tight: Sequence[float] = ()
) -> Measure:
    """ELBOs of the T-step samplers on a split: metric `perplexity` of a token, or `bits_per_dim`.

    Args:
        steps: T, of each block.
        tight: those T for which there is an importance-weighted bound as well.
    """
    perplexity = metric == "perplexity"

    def measure(model: MeasuredModel) -> list[Measurement]:
        trained, groups = model.trained, model.trained.model.architecture.groups
        size = trained.model.architecture.row_length // groups
        with_surrogate = surrogate and trained.config.diffusion.objective == "vmd"
        request = Request(
            protocol="rows",
            split=split,
            steps=tuple(t for t in steps if t <= size or math.isinf(t)),
            rows=model.sizes.rows,
            paths=trained.config.diffusion.paths,
            seed=SEED,
            micro_batch=min(64, trained.config.training.micro_batch),
            surrogate=with_surrogate,
            keep_rows=True,
        )
        reader = ShardReader(trained.config.data.shards, split, cache=shard_cache(trained.config.data))
        results = evaluate(trained.model, reader, request, "ema", trained.step)
        if tight:
            samples = (model.sizes.importance_samples,)
            request = replace(request, steps=tuple(t for t in tight if t <= size), samples=samples, surrogate=False)
            results += evaluate(trained.model, reader, request, "ema", trained.step)
        found = [
            Measurement(
                metric=metric,
                value=r.perplexity if perplexity else r.bits_per_token,
                steps=r.steps if isinstance(r.steps, str) else r.steps * groups,
                latent=r.latent,
                law=r.paths,
                split=split,
                k=r.k,
                standard_error=r.standard_error * (r.perplexity if perplexity else 1 / math.log(2)),
                row_nats=tuple(nats * r.rows / r.tokens for nats in r.row_nats or ()),
            )
            for r in results
        ]
        nats, error = results[0].vmd_surrogate, results[0].vmd_surrogate_error
        if nats is not None and error is not None:
            value = math.exp(nats) if perplexity else nats / math.log(2)
            error *= value if perplexity else 1 / math.log(2)
            measurement = partial(Measurement, steps="inf", latent="fixed", law=request.paths, split=split)
            found.append(measurement(f"{metric}_vmd_surrogate", value, standard_error=error))
        return found

    return measure


def _law(model: MeasuredModel) -> str:
    return model.trained.config.diffusion.paths


def _latent(model: MeasuredModel) -> str:
    return "fixed" if model.trained.model.architecture.latent_width else "none"


def _latents(model: MeasuredModel, steps: float) -> tuple[str, ...]:
    """The ways to draw z. In one step a new one at each is the same as one for all."""
    return ("fixed", "fresh") if _latent(model) == "fixed" and steps > 1 else (_latent(model),)


def _sampler(steps: float, law: str, tokens: str = "drawn", latent: str = "fixed") -> Sampler:
    """Without a latent, `latent` is "none", and fixed as good as any."""
    return Sampler(steps, "fresh" if latent == "fresh" else "fixed", law, 0.0 if tokens == "argmax" else 1.0)


def _samples(model: MeasuredModel, steps: float, law: str, latent: str = "fixed") -> Iterator[tuple[str, np.ndarray]]:
    """int64 [N, L] for each way of taking tokens. Without z, the most probable ones are the same in every sample."""
    for tokens in ("argmax", "drawn") if model.trained.model.architecture.latent_width else ("drawn",):
        sampler = _sampler(steps, law, tokens, latent)
        numbers = torch.arange(model.sizes.samples).split(BATCH)
        parts = [sample(model.trained.model, sampler, Noise(SEED), some) for some in numbers]
        yield tokens, torch.cat(parts).numpy()


def _right_rows(model: MeasuredModel, reader: ShardReader, sampler: Sampler) -> Tensor:
    """Whether each row, drawn again from what is given in it, is as it was: bool [N]."""
    right = []
    for batch in evaluation_batches(reader, chosen_rows(reader.rows, model.sizes.rows), 256):
        maskable, attend = masks_of(batch, reader.manifest)
        x = sample(model.trained.model, sampler, Noise(SEED), batch.positions, batch.tokens, maskable, attend)
        right.append((x == batch.tokens).all(-1))
    return torch.cat(right)
