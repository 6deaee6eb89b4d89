"""The interface of transformers around the model: prompts with padding, seeds, embeddings, checkpointing, latents."""

import pytest
import torch
from tiny_models import architecture, loud

from vmd_scale.diffusion.noise import Noise
from vmd_scale.diffusion.sampler import Sampler, sample
from vmd_scale.model import VMD

pytest.importorskip("transformers", reason="AutoModel is transformers' (pip install '.[transformers]')")

from vmd_scale.export import standalone_transformers
from vmd_scale.export.standalone_transformers import VMDConfig, VMDModel, left_aligned

L, MASK = 12, 9


def model_of(**options) -> VMDModel:
    values = {"vocab_size": MASK, "row_length": L, "layers": 2, "width": 16, "latent_width": 3, "attention": "auto"}
    torch.manual_seed(0)
    model = VMDModel(VMDConfig(architecture=architecture(**(values | options)).to_dict()))
    loud(model.vmd)
    return model.eval()


@pytest.fixture(scope="module")
def model() -> VMDModel:
    return model_of()


def test_a_call_draws_afresh_unless_it_is_seeded(model: VMDModel) -> None:
    assert not torch.equal(model.generate(count=4, steps=4), model.generate(count=4, steps=4))
    assert torch.equal(model.generate(count=4, steps=4, seed=3), model.generate(count=4, steps=4, seed=3))
    drawn = []
    for _ in range(2):
        torch.manual_seed(5)
        drawn.append(model.generate(count=4, steps=4))
    assert torch.equal(*drawn)
    alone = standalone_transformers.core.generate
    assert torch.equal(alone(model.vmd, count=4, steps=4), alone(model.vmd, count=4, steps=4, seed=0))


def test_what_a_tokenizer_returns_is_a_prompt(model: VMDModel) -> None:
    """Of one text: tokens stay, masks and the rest of the row are drawn."""
    prompt = torch.tensor([[3, MASK, 5]])
    encoded = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt), "token_type_ids": prompt * 0}
    drawn = model.generate(**encoded, steps=4, seed=1)
    assert torch.equal(drawn, model.generate(prompt, steps=4, seed=1))
    assert drawn.shape == (1, L)
    assert drawn[0, [0, 2]].tolist() == [3, 5]
    assert drawn.max() < MASK


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_prompts_are_each_continued_where_they_end(model: VMDModel, side: str) -> None:
    """As if each had been alone."""
    rows, pad = [[1, 2, 3, 4], [5, MASK]], [0, 0]
    padded = torch.tensor([rows[0], rows[1] + pad if side == "right" else pad + rows[1]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0] if side == "right" else [0, 0, 1, 1]])
    drawn = model.generate(input_ids=padded, attention_mask=mask, steps=4, seed=2)
    given = torch.full((2, L), MASK)
    given[0, :4], given[1, :2] = torch.tensor(rows[0]), torch.tensor(rows[1])
    wanted = sample(model.vmd, Sampler(4), Noise(2), torch.arange(2), given, given == MASK)
    assert torch.equal(drawn, wanted)
    assert torch.equal(left_aligned(padded, mask.bool(), MASK), given[:, :4])


def test_padding_of_whole_rows_stays_and_is_not_attended_to(model: VMDModel) -> None:
    row = torch.tensor([[MASK] * 6 + [0] * 6])
    mask = torch.tensor([[1] * 6 + [0] * 6])
    drawn = model.generate(input_ids=row, attention_mask=mask, steps=4, seed=2)
    assert drawn[0, 6:].tolist() == [0] * 6
    other = torch.cat((row[:, :6], torch.full((1, 6), 7)), 1)
    assert torch.equal(model.generate(input_ids=other, attention_mask=mask, steps=4, seed=2)[:, :6], drawn[:, :6])
    with pytest.raises(ValueError, match="a prompt of 13 tokens"):
        model.generate(torch.ones(1, L + 1, dtype=torch.long), attention_mask=torch.ones(1, L + 1))


def test_the_embeddings_are_found_and_replaced() -> None:
    model = model_of()
    embedding = model.get_input_embeddings()
    assert embedding.weight.shape == (MASK + 1, 16)
    replaced = torch.nn.Embedding(MASK + 1, 16)
    model.set_input_embeddings(replaced)
    assert model.vmd.denoiser.embedding is replaced
    with pytest.raises(NotImplementedError, match="the vocabulary is fixed"):
        model.resize_token_embeddings(20)


def test_checkpointing_computes_the_blocks_again_and_the_same_gradients() -> None:
    model = model_of().train()
    rows = torch.randint(MASK, (3, L), generator=torch.Generator().manual_seed(0))
    calls: list[int] = []
    for block in model.denoiser.blocks:
        block.register_forward_pre_hook(lambda *_: calls.append(1))

    def gradients() -> tuple[list[torch.Tensor], int]:
        model.zero_grad()
        calls.clear()
        torch.manual_seed(1)
        model(rows, labels=rows).loss.backward()
        return [p.grad for p in model.parameters() if p.grad is not None], len(calls)

    plain, once = gradients()
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    again, twice = gradients()
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing
    assert (once, twice, gradients()[1]) == (2, 4, 2)
    assert all(torch.allclose(*pair, atol=1e-6) for pair in zip(plain, again, strict=True))


@pytest.mark.parametrize("prior", ["standard", "conditional"])
@torch.no_grad()
def test_latents_that_are_not_given_come_from_the_prior(prior: str) -> None:
    """A conditional one has read what is visible."""
    model = model_of(prior=prior)
    noisy = torch.tensor([[1, 2, 3, MASK] * 3, [4] * 6 + [MASK] * 6])
    torch.manual_seed(7)
    drawn = model(noisy).logits
    torch.manual_seed(7)
    epsilon = torch.randn(2, 1, 3)
    network = VMD(model.vmd.architecture)
    network.load_state_dict(model.state_dict())
    gaussian = network.eval().prior(noisy, noisy == MASK)
    assert (gaussian is None) == (prior == "standard")
    latents = epsilon if gaussian is None else gaussian.mean + gaussian.log_std.exp() * epsilon
    assert torch.equal(drawn, model(noisy, latents=latents).logits)
    assert not torch.allclose(drawn, model(noisy, latents=epsilon + 1).logits)
    if gaussian is not None:
        assert not torch.allclose(drawn, model(noisy, latents=epsilon).logits)
