"""The posterior against its prior, standard or conditional on what is visible."""

import functools
import itertools
import math

import pytest
import torch
from expectations import assert_drawn_from, copies, mean_and_error
from model_variants import close, inputs, variant
from tiny_models import Enumeration, tiny_model
from torch.distributions import Normal, kl_divergence

from vmd_scale.diffusion.likelihood import elbo, importance_weighted, path_log_weight
from vmd_scale.diffusion.noise import Noise
from vmd_scale.diffusion.paths import RANDOM_LAWS
from vmd_scale.diffusion.sampler import Sampler, sample
from vmd_scale.model import Posterior
from vmd_scale.model.encoder import Gaussian

INF = math.inf


def posterior_example(spread=1.0):
    generator = torch.Generator().manual_seed(3)
    mean = spread * torch.randn(4, 2, 5, generator=generator)
    log_std = spread * torch.randn(4, 2, 5, generator=generator)
    return Posterior(mean, log_std), generator


def test_kl_is_that_of_torch_distributions():
    q, _ = posterior_example()
    normal = torch.distributions.Normal(q.mean, q.log_std.exp())
    standard = torch.distributions.Normal(torch.zeros_like(q.mean), torch.ones_like(q.mean))
    assert close(q.kl(), torch.distributions.kl_divergence(normal, standard).sum(-1))
    assert bool((q.kl() > 0).all())
    assert Posterior(torch.zeros(1, 1, 3), torch.zeros(1, 1, 3)).kl().item() == 0


def test_log_ratio_is_that_of_torch_distributions():
    q, generator = posterior_example()
    z = 2 * torch.randn(4, 2, 5, generator=generator)
    normal = torch.distributions.Normal(q.mean, q.log_std.exp())
    standard = torch.distributions.Normal(torch.zeros_like(q.mean), torch.ones_like(q.mean))
    expected = (standard.log_prob(z) - normal.log_prob(z)).sum(-1)
    assert torch.allclose(q.log_ratio_to_prior(z), expected, atol=1e-3, rtol=1e-4)


def test_kl_is_minus_the_mean_log_ratio_of_its_own_samples():
    q, generator = posterior_example(0.5)
    epsilon = torch.randn(4, 20_000, 2, 5, generator=generator)
    ratios = q.log_ratio_to_prior(q.sample(epsilon)).double()
    error = ratios.std(1) / math.sqrt(20_000)
    assert ((-ratios.mean(1) - q.kl()).abs() < 4.5 * error).all()


def test_samples_have_the_posterior_moments():
    q, generator = posterior_example()
    z = q.sample(torch.randn(4, 50_000, 2, 5, generator=generator))
    std = q.log_std.exp()
    assert ((z.mean(1) - q.mean).abs() < 5 * std / math.sqrt(50_000)).all()
    assert close(z.std(1), std, 0.03)


def test_kl_and_log_ratio_against_a_prior_are_those_of_torch_distributions():
    q, generator = posterior_example()
    p = Gaussian(torch.randn(4, 2, 5, generator=generator), 0.7 * torch.randn(4, 2, 5, generator=generator))
    against = Posterior(q.mean, q.log_std, p)
    normal, prior = Normal(q.mean, q.log_std.exp()), Normal(p.mean, p.log_std.exp())
    expected = kl_divergence(normal, prior)
    assert torch.allclose(against.kl_per_unit(), expected, atol=1e-4, rtol=1e-4)
    assert torch.allclose(against.kl(), expected.sum(-1), atol=1e-3, rtol=1e-4)
    z = against.sample(torch.randn(4, 2, 5, generator=generator))
    ratio = (prior.log_prob(z) - normal.log_prob(z)).sum(-1)
    assert torch.allclose(against.log_ratio_to_prior(z), ratio, atol=1e-3, rtol=1e-4)
    many = torch.stack((z, 2 * z, -z), dim=1)  # K draws of each
    assert close(against.log_ratio_to_prior(many)[:, 0], against.log_ratio_to_prior(z))
    assert close(against.log_ratio_to_prior(many)[:, 2], against.log_ratio_to_prior(-z))
    assert not close(against.kl(), q.kl(), 0.1)
    assert Posterior(p.mean, p.log_std, p).kl().abs().max() < 1e-5
    standard = Gaussian(torch.zeros_like(q.mean), torch.zeros_like(q.mean))
    assert torch.equal(Posterior(q.mean, q.log_std, standard).kl(), q.kl())


# ---- what the network reads


def test_the_prior_reads_what_is_visible_and_nothing_else():
    model = variant("conditional")
    x = inputs(model)
    x["encoder_mask"][:, 1], x["encoder_mask"][:, 2] = True, False
    q = model.encode(x["clean"], x["encoder_mask"])
    for position, heard in ((1, False), (2, True)):
        other = x["clean"].clone()
        other[:, position] = (other[:, position] + 1) % 5
        moved = model.encode(other, x["encoder_mask"]).prior
        assert close(moved.mean, q.prior.mean, 1e-6) != heard
        assert not close(model.encode(other, x["encoder_mask"]).mean, q.mean, 1e-3)  # the posterior hears both
    noisy = x["clean"].masked_fill(x["encoder_mask"], model.architecture.mask_id)
    assert torch.equal(model.prior(noisy, x["encoder_mask"]).mean, q.prior.mean)
    assert variant("plain").prior(noisy, x["encoder_mask"]) is None


# ---- bounds


@functools.cache
def model_of(seed, standard=False):
    model = tiny_model(seed, prior="conditional")
    if standard:
        with torch.no_grad():
            model.prior_network.out.weight.zero_()
            model.prior_network.out.bias.zero_()
    return model


GIVEN = [{}, {1: 2}, {0: 1}]


@functools.cache
def exact_of(which):
    return Enumeration(model_of(21), given=GIVEN[which])


def rows_of(exact, count):
    return copies(exact.rows, count, exact.maskable)


def test_the_prior_of_these_tests_is_neither_standard_nor_constant():
    nothing, something = exact_of(0), exact_of(1)
    first, given = nothing.prior(0, None), something.prior(0, None)
    assert (first.mean[0] - given.mean[0]).abs() > 0.1  # it hears what is given
    half = nothing.prior(0, (True, False, False))
    assert half.mean.std() > 0.05
    assert (half.stddev - 1).abs().min() > 0.01
    fixed, fresh = (nothing.likelihood(3, latent, "balanced") for latent in ("fixed", "fresh"))
    assert 0.5 * (fixed - fresh).abs().sum() > 0.02


@pytest.mark.parametrize("which", range(len(GIVEN)))
@pytest.mark.parametrize("latent", ["fixed", "fresh"])
@pytest.mark.parametrize(("steps", "law"), [(1, "balanced"), (2, "bernoulli"), (INF, "balanced")])
def test_bounds_and_samples_are_of_the_enumerated_likelihood(which, latent, steps, law):
    """Given tokens condition the prior; a fresh z is conditioned on all that is visible at its step."""
    exact, s, count = exact_of(which), Sampler(steps, latent, law), 400
    p = exact.likelihood(steps, latent, law)
    assert abs(p.sum().item() - 1) < 1e-6
    rows = rows_of(exact, count)
    mean, error = mean_and_error(path_log_weight(exact.model, rows, s, Noise(1), 0).sum(-1).exp(), count)
    for functional in (torch.ones_like(p), p, -p.log()):
        sigma = (functional * error).square().sum().sqrt()
        assert (functional * (mean - p)).sum().abs() <= 4 * sigma + 1e-6
    mean, error = mean_and_error(elbo(exact.model, rows, s, Noise(2), len(rows.clean)), count)
    expected = exact.negative_elbo(steps, latent, law)
    assert (expected >= -p.log() - 1e-6).all()
    assert ((mean - expected).abs() <= 4.5 * error + 1e-5).all()

    given = exact.rows[:1].expand(4000, -1)
    drawn = sample(exact.model, s, Noise(8), torch.arange(4000), given, exact.maskable.expand(4000, -1))
    assert_drawn_from(drawn, exact.rows, p)


def test_importance_weighted_bounds_fall_to_the_truth():
    exact, s, gaps = exact_of(1), Sampler(2), []
    truth = -exact.likelihood(2, "fixed", "balanced").log()
    for samples in (1, 4, 64):
        values = importance_weighted(exact.model, rows_of(exact, 40), s, Noise(samples), samples)
        mean, error = mean_and_error(values, 40)
        assert (mean >= truth - 5 * error).all()
        gaps.append((mean - truth).mean().item())
    assert gaps[0] > 0.2
    assert gaps[1] < gaps[0]
    assert abs(gaps[2]) < 0.12 * gaps[0]


def test_a_prior_network_that_says_standard_is_the_standard_prior():
    conditional = model_of(22, standard=True)
    plain = tiny_model(22)
    assert not plain.load_state_dict(conditional.state_dict(), strict=False).missing_keys
    rows = copies(torch.tensor([[0, 1, 2], [2, 2, 0]]), 20)
    for steps, latent, law in itertools.product((1, 2, INF), ("fixed", "fresh"), RANDOM_LAWS):
        s = Sampler(steps, latent, law)
        for bound in (
            lambda model, s=s: elbo(model, rows, s, Noise(1), 40),
            lambda model, s=s: importance_weighted(model, rows, s, Noise(1), 2),
        ):
            assert torch.allclose(bound(conditional), bound(plain), atol=1e-5)
            if steps > 1 or latent == "fixed":
                assert not torch.allclose(bound(model_of(22)), bound(plain), atol=1e-2)
        drawn = [sample(model, s, Noise(2), torch.arange(50)) for model in (conditional, plain)]
        assert torch.equal(*drawn)
