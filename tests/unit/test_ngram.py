"""The n-gram judge against its textbook definition, computed apart with dictionaries."""

import math
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmd_scale.evaluation.ngram import NGram

VOCAB = 3


def by_definition(rows: list[list[int]], order: int, context: tuple[int, ...], token: int) -> float:
    if len(context) >= order:
        context = context[len(context) - order + 1 :]
    after = defaultdict(Counter)
    for row in rows:
        for i, w in enumerate(row):
            for n in range(min(i, order - 1) + 1):
                after[tuple(row[i - n : i])][w] += 1
    p = 1 / VOCAB
    for n in range(len(context) + 1):
        seen = after[context[len(context) - n :]]
        if seen:
            p = (seen[token] + len(seen) * p) / (seen.total() + len(seen))
    return p


ROWS = st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=6, max_size=6), min_size=1, max_size=4)


@settings(max_examples=30, deadline=None)
@given(rows=ROWS, judged=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=8), order=st.integers(1, 4))
def test_it_is_witten_bell(rows: list[list[int]], judged: list[int], order: int) -> None:
    tokens = np.array(rows)
    model = NGram(tokens, np.ones(tokens.shape, dtype=bool), VOCAB, order)
    wanted = [-math.log(by_definition(rows, order, tuple(judged[:i]), w)) for i, w in enumerate(judged)]
    np.testing.assert_allclose(model.nll(np.array([judged]))[0], wanted)


def test_every_distribution_sums_to_one() -> None:
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, VOCAB, (5, 20))
    model = NGram(tokens, np.ones(tokens.shape, dtype=bool), VOCAB, 4)
    contexts = generator.integers(0, VOCAB, (30, 5))
    p = sum(np.exp(-model.nll(np.column_stack([contexts, np.full(30, w)]))[:, -1]) for w in range(VOCAB))
    np.testing.assert_allclose(p, 1)


def test_positions_that_are_not_counted_teach_nothing() -> None:
    tokens = np.array([[0, 1, 0, 1, 2, 2]])
    counted = np.array([[True] * 4 + [False] * 2])
    judged = np.array([[1, 0, 2, 1]])
    cut = NGram(tokens[:, :4], counted[:, :4], VOCAB, 3)
    np.testing.assert_array_equal(NGram(tokens, counted, VOCAB, 3).nll(judged), cut.nll(judged))


def test_an_order_that_does_not_fit() -> None:
    tokens = np.zeros((1, 8), dtype=np.int64)
    with pytest.raises(ValueError, match="63 bits"):
        NGram(tokens, tokens == 0, 50257, 5)
    NGram(tokens, tokens == 0, 50257, 4)
