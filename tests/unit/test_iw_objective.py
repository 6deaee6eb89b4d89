"""Objective iw: the importance-weighted bound as a training loss, against enumeration."""

import dataclasses
import math

import pytest
import torch
from tiny_models import Enumeration, sequences, tiny_model

from vmd_scale.diffusion.importance import ImportanceWeighted
from vmd_scale.diffusion.noise import Noise

INF = math.inf


def objective_of(model, steps, samples, law="balanced", seed=0):
    a = model.architecture
    shared = {"law": law, "groups": a.groups, "latent_width": a.latent_width, "mask_id": a.mask_id}
    return ImportanceWeighted(steps=steps, importance_samples=samples, noise=Noise(seed), **shared)


def prepared(objective, clean, maskable=None, step=0, positions=None, total=None):
    maskable = torch.ones_like(clean, dtype=torch.bool) if maskable is None else maskable
    positions = torch.arange(len(clean)) if positions is None else positions
    return objective.prepare(clean, maskable, None, step, positions, total or len(clean))


@torch.no_grad()
def losses(model, clean, steps, samples, copies, law="balanced"):
    """Mean loss of each row over many draws, and its standard error."""
    objective, batches = objective_of(model, steps, samples, law), 10
    values = torch.zeros(batches, len(clean), dtype=torch.float64)
    for step in range(batches):
        for n, row in enumerate(clean):
            x = prepared(objective, row.expand(copies // batches, -1), step=step)
            values[step, n] = objective(model, x, 1.0).total / (copies // batches)
    return values.mean(0), values.std(0) / math.sqrt(batches)


@pytest.mark.parametrize(("steps", "law"), [(1, "balanced"), (2, "balanced"), (2, "bernoulli"), (INF, "balanced")])
def test_one_sample_is_the_elbo(steps, law):
    model = tiny_model(14)
    exact = Enumeration(model)
    some = [0, 5, 13, 22]
    mean, error = losses(model, exact.rows[some], (steps,), 1, 1000, law)
    assert ((mean - exact.negative_elbo(steps, "fixed", law)[some]).abs() < 5 * error).all()
    assert error.max() < 0.2


@pytest.mark.parametrize("changes", [{}, {"vocab_size": 2, "row_length": 4, "groups": 2}], ids=["row", "blocks"])
def test_more_samples_are_a_tighter_bound(changes):
    model = tiny_model(14, **changes)
    exact = Enumeration(model)
    truth = -exact.likelihood(1, "fixed", "balanced").log()
    gaps = []
    for samples in (1, 4, 32):
        mean, error = losses(model, exact.rows, (1,), samples, 100)
        assert (mean > truth - 5 * error).all()
        gaps.append((mean - truth).mean().item())
    assert gaps[0] > 1.5 * gaps[1] > 0
    assert gaps[2] < 0.2 * gaps[0]


def test_the_loss_is_the_log_of_a_mean_over_latents_that_share_a_path():
    """By hand: for one row, T = 2, from the model's own densities."""
    model = tiny_model(3)
    objective = objective_of(model, (2,), 3)
    clean = torch.tensor([[2, 0, 1]])
    x = prepared(objective, clean)
    assert x.noisy.shape == (2, 3)
    before, after = (noisy == 3 for noisy in x.noisy)
    assert bool(before.all())
    assert 0 < after.sum() < 3
    with torch.no_grad():
        q = model.encode(clean, torch.ones_like(clean, dtype=torch.bool))
        weights = []
        for epsilon in x.epsilon[0]:
            z = q.mean + q.log_std.exp() * epsilon
            normal = torch.distributions.Normal(q.mean, q.log_std.exp())
            log_weight = (torch.distributions.Normal(0.0, 1.0).log_prob(z) - normal.log_prob(z)).sum()
            for noisy, revealed in ((x.noisy[0], before & ~after), (x.noisy[1], after)):
                log_p = model.logits(noisy[None], z).log_softmax(-1)[0].gather(-1, clean[0][:, None]).squeeze(-1)
                log_weight = log_weight + log_p[revealed].sum()
            weights.append(log_weight)
        expected = -torch.stack(weights).exp().mean().log()
        assert torch.allclose(objective(model, x, 1.0).total, expected, atol=1e-5)
        unpaid = objective(model, x, 0.0).total
    assert not torch.allclose(unpaid, expected, atol=1e-3)


def slopes(model, objective, x, direction, annealing):
    """Of the loss along a direction in the weights: by the gradient, and by a central difference."""
    parameters, loss = [p for p, _ in direction], objective(model, x, annealing).total
    gradients = torch.autograd.grad(loss, parameters)
    slope = sum((g * d).sum() for g, (_, d) in zip(gradients, direction, strict=True)).item()
    sides = []
    for size in (1e-4, -2e-4):
        with torch.no_grad():
            for p, d in direction:
                p.add_(size * d)
            sides.append(objective(model, x, annealing).total.item())
    with torch.no_grad():
        for p, d in direction:
            p.add_(1e-4 * d)
    return slope, (sides[0] - sides[1]) / 2e-4


def direction_in(*modules):
    generator = torch.Generator().manual_seed(0)
    parameters = [p for module in modules for p in module.parameters()]
    return [(p, torch.randn(p.shape, generator=generator, dtype=p.dtype)) for p in parameters]


def in_double(x):
    return dataclasses.replace(x, epsilon=x.epsilon.double())


@pytest.mark.parametrize("prior", ["standard", "conditional"])
def test_denoiser_and_prior_get_the_gradient_of_the_loss(prior):
    model = tiny_model(5, prior=prior).double()
    objective = objective_of(model, (1, 2), 4)
    x = in_double(prepared(objective, sequences(3, 3)[:12]))
    modules = [model.denoiser] if model.prior_network is None else [model.denoiser, model.prior_network]
    slope, difference = slopes(model, objective, x, direction_in(*modules), 0.7)
    assert slope == pytest.approx(difference, rel=1e-3)


def along_the_gradient(model, objective, x, annealing):
    """The direction in the encoder's last layer in which the loss rises most: there a slope is far from zero."""
    parameters = list(model.encoder.out.parameters())
    gradients = torch.autograd.grad(objective(model, x, annealing).total, parameters)
    length = math.sqrt(sum(g.square().sum().item() for g in gradients))
    return [(p, g / length) for p, g in zip(parameters, gradients, strict=True)]


@pytest.mark.parametrize(("annealing", "share"), [(1.0, 0.6), (0.4, 0.9)])
@pytest.mark.parametrize("groups", [1, 2])
def test_the_encoder_gets_a_gradient_with_the_same_mean_as_that_of_the_loss_and_less_noise(annealing, share, groups):
    """Only means agree: a gradient that is doubly reparameterised is another function of the same noise.

    Less noise: at most this share of the standard deviation.
    """
    model, rows, steps = tiny_model(5, row_length=4, groups=groups).double(), 100, 40
    objective = objective_of(model, (1,), 4)

    def batch(rows, step):
        return in_double(prepared(objective, torch.tensor([[2, 0, 1, 1]]).expand(rows, -1), step=step))

    direction = along_the_gradient(model, objective, batch(1000, steps), annealing)
    found = [slopes(model, objective, batch(rows, step), direction, annealing) for step in range(steps)]
    ours, plain = torch.tensor(found, dtype=torch.float64).T / rows
    error = (ours - plain).std() / math.sqrt(steps)
    assert (ours - plain).mean().abs() < 4 * error
    assert ours.mean().abs() > 10 * error  # or the comparison could not fail
    assert not torch.allclose(ours, plain, rtol=1e-3)
    assert ours.std() < share * plain.std()


def test_the_inputs_do_not_depend_on_the_micro_batch():
    model = tiny_model(6, row_length=4)
    clean = torch.arange(32).view(8, 4) % 3
    maskable = torch.ones_like(clean, dtype=torch.bool)
    maskable[2] = False
    maskable[5, 1:3] = False
    objective = objective_of(model, (1, 2, 4), 2)
    with torch.no_grad():
        whole = objective(model, prepared(objective, clean, maskable, 7), 1.0)
        parts = [
            objective(model, prepared(objective, clean[part], maskable[part], 7, part, 8), 1.0)
            for part in torch.arange(8).split(3)
        ]
    assert torch.allclose(whole.total, sum(part.total for part in parts), atol=1e-4)
    assert int(whole.tokens) == int(maskable.sum()) == sum(int(part.tokens) for part in parts)


def test_given_tokens_are_never_masked_and_every_other_is_revealed_once():
    model = tiny_model(6, row_length=6, groups=2)
    clean = torch.arange(48).view(8, 6) % 3
    maskable = torch.rand(8, 6, generator=torch.Generator().manual_seed(1)) < 0.7
    for law in ("balanced", "bernoulli"):
        x = prepared(objective_of(model, (1, 2, 3), 2, law), clean, maskable)
        assert not bool(((x.noisy == 3) & ~maskable[x.owner]).any())
        times = torch.zeros(8, 2, 6)
        states = x.index[x.index < len(x.owner) * 2 * 6]
        state, position = states // 6, states % 6
        times.index_put_((x.owner[state // 2], state % 2, position), torch.ones(len(states)), accumulate=True)
        assert torch.equal(times, maskable[:, None].expand(8, 2, 6).float())


@pytest.mark.parametrize("law", ["balanced", "bernoulli"])
def test_the_shapes_do_not_depend_on_the_rows_or_the_step(law):
    """ZeRO-3 calls the head in as many pieces as the shape tells: it must be the same on every rank."""
    model = tiny_model(6, row_length=6)
    objective = objective_of(model, (1, 2, 4), 2, law)
    generator = torch.Generator().manual_seed(0)
    shapes = set()
    for step in range(6):
        positions = torch.arange(8) + 8 * (step % 3)
        maskable = torch.rand(8, 6, generator=generator) < (0.3 if step % 2 else 1.0)
        x = prepared(objective, torch.zeros(8, 6, dtype=torch.int64), maskable, step, positions, 24)
        shapes.add((x.noisy.shape, x.owner.shape, x.ratio.shape))
    assert len(shapes) == 1


def test_every_row_has_every_t_equally_often():
    model = tiny_model(6, row_length=4)
    objective = objective_of(model, (1, 4), 1)
    clean = torch.zeros(2, 4, dtype=torch.int64)
    ones = [prepared(objective, clean, step=step).noisy.eq(3).all(1).sum().item() for step in range(50)]
    first = [bool(prepared(objective, clean, step=step).owner.eq(0).sum() == 1) for step in range(200)]
    assert set(ones) == {2}  # each row begins with everything masked
    assert 70 < sum(first) < 130
