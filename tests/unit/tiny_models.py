"""Models so small that everything about them can be enumerated, and the enumeration, written apart from the package.

Nothing here calls `vmd_scale.diffusion`: paths, likelihoods and bounds are computed from their definitions.
"""

import functools
import itertools
import math
from collections import defaultdict
from typing import NamedTuple

import torch
from torch.distributions import Normal, kl_divergence

from vmd_scale.model import VMD, Architecture

torch.set_num_threads(1)

CONFIDENCE = ("top_prob", "margin", "entropy")


def architecture(**changes):
    values = {
        "vocab_size": 3,
        "row_length": 3,
        "groups": 1,
        "layers": 1,
        "width": 8,
        "heads": 2,
        "mlp_ratio": 2.0,
        "mlp": "gelu",
        "norm": "layernorm",
        "dropout": 0.0,
        "tie_embeddings": False,
        "time_conditioning": False,
        "attention": "reference",
        "condition_width": 8,
        "latent_width": 1,
        "injection": "adaln",
        "encoder_layers": 1,
        "encoder_width": 8,
    }
    return Architecture(**{**values, **changes})


def loud(model, seed=0):
    """Random weights so large that predictions are far from uniform and hear z, each other and their position."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() < 2:
                std = 0.3 if "bias" in name else 0.0
            elif "embedding" in name or "position" in name or "pattern" in name:
                std = 1.0
            else:
                std = (1.8 if "latent_to" in name or "head" in name else 1.1) / math.sqrt(parameter.shape[1])
            if std:
                parameter.normal_(0, std, generator=generator)
        if model.encoder is not None:  # near the prior and a little wider: importance weights stay bounded
            out, width = model.encoder.out, model.architecture.latent_width
            out.weight.mul_(0.4)
            out.weight[width:].mul_(0.3)
            out.bias[width:] = 0.3
        if model.prior_network is not None:  # narrower than the posterior, for the same reason
            out, width = model.prior_network.out, model.architecture.latent_width
            out.weight.mul_(0.6)
            out.weight[width:].mul_(0.3)
            out.bias[width:] = -0.3
    return model.eval()


def tiny_model(seed=0, **changes):
    torch.manual_seed(seed)
    return loud(VMD(architecture(**changes)), seed)


def sequences(vocab, length):
    return torch.tensor(list(itertools.product(range(vocab), repeat=length)))


def subsets(n):
    return [m for m in itertools.product((False, True), repeat=n) if any(m)]


def enumerate_paths(n, steps, law):
    """All paths of n positions, equally likely: each a list, in sampling order, of (masked before, revealed)."""
    paths = []
    if law == "bernoulli" and steps != math.inf:
        for s in itertools.product(range(1, int(steps) + 1), repeat=n):
            path = [(tuple(i <= k for i in s), tuple(i == k for i in s)) for k in range(int(steps), 0, -1)]
            paths.append(path)
    else:
        total = n if steps == math.inf else int(steps)
        for order in itertools.permutations(range(n)):
            path = []
            for k in range(total, 0, -1):
                now, later = order[: k * n // total], order[: (k - 1) * n // total]
                masked = tuple(i in now for i in range(n))
                path.append((masked, tuple(i in now and i not in later for i in range(n))))
            paths.append(path)
    return [[step for step in path if any(step[1])] for path in paths]


def revealed_numbers(n, steps):
    """How many of n positions are revealed at each step that reveals any, in sampling order."""
    total = n if steps == math.inf else int(steps)
    left = [k * n // total for k in range(total, -1, -1)]
    return [a - b for a, b in itertools.pairwise(left) if a > b]


class State(NamedTuple):
    """What a model says where some positions are masked; [rows, z, free positions], float64."""

    log_p: torch.Tensor  # log p(x0_i | xt, z)
    sureness: dict  # of the prediction, by law of confidence
    weights: torch.Tensor  # of each z, [rows, z]


def sureness(log_p):
    """By the laws' definitions, the larger the surer, from log p [..., V]."""
    p = log_p.exp().sort(dim=-1).values
    return {"top_prob": p[..., -1], "margin": p[..., -1] - p[..., -2], "entropy": (p * p.log()).sum(-1)}


class Enumeration:
    """Exact likelihoods and bounds of every sequence of a model with at most one-dimensional latents, by group.

    Integrals over z are sums on a grid (the trapezoid rule converges exponentially for smooth integrands; where the
    order of the positions follows z, the integrand jumps, and the grid has to be fine).
    """

    def __init__(self, model, points=257, given=None, grid=None):
        """`given`: {position: token}, never masked; the sequences are those that agree with it. `grid`: of z."""
        self.model, self.a, given = model, model.architecture, given or {}
        rows = sequences(self.a.vocab_size, self.a.row_length)
        for position, token in given.items():
            rows = rows[rows[:, position] == token]
        self.rows = rows
        self.size = self.a.row_length // self.a.groups
        places = torch.arange(self.a.row_length).view(self.a.groups, -1).tolist()
        self.free = [[i for i in of_group if i not in given] for of_group in places]
        self.maskable = torch.tensor([i not in given for i in range(self.a.row_length)])
        if self.a.latent_width:
            self.grid = torch.linspace(-8, 8, points, dtype=torch.float64) if grid is None else grid
        else:
            self.grid = torch.zeros(1, dtype=torch.float64)
        # One z for the whole path comes from the prior that sees what was given; a fresh one from what is visible.
        places = range(self.a.groups)
        fixed = [self._tables(group, lambda group, masked: self._everywhere(group, None)) for group in places]
        apart = model.prior_network is not None
        fresh = [self._tables(group, self._everywhere) for group in places] if apart else fixed
        self.under_prior = {"fixed": fixed, "fresh": fresh}

    def _everywhere(self, group, masked):
        """The grid of z, and the weights that the prior gives it."""
        z = self.grid.expand(len(self.rows), -1)
        return z, self.prior(group, masked).log_prob(z).softmax(-1)

    def _noisy(self, group, masked):
        """The rows before a step: what `masked` says of the free positions of a group (None: all), and the pattern."""
        pattern = torch.zeros(self.a.row_length, dtype=torch.bool)
        pattern[self.free[group]] = torch.tensor(masked or (True,) * len(self.free[group]))
        noisy = self.rows.masked_fill(pattern, self.a.mask_id)
        noisy[:, (group + 1) * self.size :] = torch.where(self.maskable, self.a.mask_id, noisy)[
            :, (group + 1) * self.size :
        ]
        return noisy, pattern.expand_as(noisy)

    @torch.no_grad()
    def prior(self, group, masked):
        """p(z | what is visible), for every row."""
        if self.model.prior_network is None:
            zero = torch.zeros(len(self.rows), 1, dtype=torch.float64)
            return Normal(zero, torch.ones_like(zero))
        p = self.model.prior_network(*self._noisy(group, masked), None)
        return Normal(p.mean[:, group].double(), p.log_std[:, group].double().exp())

    @torch.no_grad()
    def posterior(self, group, masked):
        """q(z | x0, m), for every row; None stands for everything, in all groups."""
        pattern = self.maskable.expand_as(self.rows) if masked is None else self._noisy(group, masked)[1]
        q = self.model.encoder(self.rows, pattern, None)
        return Normal(q.mean[:, group].double(), q.log_std[:, group].double().exp())

    @torch.no_grad()
    def _tables(self, group, z_of):
        """{masked set of the group's free positions: State}."""
        tables, free = {}, self.free[group]
        for masked in subsets(len(free)):
            noisy, _ = self._noisy(group, masked)
            z_values, weights = z_of(group, masked)
            count = z_values.shape[1]
            noisy = noisy.repeat_interleave(count, 0)
            z = None
            if self.a.latent_width:
                z = torch.zeros(len(noisy), self.a.groups, 1)
                z[:, group, 0] = z_values.flatten().float()
            ratio = torch.full((len(noisy), self.a.groups), sum(masked) / len(free))
            log_p = self.model.logits(noisy, z, None, ratio)[:, free].double().log_softmax(-1)
            targets = self.rows[:, free].repeat_interleave(count, 0)
            shape = (len(self.rows), count, len(free))
            of_targets = log_p.gather(-1, targets.unsqueeze(-1)).view(shape)
            sure = {law: s.view(shape) for law, s in sureness(log_p).items()}
            tables[masked] = State(of_targets, sure, weights)
        return tables

    def likelihood(self, steps, latent, law):
        """p_T(x0) of every sequence."""
        result = torch.ones(len(self.rows), dtype=torch.float64)
        for tables in self.under_prior[latent]:
            walk = self._by_confidence if law in CONFIDENCE else self._by_chance
            result *= walk(tables, steps, latent, law)
        return result

    def _by_chance(self, tables, steps, latent, law):
        paths = enumerate_paths(len(next(iter(tables))), steps, law)
        result = torch.zeros(len(self.rows), dtype=torch.float64)
        for path in paths:
            p = torch.stack([(tables[m].log_p * torch.tensor(r)).sum(-1).exp() for m, r in path])  # [steps, rows, z]
            weights = torch.stack([tables[m].weights for m, _ in path])
            if latent == "fixed":
                result += (p.prod(0) * weights[0]).sum(-1)
            else:
                result += (p * weights).sum(-1).prod(0)
        return result / len(paths)

    def _by_confidence(self, tables, steps, latent, law):
        """The probability of having come, by the tokens of each row, to each set of masked positions."""
        n = len(next(iter(tables)))
        start = tables[(True,) * n].weights
        reached = {(True,) * n: torch.ones_like(start)}
        for number in revealed_numbers(n, steps):
            after = defaultdict(lambda: torch.zeros_like(start))
            for masked, mass in reached.items():
                log_p, sure, weights = tables[masked].log_p, tables[masked].sureness[law], tables[masked].weights
                for revealed in itertools.product((False, True), repeat=n):
                    left = tuple(m and not r for m, r in zip(masked, revealed, strict=True))
                    if sum(revealed) != number or sum(left) != sum(masked) - number:
                        continue
                    inside, outside = torch.tensor(revealed), torch.tensor(left)
                    surer = sure.masked_fill(~inside, math.inf).amin(-1) > sure.masked_fill(~outside, -math.inf).amax(
                        -1
                    )
                    here = mass * surer * (log_p * inside).sum(-1).exp()
                    after[left] += here if latent == "fixed" else (here * weights).sum(-1, keepdim=True)
            reached = after
        (mass,) = reached.values()
        return (mass * start).sum(-1)

    def _around(self, normal):
        """A grid of z around each row's own normal distribution, and its weights."""
        z = normal.mean + normal.stddev * self.grid
        return z, normal.log_prob(z).softmax(-1)

    def negative_elbo(self, steps, latent, law):
        """Of every sequence. (Posteriors of a fresh z hear the masks of all blocks: those of one group only.)"""
        assert latent == "fixed" or self.a.groups == 1
        return sum(self._negative_elbo(group, steps, latent, law) for group in range(self.a.groups))

    def _negative_elbo(self, group, steps, latent, law):
        n = len(self.free[group])
        paths, sets = enumerate_paths(n, steps, law), subsets(n)
        tables, kls = self.under_prior[latent][group], dict.fromkeys(sets, 0.0)
        if self.a.latent_width:
            seen = {m: m if latent == "fresh" else None for m in sets}
            kls = {
                m: kl_divergence(self.posterior(group, s), self.prior(group, s)).squeeze(-1) for m, s in seen.items()
            }
            tables = self._tables(group, lambda group, m: self._around(self.posterior(group, seen[m])))
        result = torch.zeros(len(self.rows), dtype=torch.float64)
        for path in paths:
            for masked, revealed in path:
                result -= ((tables[masked].log_p * torch.tensor(revealed)).sum(-1) * tables[masked].weights).sum(-1)
                if latent == "fresh":
                    result += kls[masked]
        return result / len(paths) + (kls[sets[-1]] if latent == "fixed" else 0)

    def negative_iw2(self, steps, law):
        """E[-log of the mean of two importance weights] of every sequence, z fixed, over all pairs of paths and z."""
        return sum(self._negative_iw2(group, steps, law) for group in range(self.a.groups))

    def _negative_iw2(self, group, steps, law):
        paths = enumerate_paths(len(self.free[group]), steps, law)
        tables, log_ratio = self.under_prior["fixed"][group], torch.zeros(len(self.rows), 1)
        if self.a.latent_width:
            q = self.posterior(group, None)
            z, _ = self._around(q)
            log_ratio = self.prior(group, None).log_prob(z) - q.log_prob(z)
            tables = self._tables(group, lambda group, m: self._around(q))
        of_paths = [sum((tables[m].log_p * torch.tensor(r)).sum(-1) for m, r in path) for path in paths]
        logs = torch.cat([log_ratio + of_path for of_path in of_paths], dim=1)  # [rows, paths x z]
        weights = next(iter(tables.values())).weights.repeat(1, len(paths)) / len(paths)
        log_mean = torch.logaddexp(logs[:, :, None], logs[:, None]) - math.log(2)
        return -torch.einsum("ri, rij, rj -> r", weights, log_mean, weights)


MODELS = {
    "vmd": {"seed": 14},
    "vmd, time": {"seed": 3, "time_conditioning": True, "norm": "rmsnorm", "mlp": "swiglu"},
    "vmd, add": {"seed": 4, "injection": "add", "tie_embeddings": True},
    "mdm": {"seed": 6, "latent_width": 0},
    "blocks": {"seed": 9, "vocab_size": 2, "row_length": 4, "groups": 2},
    "blocks, add": {"seed": 8, "vocab_size": 2, "row_length": 4, "groups": 2, "injection": "add"},
}


@functools.cache
def model_of(name):
    return tiny_model(**MODELS[name])


@functools.cache
def exact_of(name):
    return Enumeration(model_of(name))
