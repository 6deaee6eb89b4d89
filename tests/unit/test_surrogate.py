"""The published objective trains, and bounds nothing; the bounds do."""

import functools
import math

import torch
from expectations import copies
from tiny_models import architecture

from vmd_scale.diffusion.likelihood import elbo, importance_weighted, vmd_surrogate
from vmd_scale.diffusion.noise import Noise
from vmd_scale.diffusion.objective import Surrogate
from vmd_scale.diffusion.sampler import Sampler
from vmd_scale.model import VMD

INF = math.inf


@functools.cache
def coupled_model():
    """A VMD trained by the published objective on (k, k + 1 mod 10), uniform over k: entropy ln 10."""
    torch.manual_seed(0)
    a = architecture(
        vocab_size=10, row_length=2, width=32, condition_width=32, encoder_width=32, latent_width=2, attention="sdpa"
    )
    model = VMD(a)
    objective = Surrogate(law="balanced", groups=1, latent_width=2, mask_id=a.mask_id, noise=Noise(0))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, betas=(0.9, 0.98))
    batch, total = 80, 300
    for step in range(total):
        k = (torch.arange(batch) + step) % 10
        clean = torch.stack((k, (k + 1) % 10), dim=1)
        x = objective.prepare(clean, torch.ones_like(clean, dtype=torch.bool), None, step, torch.arange(batch), batch)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * min(1, 2 * (1 - step / total))
        optimizer.zero_grad()
        (objective(model, x, annealing=min(1.0, step / 150)).total / batch).backward()
        optimizer.step()
    return model.eval()


def test_the_surrogate_breaks_the_bound_and_the_bounds_do_not():
    """Two tokens that determine each other hold ln 10 = 2.303 nats; the surrogate pays for z half of the time."""
    model, entropy, count = coupled_model(), math.log(10), 60
    k = torch.arange(10)
    rows = copies(torch.stack((k, (k + 1) % 10), dim=1), count)

    surrogate = vmd_surrogate(model, rows, Noise(1), len(rows.clean), "balanced")
    assert 1.0 < surrogate.mean().item() < 1.7
    assert surrogate.mean().item() + 5 * surrogate.std().item() / math.sqrt(len(surrogate)) < entropy
    for s in (Sampler(1), Sampler(2), Sampler(2, law="bernoulli"), Sampler(INF)):
        for bound in (
            elbo(model, rows, s, Noise(2), len(rows.clean)),
            importance_weighted(model, rows, s, Noise(3), samples=1),
            importance_weighted(model, rows, s, Noise(4), samples=16),
        ):
            error = bound.std().item() / math.sqrt(len(bound))
            assert bound.mean().item() > entropy - 3 * error, s
    tight = importance_weighted(model, rows, Sampler(1), Noise(5), samples=16).mean().item()
    assert tight < 2.303 + 1.5  # the latent does say which pair it is: a product of unigrams has 2 ln 10 = 4.6
