"""AutoModel for an exported folder: the same model behind the interface of transformers.

model = AutoModel.from_pretrained(FOLDER, trust_remote_code=True)
rows = model.generate(steps=32, count=4)
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

    def generate(self, input_ids: Tensor | None = None, **options: Any) -> Tensor:
        """Draw rows: see `modeling_vmd.generate`, whose `prompt` is `input_ids`."""
        return core.generate(self.vmd, input_ids, **options).to(self.device)

    def bound(self, clean: Tensor, maskable: Tensor | None = None, steps: float = math.inf, **options: Any) -> Tensor:
        """Upper bounds on the negative log-likelihood of rows: see `modeling_vmd.bound`."""
        return core.bound(self.vmd, clean, maskable, steps, **options)

    def _init_weights(self, module: torch.nn.Module) -> None:
        """The constructor has done it."""
