"""Several documents in one row: each must be treated as if it stood alone."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import architecture, loud
from torch import Tensor

from vmd_scale.build import masks_of
from vmd_scale.config import DataConfig
from vmd_scale.data.loader import evaluation_batches
from vmd_scale.data.mixture import attended_positions
from vmd_scale.data.prepare import prepare
from vmd_scale.data.shards import ShardReader
from vmd_scale.diffusion.likelihood import Rows, elbo, importance_weighted
from vmd_scale.diffusion.noise import Noise, Stream
from vmd_scale.diffusion.objective import Nelbo, Objective, Surrogate, TrainingInputs
from vmd_scale.diffusion.sampler import Sampler
from vmd_scale.model import VMD
from vmd_scale.model.attention import Flash, attention
from vmd_scale.model.documents import attention_mask, positions_in

LENGTHS = [[5, 1, 3], [9], [2, 7]]  # of rows of 12
DOCUMENTS, LENGTH = 3, 12
VARIANTS = {
    "plain": {"latent_width": 0},
    "adaln": {"latent_width": 2},
    "add": {"latent_width": 2, "injection": "add", "time_conditioning": True},
    "conditional": {"latent_width": 2, "prior": "conditional", "encoder_layers": 2},
    "sdpa": {"latent_width": 2, "attention": "sdpa"},
}


def model_of(variant: str) -> VMD:
    torch.manual_seed(0)
    values = {"vocab_size": 7, "row_length": LENGTH, "layers": 2, "documents": DOCUMENTS, **VARIANTS[variant]}
    return loud(VMD(architecture(**values))).double()


def documents_of() -> torch.Tensor:
    rows = [[n for n, length in enumerate(row, 1) for _ in range(length)] for row in LENGTHS]
    return torch.tensor([row + [0] * (LENGTH - len(row)) for row in rows], dtype=torch.int32)


def prepared(objective: Objective, model: VMD) -> TrainingInputs:
    attend = documents_of()
    clean = torch.randint(0, 7, (3, LENGTH), generator=torch.Generator().manual_seed(1))
    inputs = objective.prepare(clean, attend > 0, attend, 4, torch.arange(3), 3)
    if inputs.epsilon is None:
        return inputs
    return TrainingInputs(**{**vars(inputs), "epsilon": inputs.epsilon.double()})


def objective(kind: str, model: VMD) -> Objective:
    shared = {"law": "bernoulli", "groups": 1, "latent_width": model.architecture.latent_width, "mask_id": 7}
    shared |= {"noise": Noise(3), "documents": DOCUMENTS}
    return Nelbo(steps=(1.0, 2.0, float("inf")), **shared) if kind == "nelbo" else Surrogate(**shared)


def alone(x: TrainingInputs, row: int, document: int) -> TrainingInputs:
    """One document of a row as a row by itself, corrupted and weighed as it was there."""
    at = x.attend[row] == document
    masked = (x.noisy[row] == 7)[at]
    return TrainingInputs(
        clean=x.clean[row : row + 1, at],
        maskable=x.maskable[row : row + 1, at],
        attend=None,
        noisy=x.noisy[row : row + 1, at],
        index=masked.nonzero().squeeze(-1),
        encoder_mask=x.encoder_mask[row : row + 1, at],
        epsilon=None if x.epsilon is None else x.epsilon[row : row + 1, document - 1 : document],
        kl_weight=x.kl_weight[row : row + 1, document - 1 : document],
        ratio=x.ratio[row : row + 1],
        dropout_seed=0,
        nll_weight=x.nll_weight[row : row + 1],
    )


@pytest.mark.parametrize("kind", ["nelbo", "vmd"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_gradient_of_packed_rows_are_those_of_the_documents_alone(variant: str, kind: str) -> None:
    if kind == "vmd" and variant == "plain":
        pytest.skip("the surrogate needs a latent")
    model = model_of(variant)
    loss_of = objective(kind, model)
    x = prepared(loss_of, model)
    assert x.noisy.eq(7).any()
    together = loss_of(model, x, 0.7)
    together.total.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    parts = [loss_of(model, alone(x, r, d), 0.7) for r, row in enumerate(LENGTHS) for d in range(1, len(row) + 1)]
    assert sum(int(part.tokens) for part in parts) == int(together.tokens) == sum(map(sum, LENGTHS))
    for name in ("total", "reconstruction", "kl"):
        torch.testing.assert_close(sum(getattr(p, name) for p in parts), getattr(together, name), rtol=1e-6, atol=1e-6)
    sum(part.total for part in parts).backward()
    for name, p in model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(p.grad, gradients[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_flash_attention_gets_the_documents_and_no_mask(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for its kernel for variable lengths: the whole network gives what it gives with the mask."""
    calls = []

    def varlen(q: Tensor, k: Tensor, v: Tensor, **bounds: Any) -> Tensor:
        calls.append(bounds["cu_seqlens_q"].tolist())
        ends = bounds["cu_seqlens_q"]
        pieces = [attention(q[None, s:e], k[None, s:e], v[None, s:e], None, "sdpa")[0] for s, e in pairwise(ends)]
        return torch.cat(pieces)

    model = model_of(variant).bfloat16()
    x = prepared(objective("nelbo", model), model)
    inputs = (x.clean, x.noisy, x.index, x.encoder_mask, x.epsilon, x.attend, x.ratio)
    masked, _ = model(*inputs)
    for stack in model.stacks:
        for block in stack:
            block.attention.kernel = Flash("stand-in", refuse, varlen, "cpu")
    packed, _ = model(*inputs)
    assert len(calls) == sum(map(len, model.stacks))
    assert all(call == calls[0] for call in calls)
    torch.testing.assert_close(packed, masked, rtol=0.05, atol=0.1)


def refuse(*arguments: Any) -> None:
    raise AssertionError("rows of several documents are not dense")


def test_a_document_does_not_hear_its_neighbours() -> None:
    model = model_of("conditional")
    x = prepared(objective("nelbo", model), model)
    inputs = (x.noisy, x.index, x.encoder_mask, x.epsilon, x.attend, x.ratio)
    nll, _ = model(x.clean, *inputs)
    other = x.clean.clone()
    first = x.attend == 1
    other[first] = (other[first] + 1) % 7
    changed, _ = model(other, torch.where(first & (x.noisy != 7), other, x.noisy), *inputs[1:])
    assert not torch.equal(nll[first], changed[first])
    assert torch.equal(nll[~first], changed[~first])


def test_positions_restart_and_masks_are_blocks() -> None:
    attend = torch.tensor([[1, 1, 2, 3, 3, 0], [1, 1, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0]], dtype=torch.int32)
    assert positions_in(attend, 6, attend.device).tolist() == [
        [0, 1, 0, 0, 1, 0],
        [0, 1, 2, 3, 4, 5],
        [0, 0, 1, 2, 3, 4],
    ]
    assert attention_mask(attend, 3, "sdpa")[0, 0].long().tolist() == [
        [1, 1, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0],
        [0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 0, 1],
    ]  # fmt: skip


def test_noise_of_a_document_does_not_depend_on_how_many_there_may_be() -> None:
    few, many = (
        Nelbo(steps=(1.0,), law="balanced", groups=1, latent_width=5, mask_id=7, noise=Noise(0), documents=n).prepare(
            torch.zeros(3, LENGTH, dtype=torch.int64), documents_of() > 0, documents_of(), 2, torch.arange(3), 3
        )
        for n in (3, 8)
    )
    assert torch.equal(few.epsilon, many.epsilon[:, :3])
    assert not many.kl_weight[:, 3:].any()


@torch.no_grad()
def test_bounds_of_packed_rows() -> None:
    """With T = 1 all of a row is masked at once: the bounds are those of the documents alone, with the same latents."""
    model = model_of("adaln")
    attend = documents_of()
    clean = torch.randint(0, 7, (3, LENGTH), generator=torch.Generator().manual_seed(1))
    rows = Rows(clean, attend > 0, attend, torch.arange(3))
    noise, sampler = Noise(5), Sampler(1.0, "fixed", "balanced")
    one_step = elbo(model, rows, sampler, noise, 3)
    for r, row in enumerate(LENGTHS):
        expected = 0.0
        for d in range(1, len(row) + 1):
            text = clean[r : r + 1, attend[r] == d]
            q = model.encode(text, torch.ones_like(text, dtype=torch.bool))
            e = noise.normal(Stream.LATENT, 0, rows.numbers, (DOCUMENTS, 2))[r : r + 1, d - 1 : d].double()
            logits = model.logits(torch.full_like(text, 7), q.sample(e))
            expected += float(torch.nn.functional.cross_entropy(logits[0], text[0], reduction="sum") + q.kl().sum())
        assert float(one_step[r]) == pytest.approx(expected, rel=1e-6)
    by_path = importance_weighted(model, rows, sampler, noise, 2)
    assert by_path.shape == (3,)
    assert torch.isfinite(by_path).all()
    with pytest.raises(ValueError, match="fresh"):
        elbo(model, rows, Sampler(1.0, "fresh", "balanced"), noise, 3)


def test_from_shards_to_documents(tmp_path: Path) -> None:
    """The whole way: what the model is told of a row is where its documents are."""
    texts = [f"{'word ' * (n % 9)}number {n}" for n in range(300)]
    (tmp_path / "text.txt").write_text("\n".join(texts))
    config = DataConfig(
        corpus="text", source={"train": str(tmp_path / "text.txt")}, tokenizer="text8", normalizer="text8",
        row_length=64, packing="document", documents_per_row=4, shards=str(tmp_path / "shards"),
    )  # fmt: skip
    record = prepare(config, progress=False).splits["train"]
    assert sum(record.document_lengths) == record.documents == 300
    reader = ShardReader(config.shards, "train")
    (batch,) = evaluation_batches(reader, np.arange(reader.rows), reader.rows)
    maskable, attend = masks_of(batch, reader.manifest)
    assert attend is not None
    assert attend.dtype == torch.int32
    assert torch.equal(maskable, attend > 0)
    assert int(maskable.sum()) == record.counted_tokens
    assert 1 < int(attend.max()) <= 4
    found = sum(int(attend[n].max()) for n in range(len(attend)))
    assert found == 300 + record.split_documents  # none of them is longer than two rows


@pytest.mark.parametrize(
    ("lengths", "tight"),
    [([16], 1.0), ([5, 6, 7], 0.95), ([5, 30, 60], 0.6), ([90], 0.7), ([64 * 9 + 1], 0.85), ([5, 300], 0.2)],
    ids=str,
)
def test_attention_inside_documents_is_not_counted_for_more_than_it_is(
    lengths: list[int], tight: float, tmp_path: Path
) -> None:
    """To how many positions one attends, padding apart: of documents of one length exactly, else a lower bound."""
    texts = ["x" * (lengths[n % len(lengths)]) for n in range(240)]
    (tmp_path / "text.txt").write_text("\n".join(texts))
    config = DataConfig(
        corpus="text", source={"train": str(tmp_path / "text.txt")}, tokenizer="text8", normalizer="text8",
        row_length=64, packing="document", documents_per_row=4, shards=str(tmp_path / "shards"), weight=3.0,
    )  # fmt: skip
    manifest = prepare(config, progress=False)
    reader = ShardReader(config.shards, "train")
    (batch,) = evaluation_batches(reader, np.arange(reader.rows), reader.rows)
    _, attend = masks_of(batch, manifest)
    assert attend is not None
    attended = float(((attend[:, :, None] == attend[:, None, :]) & (attend > 0)[:, :, None]).sum(-1).double().mean())
    assert tight * attended <= manifest.attended_positions("train") <= attended * (1 + 1e-12)
    other = config.model_copy(update={"weight": 1.0})
    mixed = config.model_copy(update={"mixture": ({**other.model_dump(exclude={"mixture"}), "shards": "b"},)})
    nothing = manifest.model_copy(
        update={"splits": {"train": manifest.splits["train"].model_copy(update={"rows": 10**9})}}
    )
    found = attended_positions(mixed, [manifest, nothing])
    assert found == pytest.approx(0.75 * manifest.attended_positions("train"), rel=1e-4)
    assert attended_positions(config.model_copy(update={"packing": "wrap"}), [manifest]) is None
