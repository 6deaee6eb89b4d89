import itertools
import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import enumerate_paths, revealed_numbers

from vmd_scale.diffusion.noise import Noise, Stream
from vmd_scale.diffusion.paths import RANDOM_LAWS as LAWS
from vmd_scale.diffusion.paths import highest, masked_before, random_ranks, reveal_steps

INF = math.inf


def noise_for(seed, *shape):
    return Noise(seed).uniform(Stream.PATH, 0, torch.arange(shape[0]), shape[1:])


def chi_square(observed, expected):
    """(statistic, degrees of freedom) of a table of counts against expected counts, all of them large."""
    return sum((observed.get(k, 0) - e) ** 2 / e for k, e in expected.items()), len(expected) - 1


shapes = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 9))


@st.composite
def maskables(draw):
    shape = draw(shapes)
    flat = draw(st.lists(st.booleans(), min_size=math.prod(shape), max_size=math.prod(shape)))
    return torch.tensor(flat).view(shape)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(maskables(), st.integers(0, 99))
def test_ranks_number_the_maskable_positions(maskable, seed):
    ranks = random_ranks(noise_for(seed, *maskable.shape), maskable)
    assert bool((ranks[~maskable] == 0).all())
    for of_group, may in zip(ranks.flatten(0, 1), maskable.flatten(0, 1), strict=True):
        assert sorted(of_group[may].tolist()) == list(range(1, int(may.sum()) + 1))


@settings(deadline=None, max_examples=150, derandomize=True)
@given(maskables(), st.sampled_from([1, 2, 3, 4, 7, 20, INF]), st.sampled_from(LAWS), st.integers(0, 99))
def test_every_maskable_position_is_revealed_once_and_no_other(maskable, steps, law, seed):
    s, total = reveal_steps(noise_for(seed, *maskable.shape), maskable, steps, law)
    assert s.shape == maskable.shape
    assert bool((s[~maskable] == 0).all())
    assert bool(((s[maskable] >= 1) & (s[maskable] <= total)).all())
    if law == "bernoulli" and steps != INF:
        assert total == steps
    if steps == INF:
        assert total == max(1, int(maskable.sum(-1).max()))
        for of_group, may in zip(s.flatten(0, 1), maskable.flatten(0, 1), strict=True):
            assert len(set(of_group[may].tolist())) == int(may.sum())  # one at a time


@settings(deadline=None, max_examples=150, derandomize=True)
@given(maskables(), st.sampled_from([1, 2, 3, 4, 7, 20]), st.integers(0, 99))
def test_balanced_masks_exactly_floor_kn_over_t(maskable, steps, seed):
    s, total = reveal_steps(noise_for(seed, *maskable.shape), maskable, steps, "balanced")
    assert total <= steps
    for of_group, may in zip(s.flatten(0, 1), maskable.flatten(0, 1), strict=True):
        n, revealed_at = int(may.sum()), of_group[may]
        if n >= steps:
            assert [int((revealed_at <= k).sum()) for k in range(1, steps + 1)] == [
                k * n // steps for k in range(1, steps + 1)
            ]
        else:  # one at a time, which is what floor(k n / T) does between its empty steps
            assert len(set(revealed_at.tolist())) == n


def order_of(steps, positions):
    """The path as the tuple of revealed sets, first revealed first; empty steps left out."""
    present = sorted({int(steps[i]) for i in positions}, reverse=True)
    return tuple(tuple(i for i in positions if steps[i] == k) for k in present)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("steps", [1, 2, 3, 4, INF])
@pytest.mark.parametrize("holes", [(), (1,)])
def test_paths_have_the_law_of_their_name(law, steps, holes):
    """The distribution over whole paths equals the enumerated one, for rows with and without holes."""
    length, count = 4, 24_000
    positions = [i for i in range(length) if i not in holes]
    maskable = torch.tensor([i in positions for i in range(length)])
    s, _ = reveal_steps(noise_for(3, count, 1, length), maskable.expand(count, 1, length), steps, law)
    observed = Counter(order_of(row, positions) for row in s.view(count, length).tolist())
    expected = Counter()
    paths = enumerate_paths(len(positions), steps, law)
    for path in paths:
        sets = tuple(tuple(positions[j] for j, r in enumerate(revealed) if r) for _, revealed in path)
        expected[sets] += count / len(paths)
    assert set(observed) <= set(expected)
    statistic, freedom = chi_square(observed, expected)
    assert statistic <= freedom + 4 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("law", LAWS)
def test_marginally_uniform_over_steps(law):
    """Where T divides n both laws reveal each position at a uniformly drawn step."""
    count, n, steps = 20_000, 6, 3
    s, total = reveal_steps(noise_for(4, count, 1, n), torch.ones(count, 1, n, dtype=torch.bool), steps, law)
    assert total == steps
    for position, k in itertools.product(range(n), range(1, steps + 1)):
        share = (s[:, 0, position] == k).double().mean().item()
        assert abs(share - 1 / 3) < 4.5 * math.sqrt(1 / 3 * 2 / 3 / count)


def test_bernoulli_positions_are_independent_and_balanced_ones_are_not():
    count, n, steps = 20_000, 4, 2
    maskable = torch.ones(count, 1, n, dtype=torch.bool)
    both = {law: reveal_steps(noise_for(5, count, 1, n), maskable, steps, law)[0][:, 0] == 2 for law in LAWS}
    together = {law: (x[:, 0] & x[:, 1]).double().mean().item() for law, x in both.items()}
    sigma = math.sqrt(3 / 16 / count)
    assert abs(together["bernoulli"] - 1 / 4) < 4 * sigma
    assert abs(together["balanced"] - (2 / 4) * (1 / 3)) < 4 * sigma


def test_groups_and_rows_have_paths_of_their_own():
    s, _ = reveal_steps(noise_for(6, 500, 2, 8), torch.ones(500, 2, 8, dtype=torch.bool), INF, "balanced")
    same = (s[:, 0] == s[:, 1]).double().mean().item()
    assert abs(same - 1 / 8) < 4 * math.sqrt(1 / 8 * 7 / 8 / 500)
    neighbours = (s[1:] == s[:-1]).double().mean().item()
    assert abs(neighbours - 1 / 8) < 4 * math.sqrt(1 / 8 * 7 / 8 / 1000)


def test_the_order_revealed_does_not_depend_on_the_rows_beside():
    """A row with 2 positions, T = 4, alone and beside one with 6: the same sets at the same step numbers.

    The step number names the noise of a fresh latent, so equal order alone is not enough.
    """
    maskable = torch.zeros(2, 1, 6, dtype=torch.bool)
    maskable[0, 0, [1, 4]] = True
    maskable[1] = True
    u = noise_for(7, 2, 1, 6)
    for law, steps in itertools.product(LAWS, (1, 2, 4, 6, 9, INF)):
        together, _ = reveal_steps(u, maskable, steps, law)
        for row in (0, 1):
            alone, _ = reveal_steps(u[row : row + 1], maskable[row : row + 1], steps, law)
            assert torch.equal(together[row : row + 1], alone), (law, steps, row)


@settings(deadline=None, max_examples=100, derandomize=True)
@given(st.integers(0, 30), st.sampled_from([1, 2, 3, 4, 7, 20, INF]))
def test_laws_of_confidence_reveal_as_many_as_balanced(n, steps):
    total = max(1, n) if steps == INF else steps
    left = [int(masked_before(k, steps, torch.tensor([n]))) for k in range(total, -1, -1)]
    assert left[0] == n
    assert left[-1] == 0
    numbers = [a - b for a, b in itertools.pairwise(left) if a != b]
    assert numbers == (revealed_numbers(n, steps) if n else [])
    if n:
        u = noise_for(1, 1, 1, n)
        s, _ = reveal_steps(u, torch.ones(1, 1, n, dtype=torch.bool), steps, "balanced")
        assert [int((s <= k).sum()) for k in range(total, 0, -1)] == left[:-1]  # at the same numbers of steps


@settings(deadline=None, max_examples=100, derandomize=True)
@given(maskables(), st.integers(0, 99), st.data())
def test_highest_chooses_so_many_of_the_highest(among, seed, data):
    among = among.flatten(0, 1)
    priority = noise_for(seed, *among.shape).mul(4).floor()  # with ties
    count = torch.tensor([data.draw(st.integers(0, int(row.sum()))) for row in among])
    chosen = highest(priority, among, count)
    assert torch.equal(chosen.sum(-1), count)
    assert not (chosen & ~among).any()
    for p, of, out in zip(priority, chosen, among & ~chosen, strict=True):
        if of.any() and out.any():
            assert p[of].min() >= p[out].max()
