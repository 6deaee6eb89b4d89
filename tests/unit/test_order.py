import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmd_scale.data.order import SampleOrder


@settings(deadline=None)
@given(st.integers(1, 5000), st.integers(0, 2**63 - 1), st.integers(0, 1000))
def test_every_epoch_is_a_permutation(rows: int, seed: int, epoch: int) -> None:
    numbers = SampleOrder(rows, seed).row_numbers(epoch * rows + np.arange(rows))
    assert np.array_equal(np.sort(numbers), np.arange(rows))


@settings(deadline=None)
@given(st.integers(1, 10**13), st.integers(0, 2**40), st.integers(1, 50))
def test_independent_of_how_positions_are_asked(rows: int, start: int, cut: int) -> None:
    order = SampleOrder(rows, 7)
    positions = start + np.arange(50)
    together = order.row_numbers(positions)
    assert together.dtype == np.int64
    assert np.all((together >= 0) & (together < rows))
    apart = np.concatenate([order.row_numbers(positions[:cut]), order.row_numbers(positions[cut:])])
    assert np.array_equal(together, apart)
    backwards = order.row_numbers(positions[::-1])
    assert np.array_equal(together, backwards[::-1])


@pytest.mark.parametrize("rows", [10**12 + 39, 2**40, 2**62])
def test_large_corpora(rows: int) -> None:
    numbers = SampleOrder(rows, 0).row_numbers(np.arange(20_000))
    assert len(np.unique(numbers)) == 20_000
    assert (numbers / rows).mean() == pytest.approx(0.5, abs=0.02)


def test_seeds_and_epochs_differ() -> None:
    rows = 1000
    first = SampleOrder(rows, 0).row_numbers(np.arange(rows))
    second_epoch = SampleOrder(rows, 0).row_numbers(rows + np.arange(rows))
    other_seed = SampleOrder(rows, 1).row_numbers(np.arange(rows))
    for other in (second_epoch, other_seed, np.arange(rows)):
        assert (first == other).mean() < 0.02


@pytest.mark.parametrize("rows", [4, 10, 100])
def test_every_row_comes_at_every_place(rows: int) -> None:
    epochs = 400 * rows
    table = SampleOrder(rows, 3).row_numbers(np.arange(rows * epochs)).reshape(epochs, rows)
    counts = np.bincount(table[:, 0], minlength=rows)
    chi2 = ((counts - epochs / rows) ** 2 / (epochs / rows)).sum()
    assert chi2 < rows + 5 * np.sqrt(2 * rows)
    # and a row does not follow its neighbour more often than chance has it
    follows = np.mean(table[:, 1] == (table[:, 0] + 1) % rows)
    assert follows == pytest.approx(1 / (rows - 1), rel=0.2)


def test_neighbours_are_torn_apart() -> None:
    rows = 100_000
    numbers = SampleOrder(rows, 5).row_numbers(np.arange(rows)).astype(np.float64)
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.02


def test_uniform_over_a_million_million_rows() -> None:
    """The first rows of the order fall evenly over the corpus, none twice, in this epoch and far later ones."""
    rows, count, bins = 10**12, 200_000, 1000
    for epoch in (0, 10**6):
        numbers = SampleOrder(rows, 11).row_numbers(epoch * rows + np.arange(count))
        assert len(np.unique(numbers)) == count
        counts = np.bincount(numbers // (rows // bins), minlength=bins)
        chi2 = ((counts - count / bins) ** 2 / (count / bins)).sum()
        assert abs(chi2 - bins) < 5 * np.sqrt(2 * bins)
        low_digits = np.bincount(numbers % 97, minlength=97)
        assert ((low_digits - count / 97) ** 2 / (count / 97)).sum() < 97 + 5 * np.sqrt(2 * 97)


@settings(deadline=None, max_examples=20)
@given(st.sampled_from([1, 2, 4, 8]), st.integers(0, 10**9))
def test_ranks_together_read_what_one_would(world_size: int, step: int) -> None:
    rows, batch = 10**12, 64
    whole = SampleOrder(rows, 2).row_numbers(step * batch + np.arange(batch))
    shares = [
        SampleOrder(rows, 2).row_numbers(step * batch + np.arange(rank, batch, world_size))
        for rank in range(world_size)
    ]
    assert np.array_equal(np.stack(shares, axis=1).ravel(), whole)


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="rows"):
        SampleOrder(0, 0)
    with pytest.raises(ValueError, match="positions"):
        SampleOrder(3, 0).row_numbers(np.array([-1]))
