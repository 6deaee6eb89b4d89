"""Where a run's first weights come from, what is frozen, and that adapters merge."""

import io
import json
import math
import pickle
from argparse import Namespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from vmd_scale.adapters import add_adapters, freeze, merged
from vmd_scale.config import LoRAConfig
from vmd_scale.errors import UserError
from vmd_scale.initial_weights import fit, initialize_from
from vmd_scale.model import VMD, Architecture

PLAIN = Architecture(
    vocab_size=11, row_length=8, groups=1, layers=2, width=16, heads=2, mlp_ratio=4.0, mlp="gelu", norm="layernorm",
    dropout=0.0, tie_embeddings=False, time_conditioning=False, attention="sdpa", condition_width=6, latent_width=0,
    injection="adaln", encoder_layers=1, encoder_width=16,
)  # fmt: skip
MASK = PLAIN.vocab_size


def model_of(seed=0, **changes):
    torch.manual_seed(seed)
    return VMD(Architecture(**{**PLAIN.to_dict(), **changes})).eval()


def noisy_rows(length=8):
    generator = torch.Generator().manual_seed(3)
    rows = torch.randint(MASK, (4, length), generator=generator)
    return rows.masked_fill(torch.rand(rows.shape, generator=generator) < 0.4, MASK)


def saved(tmp_path, model, name="weights.safetensors"):
    weights = model.state_dict() if isinstance(model, nn.Module) else model
    save_file({k: v.contiguous() for k, v in weights.items()}, tmp_path / name)
    return str(tmp_path / name)


class Sinusoids(nn.Module):
    """The time embedding of DiT: 256 sinusoids and two layers."""

    def __init__(self, condition):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, condition), nn.SiLU(), nn.Linear(condition, condition))

    def forward(self, t):
        angles = t[:, None] * torch.exp(-math.log(10000) * torch.arange(128) / 128)
        return self.mlp(torch.cat((angles.cos(), angles.sin()), -1))


class Gain(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return F.layer_norm(x, x.shape[-1:]) * self.weight


class Layer(nn.Module):
    """A DiT block as MDLM describes it: adaLN with gates, rotary attention without biases, GELU MLP with biases."""

    def __init__(self, width, heads, condition):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = Gain(width), Gain(width)
        self.attn_qkv = nn.Linear(width, 3 * width, bias=False)
        self.attn_out = nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))
        self.adaLN_modulation = nn.Linear(condition, 6 * width)

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c)[:, None].chunk(6, -1)
        b, length, width = x.shape
        qkv = self.attn_qkv(self.norm1(x) * (1 + scale1) + shift1).view(b, length, 3, self.heads, -1)
        half = qkv.shape[-1] // 2
        angles = torch.arange(length)[:, None] / 10000 ** (torch.arange(half) / half)
        cos, sin = (f.repeat(1, 2)[:, None] for f in (angles.cos(), angles.sin()))

        def rotate(v):
            return v * cos + torch.cat((-v[..., half:], v[..., :half]), -1) * sin

        q, k, v = rotate(qkv[:, :, 0]), rotate(qkv[:, :, 1]), qkv[:, :, 2]
        weights = (torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(2 * half)).softmax(-1)
        x = x + gate1 * self.attn_out(torch.einsum("bhqk,bkhd->bqhd", weights, v).reshape(b, length, width))
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class Published(nn.Module):
    """MDLM's network by its description and its names of parameters, with time 0 as in its published models."""

    def __init__(self, vocabulary, width, heads, layers, condition):
        super().__init__()
        self.vocab_embed = nn.Module()
        self.vocab_embed.embedding = nn.Parameter(torch.randn(vocabulary, width))
        self.sigma_map = Sinusoids(condition)
        self.blocks = nn.ModuleList(Layer(width, heads, condition) for _ in range(layers))
        self.output_layer = nn.Module()
        self.output_layer.norm_final = Gain(width)
        self.output_layer.linear = nn.Linear(width, vocabulary)
        self.output_layer.adaLN_modulation = nn.Linear(condition, 2 * width)

    def forward(self, tokens):
        x, c = self.vocab_embed.embedding[tokens], F.silu(self.sigma_map(torch.zeros(len(tokens))))
        for block in self.blocks:
            x = block(x, c)
        shift, scale = self.output_layer.adaLN_modulation(c)[:, None].chunk(2, -1)
        return self.output_layer.linear(self.output_layer.norm_final(x) * (1 + scale) + shift)


@pytest.fixture
def published():
    torch.manual_seed(1)
    network = Published(MASK + 1, 16, 2, 2, condition=6)
    for parameter in network.parameters():  # gains and biases too: a map that forgets one must be found out
        nn.init.normal_(parameter, std=0.3)
    return network


@pytest.mark.parametrize("changes", [{"time_conditioning": True}, {"latent_width": 3}], ids=["mdm", "latent"])
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
@torch.no_grad()
def test_an_mdlm_state_dict_computes_the_same_here(published, tmp_path, changes, suffix):
    weights = {f"backbone.{name}": value for name, value in published.state_dict().items()}
    path = tmp_path / f"mdlm{suffix}"
    torch.save({"state_dict": weights}, path) if suffix == ".ckpt" else save_file(weights, path)
    model, noisy = model_of(biases=True, **changes), noisy_rows()
    initialize_from(model, str(path))
    z = torch.randn(4, 1, 3) if "latent_width" in changes else None
    wanted = published(noisy)[..., :MASK]
    assert wanted.std() > 0.3
    torch.testing.assert_close(model.logits(noisy, z, None, torch.rand(4, 1)), wanted, rtol=0, atol=1e-5)


def test_of_a_file_with_an_average_it_is_said_which_weights_are_read(tmp_path, caplog):
    torch.save({"state_dict": model_of().state_dict(), "ema": {"decay": 0.9999}}, tmp_path / "lightning.ckpt")
    initialize_from(model_of(seed=1), str(tmp_path / "lightning.ckpt"))
    assert "lightning.ckpt holds an average too, which is not read" in caplog.text


def test_an_mdlm_state_dict_needs_an_architecture_that_can_hold_it(published, tmp_path):
    path = saved(tmp_path, published)
    with pytest.raises(UserError, match=r"model\.biases=true"):
        initialize_from(model_of(time_conditioning=True), path)
    with pytest.raises(UserError, match=r"of 2 layers, but model\.layers is 1"):
        initialize_from(model_of(biases=True, time_conditioning=True, layers=1), path)
    weights = published.state_dict()
    del weights["blocks.1.mlp.2.bias"]
    with pytest.raises(UserError, match=r"no 'blocks\.1\.mlp\.2\.bias'"):
        initialize_from(model_of(biases=True, time_conditioning=True), saved(tmp_path, weights))


@pytest.mark.parametrize("changes", [{}, {"time_conditioning": True}], ids=["", "time"])
@pytest.mark.parametrize("injection", ["adaln", "add"])
def test_a_masked_diffusion_model_that_gets_a_latent_computes_at_first_what_it_did(tmp_path, injection, changes):
    plain, noisy, ratio = model_of(**changes), noisy_rows(), torch.rand(4, 1)
    for block in plain.denoiser.blocks if changes else ():
        nn.init.normal_(block.modulation.weight)
    adapted = model_of(seed=7, latent_width=3, injection=injection, **changes)
    initialize_from(adapted, saved(tmp_path, plain))
    z, wanted = torch.randn(4, 1, 3), plain.logits(noisy, None, None, ratio)
    found = adapted.logits(noisy, z, None, ratio)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    found.square().sum().backward()  # and z can become audible
    learns = ["blocks.0.modulation", "latent_to_embedding", "latent_to_condition.2"]
    named = dict(adapted.denoiser.named_parameters())
    assert any((named[f"{n}.weight"].grad != 0).any() for n in learns if f"{n}.weight" in named)


@torch.no_grad()
def test_time_conditioning_is_silent_at_first_beside_trained_modulations(tmp_path):
    old, noisy, z = model_of(latent_width=3), noisy_rows(), torch.randn(4, 1, 3)
    for block in old.denoiser.blocks:
        nn.init.normal_(block.modulation.weight)
    timed = model_of(seed=7, latent_width=3, time_conditioning=True)
    initialize_from(timed, saved(tmp_path, old))
    torch.testing.assert_close(timed.logits(noisy, z, None, torch.rand(4, 1)), old.logits(noisy, z), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("old", "new", "first"),
    [
        ({"layers": 3}, {}, r"denoiser\.blocks\.2\..* \(6 such tensors\)"),
        ({"biases": True}, {}, r"denoiser\.blocks\.0\.mlp\.down\.bias \(5 such"),
        ({}, {"tie_embeddings": True}, r"denoiser\.head\.weight \(1 such"),
        ({"encoder_layers": 2, "latent_width": 3}, {"latent_width": 3}, r"encoder\.blocks\.1\."),
    ],
)
def test_weights_that_the_model_has_no_place_for_are_refused(tmp_path, old, new, first):
    with pytest.raises(UserError, match=f"this model has no place for {first}"):
        initialize_from(model_of(**new), saved(tmp_path, model_of(**old)))


def without_encoder(model):
    return {name: value for name, value in model.state_dict().items() if not name.startswith("encoder.")}


@pytest.mark.parametrize("injection", ["adaln", "add"])
def test_a_model_that_listens_to_z_needs_the_encoder_that_z_is_from(tmp_path, injection):
    """Beside a trained denoiser, a fresh encoder's z is noise."""
    old = model_of(latent_width=3, injection=injection)
    path = saved(tmp_path, without_encoder(old))
    with pytest.raises(UserError, match=r"without its encoder.*export it again with --encoder"):
        initialize_from(model_of(seed=1, latent_width=3, injection=injection), path)
    initialize_from(model_of(seed=1), path)  # without a latent it is not missed
    initialize_from(model_of(seed=1, latent_width=3, injection=injection), saved(tmp_path, old))


def test_adapters_start_fresh_in_every_part(tmp_path):
    adapted, path = model_of(seed=1, latent_width=3), saved(tmp_path, old := model_of(latent_width=3))
    add_adapters(adapted, LORA)
    filled = initialize_from(adapted, path)
    assert any(name.startswith("encoder.") and name.endswith("lora_a") for name in adapted.state_dict())
    assert set(filled) == set(old.state_dict())


@pytest.mark.parametrize("lost", ["encoder.out.bias", "denoiser.latent_to_condition.2.weight"])
def test_a_part_of_which_something_is_lost_does_not_start_fresh(tmp_path, lost):
    weights = model_of(latent_width=3).state_dict()
    del weights[lost]
    with pytest.raises(UserError, match=f"has no {lost}"):
        initialize_from(model_of(seed=1, latent_width=3), saved(tmp_path, weights))


def in_files(folder, model, suffix):
    """A folder of as many files as parts, and their index."""
    folder.mkdir()
    weights = model.state_dict()
    placed = {name: f"{'encoder' if name.startswith('encoder.') else 'denoiser'}{suffix}" for name in weights}
    for file in set(placed.values()):
        part = {name: value for name, value in weights.items() if placed[name] == file}
        save_file(part, folder / file) if suffix == ".safetensors" else torch.save(part, folder / file)
    index = "model.safetensors.index.json" if suffix == ".safetensors" else "pytorch_model.bin.index.json"
    (folder / index).write_text(json.dumps({"weight_map": placed}))
    return folder / index


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_a_folder_in_several_files_is_read_by_its_index(tmp_path, suffix):
    old, new = model_of(latent_width=3), model_of(seed=1, latent_width=3)
    index = in_files(tmp_path / "folder", old, suffix)
    save_file({"denoiser.head.weight": torch.zeros(2, 2)}, index.with_name("other.safetensors"))  # not in the index
    initialize_from(new, str(index.parent))
    assert all(torch.equal(value, old.state_dict()[name]) for name, value in new.state_dict().items())
    (index.parent / f"encoder{suffix}").rename(index.with_name("moved"))
    with pytest.raises(UserError, match=rf"encoder\{suffix}: not readable"):
        initialize_from(new, str(index.parent))
    with pytest.raises(UserError, match=rf"encoder\{suffix}: not readable"):  # not wanted, but part of a broken folder
        initialize_from(model_of(), str(index.parent))
    values = json.loads(index.read_text())
    values["weight_map"] |= dict.fromkeys(values["weight_map"], f"denoiser{suffix}")
    index.write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"names encoder\..*, which is not in denoiser"):
        initialize_from(new, str(index.parent))
    for wrong in ({}, {"weight_map": ["a"]}):
        index.write_text(json.dumps(wrong))
        with pytest.raises(UserError, match="expected a weight_map"):
            initialize_from(new, str(index.parent))


def test_latent_parts_and_time_conditioning_may_be_left_out(tmp_path):
    plain = model_of(seed=1)
    initialize_from(plain, saved(tmp_path, old := model_of(latent_width=3, time_conditioning=True)))
    assert all(torch.equal(value, old.state_dict()[name]) for name, value in plain.state_dict().items())


@pytest.mark.parametrize(
    "config", [[], {"vmd_scale": 3}, {"vmd_scale": None}, {"vmd_scale": {"tokenizer_fingerprint": 1}}]
)
def test_a_strange_config_beside_the_weights_knows_no_tokenizer(tmp_path, config):
    saved(tmp_path, model_of(), "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    initialize_from(model_of(seed=1), str(tmp_path), "a" * 64)


def test_a_run_without_a_checkpoint_is_named_with_its_key(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match=r"^training\.init_from .*: no checkpoint there"):
        initialize_from(model_of(), str(tmp_path))


@torch.no_grad()
def test_rows_may_become_shorter_and_not_longer(tmp_path):
    plain, path = model_of(), saved(tmp_path, model_of())
    shorter, noisy = model_of(seed=7, row_length=5), noisy_rows(5)
    initialize_from(shorter, path)
    torch.testing.assert_close(shorter.logits(noisy, None), plain.logits(noisy, None))
    with pytest.raises(UserError, match=r"a row may become shorter, not longer \(data\.row_length\)"):
        initialize_from(model_of(row_length=9), path)


def test_weights_that_do_not_fit_are_named(tmp_path):
    path = saved(tmp_path, model_of())
    with pytest.raises(UserError, match=r"embedding\.weight is \[12, 16\], this model's is \[14, 16\]"):
        initialize_from(model_of(vocab_size=13), path)
    with pytest.raises(UserError, match=r"has no denoiser\.blocks\.2\."):
        initialize_from(model_of(layers=3), path)
    with pytest.raises(UserError, match="no such file"):
        initialize_from(model_of(), str(tmp_path / "nowhere"))
    (tmp_path / "code.pt").write_bytes(pickle.dumps(print))
    with pytest.raises(UserError, match=r"code\.pt: not readable as weights alone"):
        initialize_from(model_of(), str(tmp_path / "code.pt"))
    (tmp_path / "half.safetensors").write_bytes((tmp_path / "weights.safetensors").read_bytes()[:1000])
    with pytest.raises(UserError, match=r"half\.safetensors: not readable"):
        initialize_from(model_of(), str(tmp_path / "half.safetensors"))


SOURCES = {
    "safetensors": lambda folder, model: saved(folder, model),
    "pt": lambda folder, model: torch.save(model.state_dict(), folder / "w.pt") or str(folder / "w.pt"),
    "folder": lambda folder, model: str(in_files(folder / "f", model, ".safetensors").parent),
    "bin": lambda folder, model: str(in_files(folder / "f", model, ".bin").parent),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_names_and_shapes_are_compared_without_reading_a_value(tmp_path, kind, monkeypatch):
    """On the meta device, before a corpus is prepared: the same is found as when the weights are read."""
    source = SOURCES[kind](tmp_path, model_of(latent_width=3))
    monkeypatch.setattr("vmd_scale.weight_sources.load_file", None)
    with torch.device("meta"):
        same, deeper, longer = model_of(latent_width=3), model_of(latent_width=3, layers=3), model_of(row_length=9)
    found = fit(same, source)
    assert all(value.is_meta for value in found.filled.values())
    assert set(found.filled) == set(same.state_dict())
    with pytest.raises(UserError, match=r"^training\.init_from .*: has no denoiser\.blocks\.2\."):
        fit(deeper, source)
    with pytest.raises(UserError, match="a row may become shorter, not longer"):
        fit(longer, source)


def test_mdlm_weights_are_compared_without_reading_a_value(published, tmp_path):
    path = saved(tmp_path, published)
    with torch.device("meta"):
        fits, deeper = (model_of(biases=True, time_conditioning=True, layers=n) for n in (2, 3))
    assert all(value.is_meta for value in fit(fits, path).filled.values())
    with pytest.raises(UserError, match=r"of 2 layers, but model\.layers is 3"):
        fit(deeper, path)


def written(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (written({"settings": Namespace(), "state_dict": {}}), "it holds argparse.Namespace, which is no tensor"),
        (pickle.dumps(print), "damaged, or not written by torch.save"),
        (b"\x80\x02abc", "damaged, or not written by torch.save"),
        (b"no weights at all", "damaged, or not written by torch.save"),
        (b"", "damaged, or not written by torch.save"),
        (b"PK\x03\x04" + bytes(200), "damaged, or not written by torch.save"),
    ],
    ids=["settings", "code", "no pickle", "text", "empty", "half a file"],
)
def test_what_cannot_be_read_is_told_in_our_words(tmp_path, content, reason):
    """PyTorch's would advise to run the code that a file holds, and colour their text by escape codes."""
    (tmp_path / "w.pt").write_bytes(content)
    with pytest.raises(UserError) as refusal:
        initialize_from(model_of(), str(tmp_path / "w.pt"))
    wanted = f"{tmp_path / 'w.pt'}: not readable as weights alone ({reason}); save its state dict as .safetensors"
    assert str(refusal.value) == f"training.init_from {wanted}"


def test_another_tokenizer_is_refused(tmp_path):
    folder = tmp_path / "exported"
    folder.mkdir()
    saved(folder, model_of(), "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"vmd_scale": {"tokenizer_fingerprint": "a" * 64}}))
    initialize_from(model_of(seed=1), str(folder), "a" * 64)
    with pytest.raises(UserError, match=r"fingerprint aaaaaaaaaaaa, but data\.tokenizer has bbbbbbbbbbbb"):
        initialize_from(model_of(seed=1), str(folder), "b" * 64)


LORA = LoRAConfig(rank=2, alpha=6.0)


@torch.no_grad()
def test_adapters_change_nothing_at_first_and_merge_exactly():
    noisy, plain = noisy_rows(), model_of()
    adapted = model_of()
    add_adapters(adapted, LORA)
    assert torch.equal(adapted.logits(noisy, None), plain.logits(noisy, None))
    for name, parameter in adapted.named_parameters():
        if name.endswith("lora_b"):
            nn.init.normal_(parameter)
    wanted = adapted.logits(noisy, None)
    assert (wanted - plain.logits(noisy, None)).abs().max() > 0.1
    plain.load_state_dict(merged(adapted.state_dict(), LORA))
    torch.testing.assert_close(plain.logits(noisy, None), wanted, rtol=0, atol=1e-4)


def test_only_what_is_named_is_trained():
    adapted = model_of(latent_width=3)
    add_adapters(adapted, LORA)
    freeze(adapted, ())
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert trained
    assert all(name.endswith(("lora_a", "lora_b")) for name in trained)
    freeze(adapted, ("denoiser.head.weight",))
    assert {name for name, p in adapted.named_parameters() if p.requires_grad} == trained | {"denoiser.head.weight"}
    latent = model_of(latent_width=3)
    freeze(latent, ("latent",))
    frozen = {name for name, p in latent.named_parameters() if not p.requires_grad}
    assert frozen == set(model_of().state_dict())  # exactly the plain model's own


def test_patterns_that_fit_nothing_are_errors():
    with pytest.raises(UserError, match=r"training\.trainable: no parameter matches 'denoiser\.haed\.\*'"):
        freeze(model_of(), ("denoiser.haed.*",))
    with pytest.raises(UserError, match=r"training\.lora\.layers: no parameter matches 'qkv'"):
        add_adapters(model_of(), LoRAConfig(rank=2, layers=("qkv",)))
    with pytest.raises(UserError, match=r"'latent' needs a latent"):
        freeze(model_of(), ("latent",))


@torch.no_grad()
def test_a_fresh_prior_that_reads_what_is_visible_is_the_standard_one(tmp_path):
    """Bounds are at first what they were: the encoder has learned to be near N(0, I)."""
    old, new = model_of(latent_width=3), model_of(1, latent_width=3, prior="conditional")
    for parameter in new.prior_network.parameters():
        nn.init.normal_(parameter)
    initialize_from(new, saved(tmp_path, old))
    prior = new.prior_network(noisy_rows(), noisy_rows() == MASK, None)
    assert [tensor.abs().max() for tensor in (prior.mean, prior.log_std)] == [0, 0]
