"""Floating-point operations of a training step, by formula.

Counted are matrix products, a multiplication and an addition apart, forward and backward (3 x forward), as is usual
for MFU (PaLM, arXiv 2204.02311, appendix B). Element-wise work is not counted, nor what is computed twice
(activation checkpointing, attention's own recomputation).
"""

import math
from dataclasses import dataclass

from vmd_scale.model import Architecture


@dataclass(frozen=True)
class FlopsPerToken:
    """Of one token of a row, forward and backward."""

    denoiser: float  # blocks, without the head
    head: float
    encoder: float  # with a conditional prior's
    latent: float  # modulations and projections: once a latent group, or document

    @property
    def total(self) -> float:
        return self.denoiser + self.head + self.encoder + self.latent

    @classmethod
    def of(
        cls, a: Architecture, masked: float, passes: float = 1.0, skips: bool = False, attended: float | None = None
    ) -> "FlopsPerToken":
        """
        Args:
            masked: share of the positions at which the head is computed.
            passes: forwards of the denoiser for one row.
            skips: attention leaves out what block diffusion's mask hides, as FlexAttention does (but for the rest of
                its tiles, which is not counted).
            attended: positions of a row of several documents that one attends to, where a kernel computes no others;
                None stands for the whole row.
        """
        length = a.row_length if attended is None else attended
        halves = 2 if a.groups > 1 else 1  # the block variant runs over [noisy ; clean]
        seen = (1 + 1 / a.groups) / 4 if skips and a.groups > 1 else 1.0  # of [noisy ; clean] by itself
        blocks = a.layers * _block(a, a.width, seen * halves * length)
        readers = (2 if a.prior == "conditional" else 1) if a.latent_width else 0
        encoder = a.encoder_layers * _block(a, a.encoder_width, length)
        latents = max(a.groups, a.documents)  # of a row
        encoder += 2 * a.encoder_width * 2 * a.latent_width * latents / a.row_length
        # Which positions are masked, and the mean of those of a group or document: products with a matrix that says
        # which they are, and gets no gradient.
        encoder += (2 / 3) * 2 * (2 + a.documents) * a.encoder_width
        return cls(
            denoiser=3 * passes * halves * blocks,
            head=3 * masked * 2 * a.width * a.vocab_size,
            encoder=3 * readers * encoder,
            latent=passes * (_once_a_group(a) * latents / a.row_length + _given_to_positions(a)),
        )


def mlp_width(width: int, ratio: float, kind: str) -> int:
    """Hidden units of the MLP; SwiGLU has three matrices of them, GELU two."""
    return 8 * math.ceil(width * ratio * (2 / 3 if kind == "swiglu" else 1) / 8)


def _block(a: Architecture, width: int, length: float) -> float:
    """One layer, one position that attends to `length` others, forward."""
    matrices = 4 * width * width + (3 if a.mlp == "swiglu" else 2) * width * mlp_width(width, a.mlp_ratio, a.mlp)
    return 2 * matrices + 4 * length * width


def _once_a_group(a: Architecture) -> float:
    """What makes shifts, scales and gates of z and of the time, forward and backward."""
    condition, halves = a.condition_width, 2 if a.groups > 1 else 1
    flops = 0.0
    if a.has_condition:
        flops += 3 * halves * a.layers * 2 * condition * 6 * a.width
    if a.latent_width and a.injection == "adaln":
        flops += 3 * 2 * (a.latent_width * condition + condition * condition)
    elif a.latent_width:
        flops += 3 * 2 * a.latent_width * a.width
    if a.time_conditioning:  # the time itself gets no gradient
        flops += (2 + 3) * 2 * condition * condition
    return flops


def _given_to_positions(a: Architecture) -> float:
    """Of rows of several documents: what is a document's given to its positions, forward and backward."""
    if a.documents == 1 or not a.latent_width:
        return 0.0
    width = a.layers * 6 * a.width if a.injection == "adaln" else a.width
    return 2 * 2 * a.documents * width
