"""The block variant: masks and kernels, the key/value cache, and the autoregressive limit."""

import dataclasses
import functools
import itertools
import math

import pytest
import torch
from expectations import copies
from model_variants import close, hidden, inputs, variant
from tiny_models import sequences, sureness, tiny_model
from torch.nn.attention.flex_attention import BlockMask

from vmd_scale.diffusion.likelihood import elbo, importance_weighted
from vmd_scale.diffusion.noise import Noise
from vmd_scale.diffusion.paths import CONFIDENCE_LAWS, LAWS
from vmd_scale.diffusion.sampler import Sampler, sample
from vmd_scale.model import VMD
from vmd_scale.model.attention import attention, block_diffusion_mask
from vmd_scale.model.layers import KeyValues

INF = math.inf
BLOCKS = ["blocks", "blocks, add", "blocks, mdm", "blocks, everything"]
PADDING = torch.arange(6) < torch.tensor([6, 4, 5, 3])[:, None]


# ---- masks and kernels


@pytest.mark.parametrize("name", ["plain", "blocks, everything"])
@pytest.mark.parametrize("padded", [False, True])
def test_the_whole_model_is_the_same_with_either_kernel(name, padded):
    one = variant(name)
    other = VMD(dataclasses.replace(one.architecture, attention="sdpa"))
    other.load_state_dict(one.state_dict())
    x = inputs(one)
    if padded:
        x["attend"] = torch.arange(6) < torch.tensor([6, 4, 5, 3])[:, None]
    results = []
    for model in (one, other):
        nll, posterior = model(**x)
        loss = nll.sum() + posterior.kl().sum()
        results.append((nll, *torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)))
    for one_value, other_value in zip(*results, strict=True):
        if one_value is not None:
            assert close(one_value, other_value, 1e-4)


@pytest.mark.parametrize("padded", [False, True])
def test_flex_attention_equals_the_dense_mask(padded):
    """Kept apart from the model, which on a CPU may prefer another kernel; the same function scores on a GPU."""
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    attend = (torch.arange(20) < torch.tensor([20, 13, 16])[:, None]).to(device) if padded else None
    results = []
    q, k, v = (torch.randn(3, 40, 2, 16, device=device) for _ in range(3))
    for kernel in ("sdpa", "flex"):
        mask = block_diffusion_mask(20, 5, attend, kernel, device)
        assert isinstance(mask, BlockMask) == (kernel == "flex")
        if device.type == "cuda":  # PyTorch has no backward of FlexAttention on a CPU
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            out = attention(*leaves, mask, kernel)
            results.append((out, *torch.autograd.grad(out[:, :1].square().sum(), leaves)))
        else:
            results.append((attention(q, k, v, mask, kernel),))
    scored = torch.ones(3, 40, dtype=torch.bool, device=device) if attend is None else torch.cat((attend, attend), 1)
    assert close(results[0][0][scored], results[1][0][scored])
    for one, other in zip(results[0][1:], results[1][1:], strict=True):
        assert close(one, other, 1e-4)
    unmasked = attention(q, k, v, None, "sdpa")
    assert not close(results[1][0][scored], unmasked[scored], 1e-2)


def test_with_padding_flex_attention_looks_inside_every_tile_that_is_not_empty():
    """A tile that it took for a whole one would not be asked for its padding. Tiles are 128 wide."""
    length, groups = 512, 8
    attend = torch.arange(length) < torch.tensor([512, 300])[:, None]
    mask = block_diffusion_mask(length, groups, attend, "flex", torch.device("cpu"))
    dense = block_diffusion_mask(length, groups, attend, "sdpa", torch.device("cpu"))
    assert mask.full_kv_num_blocks is None or not mask.full_kv_num_blocks.any()
    wanted = dense.unflatten(2, (-1, 128)).unflatten(4, (-1, 128)).any(5).any(3)
    visited = mask.to_dense().bool()
    assert not (wanted & ~visited).any()
    assert 0 < visited.sum() < 0.6 * visited.numel()


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("padded", [False, True])
def test_the_whole_model_is_the_same_with_flex(name, padded):
    """Training too: forward and backward, on whatever device this is."""
    one = variant(name, width=16, encoder_width=16, heads=1)
    other = VMD(dataclasses.replace(one.architecture, attention="flex"))
    other.load_state_dict(one.state_dict())
    x, results = inputs(one), []
    if padded:
        x["attend"] = PADDING
        x["encoder_mask"] = x["encoder_mask"] & PADDING
        x["index"] = x["encoder_mask"].flatten().nonzero().squeeze(-1)
    for model in (one, other.eval()):
        with torch.no_grad():
            without = model(**x)[0]
        nll = model(**x)[0]
        assert close(nll, without)
        results.append((nll, *torch.autograd.grad(nll.sum(), list(model.denoiser.parameters()), allow_unused=True)))
    for one_value, other_value in zip(*results, strict=True):
        if one_value is not None:
            assert close(one_value, other_value, 2e-4)  # sums over a batch, in another order


# ---- who sees whom


def test_block_mask_by_its_definition():
    mask = block_diffusion_mask(6, 3, None, "sdpa", torch.device("cpu"))[0, 0]
    for query in range(12):
        for key in range(12):
            q_block, k_block = query % 6 // 2, key % 6 // 2
            if query < 6:
                allowed = q_block == k_block if key < 6 else k_block < q_block
            else:
                allowed = key >= 6 and k_block <= q_block
            assert bool(mask[query, key]) == allowed


@pytest.mark.parametrize("name", ["blocks, add", "blocks, mdm", "blocks, adaln"])
def test_a_noisy_block_sees_itself_and_the_clean_blocks_before(name):
    """Perturb one position of one half at a time and see which blocks hear it."""
    model = variant("blocks, add", injection="adaln") if name.endswith("adaln") else variant(name)
    x = inputs(model, rows=3)
    base = hidden(model, x)
    for half in ("noisy", "clean"):
        for position in range(6):
            changed = x[half].clone()
            changed[:, position] = (changed[:, position] + 1) % 5
            moved = (hidden(model, x, **{half: changed}) - base).abs().amax(-1).view(3, 3, 2).amax((0, 2))
            block = position // 2
            for b in range(3):
                heard = b == block if half == "noisy" else b > block
                assert (moved[b] > 1e-4) if heard else (moved[b] < 1e-6), (half, position, b)


@pytest.mark.parametrize("injection", ["add", "adaln"])
def test_a_block_hears_its_own_latent_only(injection):
    model = variant("blocks, add", injection=injection)
    x = inputs(model, rows=3)
    base = hidden(model, x)
    for group in range(3):
        z = x["epsilon"].clone()
        z[:, group] += 1
        moved = (hidden(model, x, z) - base).abs().amax(-1).view(3, 3, 2).amax((0, 2))
        for b in range(3):
            assert (moved[b] > 1e-4) if b == group else (moved[b] < 1e-6)


def test_one_forward_over_all_blocks_equals_block_after_block():
    """Training sees all blocks at once, the sampler one after the other: with `noisy` holding the clean past."""
    for name in ("blocks", "blocks, add", "blocks, mdm", "blocks, everything"):
        model = variant(name)
        x, groups = inputs(model), model.architecture.groups
        together = model.denoiser.logits(hidden(model, x))
        for group in range(groups):
            inside = slice(group * 6 // groups, (group + 1) * 6 // groups)
            state = x["clean"].clone()
            state[:, inside] = x["noisy"][:, inside]
            state[:, inside.stop :] = model.architecture.mask_id
            alone = model.logits(state, x["epsilon"], None, x["mask_ratio"])
            assert close(alone[:, inside], together[:, inside]), name


def test_posterior_groups_pool_apart():
    model = variant("blocks")
    x = inputs(model)
    masked = torch.tensor([[True, True, False, False, False, False]] * 4)
    q = model.encode(x["clean"], masked)
    assert q.mean.shape == (4, 2, 2)
    assert bool(q.mean.isfinite().all())  # the second group has nothing masked
    assert not close(q.mean[:, 0], q.mean[:, 1], 1e-3)


# ---- block after block, with what is remembered


@pytest.mark.parametrize("name", [*BLOCKS, "plain", "mdm, time", "add, time"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kernel", ["reference", "sdpa"])
@torch.no_grad()
def test_a_block_with_its_remembered_past_equals_the_whole_forward(name, padded, kernel):
    """Plain models are one block without a past."""
    model = variant(name, attention=kernel)
    x, groups = inputs(model), model.architecture.groups
    x["attend"] = PADDING if padded else None
    together = hidden(model, x)
    past = [KeyValues() for _ in model.denoiser.blocks]
    some = torch.tensor([3, 1])
    seen = PADDING if padded else torch.ones(4, 6, dtype=torch.bool)
    for group in range(groups):
        inside = slice(group * 6 // groups, (group + 1) * 6 // groups)
        z = None if x["epsilon"] is None else x["epsilon"][:, group : group + 1]
        ratio = x["mask_ratio"][:, group : group + 1]
        for _ in range(2):  # asking changes nothing
            alone = model.denoiser.forward_block(x["noisy"][:, inside], group, past, z, x["attend"], ratio)
            heard = seen[:, inside]
            assert close(alone[heard], together[:, inside][heard])
        part = model.denoiser.forward_block(
            x["noisy"][some, inside],
            group,
            [layer.rows(some) for layer in past],
            None if z is None else z[some],
            None if x["attend"] is None else x["attend"][some],
            ratio[some],
        )
        assert close(part[heard[some]], together[some, inside][heard[some]])
        model.denoiser.forward_block(x["clean"][:, inside], group, past, None, x["attend"], clean=True)
    assert all(layer.k.shape[1] == 6 for layer in past)
    if groups > 1:  # and it does matter what is remembered
        past = [KeyValues() for _ in model.denoiser.blocks]
        forgetful = model.denoiser.forward_block(x["noisy"][:, inside], groups - 1, past, z, None, ratio)
        assert not close(forgetful[0], together[0, inside], 1e-3)


class Silent(Noise):
    """z is always its prior's mean."""

    def normal(self, stream, step, rows, shape):
        return torch.zeros(len(rows), *shape)


@pytest.mark.parametrize("name", ["plain", *BLOCKS])
@pytest.mark.parametrize("law", CONFIDENCE_LAWS)
@torch.no_grad()
def test_samples_are_those_of_a_walk_by_whole_forwards(name, law):
    """Nothing random is left: the surest position is given its most probable token, block after block."""
    for seed in range(3):
        model = variant(name, seed)
        a = model.architecture
        given = torch.arange(5 * 6).view(5, 6) * 3 % a.vocab_size
        maskable = torch.arange(30).view(5, 6) % 4 != 1
        expected = given.masked_fill(maskable, a.mask_id)
        for row, may in zip(expected, maskable, strict=True):
            for block in torch.arange(6).view(a.groups, -1):
                count = int(may[block].sum())
                for left in range(count, 0, -1):
                    ratio = torch.full((1, a.groups), left / count)
                    z = torch.zeros(1, a.groups, a.latent_width) if a.latent_width else None
                    log_p = model.logits(row[None], z, None, ratio)[0].double().log_softmax(-1)
                    masked = [int(i) for i in block if row[i] == a.mask_id]
                    chosen = max(masked, key=lambda i: sureness(log_p)[law][i])
                    row[chosen] = log_p[chosen].argmax()
        s = Sampler(INF, law=law, temperature=0.0)
        assert torch.equal(sample(model, s, Silent(0), torch.arange(5), given, maskable), expected)


# ---- blocks of one position, and one block


@functools.cache
def autoregressive(name):
    changes = {"mdm": {}, "time": {"time_conditioning": True, "norm": "rmsnorm"}, "tied": {"tie_embeddings": True}}[
        name
    ]
    return tiny_model(31, groups=3, latent_width=0, layers=2, **changes)


@torch.no_grad()
def by_prefixes(model, cached):
    """log p of all rows: each token after the clean ones before it, seen as the mask symbol itself."""
    rows = sequences(3, 3)
    result, past = torch.zeros(27, dtype=torch.float64), [KeyValues() for _ in model.denoiser.blocks]
    for i in range(3):
        if cached:
            mask = torch.full((27, 1), 3)
            states = model.denoiser.forward_block(mask, i, past, None, None, torch.ones(27, 1))
            log_p = model.denoiser.logits(states)[:, 0].double().log_softmax(-1)
            model.denoiser.forward_block(rows[:, i : i + 1], i, past, None, clean=True)
        else:
            prefix = torch.full_like(rows, 3)
            prefix[:, :i] = rows[:, :i]
            log_p = model.logits(prefix, None, None, torch.ones(27, 3))[:, i].double().log_softmax(-1)
        result += log_p[range(27), rows[:, i]]
    return result


@pytest.mark.parametrize("name", ["mdm", "time", "tied"])
def test_blocks_of_one_position_are_the_autoregressive_model(name):
    """Whatever T: nothing is left to chance, and every bound is the likelihood."""
    model, rows = autoregressive(name), copies(sequences(3, 3), 1)
    exact = by_prefixes(model, cached=False)
    assert abs(exact.exp().sum().item() - 1) < 1e-6
    assert torch.allclose(by_prefixes(model, cached=True), exact, atol=1e-5)
    assert exact.std() > 0.5
    for steps, draw in itertools.product((1, 2, 5, INF), (0, 1)):
        bound = elbo(model, rows, Sampler(steps), Noise(draw), 27, draw)
        assert torch.allclose(bound, -exact, atol=1e-5)
        for law in LAWS:
            bound = importance_weighted(model, rows, Sampler(steps, law=law), Noise(draw), 1, draw)
            assert torch.allclose(bound, -exact, atol=1e-5)


@pytest.mark.parametrize("name", ["mdm", "add, time"])
def test_the_first_block_is_a_plain_model_of_a_short_row(name):
    blocks = variant(name, groups=3)
    short = VMD(dataclasses.replace(blocks.architecture, row_length=2, groups=1)).eval()
    state = {k: v[:2] if k.endswith("position.weight") else v for k, v in blocks.state_dict().items()}
    short.load_state_dict(state)
    x = inputs(blocks)
    z = None if x["epsilon"] is None else x["epsilon"][:, :1]
    expected = short.denoiser(x["noisy"][:, :2], z, None, x["mask_ratio"][:, :1])
    assert close(hidden(blocks, x)[:, :2], expected)
    assert not close(hidden(blocks, x)[:, 2:4], expected, 1e-2)
