"""Rows that hold several documents: attention stays inside each, positions restart, and each has a latent of its own.

`attend` says who may be attended to, everywhere in this project, in one of two ways:

    bool  [B, L]   false at padding
    int32 [B, L]   the number of the document that a position belongs to, 1, 2, ... from left to right; 0 at padding
"""

import torch
from torch import Tensor

from vmd_scale.model.attention import Documents, Flash, Mask, document_boundaries


def has_documents(attend: Tensor | None) -> bool:
    """Whether `attend` tells several documents of a row apart."""
    return attend is not None and attend.dtype != torch.bool


def attention_mask(attend: Tensor | None, documents: int, kernel: str | Flash) -> Mask:
    """For `attention`: None where all is allowed, bool broadcastable to [B, heads, L, L], or `Documents`.

    Args:
        documents: of a row, at most.
        kernel: flash-attn reads rows of several documents without a mask.
    """
    if attend is None:
        return None
    if not has_documents(attend):
        return attend[:, None, None, :]
    # Padding is a document like any other: no softmax of nothing.
    if isinstance(kernel, Flash):
        return Documents(attend, document_boundaries(attend, documents + 1))
    return Documents(attend).mask()


def positions_in(attend: Tensor | None, length: int, device: torch.device) -> Tensor:
    """Positions int64 [L], or [B, L] counted from the beginning of each document."""
    at = torch.arange(length, device=device)
    if attend is None or not has_documents(attend):
        return at
    begins = attend != attend.roll(1, dims=1)
    return at - torch.where(begins, at, 0).cummax(dim=1).values


def members_of(attend: Tensor, documents: int) -> Tensor:
    """Which positions belong to documents 1 .. N of a row, bool [B, L, N]; padding to none.

    As a matrix it gives each position what is its document's: on a GPU the gradient of indexing sums in an order that
    changes from run to run.
    """
    return attend[:, :, None] == torch.arange(1, documents + 1, device=attend.device)


def any_of(mask: Tensor, attend: Tensor | None, groups: int, documents: int) -> Tensor:
    """Whether any position that shares a latent is true in bool [B, L]: for each block [B, G], or document [B, N]."""
    if attend is None or not has_documents(attend):
        return mask.view(len(mask), groups, -1).any(-1)
    return (members_of(attend, documents) & mask[:, :, None]).any(1)
