"""Laws of confidence: orders that follow the predictions have a likelihood, and it is the one that is computed."""

import functools
import itertools
import math

import pytest
import torch
from expectations import EveryNoise, assert_drawn_from, copies, mean_and_error, mean_weight, steady
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from tiny_models import Enumeration, sureness, tiny_model

from vmd_scale.diffusion.likelihood import Rows, elbo, importance_weighted, path_log_weight
from vmd_scale.diffusion.noise import Noise
from vmd_scale.diffusion.paths import CONFIDENCE_LAWS, confidence
from vmd_scale.diffusion.sampler import Sampler, sample

INF = math.inf
STEPS = (1, 2, 3, INF)
MODELS = {
    "vmd": {"seed": 14},
    "vmd, time": {"seed": 3, "time_conditioning": True, "norm": "rmsnorm", "mlp": "swiglu"},
    "conditional": {"seed": 15, "prior": "conditional"},
    "mdm": {"seed": 6, "latent_width": 0},
    "mdm, blocks": {"seed": 9, "vocab_size": 2, "row_length": 4, "groups": 2, "latent_width": 0},
    "blocks": {"seed": 9, "vocab_size": 2, "row_length": 4, "groups": 2},
}
SAMPLERS = [Sampler(*s) for s in itertools.product(STEPS, ("fixed", "fresh"), CONFIDENCE_LAWS)]
WITH_ORDER = [s for s in SAMPLERS if s.steps in (2, INF)]  # at T = 1 there is none, and T = 3 is T = inf


@functools.cache
def model_of(name):
    return tiny_model(**MODELS[name])


@functools.cache
def exact_of(name):
    return Enumeration(model_of(name), points=513)


@functools.cache
def likelihood(name, s):
    return exact_of(name).likelihood(s.steps, s.latent, s.law)


def names(value):
    return f"T={value.steps} {value.latent} {value.law}" if isinstance(value, Sampler) else value


def distance(one, other):
    return 0.5 * (one - other).abs().sum().item()


# ---- the reference, and the definitions


@pytest.mark.parametrize("name", MODELS)
def test_the_reference_is_a_distribution(name):
    for s in SAMPLERS:
        if name != "conditional" or s.steps == 2:
            assert abs(likelihood(name, s).sum().item() - 1) < 1e-6, s


def test_the_reference_is_changed_by_the_law_and_only_where_there_is_an_order():
    for latent in ("fixed", "fresh"):
        chance = {T: exact_of("vmd").likelihood(T, latent, "balanced") for T in STEPS}
        by_law = {law: {T: likelihood("vmd", Sampler(T, latent, law)) for T in STEPS} for law in CONFIDENCE_LAWS}
        for law in CONFIDENCE_LAWS:
            assert torch.allclose(by_law[law][1], chance[1])
            assert torch.allclose(by_law[law][3], by_law[law][INF])
            assert distance(by_law[law][INF], chance[INF]) > 0.01
        for one, other in itertools.combinations(CONFIDENCE_LAWS, 2):
            assert distance(by_law[one][2], by_law[other][2]) > 1e-3


@settings(deadline=None, max_examples=40, derandomize=True)
@given(st.integers(2, 9), st.sampled_from([0.1, 1.0, 8.0]), st.integers(0, 99))
def test_confidence_by_its_definition(vocab, scale, seed):
    logits = scale * torch.randn(3, 4, vocab, generator=torch.Generator().manual_seed(seed))
    expected = sureness(logits.double().log_softmax(-1))
    for law in CONFIDENCE_LAWS:
        assert torch.allclose(confidence(logits, law), expected[law], atol=1e-12)
        assert torch.allclose(confidence(logits + 3, law), expected[law], atol=1e-5)


def test_confidence_at_the_edges():
    sure = torch.tensor([[900.0, 0.0, -900.0]])
    assert [confidence(sure, law).item() for law in CONFIDENCE_LAWS] == [1, 1, 0]
    assert [confidence(torch.zeros(1, 1), law).item() for law in CONFIDENCE_LAWS] == [1, 1, 0]  # one symbol
    assert confidence(torch.zeros(1, 2), "margin").item() == 0


# ---- the bounds


def scored_on_a_grid(model, s, given=None, few=27):
    """Exact likelihoods of a few rows, logs of their whole-path weights [copies, G], and the noise they have met."""
    a = model.architecture
    every = EveryNoise(torch.full((1, a.row_length // a.groups), 0.5), 65 if model.encoder is not None else 1)
    model, grid = steady(model, every)
    exact = Enumeration(model, given=given, grid=grid)
    truth = exact.likelihood(s.steps, s.latent, s.law)
    few = torch.arange(len(truth))[:: -(-len(truth) // few)]
    rows = copies(exact.rows[few], every.count, exact.maskable)
    return truth[few], path_log_weight(model, rows, s, every, 0), every


@pytest.mark.parametrize("s", [s for s in SAMPLERS if s.latent == "fixed" and s.steps != 3], ids=names)
@pytest.mark.parametrize("name", ["vmd", "vmd, time", "conditional", "blocks"])
def test_replayed_paths_average_to_the_likelihood(name, s):
    truth, logs, every = scored_on_a_grid(model_of(name), s)
    assert torch.allclose(mean_weight(logs, every), truth, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("law", CONFIDENCE_LAWS)
def test_replayed_paths_average_to_the_likelihood_with_any_posterior(law):
    s, every = Sampler(2, "fixed", law), EveryNoise(torch.full((1, 3), 0.5), points=301)
    weights = path_log_weight(model_of("vmd"), copies(exact_of("vmd").rows, every.count), s, every, 0).sum(-1).exp()
    assert distance(weights.view(-1, every.count) @ every.weights, likelihood("vmd", s)) < 0.02


@pytest.mark.parametrize("name", ["vmd", "conditional", "blocks"])
@pytest.mark.parametrize("s", [s for s in WITH_ORDER if s.latent == "fresh"], ids=names)
def test_replayed_paths_with_a_fresh_latent_are_unbiased(name, s):
    count, exact = 500, likelihood(name, s)
    logs = path_log_weight(model_of(name), copies(exact_of(name).rows, count), s, Noise(1), 0).sum(-1)
    mean, error = mean_and_error(logs.exp(), count)
    for functional in (torch.ones_like(exact), exact, -exact.log()):
        sigma = (functional * error).square().sum().sqrt()
        assert (functional * (mean - exact)).sum().abs() <= 4 * sigma + 1e-6
    assert ((mean - exact).abs() <= 4.5 * error + 0.1 * exact).all()
    assert error.sum() < 0.2


@pytest.mark.parametrize("name", ["mdm", "mdm, blocks"])
def test_without_a_latent_the_likelihood_is_exact_at_once(name):
    rows = copies(exact_of(name).rows, 1)
    for steps, law in itertools.product(STEPS, CONFIDENCE_LAWS):
        s, truth = Sampler(steps, law=law), -likelihood(name, Sampler(steps, law=law)).log()
        for samples, seed in ((1, 0), (1, 1), (3, 0)):
            bound = importance_weighted(model_of(name), rows, s, Noise(seed), samples)
            assert torch.allclose(bound, truth, atol=1e-5), s


@pytest.mark.parametrize("s", [Sampler(2, law="top_prob"), Sampler(INF, "fresh", "entropy")], ids=names)
def test_importance_weighted_bounds_fall_to_the_truth(s):
    count, rows, truth = 30, exact_of("vmd").rows, -likelihood("vmd", s).log()
    gaps = []
    for samples in (1, 4, 64):
        values = importance_weighted(model_of("vmd"), copies(rows, count), s, Noise(samples), samples)
        mean, error = mean_and_error(values, count)
        assert (mean >= truth - 5 * error).all()
        gaps.append((mean - truth).mean().item())
    assert gaps[0] > 0.2
    assert gaps[1] < gaps[0]
    assert abs(gaps[2]) < 0.12 * gaps[0]


def test_no_bound_where_there_is_none():
    rows = copies(torch.tensor([[0, 1, 2]]), 1)
    for law in CONFIDENCE_LAWS:
        with pytest.raises(ValueError, match="random paths"):
            elbo(model_of("mdm"), rows, Sampler(2, law=law), Noise(0), 1)
    changed = [{"temperature": 0.0}, {"temperature": 0.9}, {"nucleus": 0.5}, {"order_noise": 1.0}, {"remask": 0.2}]
    for change in changed:
        s = Sampler(2, law="top_prob", **change)
        for bound in (
            lambda s: elbo(model_of("mdm"), rows, s, Noise(0), 1),
            lambda s: importance_weighted(model_of("mdm"), rows, s, Noise(0), 1),
            lambda s: path_log_weight(model_of("mdm"), rows, s, Noise(0), 0).sum(-1),
        ):
            with pytest.raises(ValueError, match=r"random paths|changes it"):
                bound(s)
    with pytest.raises(ValueError, match="changes it"):
        elbo(model_of("mdm"), rows, Sampler(2, temperature=0.9), Noise(0), 1)


# ---- the sampler is the model that is scored


@pytest.mark.parametrize("s", [s for s in SAMPLERS if s.steps != 3], ids=names)
@pytest.mark.parametrize("name", ["vmd", "mdm", "conditional", "blocks"])
def test_samples_have_the_likelihood_that_is_computed(name, s):
    if (name == "mdm" and s.latent == "fresh") or (name != "vmd" and s.steps == 1):
        return
    drawn = sample(model_of(name), s, Noise(8), torch.arange(5000))
    assert_drawn_from(drawn, exact_of(name).rows, likelihood(name, s))


# ---- models at random


@st.composite
def examples(draw):
    """A model, tokens that are given (never masked), and a sampler."""
    groups = draw(st.sampled_from([1, 1, 2]))
    changes = {
        "seed": draw(st.integers(0, 1000)),
        "groups": groups,
        "latent_width": draw(st.sampled_from([0, 1, 1])),
        "injection": draw(st.sampled_from(["adaln", "add"])),
        "norm": draw(st.sampled_from(["layernorm", "rmsnorm"])),
        "mlp": draw(st.sampled_from(["gelu", "swiglu"])),
        "time_conditioning": draw(st.booleans()),
        "tie_embeddings": draw(st.booleans()),
        "prior": draw(st.sampled_from(["standard", "conditional"])) if groups == 1 else "standard",
        "vocab_size": draw(st.integers(2, 3)) if groups == 1 else 2,
        "row_length": draw(st.integers(2, 3)) if groups == 1 else 4,
    }
    position = st.integers(0, changes["row_length"] // groups - 1)  # a block does not see what is given to its right
    fixed = draw(st.dictionaries(position, st.integers(0, 1), max_size=1))
    return changes, fixed, Sampler(draw(st.sampled_from(STEPS)), "fixed", draw(st.sampled_from(CONFIDENCE_LAWS)))


@settings(deadline=None, max_examples=12, derandomize=True, phases=[Phase.generate])
@given(examples())
def test_any_model_has_the_likelihood_that_is_computed(example):
    changes, fixed, s = example
    model = tiny_model(**changes)
    exact = Enumeration(model, points=193, given=fixed)
    truth = exact.likelihood(s.steps, "fixed", s.law)
    assert abs(truth.sum().item() - 1) < 1e-6
    on_grid, logs, every = scored_on_a_grid(model, s, fixed, few=12)
    assert torch.allclose(mean_weight(logs, every), on_grid, rtol=2e-3, atol=1e-6)
    assert (-logs.sum(-1).view(-1, every.count) @ every.weights >= -on_grid.log() - 1e-3).all()
    token = torch.zeros(exact.a.row_length, dtype=torch.int64)
    for position, value in fixed.items():
        token[position] = value
    shape = (2000, exact.a.row_length)
    drawn = sample(model, s, Noise(3), torch.arange(2000), token.expand(shape), exact.maskable.expand(shape))
    assert_drawn_from(drawn, exact.rows, truth)


# ---- rows of different lengths


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("law", CONFIDENCE_LAWS)
def test_scores_do_not_depend_on_the_batch(groups, law):
    model = tiny_model(12, row_length=6, groups=groups)
    clean, lengths = torch.arange(10 * 6).view(10, 6) * 7 % 3, torch.tensor([6, 2, 4, 6, 1, 5, 3, 6, 2, 4])
    attend = torch.arange(6) < lengths[:, None]
    maskable = attend.clone()
    maskable[3, [0, 4]] = False
    maskable[8] = False  # nothing to score
    for steps, latent in itertools.product((1, 2, 4, INF), ("fixed", "fresh")):
        s = Sampler(steps, latent, law)

        def score(index, s=s):
            rows = Rows(clean[index], maskable[index], attend[index], index)
            return importance_weighted(model, rows, s, Noise(1), 2)

        together = score(torch.arange(10))
        for cut in (torch.tensor([7]), torch.tensor([9, 1, 4]), torch.tensor([1, 8])):
            assert torch.allclose(score(cut), together[cut], atol=1e-5), s
        assert together[8] == 0
        assert bool((together[torch.arange(10) != 8] != 0).all())
