import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import enumerate_paths, subsets

from vmd_scale.diffusion.corruption import (
    INDEX_MULTIPLE,
    choose_steps,
    corrupt,
    masked_index,
    masked_share,
    stratified,
)
from vmd_scale.diffusion.noise import Noise, Stream
from vmd_scale.diffusion.paths import RANDOM_LAWS as LAWS

INF = math.inf
MASK = 99


def corrupt_many(count, maskable, steps, law, seed=0):
    """`count` copies of a row of one group: times on an even grid (an exact integral over time) and random paths."""
    length = len(maskable)
    rows = torch.arange(count)
    u_time = ((rows.double() + 0.5) / count)[:, None]
    u_path = Noise(seed).uniform(Stream.PATH, 0, rows, (1, length))
    clean = torch.arange(length).expand(count, length)
    t = torch.full((count, 1), float(steps), dtype=torch.float64)
    return corrupt(clean, torch.tensor(maskable).expand(count, length), t, u_time, u_path, law, MASK)


# ---- times


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.integers(1, 3000), st.integers(1, 4), st.integers(0, 50))
def test_times_are_spread_over_the_global_batch(total, groups, step):
    """In each group, one time in each of `total` cells of the circle, at one offset: systematic sampling."""
    u = stratified(Noise(1), step, torch.arange(total), total, groups)
    assert u.shape == (total, groups)
    assert u.dtype == torch.float64
    assert bool(((u > 0) & (u < 1)).all())
    gaps = u.sort(0).values.diff(dim=0) * total
    assert torch.allclose(gaps, torch.ones_like(gaps), atol=1e-6)


def test_blocks_of_a_row_have_independent_times():
    """All pairs of cells of two blocks' times come up over the steps, equally often (chi-square, 24 degrees)."""
    steps = 2000
    u = torch.cat([stratified(Noise(6), s, torch.tensor([3]), 8, 2) for s in range(steps)])
    cells = (u * 5).long()
    counts = torch.bincount(cells[:, 0] * 5 + cells[:, 1], minlength=25).double()
    assert ((counts - steps / 25).square() / (steps / 25)).sum() < 24 + 4 * 48**0.5


@pytest.mark.parametrize("micro", [8, 16, 64])
def test_each_micro_batch_is_evenly_spread(micro):
    """No micro-batch's empirical law is further than 4 rows from uniform: independent times are 6, 8, 16 rows off."""
    for accumulation in (1, 2, 3, 5, 8, 12, 16, 27, 31, 64, 100, 1000):
        total = micro * accumulation
        u = stratified(Noise(2), 0, torch.arange(total), total, 1).view(accumulation, micro).sort(-1).values
        rank = torch.arange(micro)
        discrepancy = torch.maximum(rank + 1 - micro * u, micro * u - rank).max().item()
        assert discrepancy < 4, total


def test_times_do_not_depend_on_the_micro_batch():
    together = stratified(Noise(3), 5, torch.arange(48), 48, 2)
    apart = torch.cat([stratified(Noise(3), 5, torch.arange(i, i + 12), 48, 2) for i in range(0, 48, 12)])
    assert torch.equal(together, apart)
    assert not torch.equal(together, stratified(Noise(3), 6, torch.arange(48), 48, 2))
    assert not torch.equal(together, stratified(Noise(4), 5, torch.arange(48), 48, 2))


@pytest.mark.parametrize(("total", "groups"), [(1, 1), (6, 1), (4, 2), (32, 1)])
def test_every_row_has_a_uniform_time_over_the_draws(total, groups):
    """Else the estimate of a row's bound is biased: a row that always gets large t is scored at large t only."""
    draws = 800
    u = torch.stack([stratified(Noise(4), d, torch.arange(total), total, groups) for d in range(draws)])
    assert (u.mean(0) - 0.5).abs().max().item() < 4.5 * math.sqrt(1 / 12 / draws)
    assert (u.square().mean(0) - 1 / 3).abs().max().item() < 4.5 * math.sqrt(4 / 45 / draws)
    for cell in range(4):
        share = ((u >= cell / 4) & (u < (cell + 1) / 4)).double().mean(0)
        assert (share - 0.25).abs().max().item() < 4.5 * math.sqrt(3 / 16 / draws)


@pytest.mark.parametrize("extreme", [2.0**-53, 1 - 2.0**-53])
def test_no_offset_leaves_the_open_interval(extreme, monkeypatch):
    """Rounding at the last stratum must not give a time of exactly 1 (where 1 / (1 - u) is infinite) or 0."""
    monkeypatch.setattr(Noise, "uniform", lambda *_: torch.full((1, 1), extreme, dtype=torch.float64))
    for total in (1, 2, 3, 512, 1000, 2**20):
        u = stratified(Noise(0), 0, torch.arange(total), total, 1)
        assert bool(((u > 0) & (u < 1)).all()), total


@settings(deadline=None, max_examples=50, derandomize=True)
@given(st.lists(st.sampled_from([1.0, 2.0, 4.0, 64.0, INF]), min_size=1, max_size=5, unique=True))
def test_steps_are_chosen_evenly_and_leave_a_uniform(choices):
    count = 50 * len(choices)
    u = ((torch.arange(count).double() + 0.5) / count)[:, None]
    steps, rest = choose_steps(u, choices)
    assert bool(((rest >= 0) & (rest < 1)).all())
    for choice in choices:
        of_choice = rest[steps == choice].sort().values
        assert torch.allclose(of_choice, (torch.arange(50).double() + 0.5) / 50, atol=1e-9)


def test_the_ends_of_the_uniform_choose_valid_steps():
    edges = torch.tensor([[2.0**-53, 1 / 3, 2 / 3, 1 - 2.0**-53]], dtype=torch.float64)
    steps, rest = choose_steps(edges, (1.0, 5.0, INF))
    assert steps[0, 0] == 1
    assert steps[0, -1] == INF
    assert bool((rest < 1).all())


# ---- masks


@settings(deadline=None, max_examples=100, derandomize=True)
@given(
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 7),
    st.sampled_from([1.0, 2.0, 3.0, 10.0, INF]),
    st.sampled_from(LAWS),
    st.integers(0, 99),
)
def test_the_parts_of_a_corruption_agree(batch, groups, size, steps, law, seed):
    rows = torch.arange(batch)
    maskable = Noise(seed).uniform(Stream.SAMPLE_TOKEN, 0, rows, (groups * size,)) < 0.7
    clean = (Noise(seed).uniform(Stream.SAMPLE_TOKEN, 1, rows, (groups * size,)) * 5).long()
    u_path = Noise(seed).uniform(Stream.PATH, 0, rows, (groups, size))
    u_time = Noise(seed).uniform(Stream.TIME, 0, rows, (groups,))
    c = corrupt(clean, maskable, torch.full_like(u_time, steps), u_time, u_path, law, MASK)
    assert not (c.masked & ~maskable).any()
    assert torch.equal(c.noisy, torch.where(c.masked, MASK, clean))
    flat = c.masked.flatten().nonzero().squeeze(-1)
    assert torch.equal(c.index[: len(flat)], flat)
    assert bool((c.index[len(flat) :] == batch * groups * size).all())
    count = maskable.view(batch, groups, size).sum(-1)
    masked_count = c.masked.view(batch, groups, size).sum(-1)
    assert torch.allclose(c.ratio, masked_count / count.clamp(min=1))
    for value in (c.weight, c.reveals, c.ratio):
        assert value.shape == (batch, groups)
        assert value.dtype == torch.float32
        assert bool(value.isfinite().all())
        assert bool((value >= 0).all())
    assert bool((c.reveals[masked_count == 0] == 0).all())
    if law == "balanced":
        assert bool((masked_count[count > 0] > 0).all())  # no empty steps


def test_groups_are_corrupted_apart():
    rows = torch.arange(64)
    clean, maskable = torch.zeros(64, 8, dtype=torch.int64), torch.ones(64, 8, dtype=torch.bool)
    u_path = Noise(1).uniform(Stream.PATH, 0, rows, (2, 4))
    u_time = stratified(Noise(1), 0, rows, 64, 2)
    for law in LAWS:
        whole = corrupt(clean, maskable, torch.full_like(u_time, 4.0), u_time, u_path, law, MASK)
        for group in (0, 1):
            part = corrupt(
                clean[:, :4],
                maskable[:, :4],
                torch.full((64, 1), 4.0, dtype=torch.float64),
                u_time[:, group : group + 1],
                u_path[:, group : group + 1],
                law,
                MASK,
            )
            assert torch.equal(whole.masked[:, 4 * group : 4 * group + 4], part.masked)
            assert torch.equal(whole.weight[:, group : group + 1], part.weight)
            assert torch.equal(whole.reveals[:, group : group + 1], part.reveals)


@pytest.mark.parametrize("law", LAWS)
def test_the_mask_ratio_covers_all_of_zero_to_one(law):
    """No missing tail: with many positions the share of masked ones is uniform, from almost none to all."""
    c = corrupt_many(4000, (True,) * 200, INF, law)
    ratio = c.ratio.flatten().double().sort().values
    assert (ratio - torch.linspace(0, 1, 4000, dtype=torch.float64)).abs().max().item() < 0.03
    assert ratio[0] <= 0.01
    assert ratio[-1] == 1


@pytest.mark.parametrize("law", LAWS)
def test_few_steps_have_few_mask_ratios(law):
    c = corrupt_many(3000, (True,) * 12, 3, law)
    counts = c.masked.sum(-1).double().view(3, 1000)  # sorted by time: k = 1, 2, 3
    for k in (1, 2, 3):
        of_k = counts[k - 1]
        if law == "balanced":
            assert bool((of_k == 4 * k).all())
        else:
            t = k / 3
            assert abs(of_k.mean().item() - 12 * t) <= 4 * math.sqrt(12 * t * (1 - t) / 1000)
    assert bool((counts[2] == 12).all())  # the first step of the sampler sees masks only


# ---- weights: the identity that makes a bound of one random step


def exact_over_paths(f, positions, steps, law):
    """E_path[sum_i f(i, set that is masked when i is revealed)]."""
    paths = enumerate_paths(len(positions), steps, law)
    total = 0.0
    for path in paths:
        for masked, revealed in path:
            names = tuple(positions[j] for j, m in enumerate(masked) if m)
            total += sum(f[positions[j], names] for j, r in enumerate(revealed) if r)
    return total / len(paths)


def random_function(length, seed):
    generator = torch.Generator().manual_seed(seed)
    f = {}
    for m in subsets(length):
        names = tuple(i for i in range(length) if m[i])
        for i in names:
            f[i, names] = 5 * torch.rand((), generator=generator).item() ** 3
    return f


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("steps", [1, 2, 3, 4, INF])
@pytest.mark.parametrize("maskable", [(True, True, True), (True, False, True), (False, True, False)])
def test_weights_turn_one_step_into_a_whole_path(law, steps, maskable):
    """E[weight * sum_masked f(i, masked)] = E_path[sum_i f(i, masked before i's reveal)] for an arbitrary f."""
    positions = [i for i in range(3) if maskable[i]]
    f = random_function(3, seed=len(positions))
    count = 60_000
    c = corrupt_many(count, maskable, steps, law, seed=1)
    table = torch.zeros(8, dtype=torch.float64)  # sum_masked f, by mask as a binary number
    for m in subsets(3):
        names = tuple(i for i in range(3) if m[i])
        table[sum(2**i for i in names)] = sum(f[i, names] for i in names)
    code = (c.masked * torch.tensor([1, 2, 4])).sum(-1)
    estimates = c.weight.double().squeeze(-1) * table[code]
    expected = exact_over_paths(f, positions, steps, law)
    sigma = estimates.std().item() / math.sqrt(count)
    assert abs(estimates.mean().item() - expected) < 4 * sigma + 1e-9 + 1e-6 * expected
    assert sigma < 0.05 * expected  # the comparison says something


def exact_mask_law(n, steps, law):
    """{mask: (probability, E[weight; mask])} by integrating the definition over time, for one group of n positions."""
    result = {}
    if law == "bernoulli":
        times = (
            [(i + 0.5) / 4000 for i in range(4000)] if steps == INF else [k / steps for k in range(1, int(steps) + 1)]
        )
        for m in subsets(n):
            p = [t ** sum(m) * (1 - t) ** (n - sum(m)) for t in times]
            result[m] = (sum(p) / len(p), sum(x / t for x, t in zip(p, times, strict=True)) / len(p))
        return result
    total = min(steps, n)
    for m in subsets(n):
        p = weight = 0.0
        for k in range(1, int(total) + 1):
            now, later = k * n // total, (k - 1) * n // total
            if sum(m) == now:
                p += 1 / math.comb(n, int(now)) / total
                weight += (now - later) / now / math.comb(n, int(now))
        result[m] = (p, weight)
    return result


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("steps", [1, 2, 3, 5, INF])
def test_masks_and_weights_against_closed_forms(law, steps):
    """P(mask) and E[weight; mask], one by one: masks of the same size are equally likely, sizes have the law's."""
    count = 40_000
    c = corrupt_many(count, (True,) * 3, steps, law, seed=2)
    for m, (probability, weight) in exact_mask_law(3, steps, law).items():
        hit = (c.masked == torch.tensor(m)).all(-1)
        share = hit.double().mean().item()
        assert abs(share - probability) <= 4 * math.sqrt(probability * (1 - probability) / count) + 1e-4
        estimates = hit.double() * c.weight.double().squeeze(-1)
        assert abs(estimates.mean().item() - weight) <= 4 * estimates.std().item() / math.sqrt(count) + 2e-3 * weight


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("steps", [1, 2, 3, 5, INF])
@pytest.mark.parametrize("maskable", [(True, True, True), (True, False, True), (False, False, False)])
def test_reveals_counts_the_steps_that_reveal_something(law, steps, maskable):
    """E[reveals * g(masked)] = E_path[sum over steps that reveal something of g(masked before)], for an arbitrary g."""
    positions = [i for i in range(3) if maskable[i]]
    generator = torch.Generator().manual_seed(3)
    g = torch.rand(8, generator=generator, dtype=torch.float64) + 0.5
    paths = enumerate_paths(len(positions), steps, law)
    expected = sum(
        g[sum(2 ** positions[j] for j, m in enumerate(masked) if m)].item() for path in paths for masked, _ in path
    ) / len(paths)
    count = 40_000
    c = corrupt_many(count, maskable, steps, law, seed=3)
    estimates = c.reveals.double().squeeze(-1) * g[(c.masked * torch.tensor([1, 2, 4])).sum(-1)]
    sigma = estimates.std().item() / math.sqrt(count)
    assert abs(estimates.mean().item() - expected) <= 4 * sigma + 1e-6
    assert c.reveals.double().mean().item() <= len(positions) + 4 * c.reveals.std().item() / math.sqrt(count) + 1e-6


def test_the_weighted_count_is_the_number_of_positions():
    """f = 1: every position is paid exactly once. Balanced at T that divides n does so without any variance."""
    for law, steps in itertools.product(LAWS, (1, 2, 4, INF)):
        c = corrupt_many(8000, (True,) * 4, steps, law)
        paid = c.weight.double().squeeze(-1) * c.masked.sum(-1)
        if law == "balanced":
            assert torch.allclose(paid, torch.full_like(paid, 4.0), atol=1e-6)
        assert abs(paid.mean().item() - 4) <= 4 * paid.std().item() / math.sqrt(8000) + 1e-6


# ---- helpers


@settings(deadline=None, max_examples=50, derandomize=True)
@given(st.integers(1, 5), st.integers(1, 60), st.floats(0, 1), st.integers(0, 9))
def test_masked_index_lists_every_masked_position_once(batch, length, share, seed):
    masked = Noise(seed).uniform(Stream.PATH, 0, torch.arange(batch), (length,)) < share
    index = masked_index(masked)
    assert len(index) <= batch * length
    assert len(index) % INDEX_MULTIPLE == 0 or len(index) == batch * length
    real = index[index < batch * length]
    rebuilt = torch.zeros(batch * length, dtype=torch.bool)
    rebuilt[real] = True
    assert len(set(real.tolist())) == len(real)
    assert torch.equal(rebuilt.view(batch, length), masked)


def test_masked_share_of_nothing_is_zero():
    masked = torch.tensor([[True, False, False, False]])
    maskable = torch.tensor([[True, True, False, False]])
    assert masked_share(masked, maskable, 2).tolist() == [[0.5, 0.0]]
