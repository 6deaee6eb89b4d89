import dataclasses
import functools
import math

import pytest
import torch
from tiny_models import Enumeration, tiny_model

from vmd_scale.diffusion.likelihood import Rows, elbo, vmd_surrogate
from vmd_scale.diffusion.noise import Noise
from vmd_scale.diffusion.objective import Nelbo, Surrogate
from vmd_scale.diffusion.paths import RANDOM_LAWS as LAWS
from vmd_scale.diffusion.sampler import Sampler

INF = math.inf
CONFIGURATIONS = [(kind, law, groups) for kind in ("nelbo", "vmd") for law in LAWS for groups in (1, 2)]


@functools.cache
def model_of(groups=1, latent=2, **changes):
    return tiny_model(
        7, vocab_size=4, row_length=6, groups=groups, latent_width=latent, time_conditioning=True, **changes
    )


def objective_for(model, kind="nelbo", steps=(1, 2, 4, INF), law="balanced", seed=0, free_bits=0.0):
    a = model.architecture
    shared = {"law": law, "groups": a.groups, "latent_width": a.latent_width, "mask_id": a.mask_id}
    shared |= {"noise": Noise(seed), "free_bits": free_bits}
    return Nelbo(steps=steps, **shared) if kind == "nelbo" else Surrogate(**shared)


def batch_of(rows, seed=0):
    """clean, maskable, attend: rows of several lengths with holes; every eighth row has nothing to mask."""
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randint(4, (rows, 6), generator=generator)
    attend = torch.arange(6) < torch.randint(2, 7, (rows, 1), generator=generator)
    maskable = attend & (torch.rand(rows, 6, generator=generator) < 0.8)
    maskable[1::8] = False
    return clean, maskable, attend


def prepare(objective, batch, step=3, rows=None, total=None):
    rows = torch.arange(len(batch[0])) if rows is None else rows
    parts = [None if part is None else part[rows] for part in batch]
    return objective.prepare(*parts, step, rows, total or len(batch[0]))


# ---- unbiased


@pytest.mark.parametrize("latent", [0, 1])
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("steps", [(2,), (1, 2, INF)])
def test_nelbo_is_the_mean_of_the_bounds_of_its_steps(latent, law, steps):
    """Mean over many draws = exact ELBO (by enumeration), averaged over the set of T."""
    model = tiny_model(9, latent_width=latent)
    exact = Enumeration(model)
    count = 3000
    for number in (0, 14):
        expected = sum(exact.negative_elbo(t, "fixed", law)[number].item() for t in steps) / len(steps)
        clean = exact.rows[number].expand(count, 3)
        objective = objective_for(model, steps=steps, law=law)
        x = objective.prepare(clean, torch.ones_like(clean, dtype=torch.bool), None, 0, torch.arange(count), count)
        with torch.no_grad():
            loss = objective(model, x, 1.0)
            nll, posterior = model(x.clean, x.noisy, x.index, x.encoder_mask, x.epsilon, x.attend, x.ratio)
        per_row = x.nll_weight.squeeze(-1) * nll.sum(-1)
        if latent:
            per_row = per_row + posterior.kl().squeeze(-1)
        assert loss.total.item() == pytest.approx(per_row.sum().item(), rel=1e-4)
        assert abs(loss.total.item() / count - expected) < 4 * per_row.std().item() / math.sqrt(count) + 1e-5
        assert expected > 0.5
        assert loss.tokens.item() == 3 * count


def test_every_step_count_of_the_set_gets_its_share():
    objective = objective_for(model_of(), steps=(1, 2, 3, INF), law="balanced")
    clean = torch.zeros(400, 6, dtype=torch.int64)
    x = objective.prepare(clean, torch.ones_like(clean, dtype=torch.bool), None, 0, torch.arange(400), 400)
    masked = (x.noisy == 4).sum(-1)
    weights = x.nll_weight.squeeze(-1)
    # 6 positions: T=1 masks 6 at weight 1; T=2 3 or 6 at 2*1, 2*.5; T=3 2, 4, 6 at 3*1, 3*.5, 1; inf k at 6/k
    expected = {(6, 1.0): 100 + 50 + 100 / 3 + 100 / 6, (3, 2.0): 50 + 100 / 6, (2, 3.0): 100 / 3 + 100 / 6}
    expected |= {(4, 1.5): 100 / 3 + 100 / 6, (1, 6.0): 100 / 6, (5, 1.2): 100 / 6}
    for (size, weight), share in expected.items():
        assert abs(int(((masked == size) & ((weights - weight).abs() < 1e-5)).sum()) - share) <= 4
    assert sum(expected.values()) == pytest.approx(400)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("steps", [1, 3, INF])
def test_training_and_evaluation_compute_the_same_thing(law, groups, steps):
    """Same noise, same rows: the objective's sum is the likelihood's sum, for the bound and for the surrogate."""
    model, batch = model_of(groups), batch_of(24)
    rows = Rows(*batch, torch.arange(24))
    bound = elbo(model, rows, Sampler(steps, law=law), Noise(5), 24, draw=3).sum().item()
    nelbo = objective_for(model, "nelbo", (steps,), law, seed=5)
    assert nelbo(model, prepare(nelbo, batch), 1.0).total.item() == pytest.approx(bound, rel=1e-5)
    surrogate = vmd_surrogate(model, rows, Noise(5), 24, law, draw=3).sum().item()
    vmd = objective_for(model, "vmd", (steps,), law, seed=5)
    assert vmd(model, prepare(vmd, batch), 1.0).total.item() == pytest.approx(surrogate, rel=1e-5)


# ---- batches


@pytest.mark.parametrize(("kind", "law", "groups"), CONFIGURATIONS)
def test_the_split_into_micro_batches_does_not_matter(kind, law, groups):
    model, batch = model_of(groups), batch_of(24)
    objective = objective_for(model, kind, law=law, free_bits=0.05)
    whole = prepare(objective, batch)
    loss = objective(model, whole, 0.7)
    gradients = torch.autograd.grad(loss.total, list(model.parameters()))
    for micro in (1, 4, 12):
        parts = [prepare(objective, batch, rows=rows, total=24) for rows in torch.arange(24).split(micro)]
        for field in dataclasses.fields(whole):
            value = getattr(whole, field.name)
            if field.name in ("index", "dropout_seed", "owner"):
                continue
            assert torch.equal(torch.cat([getattr(part, field.name) for part in parts]), value), field.name
        losses = [objective(model, part, 0.7) for part in parts]
        for name in ("total", "reconstruction", "kl", "tokens"):
            summed = sum(getattr(x, name).item() for x in losses)
            assert summed == pytest.approx(getattr(loss, name).item(), rel=1e-4), name
        split = torch.autograd.grad(sum(x.total for x in losses), list(model.parameters()))
        for one, other in zip(gradients, split, strict=True):
            assert torch.allclose(one, other, atol=1e-3 * one.abs().max().item() + 1e-5)


def test_rows_are_prepared_alike_in_any_order():
    """Which rank holds which positions does not matter either."""
    batch, objective = batch_of(16), objective_for(model_of())
    whole, order = prepare(objective, batch), torch.randperm(16, generator=torch.Generator().manual_seed(0))
    shuffled = prepare(objective, batch, rows=order, total=16)
    for name in ("noisy", "epsilon", "nll_weight", "kl_weight", "ratio", "encoder_mask"):
        assert torch.equal(getattr(shuffled, name), getattr(whole, name)[order])


def test_steps_and_seeds_have_noise_of_their_own():
    batch, names = batch_of(16), {"steps": (INF,), "law": "bernoulli"}
    base = prepare(objective_for(model_of(), **names), batch, step=3)
    for seed, step in ((0, 4), (1, 3)):
        other = prepare(objective_for(model_of(), **names, seed=seed), batch, step=step)
        assert not torch.equal(base.noisy, other.noisy)
        assert not (base.nll_weight == other.nll_weight).any()
        assert not (base.epsilon == other.epsilon).any()
        assert base.dropout_seed != other.dropout_seed
    again = prepare(objective_for(model_of(), **names), batch, step=3)
    assert torch.equal(base.noisy, again.noisy)
    assert base.dropout_seed == again.dropout_seed


# ---- what is paid


@pytest.mark.parametrize(("kind", "law", "groups"), CONFIGURATIONS)
def test_annealing_scales_the_kl_and_nothing_else(kind, law, groups):
    model, objective = model_of(groups), objective_for(model_of(groups), kind, law=law)
    x = prepare(objective, batch_of(16))
    zero, half, one = (objective(model, x, annealing) for annealing in (0.0, 0.5, 1.0))
    assert zero.total.item() == zero.reconstruction.item()
    assert zero.kl.item() > 0.1  # reported though not paid
    assert half.total.item() == pytest.approx(half.reconstruction.item() + 0.5 * half.kl.item(), rel=1e-6)
    assert one.total.item() == pytest.approx(one.reconstruction.item() + one.kl.item(), rel=1e-6)
    assert one.kl.item() == zero.kl.item()


@pytest.mark.parametrize(("kind", "law", "groups"), CONFIGURATIONS)
def test_what_the_encoder_sees_and_how_often_its_kl_counts(kind, law, groups):
    """nelbo: q(z | x0) and KL once, however early the step; vmd: q(z | x0, m) and KL weighted like the tokens."""
    model, objective = model_of(groups), objective_for(model_of(groups), kind, law=law)
    clean, maskable, attend = batch_of(64)
    x = prepare(objective, (clean, maskable, attend))
    masked = x.noisy == model.architecture.mask_id
    in_group = lambda mask: mask.view(64, groups, -1).any(-1)  # noqa: E731
    if kind == "nelbo":
        assert torch.equal(x.encoder_mask, maskable)
        assert torch.equal(x.kl_weight, in_group(maskable).float())
    else:
        assert torch.equal(x.encoder_mask, masked)
        assert torch.equal(x.kl_weight, x.nll_weight * in_group(masked))
        assert x.kl_weight.max() > 1.5
    assert not torch.equal(masked, maskable)


def test_free_bits_are_free():
    model, batch = model_of(2), batch_of(32)
    plain = objective_for(model, "nelbo")
    x = prepare(plain, batch)
    _, posterior = model(x.clean, x.noisy, x.index, x.encoder_mask, x.epsilon, x.attend, x.ratio)
    kl = posterior.kl()
    free = kl.median().item()
    loss = objective_for(model, "nelbo", free_bits=free)(model, x, 0.5)
    paid = (x.kl_weight * (kl - free).clamp(min=0)).sum().item()
    assert 0 < paid < loss.kl.item()
    assert loss.total.item() == pytest.approx(loss.reconstruction.item() + 0.5 * paid, rel=1e-5)
    assert loss.kl.item() == pytest.approx(plain(model, x, 0.5).kl.item(), rel=1e-6)  # the report is the whole KL
    all_free = objective_for(model, "nelbo", free_bits=1e6)(model, x, 1.0)
    assert all_free.total.item() == all_free.reconstruction.item()


@pytest.mark.parametrize(("kind", "law", "groups"), CONFIGURATIONS)
def test_rows_without_anything_to_predict_cost_nothing(kind, law, groups):
    model = model_of(groups)
    objective = objective_for(model, kind, law=law, free_bits=0.01)
    clean, maskable, attend = batch_of(16)
    nothing = prepare(objective, (clean, torch.zeros_like(maskable), attend))
    loss = objective(model, nothing, 1.0)
    assert loss.total.item() == loss.reconstruction.item() == loss.kl.item() == loss.tokens.item() == 0
    gradients = torch.autograd.grad(loss.total, list(model.parameters()), allow_unused=True)
    assert all(bool((g == 0).all()) for g in gradients if g is not None)
    # beside rows that do cost something
    maskable[::2] = False
    loss = objective(model, prepare(objective, (clean, maskable, attend)), 1.0)
    costly = objective(model, prepare(objective, (clean, maskable, attend), rows=torch.arange(1, 16, 2), total=16), 1.0)
    assert loss.total.item() == pytest.approx(costly.total.item(), rel=1e-5)
    assert loss.total.item() > 0
    assert loss.tokens.item() == int(maskable.sum())


def test_padding_does_not_change_the_loss():
    for groups in (1, 2):
        model, objective = model_of(groups), objective_for(model_of(groups))
        clean, maskable, attend = batch_of(16)
        other = torch.where(attend, clean, (clean + 1) % 4)
        losses = [objective(model, prepare(objective, (c, maskable, attend)), 1.0) for c in (clean, other)]
        assert losses[0].total.item() == pytest.approx(losses[1].total.item(), rel=1e-5)


def test_only_the_total_carries_a_gradient():
    model, objective = model_of(), objective_for(model_of())
    loss = objective(model, prepare(objective, batch_of(8)), 1.0)
    assert loss.total.requires_grad
    assert not loss.reconstruction.requires_grad
    assert not loss.kl.requires_grad
    baseline = model_of(latent=0)
    objective = objective_for(baseline)
    loss = objective(baseline, prepare(objective, batch_of(8)), 1.0)
    assert loss.total.requires_grad
    assert loss.kl.item() == 0
    assert loss.total.item() == loss.reconstruction.item()


# ---- blocks


@pytest.mark.parametrize("kind", ["nelbo", "vmd"])
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("latent", [0, 2])
def test_the_loss_of_a_row_is_the_sum_over_its_blocks(kind, law, latent):
    """Scoring each block alone (the others context only) adds up to scoring them all."""
    if kind == "vmd" and not latent:
        pytest.skip("the surrogate needs a latent")
    model = tiny_model(11, vocab_size=4, row_length=6, groups=3, latent_width=latent)
    if latent:  # the encoder is shown the pattern of the whole row; here it shall not matter which part is scored
        with torch.no_grad():
            model.encoder.pattern.weight.zero_()
    objective = objective_for(model, kind, law=law)
    clean = torch.randint(4, (32, 6), generator=torch.Generator().manual_seed(1))
    everything = torch.ones_like(clean, dtype=torch.bool)
    whole = objective(model, prepare(objective, (clean, everything, None)), 0.5)
    parts = []
    for block in range(3):
        alone = torch.zeros_like(everything)
        alone[:, 2 * block : 2 * block + 2] = True
        parts.append(objective(model, prepare(objective, (clean, alone, None)), 0.5))
    for name in ("total", "reconstruction", "kl", "tokens"):
        assert sum(getattr(p, name).item() for p in parts) == pytest.approx(getattr(whole, name).item(), rel=1e-4)
    assert min(p.total.item() for p in parts) > 0


def test_blocks_have_times_of_their_own():
    model = model_of(2)
    objective = objective_for(model, steps=(INF,))
    clean = torch.zeros(300, 6, dtype=torch.int64)
    x = objective.prepare(clean, torch.ones_like(clean, dtype=torch.bool), None, 0, torch.arange(300), 300)
    counts = (x.noisy == 4).view(300, 2, 3).sum(-1)
    for group in (0, 1):  # in each block every mask count occurs as often as it should
        assert (torch.bincount(counts[:, group], minlength=4) - torch.tensor([0, 100, 100, 100])).abs().max() <= 2
    assert (counts[:, 0] == counts[:, 1]).double().mean() < 0.6
    assert torch.allclose(x.ratio, counts / 3)
