"""How many rows a wanted standard error needs is asked of other rows than those that are reported."""

import numpy as np
import pytest

from vmd_scale.errors import UserError
from vmd_scale.evaluation import perplexity
from vmd_scale.evaluation.perplexity import PILOT, Request, mean_and_error
from vmd_scale.evaluation.protocols import get_protocol
from vmd_scale.evaluation.ranks import Ranks

ROWS, LENGTH = 4000, 8


@pytest.fixture
def score_until(monkeypatch):
    """The rows that are reported, given what each row would score."""

    def score_until(nats, until_error):
        asked = []

        def score_rows(*arguments):
            numbers = arguments[-1]
            asked.append(numbers)
            return nats[numbers], np.full(len(numbers), LENGTH)

        monkeypatch.setattr(perplexity, "_score_rows", score_rows)
        request = Request(protocol="rows", split="test", steps=(1.0,), until_error=until_error)
        arguments = (None, np.arange(len(nats)), get_protocol("rows"), request, Ranks(), lambda: None, None)
        return *perplexity._score_until(*arguments), asked

    return score_until


def test_the_pilot_decides_how_many_and_is_not_among_them(score_until):
    nats = np.random.default_rng(0).normal(20, 4, ROWS)
    good_looking = nats.copy()
    good_looking[:PILOT] -= 15  # a pilot with the same spread that looks much better
    found, tokens, asked = score_until(nats, 0.03)
    again, _, asked_again = score_until(good_looking, 0.03)
    assert np.array_equal(found, again)
    assert [list(numbers) for numbers in asked] == [list(numbers) for numbers in asked_again]
    assert list(asked[0]) == list(range(PILOT))
    assert list(asked[1]) == list(range(PILOT, PILOT + len(found)))
    assert PILOT < len(found) < ROWS - PILOT
    assert mean_and_error(found, tokens)[1] <= 0.03


def test_where_all_rows_are_needed_the_pilot_is_one_of_them(score_until):
    nats = np.random.default_rng(1).normal(20, 4, ROWS)
    found, _, _ = score_until(nats, 0.001)
    assert np.array_equal(found, nats)


def test_a_pilot_that_is_not_finite_is_an_error(score_until):
    with pytest.raises(UserError, match="not finite"):
        score_until(np.full(ROWS, np.nan), 0.1)


def test_what_is_reported_has_no_bias(score_until):
    """Over many data sets, of rows with long tails: the mean of the reported means is that of the rows."""
    generator = np.random.default_rng(2)
    errors = []
    for _ in range(300):
        nats = generator.gamma(1.0, 8.0, ROWS)
        found, tokens, _ = score_until(nats, 0.08)
        errors.append(found.sum() / tokens.sum() - 1.0)
    assert abs(np.mean(errors)) < 4 * np.std(errors) / np.sqrt(len(errors))
