"""The published estimate against its own definition, enumerated; and that it differs from a bound where it should."""

import itertools
import math

import numpy as np
import pytest
import torch
from tiny_models import tiny_model

from vmd_scale.diffusion.compat import compat_estimate
from vmd_scale.diffusion.likelihood import Rows, elbo
from vmd_scale.diffusion.noise import Noise
from vmd_scale.diffusion.sampler import Sampler

LENGTH, ROWS = 3, 20_000


def enumerated(model, row: list[int], counted: list[bool], epsilon: float) -> float:
    """E over t ~ U(epsilon, 1] and masks with probability (1 - epsilon) t of 1/t sum of the counted masked NLL."""
    t = np.linspace(epsilon, 1, 400_001)[1:]
    clean, total = torch.tensor([row]), 0.0
    for masked in itertools.product((False, True), repeat=LENGTH):
        if not any(masked):
            continue
        on = torch.tensor([masked])
        noisy = clean.masked_fill(on, model.architecture.mask_id)
        with torch.no_grad():
            logits = model.denoiser.logits(model.denoiser(noisy, None, None, on.float().mean(-1, keepdim=True), clean))
        log_p = logits[..., : model.architecture.vocab_size].double().log_softmax(-1)[0]
        nll = -sum(float(log_p[i, row[i]]) for i in range(LENGTH) if masked[i] and counted[i])
        p, n = (1 - epsilon) * t, sum(masked)
        total += nll * float(np.mean(p**n * (1 - p) ** (LENGTH - n) / t))
    return total


@pytest.fixture(scope="module")
def model():
    return tiny_model(latent_width=0, row_length=LENGTH)


@pytest.mark.parametrize(("interval", "epsilon"), [("full", 1e-9), ("mdlm_compat", 1e-3)])
@pytest.mark.parametrize("counted", [[True, True, True], [True, True, False]])
def test_the_estimate_is_what_it_is_defined_as(model, interval: str, epsilon: float, counted: list[bool]) -> None:
    row = [0, 2, 1]
    clean = torch.tensor([row]).expand(ROWS, -1)
    all_of_them = torch.ones_like(clean, dtype=torch.bool)
    rows = Rows(clean, all_of_them, None, torch.arange(ROWS))
    nats = compat_estimate(model, rows, torch.tensor(counted).expand(ROWS, -1), interval, Noise(3), ROWS).numpy()
    error = nats.std() / math.sqrt(ROWS)
    assert nats.mean() == pytest.approx(enumerated(model, row, counted, epsilon), abs=4 * error)


def test_on_the_whole_interval_it_is_the_elbo(model) -> None:
    """The same noise gives the same states: the two may differ by rounding only."""
    clean = torch.randint(0, 3, (64, LENGTH), generator=torch.Generator().manual_seed(0))
    everything = torch.ones_like(clean, dtype=torch.bool)
    rows = Rows(clean, everything, None, torch.arange(64))
    bound = elbo(model, rows, Sampler(math.inf, law="bernoulli"), Noise(1), 64)
    estimate = compat_estimate(model, rows, everything, "full", Noise(1), 64)
    torch.testing.assert_close(estimate, bound, rtol=1e-5, atol=1e-6)
    assert not torch.equal(compat_estimate(model, rows, everything, "mdlm_compat", Noise(1), 64), bound)


def test_with_a_latent_its_kl_is_counted_once() -> None:
    model = tiny_model(latent_width=1, row_length=LENGTH)
    clean = torch.randint(0, 3, (64, LENGTH), generator=torch.Generator().manual_seed(0))
    everything = torch.ones_like(clean, dtype=torch.bool)
    rows = Rows(clean, everything, None, torch.arange(64))
    bound = elbo(model, rows, Sampler(math.inf, law="bernoulli"), Noise(1), 64)
    torch.testing.assert_close(
        compat_estimate(model, rows, everything, "full", Noise(1), 64), bound, rtol=1e-5, atol=1e-6
    )
    nothing = compat_estimate(model, rows, ~everything, "full", Noise(1), 64)
    with torch.no_grad():
        kl = model.encode(clean, everything, None).kl().double().squeeze(-1)
    torch.testing.assert_close(nothing, kl, rtol=1e-5, atol=1e-6)
