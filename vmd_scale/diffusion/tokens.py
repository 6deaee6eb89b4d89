"""Drawing tokens from logits, and how sure a prediction is; everything in float64."""

from collections.abc import Callable

import torch
from torch import Tensor

from vmd_scale.diffusion.paths import confidence
from vmd_scale.model.head import CHUNK_ELEMENTS


def draw_categorical(logits: Tensor, u: Tensor) -> Tensor:
    """Inverse-CDF draw (precision below float64 cuts off the tails and flatters samples).

    Args:
        logits: [..., V]; u: uniform in (0, 1), float64 [...].

    Returns:
        int64 [...].
    """
    logits = logits.double()
    cumulative = (logits - logits.amax(-1, keepdim=True)).exp_().cumsum(-1)  # its last entry normalizes
    threshold = u.unsqueeze(-1) * cumulative[..., -1:]
    return torch.searchsorted(cumulative, threshold).squeeze(-1).clamp(max=logits.shape[-1] - 1)


def draw_tokens(logits: Tensor, u: Tensor, temperature: float, nucleus: float) -> Tensor:
    """Tokens, int64 [N].

    Args:
        logits: [N, V]; u: uniform in (0, 1), float64 [N].
        temperature: divides the logits; 0 takes the most probable token.
        nucleus: only the most probable tokens that together hold this probability (arXiv 1904.09751).
    """
    if temperature == 0:
        return logits.argmax(-1)
    if temperature != 1:
        logits = logits.double() / temperature
    if nucleus < 1:
        p, order = logits.double().softmax(-1).sort(dim=-1, descending=True, stable=True)
        outside = torch.zeros_like(p, dtype=torch.bool).scatter(-1, order, p.cumsum(-1) - p >= nucleus)
        logits = logits.masked_fill(outside, -torch.inf)
    return draw_categorical(logits, u)


def probability_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """How probable tokens [N] are by logits [N, V], float64 [N]."""
    return logits.double().softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def draw_from(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    vocab_size: int,
    u: Tensor,
    temperature: float,
    nucleus: float,
    with_probability: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`draw_tokens` of some positions, from their hidden states [N, D]; logits come in chunks.

    With `with_probability`, also how probable the model held what was drawn, float64 [N].
    """
    chunk = max(1, CHUNK_ELEMENTS // vocab_size)
    tokens, probabilities = [], []
    for some, uniform in zip(hidden.split(chunk), u.split(chunk), strict=True):
        logits = head(some)
        tokens.append(draw_tokens(logits, uniform, temperature, nucleus))
        if with_probability:
            probabilities.append(probability_of(logits, tokens[-1]))
    return torch.cat(tokens), torch.cat(probabilities) if with_probability else None


def confidence_of(hidden: Tensor, head: Callable[[Tensor], Tensor], vocab_size: int, law: str) -> Tensor:
    """How sure the predictions at some positions are, float64 [N], from hidden states [N, D]; logits come in chunks."""
    chunk = max(1, CHUNK_ELEMENTS // vocab_size)
    return torch.cat([confidence(head(part), law) for part in hidden.split(chunk)])
