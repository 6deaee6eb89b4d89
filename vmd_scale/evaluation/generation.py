"""How good samples are: generative perplexity by a named judge, beside how varied they are.

A low generative perplexity alone says nothing: repeated text has one. It stands beside the unigram entropy of each
sample, distinct n-grams, and the same figures of real text. No sample is rejected and drawn again.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from vmd_scale.checkpoints import TrainedModel
from vmd_scale.data.roles import Role
from vmd_scale.data.shards import ShardReader
from vmd_scale.diffusion.noise import Noise
from vmd_scale.diffusion.sampler import Sampler, sample
from vmd_scale.evaluation.judges import Judge, Sample, end_of_text
from vmd_scale.evaluation.perplexity import chosen_rows, mean_and_error
from vmd_scale.evaluation.ranks import Ranks
from vmd_scale.tokenization import Tokenizer

DISTINCT = (1, 2, 3, 4)


@dataclass(frozen=True)
class GenerationResult:
    """Figures of the samples of one sampler, or of real text (steps "data")."""

    protocol: str
    judge: str
    steps: int | str  # T; "inf"; "data"
    latent: str
    paths: str
    samples: int
    tokens: int  # judged
    generative_perplexity: float
    standard_error: float  # of the judge's nats per token, over samples
    unigram_entropy: float  # nats, mean over samples
    unigram_entropy_error: float
    distinct: dict[str, float]  # n -> share of the n-grams of all samples that differ
    weights: str
    step: int
    seed: int
    row_length: int
    split: str  # that real text is of
    data: str  # see `Manifest.described`
    changes: str = ""  # what the sampler does for quality's sake, such as a temperature
    mauve: float | None = None
    checkpoint: str | None = None  # `checkpoint_id` of what was sampled
    precision: str | None = None  # that the network computed in; results of older versions do not know

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def evaluate_generation(
    trained: TrainedModel,
    samplers: Sequence[Sampler],
    judge: Judge,
    reader: ShardReader,
    count: int,
    seed: int,
    micro_batch: int,
    ranks: Ranks | None = None,
) -> list[GenerationResult]:
    """One result for real text and one for each sampler, the same on every rank.

    Args:
        reader: the split that real text is taken from, `count` rows if there are so many.
        count: samples of each sampler, dealt out to the ranks.
    """
    ranks = ranks or Ranks()
    text_end = end_of_text(trained.tokenizer)
    real = real_samples(reader, count, trained.tokenizer)
    reference = _features(judge, real, ranks)
    results = [_result(trained, None, judge, reader, real, seed, ranks, reference)]
    for sampler in samplers:
        mine = ranks.share(torch.arange(count))
        rows: dict[int, list[int]] = {}
        for some in mine.split(micro_batch) if len(mine) else ():
            drawn = sample(trained.model, sampler, Noise(seed), some)
            rows |= dict(zip(some.tolist(), drawn.tolist(), strict=True))
        rows = {number: ids for share in ranks.gathered(rows) for number, ids in share.items()}
        samples = [as_judged(np.array(rows[n]), trained.tokenizer, text_end) for n in range(count)]
        results.append(_result(trained, sampler, judge, reader, samples, seed, ranks, reference))
    return results


def as_judged(ids: np.ndarray, tokenizer: Tokenizer, text_end: int | None) -> Sample:
    """What of a row [L] is judged: up to the first end of text, without begin, padding and separators."""
    if len(ids) and ids[0] == tokenizer.begin_id:
        ids = ids[1:]
    ended = False
    if text_end is not None and (ids == text_end).any():
        ids, ended = ids[: int(np.argmax(ids == text_end))], True
    silent = [i for i in (tokenizer.begin_id, tokenizer.end_id, tokenizer.pad_id) if i is not None]
    ids = ids[~np.isin(ids, silent)]
    return Sample(ids, tokenizer.decode(ids), ended)


def real_samples(reader: ShardReader, count: int, tokenizer: Tokenizer) -> list[Sample]:
    """Rows of a corpus as samples: a fixed random choice."""
    tokens, roles = reader.read(chosen_rows(reader.rows, count))
    text_end = end_of_text(tokenizer)
    rows = [t if roles is None else t[roles[n] != Role.PADDING] for n, t in enumerate(tokens)]
    return [as_judged(row, tokenizer, text_end) for row in rows]


def unigram_entropies(samples: Sequence[Sample]) -> np.ndarray:
    """Entropy of the ids of each sample as a distribution, nats [n]."""
    entropies = np.zeros(len(samples))
    for n, one in enumerate(samples):
        _, counts = np.unique(one.ids, return_counts=True)
        p = counts / max(1, counts.sum())
        entropies[n] = -(p * np.log(p)).sum()
    return entropies


def distinct_share(samples: Sequence[Sample], n: int) -> float:
    """Different n-grams of all samples, divided by all of them (arXiv 1510.03055); nan where there are none."""
    grams = Counter(tuple(one.ids[i : i + n].tolist()) for one in samples for i in range(len(one.ids) - n + 1))
    return len(grams) / grams.total() if grams else math.nan


def mauve_score(reference: np.ndarray, features: np.ndarray) -> float | None:
    """MAUVE of two sets of features (arXiv 2102.01454); None where its package is not installed."""
    try:
        import mauve
    except ImportError:
        return None
    return float(mauve.compute_mauve(p_features=reference, q_features=features, verbose=False).mauve)


def generation_table(results: Sequence[GenerationResult]) -> str:
    """A text table; the first line says what all of them share."""
    first = results[0]
    lines = [
        f"protocol {first.protocol}, judge {first.judge}, data of the {first.split} split, weights {first.weights}, "
        + (f"precision {first.precision}, " if first.precision else "")
        + f"step {first.step}, seed {first.seed}, rows of {first.row_length}"
        + (f", {changes}" if (changes := results[-1].changes) else "")  # the first result is of real texts
    ]
    head = ("T", "z", "paths", "samples", "tokens", "gen. ppl", "+-", "entropy", "+-", *(f"dist-{n}" for n in DISTINCT))
    form = "{:>6} {:>6} {:>9} {:>7} {:>9} {:>10} {:>8} {:>8} {:>6}" + " {:>7}" * len(DISTINCT) + " {:>6}"
    lines.append(form.format(*head, "MAUVE"))
    for r in results:
        ppl, error = r.generative_perplexity, r.generative_perplexity * r.standard_error
        lines.append(
            form.format(
                *(r.steps, r.latent, r.paths, r.samples, f"{r.tokens:,}", f"{ppl:.2f}", f"{error:.2f}"),
                *(f"{r.unigram_entropy:.3f}", f"{r.unigram_entropy_error:.3f}"),
                *(f"{r.distinct[str(n)]:.3f}" for n in DISTINCT),
                "-" if r.mauve is None else f"{r.mauve:.3f}",
            )
        )
    return "\n".join(lines)


def _result(
    trained: TrainedModel,
    sampler: Sampler | None,
    judge: Judge,
    reader: ShardReader,
    samples: Sequence[Sample],
    seed: int,
    ranks: Ranks,
    reference: np.ndarray | None,
) -> GenerationResult:
    nats, tokens = map(ranks.together, judge.score(ranks.share(samples)))
    mean, error = mean_and_error(nats, tokens) if tokens.sum() else (math.nan, math.nan)
    entropies = unigram_entropies(samples)
    mauve = None
    if sampler is not None and reference is not None:
        features = _features(judge, samples, ranks)
        mauve = None if features is None else mauve_score(reference, features)
    steps: int | str = "data"
    if sampler is not None:
        steps = "inf" if math.isinf(sampler.steps) else int(sampler.steps)
    return GenerationResult(
        protocol="generation",
        judge=judge.name,
        steps=steps,
        latent="none" if sampler is None or not trained.model.architecture.latent_width else sampler.latent,
        paths="none" if sampler is None else sampler.law,
        samples=len(samples),
        tokens=int(tokens.sum()),
        generative_perplexity=math.exp(min(mean, 700.0)),
        standard_error=error,
        unigram_entropy=float(entropies.mean()),
        unigram_entropy_error=float(entropies.std(ddof=1) / math.sqrt(len(samples))),
        distinct={str(n): distinct_share(samples, n) for n in DISTINCT},
        weights=trained.weights,
        step=trained.step,
        seed=seed,
        row_length=trained.model.architecture.row_length,
        split=reader.split,
        data=reader.manifest.described(reader.split),
        changes="" if sampler is None or sampler.is_plain else _changes(sampler),
        mauve=mauve,
        precision=trained.precision,
    )


def _changes(sampler: Sampler) -> str:
    told = {"temperature": 1, "nucleus": 1, "order_noise": 0, "remask": 0}
    return ", ".join(f"{k} {getattr(sampler, k):g}" for k, plain in told.items() if getattr(sampler, k) != plain)


def _features(judge: Judge, samples: Sequence[Sample], ranks: Ranks) -> np.ndarray | None:
    """The judge's features of all samples [n, D], each computed on one rank."""
    features = judge.features(ranks.share(samples))
    return None if features is None else ranks.together(features)
