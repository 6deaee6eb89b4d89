"""Models so small that everything about them can be enumerated, and the enumeration, written apart from the package.

Nothing here calls `vmd_scale.diffusion`: paths, likelihoods and bounds are computed from their definitions.
"""

import itertools
import math

import torch

from vmd_scale.model import VMD, Architecture

torch.set_num_threads(1)


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


class Enumeration:
    """Exact likelihoods and bounds of every sequence of a model with at most one-dimensional latents, by group.

    Integrals over z are sums on a grid (the trapezoid rule converges exponentially for smooth integrands).
    """

    def __init__(self, model, points=257):
        self.model, self.a = model, model.architecture
        self.rows = sequences(self.a.vocab_size, self.a.row_length)
        self.size = self.a.row_length // self.a.groups
        if self.a.latent_width:
            self.grid = torch.linspace(-8, 8, points, dtype=torch.float64)
            self.weights = torch.softmax(-0.5 * self.grid**2, 0)
        else:
            self.grid, self.weights = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
        everywhere = self.grid.expand(len(self.rows), -1)
        self.under_prior = [self._tables(group, lambda masked: everywhere) for group in range(self.a.groups)]

    @torch.no_grad()
    def _tables(self, group, z_of):
        """{masked set of the group: log p(x0_i | xt, z), float64 [rows, z, positions of the group]}."""
        tables = {}
        inside = slice(group * self.size, (group + 1) * self.size)
        for masked in subsets(self.size):
            noisy = self.rows.clone()
            noisy[:, inside] = noisy[:, inside].masked_fill(torch.tensor(masked), self.a.mask_id)
            noisy[:, inside.stop :] = self.a.mask_id
            z_values = z_of(masked)
            count = z_values.shape[1]
            noisy = noisy.repeat_interleave(count, 0)
            z = None
            if self.a.latent_width:
                z = torch.zeros(len(noisy), self.a.groups, 1)
                z[:, group, 0] = z_values.flatten().float()
            ratio = torch.full((len(noisy), self.a.groups), sum(masked) / self.size)
            logits = self.model.logits(noisy, z, None, ratio)
            targets = self.rows.repeat_interleave(count, 0)
            log_p = logits.double().log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
            tables[masked] = log_p[:, inside].view(len(self.rows), count, self.size)
        return tables

    def likelihood(self, steps, latent, law):
        """p_T(x0) of every sequence."""
        result = torch.ones(len(self.rows), dtype=torch.float64)
        for table in self.under_prior:
            paths = enumerate_paths(self.size, steps, law)
            of_group = torch.zeros_like(result)
            for path in paths:
                logs = [(table[m] * torch.tensor(r)).sum(-1) for m, r in path]  # [rows, z] for each step
                if latent == "fixed":
                    of_group += torch.stack(logs).sum(0).exp() @ self.weights
                else:
                    of_group += torch.stack([step.exp() @ self.weights for step in logs]).prod(0)
            result *= of_group / len(paths)
        return result

    @torch.no_grad()
    def negative_elbo(self, steps, latent, law):
        """Of every sequence, for one group."""
        assert self.a.groups == 1
        paths = enumerate_paths(self.size, steps, law)
        everything = (True,) * self.size
        means, stds, kls = {}, {}, dict.fromkeys(subsets(self.size), 0.0)
        if self.a.latent_width:
            for m in subsets(self.size):
                pattern = torch.tensor(m if latent == "fresh" else everything).expand_as(self.rows)
                q = self.model.encode(self.rows, pattern)
                means[m], stds[m] = q.mean.double().view(-1, 1), q.log_std.double().exp().view(-1, 1)
                normal = torch.distributions.Normal(means[m], stds[m])
                standard = torch.distributions.Normal(torch.zeros_like(means[m]), torch.ones_like(stds[m]))
                kls[m] = torch.distributions.kl_divergence(normal, standard).squeeze(-1)
            table = self._tables(0, lambda m: means[m] + stds[m] * self.grid)
        else:
            table = self.under_prior[0]
        result = torch.zeros(len(self.rows), dtype=torch.float64)
        for path in paths:
            for masked, revealed in path:
                result -= (table[masked] * torch.tensor(revealed)).sum(-1) @ self.weights
                if latent == "fresh":
                    result += kls[masked]
        return result / len(paths) + (kls[everything] if latent == "fixed" else 0)
