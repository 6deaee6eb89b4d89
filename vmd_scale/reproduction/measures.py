"""What is measured on a trained model: accuracy and divergences of its samples, valid bounds, solved puzzles."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from vmd_scale.build import masks_of
from vmd_scale.checkpoints import TrainedModel
from vmd_scale.data.corpora.four_tokens import four_tokens_distribution
from vmd_scale.data.corpora.toy2d import GRID, toy2d_distribution
from vmd_scale.data.corpora.two_tokens import two_tokens_distribution
from vmd_scale.data.loader import evaluation_batches
from vmd_scale.data.shards import ShardReader
from vmd_scale.diffusion.likelihood import Rows, importance_weighted
from vmd_scale.diffusion.noise import Noise
from vmd_scale.diffusion.sampler import Sampler, sample
from vmd_scale.evaluation.perplexity import Request, chosen_rows, evaluate
from vmd_scale.model import VMD
from vmd_scale.reproduction.task import Measurement, Sizes

BATCH = 2048
EVALUATION_SEED = 1_000_003  # not a training seed: samples and bounds meet no noise that the model was trained with

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


def draw(trained: TrainedModel, sampler: Sampler, count: int) -> np.ndarray:
    """Samples, int64 [count, L]."""
    numbers = torch.arange(count).split(BATCH)
    return torch.cat([sample(trained.model, sampler, Noise(EVALUATION_SEED), some) for some in numbers]).numpy()


def listed(distribution: Distribution) -> Callable[[TrainedModel, str, Sizes], list[Measurement]]:
    """For a task whose exact distribution is a list of rows: accuracy, KL and bounds in 1, 2 and 4 steps a block."""

    def measure(trained: TrainedModel, variant: str, sizes: Sizes) -> list[Measurement]:
        rows, p = distribution(variant)
        a = trained.model.architecture
        latent, law = ("fixed" if a.latent_width else "none"), trained.config.diffusion.paths
        found = []
        for per_block in [t for t in (1, 2, 4) if t * a.groups <= a.row_length]:
            steps = per_block * a.groups
            for tokens, temperature in (("argmax", 0.0), ("drawn", 1.0)):
                if tokens == "argmax" and not a.latent_width:
                    continue  # without z the most probable tokens are the same in every sample
                x = draw(trained, Sampler(per_block, law=law, temperature=temperature), sizes.samples)
                counts = count_rows(rows, x, a.vocab_size)
                right = 1 - counts[-1] / counts.sum()
                for metric, value in (("accuracy", right), ("kl", kl_divergence(p, counts))):
                    found.append(Measurement(metric, value, steps, tokens, law, latent))
            bound, error = exact_bound(trained.model, rows, p, Sampler(per_block, law=law), sizes)
            name = f"bound_nats_iw{sizes.importance_samples}"
            found.append(Measurement(name, bound, steps, "", law, latent))
            found.append(Measurement("standard_error_nats", error, steps, "", law, latent))
        return found

    return measure


def count_rows(rows: np.ndarray, x: np.ndarray, vocab_size: int) -> np.ndarray:
    """How often each of rows [n, L] occurs in x [N, L], and how often anything else does: int64 [n + 1]."""
    powers = vocab_size ** np.arange(rows.shape[1])
    codes, order = np.unique(rows @ powers, return_index=True)
    drawn = x @ powers
    place = np.searchsorted(codes, drawn).clip(max=len(codes) - 1)
    place = np.where(codes[place] == drawn, order[place], len(rows))
    return np.bincount(place, minlength=len(rows) + 1)


def exact_bound(model: VMD, rows: np.ndarray, p: np.ndarray, sampler: Sampler, sizes: Sizes) -> tuple[float, float]:
    """IW-K bound on the cross-entropy of a listed distribution with the model, and its standard error, nats a row.

    The sum over the distribution is exact; what is random, and what the error is of, are the K latents and paths.
    """
    copies = max(2, sizes.rows // len(rows))
    clean = torch.from_numpy(rows).repeat_interleave(copies, 0)
    parts = []
    for some in torch.arange(len(clean)).split(BATCH):
        scored = Rows(clean[some], torch.ones_like(clean[some], dtype=torch.bool), None, some)
        parts.append(importance_weighted(model, scored, sampler, Noise(EVALUATION_SEED), sizes.importance_samples))
    bounds = torch.cat(parts).view(len(rows), copies).numpy()
    error = np.sqrt((p**2 * bounds.var(1, ddof=1) / copies).sum())
    return float(p @ bounds.mean(1)), float(error)


four_tokens = listed(four_tokens_distribution)
two_tokens = listed(two_tokens_distribution)


def toy2d(trained: TrainedModel, variant: str, sizes: Sizes) -> list[Measurement]:
    """Jensen-Shannon divergence between samples and the exact distribution on the grid."""
    a, law = trained.model.architecture, trained.config.diffusion.paths
    exact, found = toy2d_distribution(variant).ravel(), []
    for steps in (1, 5):
        for tokens, temperature in (("drawn", 1.0), ("argmax", 0.0)):
            if tokens == "argmax" and not a.latent_width:
                continue
            x = draw(trained, Sampler(steps, law=law, temperature=temperature), sizes.samples)
            drawn = np.bincount(x[:, 0] * GRID + x[:, 1], minlength=GRID * GRID) / len(x)
            value = js_divergence(exact, drawn)
            latent = "fixed" if a.latent_width else "none"
            found.append(Measurement("js", value, steps, tokens, law, latent))
    return found


def infilled(trained: TrainedModel, reader: ShardReader, sampler: Sampler, rows: int) -> tuple[Tensor, Tensor]:
    """Rows of a split drawn again from what is given in them: int64 [N, L] drawn, and as they are."""
    drawn, clean = [], []
    for batch in evaluation_batches(reader, chosen_rows(reader.rows, rows), 256):
        maskable, attend = masks_of(batch, reader.manifest)
        numbers = batch.positions
        drawn.append(sample(trained.model, sampler, Noise(EVALUATION_SEED), numbers, batch.tokens, maskable, attend))
        clean.append(batch.tokens)
    return torch.cat(drawn), torch.cat(clean)


def solved(
    trained: TrainedModel, readers: Sequence[tuple[str, ShardReader]], steps: Sequence[int], sizes: Sizes
) -> list[Measurement]:
    """Share of puzzles of which every cell is right."""
    latent, found = ("fixed" if trained.model.architecture.latent_width else "none"), []
    for split, reader in readers:
        for law in ("top_prob", "margin", "balanced"):
            for total in steps:
                for tokens, temperature in (("argmax", 0.0), ("drawn", 1.0)):
                    x, clean = infilled(trained, reader, Sampler(total, law=law, temperature=temperature), sizes.rows)
                    value = float((x == clean).all(-1).double().mean())
                    found.append(Measurement("accuracy", value, total, tokens, law, latent, split))
    return found


def bounds(
    trained: TrainedModel, steps: Sequence[float], sizes: Sizes, split: str, unit: str, surrogate: bool = False
) -> list[Measurement]:
    """Valid bounds of the T-step samplers on a split: `perplexity` per token, or `bits_per_dim`."""
    reader = ShardReader(trained.config.data.shards, split)
    request = Request(
        protocol="rows",
        split=split,
        steps=tuple(steps),
        rows=sizes.rows,
        paths=trained.config.diffusion.paths,
        seed=EVALUATION_SEED,
        micro_batch=min(64, trained.config.training.micro_batch),
        surrogate=surrogate,
    )
    groups, found = trained.model.architecture.groups, []
    results = evaluate(trained.model, reader, request, trained.weights, trained.step)
    for r in results:
        total = r.steps if isinstance(r.steps, str) else r.steps * groups
        value = r.perplexity if unit == "perplexity" else r.bits_per_token
        found.append(Measurement(unit, value, total, "", r.paths, r.latent, split))
        error = r.standard_error * (r.perplexity if unit == "perplexity" else 1 / math.log(2))
        found.append(Measurement("standard_error", error, total, "", r.paths, r.latent, split))
    nats = results[0].vmd_surrogate
    if nats is not None and trained.model.architecture.latent_width:
        value = math.exp(nats) if unit == "perplexity" else nats / math.log(2)
        found.append(Measurement(f"{unit}_vmd_surrogate", value, "inf", "", request.paths, "fixed", split))
    return found
