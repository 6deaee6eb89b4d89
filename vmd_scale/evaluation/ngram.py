"""An n-gram language model over token ids: a judge of samples that needs no network and no download.

Interpolated Witten-Bell smoothing (Witten and Bell, 1991; Chen and Goodman, 1999, section 2.4):

    p(w | h) = (c(h w) + d(h) p(w | h')) / (c(h) + d(h)),  d(h) tokens seen after h, h' is h without its first

down to the uniform distribution. Every p(. | h) sums to one, so that its perplexity is a perplexity.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class _Counts:
    """Counts for one length of context; n-grams and contexts are numbers in base V, sorted."""

    grams: np.ndarray
    of_gram: np.ndarray
    contexts: np.ndarray
    of_context: np.ndarray
    continuations: np.ndarray


class NGram:
    """Fitted to rows of ids, each for itself.

    Args:
        tokens: int64 [n, L].
        counted: bool [n, L]; n-grams that touch another position are left out.
        order: the n of n-gram.

    Raises:
        ValueError: vocab_size ** order does not fit into 63 bits.
    """

    def __init__(self, tokens: np.ndarray, counted: np.ndarray, vocab_size: int, order: int) -> None:
        if order < 1 or not n_grams_fit(vocab_size, order):
            raise ValueError(f"order {order} with {vocab_size} symbols: n-grams must fit into 63 bits")
        self.vocab_size, self.order = vocab_size, order
        self._counts = []
        for length in range(min(order, tokens.shape[1])):
            grams, usable = self._numbered(tokens, counted, length)
            keys, of_gram = np.unique(grams[usable], return_counts=True)
            contexts, first = np.unique(keys // vocab_size, return_index=True)
            sums = np.add.reduceat(of_gram, first) if len(first) else of_gram
            continuations = np.diff(np.append(first, len(keys)))
            self._counts.append(_Counts(keys, of_gram, contexts, sums, continuations))

    def nll(self, tokens: np.ndarray) -> np.ndarray:
        """-log p of each token given those before it in its row; float64 [n, L], nats."""
        p = np.full(tokens.shape, 1 / self.vocab_size)
        everywhere = np.ones(tokens.shape, dtype=bool)
        for length, counts in enumerate(self._counts):
            if length >= tokens.shape[1]:
                break
            grams, _ = self._numbered(tokens, everywhere, length)
            seen = _looked_up(counts.grams, counts.of_gram, grams)
            total = _looked_up(counts.contexts, counts.of_context, grams // self.vocab_size)
            different = _looked_up(counts.contexts, counts.continuations, grams // self.vocab_size)
            shorter = p[:, length:]
            known = total > 0
            longer = (seen + different * shorter) / np.maximum(total + different, 1)
            p[:, length:] = np.where(known, longer, shorter)
        return -np.log(p)

    def _numbered(self, tokens: np.ndarray, counted: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Each token with `length` tokens before it as one number, [n, L - length], and whether all are counted."""
        width = tokens.shape[1] - length
        grams, usable = np.zeros((len(tokens), width), dtype=np.int64), np.ones((len(tokens), width), dtype=bool)
        for offset in range(length + 1):
            grams = grams * self.vocab_size + tokens[:, offset : offset + width]
            usable &= counted[:, offset : offset + width]
        return grams, usable


def n_grams_fit(vocab_size: int, order: int) -> bool:
    """Whether every n-gram is a number of 63 bits."""
    return vocab_size**order < 1 << 63


def _looked_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The values of sorted keys, 0 for those that are not there."""
    if not len(keys):
        return np.zeros(wanted.shape, dtype=np.int64)
    places = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
    return np.where(keys[places] == wanted, values[places], 0)
