"""Cross-entropy at the masked positions only: hidden states are gathered before the head, logits come in chunks.

The full [B, L, V] logits never exist. Two ways to a gradient:

    masked_nll      any gradient may come back: each chunk of logits is computed again in the backward pass
    weighted_nll    the weight of every position is known beforehand: the gradient is made together with the loss, and
                    nothing is computed twice ("fused linear cross-entropy", as in Liger, arXiv 2410.10989)
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

CHUNK_ELEMENTS = 2**25  # logits in existence at once: 128 MiB in fp32
GPU_CHUNK_ELEMENTS = 2**29  # of the fused one there: each chunk reads and writes a gradient as large as the head
# Symbols of the fused one by device: a GPU's fast matrix products want rows that begin at multiples of 16 bytes.
VOCAB_MULTIPLE = {"cuda": 64}


def masked_nll(
    hidden: Tensor, targets: Tensor, index: Tensor, logits: Callable[[Tensor], Tensor], vocab_size: int
) -> Tensor:
    """-log p(x0 | hidden) at the positions in `index`, zero elsewhere.

    Args:
        hidden: [B, L, D].
        targets: int64 [B, L].
        index: int64 [N], positions in the flattened [B * L]; entries equal to B * L are padding.
        logits: the head, [n, D] -> fp32 [n, V].

    Returns:
        fp32 [B, L], nats.
    """
    rows, wanted = _gather(hidden, targets, index)

    def chunk_nll(h: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(logits(h), y, reduction="none")

    pieces = pieces_of(targets, vocab_size)
    if pieces == 1:
        nll = chunk_nll(rows, wanted)
    else:
        parts = zip(rows.tensor_split(pieces), wanted.tensor_split(pieces), strict=True)
        nll = torch.cat([checkpoint(chunk_nll, h, y, use_reentrant=False) for h, y in parts])
    return _scatter(nll, targets, index)


def weighted_nll(
    hidden: Tensor,
    targets: Tensor,
    index: Tensor,
    matrix: Tensor,
    weight: Tensor,
    compiled: bool = False,
    bias: Tensor | None = None,
) -> Tensor:
    """sum_{b, l} weight * -log p(x0 | hidden) over the positions in `index`, a scalar in fp32.

    Args:
        hidden, targets, index: as those of `masked_nll`.
        matrix: [V, D], the head; where it is frozen, no gradient of it is made.
        weight: fp32 [B, G], one for each group of L / G positions. It gets no gradient.
        compiled: whether torch.compile makes one kernel of what is done to a chunk of logits.
        bias: [V], the head's, or None.
    """
    rows, wanted = _gather(hidden, targets, index)
    of_position = weight.repeat_interleave(targets.shape[1] // weight.shape[1], 1).flatten()
    of_rows = F.pad(of_position, (0, 1))[index]  # padding weighs nothing
    return _WeightedNLL.apply(rows, matrix, bias, wanted, of_rows, compiled)


def pieces_of(targets: Tensor, vocab_size: int) -> int:
    """Into how many chunks the logits of a micro-batch fall.

    From the shape alone, not from the number of masked positions: under ZeRO-3 each call of the head is a collective.
    """
    return -(-targets.numel() // max(1, CHUNK_ELEMENTS // vocab_size))


def _gather(hidden: Tensor, targets: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    source = index.clamp(max=targets.numel() - 1)
    return hidden.flatten(0, 1).index_select(0, source), targets.flatten()[source]


def _scatter(nll: Tensor, targets: Tensor, index: Tensor) -> Tensor:
    # One slot more than there are positions takes what the padding of `index` computed.
    dense = torch.zeros(targets.numel() + 1, dtype=nll.dtype, device=nll.device).scatter(0, index, nll)
    return dense[:-1].view_as(targets)


class _WeightedNLL(torch.autograd.Function):
    """sum_n w_n NLL_n. Its gradient, up to the factor that comes back, is made in the forward pass, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, matrix: Tensor, bias: Tensor | None, targets: Tensor, weight: Tensor, compiled: bool
    ) -> Tensor:
        elements = GPU_CHUNK_ELEMENTS if rows.is_cuda else CHUNK_ELEMENTS
        vocab_size, multiple = len(matrix), VOCAB_MULTIPLE.get(rows.device.type, 1)
        if vocab_size % multiple:
            matrix, bias = _filled_up(matrix, bias, -vocab_size % multiple)
        pieces = max(1, -(-len(rows) // max(1, elements // len(matrix))))
        d_rows = torch.empty_like(rows)
        d_matrix: Tensor | None = None
        d_bias: Tensor | None = None
        total = torch.zeros((), dtype=torch.float64, device=rows.device)
        score = _compiled if compiled else _nll_and_gradient
        parts = (x.tensor_split(pieces) for x in (rows, targets, weight, d_rows))
        for h, y, w, d_h in zip(*parts, strict=True):
            logits = h @ matrix.T if bias is None else torch.addmm(bias, h, matrix.T)
            nll, d_logits = score(logits, y, w)
            total += (nll.double() * w).sum()
            torch.mm(d_logits, matrix, out=d_h)
            d_logits = d_logits[:, :vocab_size]
            if ctx.needs_input_grad[2]:
                of_bias = d_logits.sum(0, dtype=torch.float32)
                d_bias = of_bias if d_bias is None else d_bias.add_(of_bias)
            if ctx.needs_input_grad[1]:
                d_matrix = _plus_product(d_matrix, d_logits.T, h)
            del logits, d_logits  # or they would be there beside the next ones
        ctx.save_for_backward(d_rows, d_matrix, d_bias)
        ctx.dtype = matrix.dtype
        return total.float()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (factor,) = gradients
        d_rows, d_matrix, d_bias = ctx.saved_tensors
        of_head = (
            None if d is None else torch.mul(d, factor, out=torch.empty_like(d, dtype=ctx.dtype))
            for d in (d_matrix, d_bias)
        )
        return d_rows * factor.to(d_rows.dtype), *of_head, None, None, None


def _plus_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """total + a @ b in fp32, in place; None stands for zeros."""
    if total is None:
        return (a @ b).float()
    return total.addmm_(a, b) if a.dtype == torch.float32 else total.add_(a @ b)


def _filled_up(matrix: Tensor, bias: Tensor | None, more: int) -> tuple[Tensor, Tensor]:
    """The head with `more` symbols more, of probability 0."""
    bias = matrix.new_zeros(len(matrix)) if bias is None else bias
    return F.pad(matrix, (0, 0, 0, more)), F.pad(bias, (0, more), value=-torch.inf)


def _nll_and_gradient(logits: Tensor, targets: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """NLL, fp32 [n], of logits [n, V], and the gradient of its sum weighted by fp32 [n], in the logits' dtype."""
    log_p = logits.float().log_softmax(-1)
    targets = targets.unsqueeze(-1)
    nll = -log_p.gather(-1, targets).squeeze(-1)
    p = log_p.exp_()
    p.scatter_add_(-1, targets, p.new_full(targets.shape, -1.0))
    return nll, p.mul_(weight.unsqueeze(-1)).to(logits.dtype)


def _in_one_pass(logits: Tensor, targets: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The same without a scattered write, for a compiler that fuses what is element-wise."""
    scores, targets = logits.float(), targets.unsqueeze(-1)
    # Written out: what logsumexp does about infinities hides from the compiler that this is a softmax, of which it can
    # make maximum and sum in one reading.
    top = scores.amax(-1, keepdim=True)
    shifted = scores - top
    normalizer = shifted.exp().sum(-1, keepdim=True).log()
    hit = torch.arange(logits.shape[-1], device=logits.device) == targets
    gradient = ((shifted - normalizer).exp() - hit.float()) * weight.unsqueeze(-1)
    return (normalizer - (scores.gather(-1, targets) - top)).squeeze(-1), gradient.to(logits.dtype)


def _compiled(logits: Tensor, targets: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    for x in (logits, targets, weight):
        torch._dynamo.maybe_mark_dynamic(x, 0)  # not the vocabulary: what is known to be aligned is read faster
    return _compiler()(logits, targets, weight)


@functools.cache
def _compiler() -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    return torch.compile(_in_one_pass)
