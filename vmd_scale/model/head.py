"""Cross-entropy at the masked positions only: hidden states are gathered before the head, logits come in chunks."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

CHUNK_ELEMENTS = 2**25  # logits in existence at once: 128 MiB in fp32


def masked_nll(
    hidden: Tensor, targets: Tensor, index: Tensor, logits: Callable[[Tensor], Tensor], vocab_size: int
) -> Tensor:
    """-log p(x0 | hidden) at the positions in `index`, zero elsewhere.

    The full [B, L, V] logits never exist: each chunk is computed again in the backward pass.

    Args:
        hidden: [B, L, D].
        targets: int64 [B, L].
        index: int64 [N], positions in the flattened [B * L]; entries equal to B * L are padding.
        logits: the head, [n, D] -> fp32 [n, V].

    Returns:
        fp32 [B, L], nats.
    """
    positions = targets.numel()
    source = index.clamp(max=positions - 1)
    rows, wanted = hidden.flatten(0, 1)[source], targets.flatten()[source]
    chunk = max(1, CHUNK_ELEMENTS // vocab_size)

    def chunk_nll(h: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(logits(h), y, reduction="none")

    # From the shape alone, not from the number of masked positions: under ZeRO-3 each call of the head is a collective.
    pieces = -(-positions // chunk)
    if pieces == 1:
        nll = chunk_nll(rows, wanted)
    else:
        parts = zip(rows.tensor_split(pieces), wanted.tensor_split(pieces), strict=True)
        nll = torch.cat([checkpoint(chunk_nll, h, y, use_reentrant=False) for h, y in parts])
    # One slot more than there are positions takes what the padding of `index` computed.
    dense = torch.zeros(positions + 1, dtype=nll.dtype, device=nll.device).scatter(0, index, nll)
    return dense[:positions].view_as(targets)
