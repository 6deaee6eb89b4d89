"""AutoModel for an exported folder: the same model behind the interface of transformers.

model = AutoModel.from_pretrained(FOLDER, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True)
rows = model.generate(steps=32, count=4)
rows = model.generate(**tokenizer("a text to continue", return_tensors="pt"), steps=32)
"""

import math
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput

from vmd_scale.export import standalone_tail as core
from vmd_scale.model.vmd import VMD


class VMDConfig(PretrainedConfig):
    """`architecture` is what builds the network; the other keys repeat parts of it by their usual names."""

    model_type = "vmd"

    def __init__(self, architecture: dict[str, Any] | None = None, has_encoder: bool = True, **others: Any) -> None:
        self.architecture = architecture
        self.has_encoder = has_encoder
        super().__init__(**others)


class VMDModel(PreTrainedModel):
    """Variational masked diffusion; `vmd` is the model itself, with `encode`, `prior` and `token_nll`."""

    config_class = VMDConfig
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules: list[str] | set[str] | None = ["Block"]  # noqa: RUF012 - as in the base class

    def __init__(self, config: VMDConfig) -> None:
        super().__init__(config)
        assert config.architecture is not None
        built = core.build(config.architecture, config.has_encoder)
        # Not `built` itself: so weights have the same names here and there.
        self.denoiser, self.encoder, self.prior_network = built.denoiser, built.encoder, built.prior_network
        self.post_init()

    @property
    def vmd(self) -> VMD:
        """The same modules as a `VMD`."""
        view = VMD.__new__(VMD)
        torch.nn.Module.__init__(view)
        view.architecture = self.denoiser.architecture
        view.denoiser, view.encoder, view.prior_network = self.denoiser, self.encoder, self.prior_network
        return view.train(self.training)

    def forward(
        self,
        input_ids: Tensor,
        latents: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **_: Any,
    ) -> MaskedLMOutput:
        """Logits of a partly masked row, or a training loss.

        Args:
            input_ids: int64 [B, L], the mask id (`config.mask_token_id`) where masked.
            latents: fp32 [B, G, d_z]; None draws them from the prior by torch's global generator.
            attention_mask: [B, L], 0 at padding.
            labels: int64 [B, L]: the clean tokens, -100 where they are given and not counted. Then `input_ids` are
                clean too, `loss` is the negative ELBO in nats per counted token, and no logits are made.
        """
        model, attend = self.vmd, None if attention_mask is None else attention_mask.bool()
        a = model.architecture
        if labels is not None:
            counted = labels != -100
            nats = core.negative_elbo(model, torch.where(counted, labels, input_ids), counted, attend)
            return MaskedLMOutput(loss=nats.sum() / counted.sum().clamp(min=1))
        masked = input_ids == a.mask_id
        if a.latent_width and latents is None:
            latents = torch.randn(len(input_ids), a.groups, a.latent_width, device=input_ids.device)
            prior = model.prior(input_ids, masked, attend)
            latents = latents if prior is None else prior.sample(latents)
        ratio = masked.unflatten(1, (a.groups, -1)).float().mean(-1)
        return MaskedLMOutput(logits=model.logits(input_ids, latents, attend, ratio))

    def generate(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        seed: int | None = None,
        **options: Any,
    ) -> Tensor:
        """Draw whole rows: see `modeling_vmd.generate`, whose options these are and whose `prompt` is `input_ids`.

        Args:
            input_ids: int64 [B, n]; the mask id is drawn like what follows the prompt.
            attention_mask: [B, n], 0 at padding. From prompts shorter than a row, padding on either side is removed:
                what is drawn follows each prompt at once. In whole rows, padding is kept and not attended to.
            token_type_ids: not looked at; some tokenizers return them.
            seed: None takes one from torch's global generator, so that two calls differ; the same seed draws the same.

        Raises:
            ValueError: see `modeling_vmd.generate`.
        """
        if seed is None:
            seed = int(torch.randint(2**62, ()))
        if input_ids is not None and attention_mask is not None and not attention_mask.all():
            text = attention_mask.bool()
            if input_ids.shape[1] < self.denoiser.architecture.row_length:
                input_ids = left_aligned(input_ids, text, self.denoiser.architecture.mask_id)
            else:
                options["attend"] = text
        return core.generate(self.vmd, input_ids, seed=seed, **options).to(self.device)

    def bound(self, clean: Tensor, maskable: Tensor | None = None, steps: float = math.inf, **options: Any) -> Tensor:
        """Upper bounds on the negative log-likelihood of rows: see `modeling_vmd.bound`."""
        return core.bound(self.vmd, clean, maskable, steps, **options)

    def get_input_embeddings(self) -> torch.nn.Module:
        """The denoiser's, which has a row for the mask; the encoder has its own."""
        return self.denoiser.embedding

    def set_input_embeddings(self, value: Any) -> None:
        self.denoiser.embedding = value

    def resize_token_embeddings(self, *_: Any, **__: Any) -> torch.nn.Embedding:
        """Raises `NotImplementedError`."""
        raise NotImplementedError("the mask is the last symbol, and the head has none for it: the vocabulary is fixed")

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = None, every_n_layers: int = 1
    ) -> None:
        """What gradient_checkpointing_enable() and its successor call; how it is done, the blocks know."""
        self.gradient_checkpointing = enable
        self.vmd.checkpoint_activations("full" if enable else "none")

    def _init_weights(self, module: torch.nn.Module) -> None:
        """The constructor has done it."""


def left_aligned(input_ids: Tensor, text: Tensor, mask_id: int) -> Tensor:
    """Each row's text, where `text` [B, n] is true, moved to its start, and masks after it."""
    order = (~text).int().argsort(dim=1, stable=True)
    return input_ids.gather(1, order).masked_fill(~text.gather(1, order), mask_id)
