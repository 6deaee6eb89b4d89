"""What a configuration computes: rows at a time, how often the networks run for each, and FLOPs a token."""

import math

from vmd_scale.config import Config, step_values
from vmd_scale.model import Architecture
from vmd_scale.model.head import CHUNK_ELEMENTS
from vmd_scale.planning.flops import FlopsPerToken


def fitting_micro_batch(most: int, global_batch: int, ranks: int) -> int | None:
    """The largest micro-batch, `most` at most, of which that many ranks make a global batch; None where none does."""
    return next((size for size in range(most, 0, -1) if global_batch % (size * ranks) == 0), None)


def denoiser_passes(config: Config, rows: int | None = None) -> float:
    """Forwards of the denoiser for one row: 1, with objective iw K of them for each step of the path.

    Args:
        rows: of a micro-batch, which objective iw fills up to as many rows of each T; None: without that, on average.
    """
    diffusion = config.diffusion
    if diffusion.objective != "iw":
        return 1.0
    longest = config.data.row_length // config.groups
    steps = [T if diffusion.paths == "bernoulli" else min(T, longest) for T in step_values(diffusion.steps)]
    share = 1 / len(steps) if rows is None else -(-rows // len(steps)) / rows
    return diffusion.importance_samples * share * sum(steps)


def masked_share(config: Config) -> float:
    """Mean share of positions at which the head is computed in training, under the linear schedule."""
    if config.diffusion.objective == "iw":  # along a whole path, each position once
        return float(config.diffusion.importance_samples)
    if config.diffusion.objective == "vmd":
        return 0.5
    steps = step_values(config.diffusion.steps)
    return sum(0.5 + 0.5 / T for T in steps) / len(steps)  # mean of k/T over k = 1..T; 1/2 for T = inf


def flops_of(
    config: Config,
    architecture: Architecture,
    on_gpu: bool = False,
    attended: float | None = None,
    rows: int | None = None,
) -> FlopsPerToken:
    """Of a training step; on a GPU, where FlexAttention does not compute what no position of a block sees.

    Args:
        attended: where attention stays inside documents, to how many positions one attends; None: to all of a row.
        rows: of a micro-batch, for what is computed rather than what is of use; see `denoiser_passes`.
    """
    skips = on_gpu and config.model.attention in ("auto", "flash", "flex")
    return FlopsPerToken.of(architecture, masked_share(config), denoiser_passes(config, rows), skips, attended)


def head_pieces(architecture: Architecture, positions: float) -> int:
    """Into how many chunks so many positions fall, of which each recomputes its logits; see `model.head.pieces_of`."""
    return math.ceil(positions / max(1, CHUNK_ELEMENTS // architecture.vocab_size))
