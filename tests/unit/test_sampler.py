"""Samplers: each draws from the distribution of its name, row by row, and touches nothing that was given."""

import itertools
import math
import shutil
from collections import Counter

import pytest
import torch
from expectations import assert_drawn_from
from tiny_models import MODELS, exact_of, model_of, sequences, sureness, tiny_model
from watching import DeviceWatch

from vmd_scale.diffusion.noise import Noise
from vmd_scale.diffusion.paths import CONFIDENCE_LAWS, LAWS, RANDOM_LAWS
from vmd_scale.diffusion.sampler import Sampler, _Walk, sample
from vmd_scale.diffusion.tokens import draw_categorical, draw_tokens, probability_of

INF = math.inf
MDM = tiny_model(6, latent_width=0)
VMD = tiny_model(14)
ROWS = sequences(3, 3)


@torch.no_grad()
def log_p(model, noisy, z=None, ratio=None):
    return model.logits(noisy, z, None, ratio).double().log_softmax(-1)


def independent(p):
    """Probabilities of all rows when positions are independent, from p [L, V]."""
    return torch.stack([p[i, ROWS[:, i]] for i in range(3)]).prod(0)


class Watched:
    """What the denoiser was asked while a sample was drawn: the states before the steps, and z."""

    def __init__(self, model, *arguments):
        self.noisy, self.z = [], []

        def remember(module, inputs):
            self.noisy.append(inputs[0].clone())
            self.z.append(inputs[1])

        hook = model.denoiser.register_forward_pre_hook(remember)
        try:
            self.drawn = sample(model, *arguments)
        finally:
            hook.remove()
        self.states = [*self.noisy, self.drawn]


def partly_given():
    """Rows of six with padding at the end, some tokens given, unequal numbers to draw, one with nothing to draw."""
    clean, lengths = torch.arange(12 * 6).view(12, 6) * 5 % 3, torch.tensor([6, 2, 4, 6, 1, 5, 3, 6, 2, 4, 6, 6])
    attend = torch.arange(6) < lengths[:, None]
    maskable = attend.clone()
    maskable[3, [0, 4]] = False
    maskable[7, 1:] = False
    maskable[8] = False
    return clean, maskable, attend


CHANGED = [
    {"temperature": 0.0},
    {"temperature": 0.6},
    {"nucleus": 0.7},
    {"remask": 0.4},
    {"law": "top_prob"},
    {"law": "margin", "order_noise": 2.0},
    {"law": "entropy", "order_noise": 5.0, "temperature": 0.5, "nucleus": 0.9, "remask": 0.6},
]


# ---- plain samplers


@pytest.mark.parametrize("latent", ["fixed", "fresh"])
@pytest.mark.parametrize("name", MODELS)
def test_samples_have_the_likelihood_that_is_computed(name, latent):
    """For laws of confidence see test_confidence."""
    exact = exact_of(name)
    if latent == "fresh" and name == "mdm":
        return
    for steps, law in itertools.product((1, 2, 3, INF) if name in ("vmd", "mdm") else (2,), RANDOM_LAWS):
        x = sample(model_of(name), Sampler(steps, latent, law), Noise(8), torch.arange(8000))
        assert_drawn_from(x, exact.rows, exact.likelihood(steps, latent, law))


# ---- rows


@pytest.mark.parametrize("change", [{}, {"law": "bernoulli"}, *CHANGED], ids=str)
@pytest.mark.parametrize("kind", [{}, {"groups": 2, "seed": 9}, {"prior": "conditional"}], ids=str)
def test_a_row_is_named_by_its_number_whatever_is_beside_it(change, kind):
    model, (given, maskable, attend) = tiny_model(**{"seed": 12, "row_length": 6, **kind}), partly_given()
    for steps, latent in itertools.product((2, 4, INF), ("fixed", "fresh")):
        s = Sampler(steps, latent, **change)
        together = sample(model, s, Noise(10), torch.arange(12), given, maskable, attend)
        assert torch.equal(together[~maskable], given[~maskable])
        assert int(together.max()) < 3  # no mask is left
        for part in (*torch.arange(12).split(1), torch.tensor([7, 3, 1])):
            alone = sample(model, s, Noise(10), part, given[part], maskable[part], attend[part])
            assert torch.equal(together[part], alone), (s, part)
    full = sample(model, s, Noise(10), torch.arange(12))
    assert not torch.equal(full, sample(model, s, Noise(11), torch.arange(12))) or s.temperature == 0


@pytest.mark.parametrize("latent", ["fixed", "fresh"])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("numbers", [[0, 1, 2, 3, 4, 5], [0]], ids=["rows", "a row"])
def test_modulations_are_computed_once_a_latent(groups, latent, numbers, monkeypatch):
    """And draw what is drawn when every forward computes them."""
    model, sampler, noise = tiny_model(12, row_length=6, groups=groups), Sampler(3, latent=latent), Noise(10)
    numbers, given = torch.tensor(numbers), [x[numbers] for x in partly_given()]
    computed, forwards = [], []
    model.denoiser.latent_to_condition.register_forward_hook(lambda *_: computed.append(1))
    model.denoiser.norm.register_forward_hook(lambda *_: forwards.append(1))  # also where a block is remembered
    drawn = sample(model, sampler, noise, numbers, *given)
    assert len(forwards) > groups
    assert len(computed) == (1 if latent == "fixed" else 1 + len(forwards) - (groups - 1))
    monkeypatch.setattr(model.denoiser, "modulations", lambda z: None)
    assert torch.equal(sample(model, sampler, noise, numbers, *given), drawn)
    assert len(computed) > 2


KINDS = [{}, {"groups": 2}, {"prior": "conditional"}, {"time_conditioning": True}, {"latent_width": 0}]


@pytest.mark.parametrize("latent", ["fixed", "fresh"])
@pytest.mark.parametrize("law", RANDOM_LAWS)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_step_of_a_random_law_waits_for_nothing(law, kind, latent, monkeypatch):
    """Here with the CPU playing a device: what is not on it is on the host, where waiting costs nothing."""
    model, watch = tiny_model(12, row_length=6, **kind), DeviceWatch("sampler.py")
    for parameter in model.parameters():
        watch.put(parameter)
    monkeypatch.setattr(_Walk, "_sent", lambda self, x: watch.put(x.clone()))
    with watch:
        drawn = sample(model, Sampler(4, latent, law), Noise(10), torch.arange(12), *partly_given())
    assert watch.is_on_device(drawn)
    assert watch.waits == watch.mixed == {}
    assert watch.operations["nonzero"] > 4  # they are there, on the host
    with watch:
        drawn[drawn == 1].sum().item()
    assert watch.waits == {"index": 1, "_local_scalar_dense": 1}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("law", RANDOM_LAWS)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_step_of_a_random_law_waits_for_no_gpu(law, kind):
    model, (given, maskable, attend) = tiny_model(12, row_length=6, **kind), partly_given()
    arguments = Sampler(4, "fresh", law), Noise(10), torch.arange(12)
    expected = sample(model, *arguments, given, maskable, attend)
    model.cuda()
    sample(model, *arguments, given, maskable, attend)  # whatever is only done once
    torch.cuda.set_sync_debug_mode("error")
    try:
        walk = _Walk(model, *arguments, given.masked_fill(maskable, 3), maskable, attend)
        for group in range(model.architecture.groups):
            walk.block(group)
            if group < model.architecture.groups - 1:
                walk.remember(group)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (walk.x.cpu() == expected).float().mean() > 0.95  # in fp32, a token may be at the edge of two


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_compiled_blocks_draw_the_same_rows():
    """Of any number of rows, which changes on the way, and with keys and values of the block before."""
    torch._dynamo.reset()
    model, given = tiny_model(12, row_length=6, attention="sdpa", groups=2), partly_given()
    numbers, sampler = (torch.arange(12), torch.tensor([5]), torch.tensor([7, 3, 1])), Sampler(4)
    drawn = [sample(model, sampler, Noise(10), n, *(x[n] for x in given)) for n in numbers]
    model.compile_blocks()
    torch._dynamo.utils.counters.clear()
    for n, rows in zip(numbers, drawn, strict=True):
        assert torch.equal(sample(model, sampler, Noise(10), n, *(x[n] for x in given)), rows)
    assert 1 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 12  # of a block, and of the last norm


def test_steps_in_which_nothing_changes_cost_no_forward():
    """Of 50 steps by coin over three tokens, at most three reveal any; rows with the others' steps are not computed."""
    numbers = torch.arange(8)
    watched = Watched(VMD, Sampler(50, law="bernoulli"), Noise(2), numbers)
    assert sum(len(noisy) for noisy in watched.noisy) <= 3 * len(numbers)
    assert len(Watched(VMD, Sampler(50, law="balanced"), Noise(2), numbers).noisy) == 3
    given = torch.zeros(8, 3, dtype=torch.int64)
    assert not Watched(VMD, Sampler(4), Noise(2), numbers, given, torch.zeros(8, 3, dtype=torch.bool)).noisy


def test_padding_is_not_heard():
    given, maskable, attend = partly_given()
    other = torch.where(attend, given, (given + 1) % 3)
    for groups, change in itertools.product((1, 2), CHANGED):
        model, s = tiny_model(12, row_length=6, groups=groups), Sampler(3, "fresh", **change)
        one, two = (sample(model, s, Noise(1), torch.arange(12), x, maskable, attend) for x in (given, other))
        assert torch.equal(one[attend], two[attend])


def test_given_tokens_are_kept_and_condition_the_others():
    """Infilling: with position 1 given, T = inf draws from p(x0 | x1) as the enumeration over orders gives it."""
    count, pairs = 12_000, sequences(3, 2)
    maskable = torch.tensor([True, False, True]).expand(count, 3)
    given = torch.tensor([0, 2, 0]).expand(count, 3)
    x = sample(MDM, Sampler(INF), Noise(9), torch.arange(count), given, maskable)
    rows, expected = torch.tensor([[left, 2, right] for left, right in pairs.tolist()]), torch.zeros(9).double()
    for first, second in ((0, 2), (2, 0)):
        noisy = torch.tensor([[3, 2, 3]]).repeat(9, 1)
        p = log_p(MDM, noisy)[range(9), first, rows[:, first]]
        noisy[:, first] = rows[:, first]
        expected += 0.5 * (p + log_p(MDM, noisy)[range(9), second, rows[:, second]]).exp()
    assert_drawn_from(x, rows, expected)


# ---- tokens


def test_what_is_far_out_in_the_tail_can_be_drawn():
    """In float32 the sum of these two probabilities is the first one: the second would never be drawn."""
    u = torch.tensor([1 - 5e-12], dtype=torch.float64)
    assert draw_categorical(torch.tensor([[0.0, -25.0]]), u).item() == 1


def test_categorical_draws_invert_the_distribution():
    logits = torch.tensor([0.3, -1.0, 2.0, -30.0])
    u = (torch.arange(100_000).double() + 0.5) / 100_000
    counts = torch.bincount(draw_categorical(logits.expand(100_000, 4), u), minlength=4)
    assert torch.allclose(counts / 100_000, logits.softmax(-1), atol=2e-5)
    for edge in (2.0**-53, 1 - 2.0**-53):
        drawn = draw_categorical(torch.zeros(1, 4), torch.tensor([edge], dtype=torch.float64)).item()
        assert drawn == (0 if edge < 0.5 else 3)


def nucleus_of(p, share):
    """The smallest set of the most probable tokens that holds `share`, renormalised; [..., V], one by one."""
    result = torch.zeros_like(p)
    for to, of in zip(result.view(-1, p.shape[-1]), p.reshape(-1, p.shape[-1]), strict=True):
        held = 0.0
        for token in sorted(range(len(of)), key=lambda token: -of[token]):
            if held >= share:
                break
            to[token], held = of[token], held + of[token].item()
        to /= held
    return result


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("nucleus", [0.3, 0.8, 1.0])
def test_tokens_by_temperature_and_nucleus(temperature, nucleus):
    """Temperature first, then the nucleus of what it made: one step of an MDM draws every position so."""
    noisy = torch.full((1, 3), 3)
    p = (log_p(MDM, noisy)[0] / temperature).softmax(-1)
    expected = independent(nucleus_of(p, nucleus))
    assert (expected == 0).any() == (nucleus < 1)
    drawn = sample(MDM, Sampler(1, temperature=temperature, nucleus=nucleus), Noise(2), torch.arange(8000))
    assert_drawn_from(drawn, ROWS, expected)

    logits = 3 * torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    u = ((torch.arange(5000).double() + 0.5) / 5000).repeat(6)
    tokens = draw_tokens(logits.repeat_interleave(5000, 0), u, temperature, nucleus)
    held = probability_of(logits.repeat_interleave(5000, 0), tokens)
    share = torch.nn.functional.one_hot(tokens.view(6, -1), 9).double().mean(1)
    assert torch.allclose(share, nucleus_of((logits.double() / temperature).softmax(-1), nucleus), atol=3e-4)
    model_p = logits.double().softmax(-1).repeat_interleave(5000, 0)  # how probable the model itself held them
    assert torch.allclose(held, model_p[range(len(tokens)), tokens])


@pytest.mark.parametrize("latent", ["fixed", "fresh"])
@pytest.mark.parametrize("law", ["balanced", "margin"])
def test_temperature_zero_is_the_most_probable_token_given_z(latent, law):
    seen = Watched(VMD, Sampler(INF, latent, law, temperature=0.0), Noise(3), torch.arange(300))
    assert len(seen.noisy) == 3
    for before, z, after in zip(seen.noisy, seen.z, seen.states[1:], strict=False):
        best, new = log_p(VMD, before, z).argmax(-1), (before == 3) & (after != 3)
        assert bool((new.sum(-1) == 1).all())
        assert torch.equal(after[new], best[new])
        assert torch.equal(after[before != 3], before[before != 3])
    assert len(seen.drawn.unique(dim=0)) > 3  # z still decides
    tiny = sample(VMD, Sampler(INF, latent, law, nucleus=1e-9), Noise(3), torch.arange(300))
    assert torch.equal(tiny, seen.drawn)
    assert torch.equal(seen.z[0], seen.z[1]) == (latent == "fixed")


# ---- order


@pytest.mark.parametrize("law", CONFIDENCE_LAWS)
def test_noise_on_the_order(law):
    """Gumbel noise: position i comes first with a probability proportional to exp(sureness_i / noise)."""
    count, start = 6000, torch.full((1, 3), 3)
    sure = sureness(log_p(MDM, start)[0])[law]
    on_log_scale = sure if law == "entropy" else sure.log()
    firsts = {}
    for noise in (0.0, 1e-9, 0.2, 1e9):
        seen = Watched(MDM, Sampler(INF, law=law, order_noise=noise, temperature=0.0), Noise(1), torch.arange(count))
        first = (seen.states[1] != 3).long().argmax(-1)
        firsts[noise] = torch.bincount(first, minlength=3).double()
        if noise <= 1e-9:
            assert bool((first == sure.argmax()).all())
        if noise == 1e9:
            orders = Counter(zip(first.tolist(), (seen.states[2] == 3).long().argmax(-1).tolist(), strict=True))
            assert len(orders) == 6
            assert all(abs(n - count / 6) < 4.5 * math.sqrt(count * 5 / 36) for n in orders.values())
    expected = (on_log_scale / (0.2 * 2 / 3)).softmax(-1) * count  # it has faded to (k - 1) / T, k = 3
    assert ((firsts[0.2] - expected).square() / expected).sum() < 2 + 4 * 2
    assert (firsts[0.2] - count / 3).abs().max() > 5 * math.sqrt(count * 2 / 9)  # neither random nor


@pytest.mark.parametrize(("steps", "remask", "own"), [(20, 0.0, 3), (20, 0.5, 20), (2, 0.0, 2), (INF, 0.0, 3)])
def test_noise_on_the_order_fades_over_the_steps_that_a_row_walks(monkeypatch, steps, remask, own):
    """Without masking again those are at most one a position, of which there are three."""
    fades, sureness_of = [], _Walk._sureness

    def sureness(self, hidden, masked, u, fade):
        fades.extend(set(fade.flatten().tolist()))
        return sureness_of(self, hidden, masked, u, fade)

    monkeypatch.setattr(_Walk, "_sureness", sureness)
    sample(MDM, Sampler(steps, law="margin", order_noise=0.3, remask=remask), Noise(1), torch.arange(4))
    numbers = [round(own * fade) + 1 for fade in fades]
    assert fades == pytest.approx([(k - 1) / own for k in numbers])
    assert numbers == sorted(set(numbers), reverse=True)
    assert numbers[-1] == 1
    assert numbers[0] == own or remask  # then the first steps may change nothing
    assert len(numbers) >= own // 2


# ---- masking again


@pytest.mark.parametrize("law", [law for law in LAWS if law != "bernoulli"])
@pytest.mark.parametrize("groups", [1, 2])
def test_masking_again_keeps_to_the_schedule(law, groups):
    model, n, blocks = tiny_model(9, row_length=6, groups=groups, latent_width=0), 6 // groups, []
    if groups > 1:  # what is asked of a block
        ask = model.denoiser.forward_block

        def remember(tokens, *others, **named):
            blocks.append(tokens.clone())
            return ask(tokens, *others, **named)

        model.denoiser.forward_block = remember
    for steps, remask in itertools.product((2, 4, 20, INF), (0.3, 0.9)):
        blocks.clear()
        seen = Watched(model, Sampler(steps, law=law, remask=remask), Noise(5), torch.arange(50))
        states = [b for b in blocks if bool((b == 3).any())] if groups > 1 else seen.noisy
        total = n if steps == INF else int(steps)
        masked = [n, *(max(k * n // total, 1) for k in range(total - 1, 0, -1)), 0]  # one stays to the end
        again = [min(int(remask * (n - before)), after) for before, after in itertools.pairwise(masked)]
        schedule = [m for m, left, a in zip(masked, masked[1:], again, strict=False) if m + a > left] * groups
        assert [set((b == 3).sum(-1).tolist()) for b in states] == [{m} for m in schedule], (steps, remask)
        assert len(schedule) > n * groups or (steps, remask) != (20, 0.9)
        assert int(seen.drawn.max()) < 3


@pytest.mark.parametrize("remask", [0.3, 0.9])
def test_what_was_least_probable_is_masked_again(remask):
    """As many as a share of the known ones, no more than the schedule leaves masked; the least probable when drawn."""
    model = tiny_model(12, row_length=6, latent_width=0)
    seen = Watched(model, Sampler(INF, remask=remask), Noise(6), torch.arange(200))
    drawn_with, again_in_all = torch.full((200, 6), math.nan).double(), 0
    for k, (before, after) in zip(range(6, 0, -1), itertools.pairwise(seen.states), strict=True):
        known, kept = before != 3, (before != 3) & (after != 3)
        assert torch.equal(before[kept], after[kept])
        again = known & (after == 3)
        assert set(again.sum(-1).tolist()) == {min(int(remask * (6 - k)), k - 1)}
        for row in range(200):
            if again[row].any() and kept[row].any():
                assert drawn_with[row, again[row]].max() <= drawn_with[row, kept[row]].min() + 1e-12
        new, p = (before == 3) & (after != 3), log_p(model, before).exp()
        drawn_with[new] = p[new].gather(-1, after[new].unsqueeze(-1)).squeeze(-1)
        again_in_all += int(again.sum())
    assert again_in_all >= 200


def test_masking_again_changes_nothing_in_one_step_or_by_nothing():
    p = independent(log_p(MDM, torch.full((1, 3), 3))[0].exp())
    assert_drawn_from(sample(MDM, Sampler(1, remask=0.9), Noise(7), torch.arange(6000)), ROWS, p)
    for steps, remask in ((1, 0.9), (INF, 1e-9)):
        plain, changed = (
            sample(VMD, Sampler(steps, law="top_prob", temperature=0.0, remask=r), Noise(7), torch.arange(100))
            for r in (0.0, remask)
        )
        assert torch.equal(plain, changed)
    model = tiny_model(12, row_length=6)
    s = [Sampler(INF, law="top_prob", temperature=0.0, remask=r) for r in (0.0, 0.9)]
    assert not torch.equal(*(sample(model, x, Noise(7), torch.arange(100)) for x in s))


# ---- names


def test_samplers_have_valid_names_only():
    wrong = [{"steps": 0}, {"latent": "warm"}, {"law": "magic"}, {"temperature": -0.1}, {"temperature": math.nan}]
    wrong += [{"nucleus": 0.0}, {"nucleus": 1.1}, {"order_noise": -1.0, "law": "margin"}, {"order_noise": 1.0}]
    wrong += [{"remask": 1.0}, {"remask": -0.1}, {"remask": 0.1, "law": "bernoulli"}]
    for arguments in wrong:
        with pytest.raises(ValueError, match=f"^{next(iter(arguments))} .*: expected "):
            Sampler(**{"steps": 1, **arguments})
    assert all(Sampler(2, law=law).is_plain for law in LAWS)
    assert not any(Sampler(2, **change).is_plain for change in CHANGED if change != {"law": "top_prob"})
