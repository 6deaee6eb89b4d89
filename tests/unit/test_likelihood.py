import dataclasses
import functools
import itertools
import math

import pytest
import torch
from expectations import EveryNoise, EveryPair, copies, every_path, mean_and_error, mean_weight, steady
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from tiny_models import MODELS, Enumeration, enumerate_paths, exact_of, model_of, tiny_model

from vmd_scale.diffusion.likelihood import Rows, elbo, importance_weighted, path_log_weight, vmd_surrogate
from vmd_scale.diffusion.noise import Noise
from vmd_scale.diffusion.paths import RANDOM_LAWS as LAWS
from vmd_scale.diffusion.sampler import Sampler
from vmd_scale.model import VMD

INF = math.inf
STEPS = (1, 2, 3, INF)
SAMPLERS = [
    Sampler(steps, latent, law)
    for steps, latent, law in itertools.product(STEPS, ("fixed", "fresh"), LAWS)
    if law == "balanced" or steps in (2, 3)  # at T = 1 and T = inf the two laws are one
]
COMBINATIONS = [("vmd", s) for s in SAMPLERS]
COMBINATIONS += [("mdm", s) for s in SAMPLERS if s.latent == "fixed"]
COMBINATIONS += [(name, s) for name in MODELS if name not in ("vmd", "mdm") for s in SAMPLERS if s.steps == 2]


@functools.cache
def exact_likelihood(name, s):
    return exact_of(name).likelihood(s.steps, s.latent, s.law)


def names(value):
    return f"T={value.steps} {value.latent} {value.law}" if isinstance(value, Sampler) else value


# ---- the reference itself


@pytest.mark.parametrize("name", MODELS)
def test_the_reference_is_a_distribution_that_z_and_the_steps_change(name):
    for s in SAMPLERS:
        assert abs(exact_likelihood(name, s).sum().item() - 1) < 1e-6, s
    coarse = Enumeration(model_of(name), points=193).likelihood(2, "fixed", "balanced")
    assert torch.allclose(coarse, exact_likelihood(name, Sampler(2)), atol=1e-5)  # the grid is fine enough

    def distance(one, other):
        return 0.5 * (exact_likelihood(name, one) - exact_likelihood(name, other)).abs().sum().item()

    size = exact_of(name).size
    assert distance(Sampler(1), Sampler(size)) > 0.03
    if model_of(name).encoder is not None:
        assert distance(Sampler(size), Sampler(size, "fresh")) > 0.02
    if size > 2:
        assert distance(Sampler(2), Sampler(2, law="bernoulli")) > 0.01


def test_enumerated_paths_are_paths():
    for n, steps, law in itertools.product((1, 2, 3), (1, 2, 3, 5, INF), LAWS):
        for path in enumerate_paths(n, steps, law):
            left = (True,) * n
            for masked, revealed in path:
                assert masked == left
                left = tuple(m and not r for m, r in zip(masked, revealed, strict=True))
            assert not any(left)


# ---- bounds against the truth


@pytest.mark.parametrize(("name", "s"), COMBINATIONS, ids=names)
def test_whole_paths_are_unbiased_estimates_of_the_likelihood(name, s):
    """E[exp(path_log_weight)] = p_T(x0) for every sequence: all that makes IW-K a bound, for every K."""
    count = 600
    logs = path_log_weight(model_of(name), copies(exact_of(name).rows, count), s, Noise(1), 0).sum(-1)
    mean, error = mean_and_error(logs.exp(), count)
    exact = exact_likelihood(name, s)
    # Weights of rare sequences are skewed, and their mean far from normal; sums over all sequences are not.
    assert ((mean - exact).abs() <= 4.5 * error + 0.1 * exact).all()
    assert error.mean() < 0.15 * exact.mean()
    for functional in (torch.ones_like(exact), exact, -exact.log()):
        sigma = (functional * error).square().sum().sqrt()
        assert (functional * (mean - exact)).sum().abs() <= 4 * sigma + 1e-6


@pytest.mark.parametrize(
    ("name", "s"), [(name, s) for name, s in COMBINATIONS if not name.startswith("blocks")], ids=names
)
def test_the_elbo_is_unbiased_and_never_below_the_truth(name, s):
    count = 600
    model, exact = model_of(name), exact_of(name)
    rows = copies(exact.rows, count)
    mean, error = mean_and_error(elbo(model, rows, s, Noise(2), len(rows.clean)), count)
    expected = exact.negative_elbo(s.steps, s.latent, s.law)
    truth = -exact_likelihood(name, s).log()
    assert (expected >= truth - 1e-6).all()
    assert (expected - truth).max() > 0.05 or (name == "mdm" and s.steps == 1)  # a real gap: the check can fail
    assert ((mean - expected).abs() <= 4.5 * error + 1e-5).all()
    assert (mean >= truth - 4.5 * error - 1e-5).all()


@pytest.mark.parametrize("name", ["blocks", "blocks, add"])
@pytest.mark.parametrize("s", [s for s in SAMPLERS if s.steps in (1, 2)], ids=names)
def test_the_elbo_of_the_block_variant_is_never_below_the_truth(name, s):
    count = 400
    rows = copies(exact_of(name).rows, count)
    mean, error = mean_and_error(elbo(model_of(name), rows, s, Noise(3), len(rows.clean)), count)
    truth = -exact_likelihood(name, s).log()
    assert (mean >= truth - 4.5 * error).all()
    assert (mean - truth).mean() > 0.01
    if s.latent == "fixed":
        expected = exact_of(name).negative_elbo(s.steps, s.latent, s.law)
        assert (expected >= truth - 1e-6).all()
        assert ((mean - expected).abs() <= 4.5 * error + 1e-5).all()
        # and it is the mean of the log of one whole path
        logs = path_log_weight(model_of(name), rows, s, Noise(4), 0).sum(-1)
        other, other_error = mean_and_error(-logs, count)
        assert ((mean - other).abs() <= 4.5 * (error + other_error)).all()


@pytest.mark.parametrize("s", [Sampler(2), Sampler(INF, "fresh")], ids=names)
def test_the_elbo_of_one_row_of_a_set_is_unbiased_over_the_draws(s):
    """A row keeps its number from draw to draw; averaging draws must lead to its own bound, whatever its number."""
    model, exact = model_of("vmd"), exact_of("vmd")
    rows = copies(exact.rows[[0, 5, 10, 13, 18, 22, 25, 26]], 1)
    draws = 250
    values = torch.stack([elbo(model, rows, s, Noise(5), len(rows.clean), draw) for draw in range(draws)])
    expected = exact.negative_elbo(s.steps, s.latent, s.law)[[0, 5, 10, 13, 18, 22, 25, 26]]
    assert ((values.mean(0) - expected).abs() <= 4.5 * values.std(0) / math.sqrt(draws)).all()


def deaf_pair(**changes):
    """A VMD whose denoiser does not hear z, and the MDM with the same weights."""
    deaf = tiny_model(13, **changes)
    with torch.no_grad():
        for block in deaf.denoiser.blocks:
            block.modulation.weight.zero_()
            block.modulation.bias.zero_()
    mdm = VMD(dataclasses.replace(deaf.architecture, latent_width=0)).eval()
    assert not mdm.load_state_dict(deaf.state_dict(), strict=False).missing_keys
    return deaf, mdm


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("steps", [1, 2, 4, INF])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_latent_that_nobody_hears_costs_its_kl(groups, steps, law):
    """Fixed: KL(q(z | x0)) once, in every single draw, whatever t is. Fresh: once for each step that reveals."""
    rows = ragged_rows()
    deaf, mdm = deaf_pair(row_length=6, groups=groups)
    counts = rows.maskable.view(10, groups, -1).sum(-1)
    with torch.no_grad():
        kl = (deaf.encode(rows.clean, rows.maskable, rows.attend).kl() * (counts > 0)).sum(-1).double()
    for draw in range(5):
        bounds = [elbo(model, rows, Sampler(steps, law=law), Noise(1), 10, draw) for model in (deaf, mdm)]
        assert torch.allclose(bounds[0] - bounds[1], kl, atol=1e-4)
    if law == "balanced":  # a posterior that never changes, paid at min(T, n) steps of each group
        with torch.no_grad():
            deaf.encoder.out.weight.zero_()
            deaf.encoder.out.bias.copy_(torch.tensor([0.7, -0.4]))
            one = deaf.encode(rows.clean[:1], rows.maskable[:1]).kl()[0, 0].double()
        bounds = [elbo(model, rows, Sampler(steps, "fresh", law), Noise(1), 10) for model in (deaf, mdm)]
        assert torch.allclose(bounds[0] - bounds[1], one * counts.clamp(max=min(steps, 6)).sum(-1), atol=1e-4)


def test_the_mdm_is_scored_exactly_in_one_step():
    """T = 1 without a latent is a product of unigrams: one path, nothing random, every bound equal to the truth."""
    model, exact = model_of("mdm"), exact_of("mdm")
    rows = copies(exact.rows, 1)
    truth = -exact_likelihood("mdm", Sampler(1)).log()
    for bound in (
        elbo(model, rows, Sampler(1), Noise(6), 27),
        importance_weighted(model, rows, Sampler(1), Noise(6), samples=1),
        importance_weighted(model, rows, Sampler(1), Noise(6), samples=3),
        elbo(model, rows, Sampler(1, law="bernoulli"), Noise(6), 27),
    ):
        assert torch.allclose(bound, truth, atol=1e-5)


@pytest.mark.parametrize(("name", "s"), [("vmd", Sampler(2)), ("vmd", Sampler(2, "fresh", "bernoulli"))], ids=names)
def test_importance_weighted_bounds_fall_to_the_truth(name, s):
    count = 40
    model, exact = model_of(name), exact_of(name)
    rows = copies(exact.rows, count)
    truth = -exact_likelihood(name, s).log()
    gaps, errors = [], []
    for samples in (1, 4, 64):
        mean, error = mean_and_error(importance_weighted(model, rows, s, Noise(samples), samples), count)
        assert (mean >= truth - 5 * error).all()
        gaps.append((mean - truth).mean().item())
        errors.append(error.square().sum().sqrt().item() / len(truth))
    if s.latent == "fixed":  # K = 1 is the ELBO
        first = (exact.negative_elbo(s.steps, s.latent, s.law) - truth).mean().item()
        assert abs(gaps[0] - first) < 4 * errors[0]
    for (wide, narrow), (error, other) in zip(itertools.pairwise(gaps), itertools.pairwise(errors), strict=True):
        assert narrow < wide + 4 * (error + other)
    assert gaps[0] > 0.3
    assert gaps[-1] < 0.1 * gaps[0]


def test_importance_weighting_is_the_log_of_a_mean():
    rows, s = copies(exact_of("vmd").rows, 2), Sampler(3)
    logs = torch.stack([path_log_weight(model_of("vmd"), rows, s, Noise(7), 2 * 5 + k).sum(-1) for k in range(5)])
    whole = importance_weighted(model_of("vmd"), rows, s, Noise(7), samples=5, draw=2)
    assert torch.allclose(whole, -logs.exp().mean(0).log(), atol=1e-10)
    assert not torch.allclose(logs[0], logs[1])
    other = importance_weighted(model_of("vmd"), rows, s, Noise(7), samples=5, draw=3)
    assert (whole - other).abs().min() > 0


# ---- models at random


@st.composite
def examples(draw):
    """A model of 3 tokens over 3 symbols, or of two blocks of 2 tokens over 2; and tokens given (never masked)."""
    groups = draw(st.sampled_from([1, 1, 2]))
    changes = {
        "groups": groups,
        "vocab_size": 3 if groups == 1 else 2,
        "row_length": 3 if groups == 1 else 4,
        "seed": draw(st.integers(0, 1000)),
        "latent_width": draw(st.sampled_from([0, 1, 1])),
        "injection": draw(st.sampled_from(["adaln", "add"])),
        "norm": draw(st.sampled_from(["layernorm", "rmsnorm"])),
        "mlp": draw(st.sampled_from(["gelu", "swiglu"])),
        "time_conditioning": draw(st.booleans()),
        "tie_embeddings": draw(st.booleans()),
        "prior": draw(st.sampled_from(["standard", "conditional"])) if groups == 1 else "standard",
    }
    position, token = st.integers(0, changes["row_length"] - 1), st.integers(0, changes["vocab_size"] - 1)
    fixed = draw(st.dictionaries(position, token, max_size=1))
    return changes, fixed, draw(st.sampled_from([1, 2, 3, INF])), draw(st.sampled_from(LAWS))


@settings(deadline=None, max_examples=18, derandomize=True, phases=[Phase.generate])
@given(examples(), st.sampled_from(["fixed", "fixed", "fresh"]))
def test_any_model_has_the_bounds_that_are_computed(example, latent):
    """E[exp(log weight)], E[-log weight], E[elbo] and E[iw] over all that is random, exactly: no statistics here."""
    (changes, fixed, steps, law), latents = example, 1
    model = tiny_model(**changes)
    groups, size = changes["groups"], changes["row_length"] // changes["groups"]
    if latent == "fresh" and model.encoder is not None:  # a grid for each step: two at most
        latents = steps = min(steps, 2)
    law = "balanced" if steps == INF else law  # the same, but that t is continuous
    s, u, points = Sampler(steps, latent, law), every_path(size, steps, law), 1 if model.encoder is None else 33
    fine = Enumeration(model, points=193, given=fixed)
    truth = fine.likelihood(steps, latent, law)
    assert abs(truth.sum().item() - 1) < 1e-6
    few = torch.arange(len(truth))[:: 4 if fixed else 9]

    every = EveryNoise(u, points, latents)
    rows = copies(fine.rows[few], every.count, fine.maskable)
    unbiased, grid = steady(model, every)
    expected = Enumeration(unbiased, given=fixed, grid=grid).likelihood(steps, latent, law)[few]
    weights = mean_weight(path_log_weight(unbiased, rows, s, every, 0), every)
    assert torch.allclose(weights, expected, rtol=1e-3, atol=1e-7)

    if latent == "fresh" and groups > 1:
        return
    bound = fine.negative_elbo(steps, latent, law)
    assert (bound >= -truth.log() - 1e-4).all()
    coarse = Enumeration(model, given=fixed, grid=every.grid)
    expected = coarse.negative_elbo(steps, latent, law)[few]
    assert torch.allclose(expected, bound[few], atol=0.1, rtol=0.05)  # a coarse grid, for exact means
    whole = -path_log_weight(model, rows, s, every, 0).sum(-1).view(-1, every.count) @ every.weights
    assert torch.allclose(whole, expected, atol=2e-3)
    by_step, counts = [], fine.maskable.view(groups, -1).sum(-1)
    totals = {int(steps if law == "bernoulli" else min(steps, n)) for n in counts.tolist()}
    total = math.lcm(*totals)  # a time in each step of every group
    for k in range(total):
        one = EveryNoise(u, points, time=(k + 0.5) / total)
        rows = copies(fine.rows[few], one.count, fine.maskable)
        by_step.append(elbo(model, rows, s, one, 1).view(-1, one.count) @ one.weights)
    assert torch.allclose(torch.stack(by_step).mean(0), expected, atol=2e-3)

    if latent == "fixed":
        tighter = coarse.negative_iw2(steps, law)
        assert (-truth.log() <= tighter + 1e-3).all()
        assert (tighter <= bound + 1e-3).all()
        assert model.encoder is None or (bound - tighter).max() > 0.01  # the check can fail
        pairs = EveryPair(EveryNoise(u, min(points, 7)))
        if pairs.count < 5000:
            rows = copies(fine.rows[few], pairs.count, fine.maskable)
            mean = importance_weighted(model, rows, s, pairs, 2).view(-1, pairs.count) @ pairs.weights
            exact = Enumeration(model, given=fixed, grid=pairs.every.grid).negative_iw2(steps, law)[few]
            assert torch.allclose(mean, exact, atol=1e-3)


# ---- batching, padding


def ragged_rows():
    """Rows of different lengths, with holes, one of them with nothing to score."""
    clean = torch.arange(10 * 6).view(10, 6) * 7 % 3
    lengths = torch.tensor([6, 2, 4, 6, 1, 5, 3, 6, 2, 4])
    attend = torch.arange(6) < lengths[:, None]
    maskable = attend.clone()
    maskable[3, [0, 4]] = False
    maskable[8] = False
    return Rows(clean, maskable, attend, torch.arange(10))


def take(rows, index):
    return Rows(rows.clean[index], rows.maskable[index], rows.attend[index], rows.numbers[index])


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("latent", ["fixed", "fresh"])
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("steps", [1, 4, INF])
def test_scores_do_not_depend_on_the_batch(groups, latent, law, steps):
    model, rows, s = tiny_model(12, row_length=6, groups=groups), ragged_rows(), Sampler(steps, latent, law)

    def scores(part):
        values = [elbo(model, part, s, Noise(1), 10), importance_weighted(model, part, s, Noise(1), 2)]
        return torch.stack([*values, vmd_surrogate(model, part, Noise(1), 10, law)])

    together = scores(rows)
    assert bool(together.isfinite().all())
    for cut in (torch.tensor([7]), torch.tensor([9, 1, 4]), torch.tensor([1, 8])):
        assert torch.allclose(scores(take(rows, cut)), together[:, cut], atol=1e-5), cut
    assert bool((together[:, 8] == 0).all())  # nothing to score: no KL either
    assert bool((together[1, [0, 1, 2, 3, 4, 5, 6, 7, 9]] != 0).all())


def test_scores_do_not_hear_padding():
    model, rows = tiny_model(12, row_length=6), ragged_rows()
    other = dataclasses.replace(rows, clean=torch.where(rows.attend, rows.clean, (rows.clean + 1) % 3))
    s = Sampler(3)
    assert torch.allclose(elbo(model, rows, s, Noise(1), 10), elbo(model, other, s, Noise(1), 10), atol=1e-6)
    whole = [importance_weighted(model, r, s, Noise(1), 2) for r in (rows, other)]
    assert torch.allclose(*whole, atol=1e-6)


def test_context_that_is_not_scored_is_heard():
    """Fixed tokens (Sudoku's clues) condition the others and cost nothing."""
    model, s = model_of("mdm"), Sampler(1)
    maskable = torch.tensor([[True, False, True]] * 3)
    rows = Rows(torch.tensor([[1, 0, 2], [1, 1, 2], [1, 2, 2]]), maskable, None, torch.arange(3))
    bound = elbo(model, rows, s, Noise(1), 3)
    noisy = rows.clean.masked_fill(maskable, 3)
    with torch.no_grad():
        log_p = model.logits(noisy, None).double().log_softmax(-1).gather(-1, rows.clean[..., None]).squeeze(-1)
    assert torch.allclose(bound, -(log_p * maskable).sum(-1), atol=1e-5)
    assert (bound[0] - bound[1]).abs() > 1e-3
