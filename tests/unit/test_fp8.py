"""fp8 is refused where it cannot be, before anything starts; what is converted, with torchao where it is installed."""

import pytest
import torch
from model_variants import inputs, variant

from vmd_scale.errors import UserError
from vmd_scale.training import fp8


def test_no_gpu_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"training\.fp8 needs a GPU .* found no GPU"):
        fp8.check_fp8("bf16")


@pytest.mark.parametrize(
    ("capability", "precision", "message"),
    [((8, 0), "bf16", "found A100"), ((9, 0), "fp32", "training.precision"), ((9, 0), "bf16", "torchao")],
)
def test_what_is_missing_is_named(capability, precision, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A100")
    monkeypatch.setitem(__import__("sys").modules, "torchao.float8", None)
    with pytest.raises(UserError, match=message):
        fp8.check_fp8(precision)


def test_large_matrices_of_the_blocks_are_converted_and_nothing_else():
    model = variant("plain", width=32, heads=2, encoder_width=16)
    fit = {name for stack in model.stacks for name, m in stack.named_modules() if fp8._is_fit(m, name)}
    assert {name.split(".", 1)[1] for name in fit} == {"attention.qkv", "attention.out", "mlp.up", "mlp.down"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_step_in_fp8_is_near_one_in_bf16_on_a_gpu():
    try:
        fp8.check_fp8("bf16")
    except UserError as reason:
        pytest.skip(str(reason))
    model = variant("plain", width=64, heads=2, encoder_width=64, attention="sdpa").cuda().bfloat16()
    x = {key: value.cuda() if torch.is_tensor(value) else value for key, value in inputs(model, rows=32).items()}
    plain = model(**x)[0]
    fp8.convert_to_fp8(model)
    assert torch.allclose(model(**x)[0], plain, atol=0.3, rtol=0.1)
    model(**x)[0].sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
