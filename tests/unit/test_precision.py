"""Evaluation and sampling in bf16: the same numbers to its tolerance, and fp32 or float64 where it matters."""

import pytest
import torch
from example_results import example_result
from model_variants import VARIANTS, variant

from vmd_scale.diffusion import sampler as sampling
from vmd_scale.diffusion.likelihood import Rows, elbo, importance_weighted
from vmd_scale.diffusion.noise import Noise
from vmd_scale.diffusion.sampler import Sampler, sample
from vmd_scale.evaluation.tables import table
from vmd_scale.model import VMD
from vmd_scale.precision import describe_kernels, precision_of, precision_on

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("has_bf16", [True, False])
def test_auto_is_bf16_on_a_gpu_that_has_it(has_bf16, monkeypatch):
    def supported(including_emulation=True):  # PyTorch counts GPUs that compute it by way of fp32
        return has_bf16 or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert [precision_on(CPU, wanted) for wanted in ("auto", "fp32", "bf16")] == ["fp32", "fp32", "bf16"]
    auto = "bf16" if has_bf16 else "fp32"
    assert [precision_on(GPU, wanted) for wanted in ("auto", "fp32", "bf16")] == [auto, "fp32", "bf16"]


@pytest.mark.parametrize("name", [*VARIANTS, "documents"])
def test_bounds_in_bf16_are_those_of_fp32_to_its_tolerance(name):
    documents = name == "documents"
    model = variant("plain", documents=2) if documents else variant(name)
    clean = torch.randint(5, (64, 6), generator=torch.Generator().manual_seed(0))
    attend = torch.tensor([1, 1, 1, 2, 2, 0], dtype=torch.int32).expand(64, 6) if documents else None
    maskable = torch.ones_like(clean, dtype=torch.bool) if attend is None else attend > 0
    rows, sampler = Rows(clean, maskable, attend, torch.arange(64)), Sampler(2)

    def bounds():
        return elbo(model, rows, sampler, Noise(0), 64), importance_weighted(model, rows, sampler, Noise(0), 2)

    exact = bounds()
    model.bfloat16()
    assert precision_of(model) == "bf16"
    for rough, wanted in zip(bounds(), exact, strict=True):
        assert rough.dtype == torch.float64
        assert not torch.equal(rough, wanted)
        assert abs(rough.mean() / wanted.mean() - 1) < 0.02


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(("law", "latent", "remask"), [("balanced", "fresh", 0.5), ("margin", "fixed", 0.0)])
def test_samples_in_bf16_are_drawn_in_float64(name, law, latent, remask, monkeypatch):
    model, heads = variant(name).bfloat16(), []
    original = sampling.draw_from

    def draw(hidden, head, vocab_size, u, *others, **options):
        heads.append((hidden.dtype, head(hidden).dtype, u.dtype))
        return original(hidden, head, vocab_size, u, *others, **options)

    monkeypatch.setattr(sampling, "draw_from", draw)
    x = sample(model, Sampler(3, latent, law, remask=remask), Noise(0), torch.arange(5))
    assert ((x >= 0) & (x < 5)).all()
    assert set(heads) == {(torch.bfloat16, torch.float32, torch.float64)}


def test_what_encoder_and_prior_say_is_fp32():
    model = variant("conditional").bfloat16()
    clean = torch.zeros(2, 6, dtype=torch.int64)
    posterior = model.encode(clean, clean == 0)
    z = posterior.sample(torch.randn(2, 1, 2))
    assert {x.dtype for x in (*posterior[:2], *posterior.prior, z, posterior.kl())} == {torch.float32}
    assert model.logits(clean, z).dtype == torch.float32


def test_the_kernels_of_sampling_are_named():
    """No encoder runs, and blocks are computed one after the other: no block mask, no FlexAttention."""
    a = variant("blocks", attention="flex").architecture
    trained = "precision bf16, attention: denoiser by flex, encoder by PyTorch SDPA"
    assert describe_kernels(VMD(a), "bf16", False) == trained
    assert describe_kernels(VMD(a), "fp32", False, True) == "precision fp32, attention: denoiser by PyTorch SDPA"


def test_results_tell_their_precision_where_they_know_it():
    old, new = example_result(), example_result(precision="bf16")
    assert "precision" not in table([old, old])
    assert "weights ema, precision bf16, step" in table([new, new])
    assert [line.split()[-1] for line in table([old, new]).splitlines()[1:4]] == ["precision", "none", "bf16"]
    assert "precision" not in old.to_dict()
