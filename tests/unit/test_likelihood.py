import dataclasses
import functools
import itertools
import math

import pytest
import torch
from tiny_models import Enumeration, architecture, enumerate_paths, sequences, tiny_model

from vmd_scale.diffusion.likelihood import Rows, elbo, importance_weighted, path_log_weight, vmd_surrogate
from vmd_scale.diffusion.noise import Noise
from vmd_scale.diffusion.objective import Objective
from vmd_scale.diffusion.paths import LAWS
from vmd_scale.diffusion.sampler import Sampler, draw_categorical, sample
from vmd_scale.model import VMD

INF = math.inf
STEPS = (1, 2, 3, INF)
SAMPLERS = [
    Sampler(steps, latent, law)
    for steps, latent, law in itertools.product(STEPS, ("fixed", "fresh"), LAWS)
    if law == "balanced" or steps in (2, 3)  # at T = 1 and T = inf the two laws are one
]
MODELS = {
    "vmd": {"seed": 14},
    "vmd, time": {"seed": 3, "time_conditioning": True, "norm": "rmsnorm", "mlp": "swiglu"},
    "vmd, add": {"seed": 4, "injection": "add", "tie_embeddings": True},
    "mdm": {"seed": 6, "latent_width": 0},
    "blocks": {"seed": 9, "vocab_size": 2, "row_length": 4, "groups": 2},
    "blocks, add": {"seed": 8, "vocab_size": 2, "row_length": 4, "groups": 2, "injection": "add"},
}
COMBINATIONS = [("vmd", s) for s in SAMPLERS]
COMBINATIONS += [("mdm", s) for s in SAMPLERS if s.latent == "fixed"]
COMBINATIONS += [(name, s) for name in MODELS if name not in ("vmd", "mdm") for s in SAMPLERS if s.steps == 2]


@functools.cache
def model_of(name):
    return tiny_model(**MODELS[name])


@functools.cache
def exact_of(name):
    return Enumeration(model_of(name))


@functools.cache
def exact_likelihood(name, s):
    return exact_of(name).likelihood(s.steps, s.latent, s.law)


def copies(rows, count, first=0):
    """`count` copies of each row, each copy with a number, hence noise, of its own."""
    clean = rows.repeat_interleave(count, 0)
    numbers = first + torch.arange(len(clean))
    return Rows(clean, torch.ones_like(clean, dtype=torch.bool), None, numbers)


def mean_and_error(values, count):
    """Mean over the copies of each row, and its standard error."""
    per_row = values.view(-1, count)
    return per_row.mean(1), per_row.std(1) / math.sqrt(count)


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
    logs = path_log_weight(model_of(name), copies(exact_of(name).rows, count), s, Noise(1), 0)
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
    if s.latent == "fixed":  # and it is the mean of the log of one whole path
        logs = path_log_weight(model_of(name), rows, s, Noise(4), 0)
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
    logs = torch.stack([path_log_weight(model_of("vmd"), rows, s, Noise(7), 2 * 5 + k) for k in range(5)])
    whole = importance_weighted(model_of("vmd"), rows, s, Noise(7), samples=5, draw=2)
    assert torch.allclose(whole, -logs.exp().mean(0).log(), atol=1e-10)
    assert not torch.allclose(logs[0], logs[1])
    other = importance_weighted(model_of("vmd"), rows, s, Noise(7), samples=5, draw=3)
    assert (whole - other).abs().min() > 0


# ---- the sampler is the model that is scored


@pytest.mark.parametrize(("name", "s"), COMBINATIONS, ids=names)
def test_samples_have_the_likelihood_that_is_computed(name, s):
    count = 8000
    exact = exact_of(name)
    x = sample(model_of(name), s, Noise(8), torch.arange(count))
    vocab, length = exact.a.vocab_size, exact.a.row_length
    code = (x * vocab ** torch.arange(length - 1, -1, -1)).sum(-1)
    assert torch.equal(exact.rows[code], x)
    observed = torch.bincount(code, minlength=len(exact.rows)).double()
    expected = exact_likelihood(name, s) * count
    small = expected < 5  # rare sequences are counted together
    if small.any():
        observed = torch.cat((observed[~small], observed[small].sum()[None]))
        expected = torch.cat((expected[~small], expected[small].sum()[None]))
    statistic = ((observed - expected).square() / expected.clamp(min=1e-9)).sum().item()
    freedom = len(expected) - 1
    assert statistic < freedom + 4 * math.sqrt(2 * freedom) + 4


def test_given_tokens_are_kept_and_condition_the_others():
    """Infilling: with position 1 given, T = inf draws from p(x0 | x1) as the enumeration over orders gives it."""
    model, count = model_of("mdm"), 12_000
    maskable = torch.tensor([True, False, True]).expand(count, 3)
    given = torch.tensor([0, 2, 0]).expand(count, 3)
    x = sample(model, Sampler(INF), Noise(9), torch.arange(count), given, maskable)
    assert bool((x[:, 1] == 2).all())
    pairs = sequences(3, 2)
    expected = torch.zeros(9, dtype=torch.float64)
    for n, (left, right) in enumerate(pairs.tolist()):
        for first, second in ((0, 2), (2, 0)):
            noisy = torch.tensor([[3, 2, 3]])
            with torch.no_grad():
                p_first = model.logits(noisy, None)[0, first].double().softmax(-1)[(left, right)[first // 2]]
                noisy[0, first] = (left, right)[first // 2]
                p_second = model.logits(noisy, None)[0, second].double().softmax(-1)[(left, right)[second // 2]]
            expected[n] += 0.5 * (p_first * p_second).item() * count
    observed = torch.bincount(3 * x[:, 0] + x[:, 2], minlength=9).double()
    assert ((observed - expected).square() / expected).sum().item() < 8 + 4 * math.sqrt(16)


def test_a_sample_is_named_by_its_number():
    for name, s in itertools.product(("vmd", "mdm", "blocks"), (Sampler(2), Sampler(2, "fresh", "bernoulli"))):
        together = sample(model_of(name), s, Noise(10), torch.arange(30))
        apart = torch.cat([sample(model_of(name), s, Noise(10), part) for part in torch.arange(30).split(7)])
        assert torch.equal(together, apart)
        assert not torch.equal(together, sample(model_of(name), s, Noise(11), torch.arange(30)))


def test_a_fresh_sample_does_not_depend_on_the_rows_beside():
    model = tiny_model(12, row_length=6)
    maskable = torch.ones(40, 6, dtype=torch.bool)
    maskable[0::2, 2:] = False
    given = torch.arange(240).view(40, 6) % 3
    for s in (Sampler(4, "fresh"), Sampler(INF, "fresh"), Sampler(3, "fresh", "bernoulli")):
        together = sample(model, s, Noise(10), torch.arange(40), given, maskable)
        rows = torch.arange(40).split(1)
        apart = torch.cat([sample(model, s, Noise(10), row, given[row], maskable[row]) for row in rows])
        assert torch.equal(together, apart), s


def test_categorical_draws_invert_the_distribution():
    logits = torch.tensor([0.3, -1.0, 2.0, -30.0])
    u = (torch.arange(100_000).double() + 0.5) / 100_000
    counts = torch.bincount(draw_categorical(logits.expand(100_000, 4), u), minlength=4)
    assert torch.allclose(counts / 100_000, logits.softmax(-1), atol=2e-5)
    for edge in (2.0**-53, 1 - 2.0**-53):
        drawn = draw_categorical(torch.zeros(1, 4), torch.tensor([edge], dtype=torch.float64)).item()
        assert drawn == (0 if edge < 0.5 else 3)


def test_samplers_have_valid_names_only():
    for wrong in ({"steps": 0}, {"steps": 1, "latent": "warm"}, {"steps": 1, "law": "magic"}):
        with pytest.raises(ValueError, match="no such sampler"):
            Sampler(**wrong)


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


# ---- the surrogate is no bound


@functools.cache
def coupled_model():
    """A VMD trained by the published objective on (k, k + 1 mod 10), uniform over k: entropy ln 10."""
    torch.manual_seed(0)
    a = architecture(
        vocab_size=10, row_length=2, width=32, condition_width=32, encoder_width=32, latent_width=2, attention="sdpa"
    )
    model = VMD(a)
    objective = Objective("vmd", (INF,), "balanced", 1, 2, a.mask_id, Noise(0))
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
