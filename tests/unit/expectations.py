"""Means over everything random: without error, by noise that meets every case, or with a known one, by copies."""

import copy
import itertools
import math

import torch

from vmd_scale.diffusion.likelihood import Rows
from vmd_scale.diffusion.noise import Stream


class EveryNoise:
    """Stands in for `Noise`: the copies of a row meet every path and every z of a grid, so that means are exact.

    Copy number c of a row has the weight `weights[c]`; there are `count` copies. All groups of a copy have the same
    noise: what is bounded group by group has its exact mean by group.
    """

    def __init__(self, u_paths, points=1, latents=1, time=0.5):
        """`u_paths`: [P, L / G], equally likely; `latents`: how many steps draw a z of their own; `time`: of all."""
        self.u_paths, self.time, self.latents = u_paths, time, latents
        self.grid = torch.linspace(-6, 6, points, dtype=torch.float64) if points > 1 else torch.zeros(1)
        of_z = torch.softmax(-0.5 * self.grid.double() ** 2, 0)
        joint = of_z
        for _ in range(latents - 1):
            joint = (joint[:, None] * of_z).flatten()
        self.weights = (joint[:, None] / len(u_paths)).expand(-1, len(u_paths)).flatten()
        self.count = len(self.weights)

    def uniform(self, stream, step, rows, shape):
        if stream == Stream.TIME:
            return torch.full((len(rows), *shape), self.time, dtype=torch.float64)
        assert stream == Stream.PATH
        return self.u_paths[rows % self.count % len(self.u_paths)].unsqueeze(1).expand(-1, *shape)

    def normal(self, stream, step, rows, shape):
        assert stream == Stream.LATENT
        assert shape[1] == 1
        points, of_z = len(self.grid), rows % self.count // len(self.u_paths)
        which = max(0, (step & 0xFFFFFFFF) - 1) if self.latents > 1 else 0  # a fresh one is named by its step
        assert which < self.latents
        return self.grid[of_z // points**which % points].float().view(len(rows), 1, 1).expand(-1, *shape)


class EveryPair:
    """Noise of two samples for each row: its copies meet every pair of those of an `EveryNoise`, one z a path."""

    def __init__(self, every):
        self.every, self.count = every, every.count**2
        self.weights = (every.weights[:, None] * every.weights).flatten()

    def uniform(self, stream, step, rows, shape):
        return self.every.uniform(stream, step, self._of_sample(step, rows), shape)

    def normal(self, stream, step, rows, shape):
        return self.every.normal(stream, step, self._of_sample(step, rows), shape)

    def _of_sample(self, sample, rows):
        assert sample in (0, 1)
        pair = rows % self.count
        return pair % self.every.count if sample else pair // self.every.count


def steady(model, every):
    """The model with one posterior for all rows, and the z that it meets in `every`.

    On the very same grid sums agree to rounding, even where the order of the positions, hence the integrand, jumps.
    """
    model = copy.deepcopy(model)
    if model.encoder is None:
        return model, None
    with torch.no_grad():
        model.encoder.out.weight.zero_()
        model.encoder.out.bias.copy_(torch.tensor([0.3, 0.2]))
    return model, 0.3 + math.exp(0.2) * every.grid


def every_path(length, steps, law):
    """Uniforms, equally likely, that lead to every path of a law."""
    if law == "bernoulli" and steps != math.inf:
        return (torch.tensor(list(itertools.product(range(int(steps)), repeat=length))).double() + 0.5) / steps
    orders = torch.tensor(list(itertools.permutations(range(length))))
    return (orders.double() + 0.5) / length


def copies(rows, count, maskable=None):
    """`count` copies of each row, each copy with a number, hence noise, of its own."""
    clean = rows.repeat_interleave(count, 0)
    maskable = torch.ones_like(clean, dtype=torch.bool) if maskable is None else maskable.expand_as(clean)
    return Rows(clean, maskable, None, torch.arange(len(clean)))


def mean_weight(logs, every):
    """exp(log weight) [copies, G] of `EveryNoise`, averaged over the copies of each row, for all of its groups."""
    by_row = logs.exp().unflatten(0, (-1, every.count))
    return (by_row * every.weights[:, None]).sum(1).prod(-1)


def mean_and_error(values, count):
    """Mean over the copies of each row, and its standard error."""
    per_row = values.view(-1, count)
    return per_row.mean(1), per_row.std(1) / math.sqrt(count)


def assert_drawn_from(drawn, rows, probabilities):
    """Chi-square: rows drawn [N, L] against the probabilities of all the rows there are."""
    vocab = int(max(drawn.max(), rows.max())) + 1
    powers = vocab ** torch.arange(rows.shape[1])
    code = {int(c): n for n, c in enumerate((rows * powers).sum(-1))}
    observed = torch.zeros(len(rows), dtype=torch.float64)
    for c, number in zip(*(drawn * powers).sum(-1).unique(return_counts=True), strict=True):
        observed[code[int(c)]] = number  # a KeyError: a row that cannot be
    expected = probabilities * len(drawn)
    assert bool((observed[expected == 0] == 0).all())
    small = expected < 5  # rare rows are counted together
    if small.any():
        observed = torch.cat((observed[~small], observed[small].sum()[None]))
        expected = torch.cat((expected[~small], expected[small].sum()[None]))
    statistic = ((observed - expected).square() / expected.clamp(min=1e-9)).sum().item()
    freedom = len(expected) - 1
    assert statistic < freedom + 4 * math.sqrt(2 * freedom) + 4, (statistic, freedom)
