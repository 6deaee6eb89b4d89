"""What a run tells about itself in the middle of training: bounds, use of the latent, a few samples."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from vmd_scale.build import masks_of
from vmd_scale.config import Config, step_values
from vmd_scale.data.loader import evaluation_batches
from vmd_scale.data.roles import Role
from vmd_scale.data.shards import ShardReader
from vmd_scale.determinism import any_order
from vmd_scale.diffusion.noise import Noise
from vmd_scale.diffusion.sampler import Sampler, sample
from vmd_scale.evaluation.latent import LatentUsage, latent_usage
from vmd_scale.evaluation.perplexity import Request, Result, chosen_rows, evaluate
from vmd_scale.evaluation.ranks import Ranks
from vmd_scale.model import VMD
from vmd_scale.tokenization import Tokenizer


@dataclass(frozen=True)
class Validation:
    results: list[Result]
    usage: LatentUsage | None  # of a model with a latent
    samples: dict[str, Any] | None  # where the configuration asks for them

    @property
    def best(self) -> Result:
        return min(self.results, key=lambda r: r.nats_per_token)


def validate(
    model: VMD,
    config: Config,
    reader: ShardReader,
    tokenizer: Tokenizer,
    weights: str,
    step: int,
    ranks: Ranks,
    after_batch: Callable[[], None],
) -> Validation:
    """On the validation split; the same on every rank. Draws nothing from any generator of the run.

    Args:
        model: in evaluation mode.
        reader: of the validation split.
        weights: ema | raw, what the model computes with.
        after_batch: called on every rank after each of its batches, of which all ranks have the same number.
    """
    evaluation, micro_batch = config.evaluation, config.training.micro_batch
    results: list[Result] = []
    for protocol in evaluation.protocols or ("rows",):
        request = Request(
            protocol=protocol,
            split="validation",
            steps=step_values(evaluation.steps),
            rows=evaluation.rows,
            paths=config.diffusion.paths,
            micro_batch=micro_batch,
        )
        results += evaluate(model, reader, request, weights, step, ranks, after_batch)
    usage = samples = None
    if config.latent.width:
        objective = config.diffusion.objective
        usage = latent_usage(model, reader, step, objective, micro_batch=micro_batch, after_batch=after_batch)
    if evaluation.samples:
        samples = draw_samples(model, config, tokenizer, reader, step)
    return Validation(results, usage, samples)


def draw_samples(model: VMD, config: Config, tokenizer: Tokenizer, reader: ShardReader, step: int) -> dict[str, Any]:
    """The same rows at every evaluation, drawn with the largest finite T of evaluation.steps (else one a token).

    Where rows are given in part (prompts, clues), that part is of rows of the split.
    """
    steps = max((T for T in step_values(config.evaluation.steps) if math.inf > T), default=math.inf)
    sampler = Sampler(steps, law=config.diffusion.paths)
    numbers = chosen_rows(reader.rows, config.evaluation.samples)
    batches = list(evaluation_batches(reader, numbers, config.training.micro_batch))
    inputs: list[tuple[Any, ...]]
    if any(batch.roles is not None and bool((batch.roles == Role.GIVEN).any()) for batch in batches):
        inputs = [(batch.positions, batch.tokens, *masks_of(batch, reader.manifest)) for batch in batches]
    else:
        inputs = [(some,) for some in torch.arange(config.evaluation.samples).split(config.training.micro_batch)]
    # Rows that are finished leave the batch: compiled for each size, the blocks would use up their recompilations.
    with torch.compiler.set_stance("eager_on_recompile"), any_order():
        drawn = torch.cat([sample(model, sampler, Noise(0), *some) for some in inputs])
    texts = [tokenizer.decode(row) for row in drawn.tolist()]
    shown = "inf" if math.isinf(steps) else int(steps)
    return {"step": step, "steps": shown, "latent": "fixed", "law": sampler.law, "seed": 0, "texts": texts}
