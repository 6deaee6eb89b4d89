import pytest
import torch
from model_variants import VARIANTS, close, hidden, inputs, variant
from tiny_models import architecture, loud, sequences, tiny_model
from torch.nn import functional as F

from vmd_scale.diffusion.noise import Noise, Stream
from vmd_scale.diffusion.sampler import Sampler, sample
from vmd_scale.model import VMD, head
from vmd_scale.model.attention import apply_rotary, attention, block_diffusion_mask, rotary_table
from vmd_scale.model.encoder import LOG_STD_RANGE
from vmd_scale.model.head import masked_nll

# ---- attention and rotary embedding


@pytest.mark.parametrize("kind", ["none", "padding", "blocks", "padding and blocks"])
def test_reference_attention_equals_sdpa(kind):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 6, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    attend = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])[:, None, None, :]
    blockwise = block_diffusion_mask(3, 3, None, "sdpa", torch.device("cpu"))
    mask = {"none": None, "padding": attend, "blocks": blockwise, "padding and blocks": attend & blockwise}[kind]
    if kind == "padding and blocks":  # the last noisy block sees clean blocks 4 and 5 and itself: 2 of them padding
        assert bool(mask.any(-1).all())
    results = []
    for kernel in ("reference", "sdpa"):
        out = attention(q, k, v, mask, kernel)
        results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, atol=1e-6)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / 2
    if mask is not None:
        scores = scores.masked_fill(~mask, -1e30)
    assert torch.allclose(results[0][0], torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v), atol=1e-6)


def test_rotary_attention_hears_differences_of_positions_only():
    torch.manual_seed(0)
    q, k = torch.randn(1, 5, 1, 8), torch.randn(1, 5, 1, 8)
    scores = []
    for shift in (0, 1, 17):
        table = rotary_table(torch.arange(5) + shift, 8)
        rotated = apply_rotary(q, table), apply_rotary(k, table)
        assert close(rotated[0].norm(dim=-1), q.norm(dim=-1))
        scores.append(torch.einsum("bihd,bjhd->bhij", *rotated))
    assert close(scores[0], scores[1], 1e-4)
    assert close(scores[0], scores[2], 1e-4)
    assert not close(scores[0], torch.einsum("bihd,bjhd->bhij", q, k), 1e-2)


# ---- the head


@pytest.mark.parametrize("chunk", [1, 4, 1000])
def test_gathered_and_chunked_equals_full_logits(chunk, monkeypatch):
    torch.manual_seed(1)
    vocab, weight = 7, torch.randn(7, 8, requires_grad=True)
    states = torch.randn(3, 5, 8, requires_grad=True)
    targets, masked = torch.randint(vocab, (3, 5)), torch.rand(3, 5) < 0.5
    index = torch.cat((masked.flatten().nonzero().squeeze(-1), torch.full((3,), 15)))  # with padding

    full = F.cross_entropy((states @ weight.T).flatten(0, 1), targets.flatten(), reduction="none").view(3, 5)
    expected = torch.where(masked, full, 0)
    pay = torch.randn(3, 5)
    expected_gradients = torch.autograd.grad((pay * expected).sum(), (states, weight))

    monkeypatch.setattr(head, "CHUNK_ELEMENTS", chunk * vocab)
    sizes = []

    def logits(h):
        sizes.append(len(h))
        return h @ weight.T

    nll = masked_nll(states, targets, index, logits, vocab)
    assert max(sizes) <= chunk
    assert nll.shape == (3, 5)
    assert close(nll, expected)
    assert bool((nll[~masked] == 0).all())
    for one, other in zip(torch.autograd.grad((pay * nll).sum(), (states, weight)), expected_gradients, strict=True):
        assert close(one, other)


def test_nothing_masked_costs_nothing():
    states = torch.randn(2, 3, 4, requires_grad=True)
    targets = torch.zeros(2, 3, dtype=torch.int64)
    for index in (torch.zeros(0, dtype=torch.int64), torch.full((6,), 6)):
        nll = masked_nll(states, targets, index, lambda h: h @ torch.ones(4, 5), 5)
        assert bool((nll == 0).all())
        assert bool((torch.autograd.grad(nll.sum(), states)[0] == 0).all())


@pytest.mark.parametrize("name", VARIANTS)
def test_the_model_scores_with_its_own_logits(name):
    """VMD.forward is cross-entropy of `logits`, at the masked positions and nowhere else."""
    model = variant(name)
    x = inputs(model)
    nll, posterior = model(**x)
    z = None if posterior is None else posterior.sample(x["epsilon"])
    logits = model.denoiser.logits(hidden(model, x, z))
    full = F.cross_entropy(logits.flatten(0, 1), x["clean"].flatten(), reduction="none").view_as(nll)
    assert close(nll, torch.where(x["encoder_mask"], full, 0))
    assert close(model.token_nll(x["clean"], x["noisy"], x["index"], z, None, x["mask_ratio"]), nll)
    if model.architecture.groups == 1:
        assert close(model.logits(x["noisy"], z, None, x["mask_ratio"]), logits)


@pytest.mark.parametrize("name", ["plain", "tied", "blocks"])
def test_the_mask_symbol_is_never_predicted(name):
    model = variant(name)
    x = inputs(model)
    logits = model.logits(x["noisy"], x["epsilon"], None, x["mask_ratio"])
    assert logits.shape[-1] == model.architecture.vocab_size == model.architecture.mask_id
    with torch.no_grad():
        model.denoiser.embedding.weight[model.architecture.mask_id] *= 30  # loud, and tied to nothing
    for s in (Sampler(1), Sampler(3)):
        drawn = sample(model, s, Noise(0), torch.arange(200))
        assert int(drawn.max()) < model.architecture.mask_id
        assert int(drawn.min()) >= 0


# ---- padding


@pytest.mark.parametrize("name", VARIANTS)
def test_padding_is_not_heard(name):
    model = variant(name)
    lengths = torch.tensor([6, 4, 5, 3])
    attend = torch.arange(6) < lengths[:, None]
    x = inputs(model)
    x["encoder_mask"] = x["encoder_mask"] & attend
    x["noisy"] = x["clean"].masked_fill(x["encoder_mask"], model.architecture.mask_id)
    x["index"] = x["encoder_mask"].flatten().nonzero().squeeze(-1)
    x["attend"] = attend
    other = dict(x)
    for key in ("clean", "noisy"):
        other[key] = torch.where(attend, x[key], (x[key] + 2) % model.architecture.vocab_size)
    nll, posterior = model(**x)
    other_nll, other_posterior = model(**other)
    assert close(nll, other_nll)
    if posterior is not None:
        heard = x["encoder_mask"].unflatten(1, (model.architecture.groups, -1)).any(-1)
        assert close(posterior.mean[heard], other_posterior.mean[heard])
    assert close(hidden(model, x)[attend], hidden(model, other)[attend])
    deaf = {**other, "attend": None}
    assert not close(nll, model(**deaf)[0], 1e-3)  # without the attend mask it would be heard


def test_a_padded_row_equals_the_row_without_padding():
    model = variant("plain")
    x = inputs(model, rows=3)
    x["attend"] = (torch.arange(6) < 4).expand(3, 6)
    x["encoder_mask"] = x["encoder_mask"] & x["attend"]
    padded_hidden = hidden(model, x)[:, :4]
    padded_q = model.encode(x["clean"], x["encoder_mask"], x["attend"])
    short = {key: x[key][:, :4] for key in ("clean", "noisy", "encoder_mask")}
    assert close(padded_hidden, hidden(model, x, **short, attend=None))
    q = model.encode(short["clean"], short["encoder_mask"])
    assert close(q.mean, padded_q.mean)
    assert close(q.log_std, padded_q.log_std)


@pytest.mark.parametrize("name", ["plain", "blocks", "blocks, mdm"])
@pytest.mark.parametrize("kernel", ["reference", "sdpa"])
def test_a_row_of_padding_only_is_harmless(name, kernel):
    """The last batch of an evaluation may be filled with such rows."""
    model = variant(name, attention=kernel)
    x = inputs(model)
    x["attend"] = torch.ones(4, 6, dtype=torch.bool)
    x["attend"][2] = False
    x["encoder_mask"] = x["encoder_mask"] & x["attend"]
    x["noisy"] = x["clean"].masked_fill(x["encoder_mask"], model.architecture.mask_id)
    x["index"] = x["encoder_mask"].flatten().nonzero().squeeze(-1)
    nll, posterior = model(**x)
    loss = nll.sum() + (posterior.kl().sum() if posterior is not None else 0)
    assert bool(loss.isfinite())
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    assert all(bool(g.isfinite().all()) for g in gradients if g is not None)


# ---- gradients, initialisation, the latent


@pytest.mark.parametrize("name", VARIANTS)
def test_every_parameter_has_a_gradient(name):
    model = variant(name).train()
    x = inputs(model, rows=16)
    nll, posterior = model(**x)
    (nll.sum() + (0 if posterior is None else posterior.kl().sum())).backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    # the shared clean half of the block variant has a last layer that nothing reads, but its weights are shared
    assert silent == []
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())


def test_latent_and_plain_denoiser_are_one_at_initialisation():
    """adaLN starts at zero modulation: whatever z is, a VMD begins as the MDM with the same weights."""
    torch.manual_seed(0)
    vmd = VMD(architecture(latent_width=4, layers=2)).eval()
    mdm = VMD(architecture(latent_width=0, layers=2)).eval()
    missing, unexpected = mdm.load_state_dict(vmd.state_dict(), strict=False)
    assert missing == []
    assert all("latent" in key or "modulation" in key or key.startswith("encoder.") for key in unexpected)
    noisy = sequences(4, 3)
    one, other = (vmd.logits(noisy, 5 * torch.randn(len(noisy), 1, 4)) for _ in range(2))
    assert torch.equal(one, other)
    assert close(one, mdm.logits(noisy, None))
    assert one.std() > 0.01


@pytest.mark.parametrize("injection", ["adaln", "add"])
def test_z_is_heard_after_one_step(injection):
    torch.manual_seed(0)
    model = VMD(architecture(latent_width=4, injection=injection))
    x = inputs(model, rows=32, share=1.0)
    q = model.encode(x["clean"], x["encoder_mask"])
    assert q.kl().max().item() < 0.1  # the posterior starts near the prior
    noisy = torch.full((1, 3), model.architecture.mask_id)

    def difference():
        with torch.no_grad():
            one, other = (model.logits(noisy, sign * torch.ones(1, 1, 4)).log_softmax(-1) for sign in (-2, 2))
        return (one - other).abs().max().item()

    assert (difference() == 0) == (injection == "adaln")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    nll, posterior = model(**x)
    (nll.sum() + posterior.kl().sum()).backward()
    assert all(p.grad is not None for p in model.parameters())
    optimizer.step()
    assert difference() > 1e-4
    optimizer.zero_grad()
    model(**x)[0].sum().backward()  # and through z the encoder is heard: the reconstruction alone trains it
    assert model.encoder.blocks[0].mlp.up.weight.grad.abs().max() > 0


def test_positions_are_told_apart_where_everything_is_masked():
    """Rotary attention alone would predict the same token everywhere; absolute positions let z say which goes where."""
    torch.manual_seed(0)
    model = VMD(architecture(latent_width=4))
    clean = torch.tensor([[0, 1, 2]] * 8)
    x = {**inputs(model, rows=8, share=1.0), "clean": clean}
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        nll, posterior = model(**x)
        (nll.sum() + posterior.kl().sum()).backward()
        optimizer.step()
    noisy, z = torch.full((1, 3), model.architecture.mask_id), torch.ones(1, 1, 4)
    logits = model.logits(noisy, z)[0]
    assert logits.argmax(-1).tolist() == [0, 1, 2]
    with torch.no_grad():
        model.denoiser.position.weight.zero_()
    blind = model.logits(noisy, z)[0]
    assert close(blind[0], blind[1])
    assert close(blind[0], blind[2])


def test_time_is_heard_only_when_asked():
    for name, hears in (("plain", False), ("time", True), ("mdm, time", True), ("mdm", False)):
        model = variant(name)
        x = inputs(model)
        same = close(hidden(model, x), hidden(model, x, mask_ratio=1 - x["mask_ratio"]), 1e-4)
        assert same != hears, name


def test_dropout_acts_in_training_only():
    model = variant("plain", dropout=0.5)
    x = inputs(model)
    assert torch.equal(model.eval()(**x)[0], model(**x)[0])
    model.train()
    assert not close(model(**x)[0], model(**x)[0], 1e-3)


# ---- the encoder and its posterior


def test_the_encoder_pools_over_masked_positions_and_hears_the_pattern():
    model = variant("plain", encoder_layers=1)
    clean = inputs(model)["clean"]
    some = torch.tensor([[True, True, False, False, True, False]] * 4)
    q, whole = model.encode(clean, some), model.encode(clean, torch.ones_like(some))
    assert q.mean.shape == q.log_std.shape == (4, 1, 2)
    assert not close(q.mean, whole.mean, 1e-3)
    seen = clean.clone()
    seen[:, 2] = (seen[:, 2] + 1) % 5
    assert not close(q.mean, model.encode(seen, some).mean, 1e-3)  # unmasked tokens are context, not ignored
    other = some.clone()
    other[:, 2] = True
    assert not close(q.mean, model.encode(clean, other).mean, 1e-3)


def test_extreme_encoders_stay_finite():
    model = variant("plain")
    with torch.no_grad():
        model.encoder.out.weight *= 1e4
    x = inputs(model)
    nll, posterior = model(**x)
    assert bool(nll.isfinite().all())
    assert bool(posterior.kl().isfinite().all())
    assert LOG_STD_RANGE[0] <= posterior.log_std.min().item() < 0 < posterior.log_std.max().item() <= LOG_STD_RANGE[1]


# ---- reproducible numbers


def test_rows_do_not_hear_each_other():
    for name in VARIANTS:
        model = variant(name)
        x = inputs(model, rows=5)
        whole = hidden(model, x)
        for row in range(5):
            one = {k: v[row : row + 1] if v is not None and k != "index" else v for k, v in x.items()}
            assert close(hidden(model, one), whole[row : row + 1]), name


def test_loud_models_are_reproducible_and_far_from_uniform():
    """The tests above rest on it: predictions that hear their inputs, the same in every run."""
    one, other = tiny_model(3), tiny_model(3)
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
    z = Noise(0).normal(Stream.LATENT, 0, torch.arange(64), (1, 1))
    with torch.no_grad():
        p = one.logits(sequences(4, 3), z).softmax(-1)
    assert p.max(-1).values.mean() > 0.5
    assert p.std(0).min() > 0.05
    assert loud(one, 4).denoiser.position.weight.std() > 0.5
