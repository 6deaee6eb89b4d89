"""`training.deterministic`: what is asked of PyTorch and flash-attn, and that our step can do with what remains."""

import math
import os

import pytest
import torch
from test_step_causes import CHUNK, network, prepared, watched
from watching import Watch

from vmd_scale.determinism import any_order, be_deterministic
from vmd_scale.diffusion.tokens import draw_categorical
from vmd_scale.model import attention, head

# By torch.use_deterministic_algorithms, of what has no deterministic form on a GPU: all that one might call here.
REFUSED = {
    "cumsum",
    "cumsum_",
    "put_",
    "histc",
    "bincount",
    "median",
    "kthvalue",
    "nll_loss2d_forward",
    "scatter_reduce",
}


@pytest.fixture
def deterministic(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    be_deterministic()
    yield
    torch.use_deterministic_algorithms(False)
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


def test_pytorch_and_cublas_are_told(deterministic):
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()  # else flash attention stays as it is
    with any_order():
        assert not torch.are_deterministic_algorithms_enabled()
    assert torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("vmd", {}),
        ("nelbo", {"groups": 4, "time_conditioning": True}),
        ("nelbo", {"prior": "conditional", "injection": "add"}),
        ("nelbo", {"latent": 0, "mlp": "swiglu", "norm": "rmsnorm"}),
    ],
)
def test_a_step_calls_nothing_that_a_gpu_refuses(deterministic, kind, changes, fused, monkeypatch):
    monkeypatch.setattr(head, "CHUNK_ELEMENTS", CHUNK)
    model = network(**changes)
    model.fused_loss = fused
    watch, _ = watched(model, kind)
    assert REFUSED & set(watch.operations) == set()


def test_drawing_tokens_needs_what_a_gpu_refuses():
    """So that evaluations in the middle of a run are let off."""
    with Watch() as watch:
        draw_categorical(torch.zeros(2, 3), torch.full((2,), 0.5).double())
    assert "cumsum" in watch.operations


def test_a_flash_attention_without_a_deterministic_gradient_is_not_taken(deterministic, monkeypatch):
    def able(q, k, v, deterministic=False):
        return deterministic

    def unable(q, k, v):
        return q

    assert attention._deterministic(able)(1, 2, 3) is True
    with pytest.raises(TypeError, match="unable has no argument 'deterministic'"):
        attention._deterministic(unable)
    asked = []
    monkeypatch.setattr(attention, "_flash_kernels", lambda *a: asked.append(a))
    attention.flash_kernels(32)
    with any_order():
        attention.flash_kernels(32)
    assert asked == [(32, True, True), (32, False, True)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("compiled", [False, True])
def test_a_gpu_computes_the_same_gradients_twice(deterministic, compiled):
    model = network(heads=2).cuda().bfloat16()
    model.compiled_loss = compiled
    if compiled:
        model.compile_blocks(dynamic=False)
    objective, x = prepared(model, "nelbo")
    x, found = x.to(torch.device("cuda")), []
    for _ in range(2):
        model.zero_grad()
        objective(model, x, 1.0).total.backward()
        found.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert math.isfinite(sum(float(g.float().sum()) for g in found[0]))
