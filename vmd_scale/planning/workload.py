"""What a configuration computes: rows at a time, how often the networks run for each, and FLOPs a token."""

from vmd_scale.config import Config, step_values
from vmd_scale.model import Architecture
from vmd_scale.planning.flops import FlopsPerToken


def fitting_micro_batch(most: int, global_batch: int, ranks: int) -> int | None:
    """The largest micro-batch, `most` at most, of which that many ranks make a global batch; None where none does."""
    return next((size for size in range(most, 0, -1) if global_batch % (size * ranks) == 0), None)


def denoiser_passes(config: Config) -> float:
    """Forwards of the denoiser for one row: 1, with objective iw K of them for each step of the path."""
    if config.diffusion.objective != "iw":
        return 1.0
    longest = config.data.row_length // config.groups
    steps = [min(T, longest) for T in step_values(config.diffusion.steps)]
    return config.diffusion.importance_samples * sum(steps) / len(steps)


def masked_share(config: Config) -> float:
    """Mean share of positions at which the head is computed in training, under the linear schedule."""
    if config.diffusion.objective == "iw":  # along a whole path, each position once
        return float(config.diffusion.importance_samples)
    if config.diffusion.objective == "vmd":
        return 0.5
    steps = step_values(config.diffusion.steps)
    return sum(0.5 + 0.5 / T for T in steps) / len(steps)  # mean of k/T over k = 1..T; 1/2 for T = inf


def flops_of(
    config: Config, architecture: Architecture, on_gpu: bool = False, attended: float | None = None
) -> FlopsPerToken:
    """Of a training step; on a GPU, where FlexAttention does not compute what no position of a block sees.

    `attended`: where attention stays inside documents, to how many positions one attends; None: to all of a row.
    """
    skips = on_gpu and config.model.attention in ("auto", "flash", "flex")
    return FlopsPerToken.of(architecture, masked_share(config), denoiser_passes(config), skips, attended)
