"""The loss whose gradient is made in the forward pass, against PyTorch's own cross-entropy of full logits."""

import pytest
import torch
from model_variants import inputs, variant
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from vmd_scale.adapters import add_adapters
from vmd_scale.config import LoRAConfig
from vmd_scale.model import head
from vmd_scale.model.head import masked_nll, weighted_nll


def problem(seed=0, rows=3, length=6, width=8, vocab=11, groups=2, dtype=torch.float32):
    torch.manual_seed(seed)
    hidden = torch.randn(rows, length, width).to(dtype).requires_grad_()
    matrix = torch.randn(vocab, width).to(dtype).requires_grad_()
    targets, masked = torch.randint(vocab, (rows, length)), torch.rand(rows, length) < 0.5
    index = F.pad(masked.flatten().nonzero().squeeze(-1), (0, 4), value=rows * length)
    return hidden, matrix, targets, masked, index, torch.rand(rows, groups) * 5


def reference(hidden, matrix, targets, masked, weight):
    logits = hidden.float() @ matrix.float().T
    nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
    per_group = torch.where(masked, nll, 0).unflatten(1, (weight.shape[1], -1)).sum(-1)
    return (weight * per_group).sum()


@pytest.mark.parametrize("chunk", [1, 4, 1000])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_weighted_nll_is_the_weighted_sum_of_cross_entropies(chunk, dtype, tolerance, monkeypatch):
    hidden, matrix, targets, masked, index, weight = problem(dtype=dtype)
    monkeypatch.setattr(head, "CHUNK_ELEMENTS", chunk * len(matrix))
    factor = 0.3  # what the loss is multiplied with afterwards
    results = []
    for total in (
        weighted_nll(hidden, targets, index, matrix, weight),
        reference(hidden, matrix, targets, masked, weight),
    ):
        results.append((total, *torch.autograd.grad(factor * total, (hidden, matrix))))
    for one, other in zip(*results, strict=True):
        assert (one.float() - other.float()).norm() < tolerance * other.float().norm()
    assert results[0][1].dtype == results[0][2].dtype == dtype
    assert bool((results[0][1][~masked] == 0).all())


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compiled", [False, True])
def test_symbols_that_fill_up_the_vocabulary_change_nothing(with_bias, dtype, compiled, monkeypatch):
    """As on a GPU, whose matrix products want that."""
    monkeypatch.setattr(head, "_compiler", lambda: head._in_one_pass)
    hidden, matrix, targets, _, index, weight = problem(dtype=dtype)
    monkeypatch.setattr(head, "CHUNK_ELEMENTS", 4 * len(matrix))
    bias = torch.randn(len(matrix)).to(dtype).requires_grad_() if with_bias else None
    wanted = [hidden, matrix, *([bias] if bias is not None else [])]
    results = []
    for multiple in (1, 8):
        monkeypatch.setitem(head.VOCAB_MULTIPLE, "cpu", multiple)
        total = weighted_nll(hidden, targets, index, matrix, weight, compiled, bias)
        results.append((total, *torch.autograd.grad(total, wanted)))
    for one, other in zip(*results, strict=True):
        assert one.shape == other.shape
        assert (one.float() - other.float()).norm() <= (1e-5 if dtype == torch.float32 else 2e-2) * one.float().norm()


def test_a_compiled_loss_is_compiled_once_whatever_is_masked(monkeypatch):
    """But for another vocabulary: its size is a constant of the kernel."""
    torch._dynamo.reset()
    compiled = []
    compiler = torch.compile(head._in_one_pass, backend=lambda graph, inputs: compiled.append(graph) or graph)
    monkeypatch.setattr(head, "_compiler", lambda: compiler)
    for rows, symbols, times in ((7, 50, 1), (5, 50, 1), (1000, 50, 1), (7, 60, 2)):
        logits, targets, weight = torch.randn(rows, symbols), torch.randint(symbols, (rows,)), torch.rand(rows)
        found, wanted = (f(logits.clone(), targets, weight) for f in (head._compiled, head._nll_and_gradient))
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, wanted, strict=True))
        assert len(compiled) == times


def test_extreme_logits_have_an_exact_loss():
    hidden = torch.tensor([[[1e4, 0.0], [0.0, 80.0]]], requires_grad=True)
    matrix, targets, index = torch.eye(2), torch.tensor([[1, 0]]), torch.tensor([0, 1])
    total = weighted_nll(hidden, targets, index, matrix, torch.tensor([[1.0, 2.0]]))
    assert total.item() == pytest.approx(1e4 + 2 * 80)
    assert torch.autograd.grad(total, hidden)[0].tolist() == [[[1.0, -1.0], [-2.0, 2.0]]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_compiled_on_a_gpu_computes_the_same(dtype):
    torch.manual_seed(0)
    logits, targets, weight = 4 * torch.randn(9, 50).to(dtype), torch.randint(50, (9,)), torch.rand(9)
    for one, other in zip(
        head._nll_and_gradient(logits.clone(), targets, weight),
        head._in_one_pass(logits, targets, weight),
        strict=True,
    ):
        assert one.dtype == other.dtype
        assert torch.allclose(one.float(), other.float(), atol=1e-6, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5)


def test_nothing_masked_costs_nothing():
    hidden, matrix, targets, _, _, weight = problem()
    for index in (torch.zeros(0, dtype=torch.int64), torch.full((5,), targets.numel())):
        total = weighted_nll(hidden, targets, index, matrix, weight)
        assert total.item() == 0
        assert all(bool((g == 0).all()) for g in torch.autograd.grad(total, (hidden, matrix)))


def one_loss_and_gradient(model, x, weight, monkeypatch):
    """The loss and all gradients by name: of all logits at once, and the same by recomputed and by fused chunks."""
    found = []
    for chunk, fused in ((1000, True), (3, False), (3, True)):
        monkeypatch.setattr(head, "CHUNK_ELEMENTS", chunk * model.architecture.vocab_size)
        model.fused_loss = fused
        model.zero_grad()
        total, _ = model(**x, nll_weight=weight)
        (0.1 * total).backward()
        found.append({"loss": total.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for name, value in found[0].items():
            assert torch.allclose(value, other[name], atol=1e-5, rtol=1e-4), name
    return found[0]


@pytest.mark.parametrize("name", ["plain", "mdm", "tied", "blocks", "conditional"])
def test_the_model_has_one_gradient_whichever_way_it_is_made(name, monkeypatch):
    """With the gradient made in the forward pass, with recomputed chunks, and with all logits at once."""
    model = variant(name)
    x = inputs(model)
    weight = torch.rand(4, model.architecture.groups)
    first = one_loss_and_gradient(model, x, weight, monkeypatch)
    nll, _ = model(**x)
    assert torch.allclose((weight * nll.unflatten(1, (len(weight[0]), -1)).sum(-1)).sum(), first["loss"], rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "biases", "head_is"),
    [
        ("tied", False, "trained"),
        *(("plain", biases, head_is) for biases in (False, True) for head_is in ("trained", "adapted", "frozen")),
        ("plain", True, "frozen but for its bias"),
    ],
)
def test_whatever_the_head_is_there_is_one_loss_and_one_gradient(name, biases, head_is, monkeypatch):
    model = variant(name, biases=biases)
    if head_is == "adapted":
        add_adapters(model, LoRAConfig(rank=2, layers=("denoiser.head",)))
        torch.nn.init.normal_(model.denoiser.head.lora_b)
    if head_is.startswith("frozen"):
        model.denoiser.head.requires_grad_(False)
        if head_is == "frozen but for its bias":
            model.denoiser.head.bias.requires_grad_(True)
    x, weight = inputs(model), torch.rand(4, 1)
    first = one_loss_and_gradient(model, x, weight, monkeypatch)
    assert first.keys() - {"loss"} == {name for name, p in model.named_parameters() if p.requires_grad}


def test_a_frozen_head_costs_no_gradient_of_its_own():
    hidden, matrix, targets, _, index, weight = problem()
    product = 2 * len(index) * matrix.numel()
    for trained, products in ((True, 3), (False, 2)):
        with FlopCounterMode(display=False) as counter:
            weighted_nll(hidden, targets, index, matrix.requires_grad_(trained), weight).backward()
        assert counter.get_total_flops() == products * product


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("chunk", [64, 4096])
def test_on_a_gpu_in_bf16(chunk, monkeypatch):
    hidden, matrix, targets, masked, index, weight = (
        x.cuda() for x in problem(rows=4, length=128, width=64, vocab=1000)
    )
    monkeypatch.setattr(head, "GPU_CHUNK_ELEMENTS", chunk * 1000)
    low = [x.detach().bfloat16().requires_grad_() for x in (hidden, matrix)]
    wanted = torch.autograd.grad(reference(*low, targets, masked, weight), low)
    for compiled in (False, True):
        got = torch.autograd.grad(weighted_nll(low[0], targets, index, low[1], weight, compiled), low)
        for one, other in zip(got, wanted, strict=True):
            assert (one.float() - other.float()).norm() < 2e-2 * other.float().norm()


def test_an_empty_list_of_positions_has_a_loss_of_zero_everywhere():
    hidden, matrix, targets, *_ = problem()
    nll = masked_nll(hidden, targets, torch.zeros(0, dtype=torch.int64), lambda h: h @ matrix.T, len(matrix))
    assert nll.shape == targets.shape
    assert bool((nll == 0).all())
