"""What contradicts what in a configuration, by subject. Every rule raises `ValueError`, naming keys and values."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vmd_scale.config import Config

DEFAULT_STAGE = 1  # of ZeRO, where `deepspeed.zero_optimization` names none


def widths_fit(config: Config) -> None:
    model = config.model
    if model.width % model.heads or (model.width // model.heads) % 2:
        raise ValueError(f"model.heads ({model.heads}) must divide model.width ({model.width}) into an even head width")
    if config.encoder_width % config.head_width:
        raise ValueError(
            f"latent.encoder_width ({config.encoder_width}) must be a multiple of the head width "
            f"model.width / model.heads ({config.head_width})"
        )


def objective_fits(config: Config) -> None:
    latent, diffusion = config.latent, config.diffusion
    if diffusion.objective != "nelbo" and latent.width == 0:
        raise ValueError(
            f"diffusion.objective {diffusion.objective!r} needs a latent, but latent.width is 0; "
            "the MDM baseline is latent.width=0 with diffusion.objective='nelbo' and diffusion.steps=['inf']"
        )
    if diffusion.objective == "iw":
        if diffusion.free_bits:
            raise ValueError(
                f"diffusion.free_bits ({diffusion.free_bits}) has no meaning with diffusion.objective 'iw'; set it to 0"
            )
        if "inf" in diffusion.steps:
            raise ValueError(
                "diffusion.steps holds 'inf', but diffusion.objective 'iw' runs importance_samples x T forwards a "
                "row; name small numbers of steps, such as [1, 2, 4]"
            )


def rows_fit(config: Config) -> None:
    latent, diffusion, block = config.latent, config.diffusion, config.diffusion.block_size
    if block is not None and config.data.row_length % block:
        raise ValueError(f"diffusion.block_size ({block}) must divide data.row_length ({config.data.row_length})")
    if latent.width and (latent.scope == "block") != (block is not None):
        raise ValueError(
            f"latent.scope {latent.scope!r} contradicts diffusion.block_size {block}: "
            "scope 'block' needs a block size, scope 'row' none"
        )
    if config.data.packing == "document":
        if block is not None:
            raise ValueError(
                f"diffusion.block_size ({block}) would cut through the documents of data.packing 'document'; "
                "use packing 'pad' or 'wrap'"
            )
        if diffusion.objective == "iw":
            raise ValueError(
                "diffusion.objective 'iw' weighs whole rows: data.packing 'document' has several documents in one; "
                "use packing 'pad'"
            )
    if latent.prior == "conditional" and (latent.width == 0 or block is not None):
        raise ValueError(
            f"latent.prior 'conditional' needs a latent of scope 'row': found latent.width {latent.width}, "
            f"diffusion.block_size {block}"
        )


def training_fits(config: Config) -> None:
    training = config.training
    if training.global_batch % training.micro_batch:
        raise ValueError(
            f"training.global_batch ({training.global_batch}) must be a multiple of "
            f"training.micro_batch ({training.micro_batch})"
        )
    if training.init_from is None and (training.trainable or training.lora):
        key = "trainable" if training.trainable else "lora"
        raise ValueError(f"training.{key} freezes weights, but training.init_from names none to start from")
    if training.optimizer == "muon" and training.lora is not None:
        raise ValueError("training.optimizer 'muon' is for whole matrices: with training.lora leave it at 'adamw'")
    if training.fp8 and training.lora is not None:
        raise ValueError("training.fp8 replaces the linear layers that training.lora adapts: leave one of them out")
    if training.fp8 and training.micro_batch * config.data.row_length % 16:  # what fp8 matrix products are made of
        raise ValueError(
            f"training.fp8 needs training.micro_batch ({training.micro_batch}) x data.row_length "
            f"({config.data.row_length}) to be a multiple of 16"
        )
    if training.loss_spike == "rollback" and training.keep_checkpoints < 2:
        raise ValueError("training.loss_spike 'rollback' needs training.keep_checkpoints of at least 2, found 1")


def sections_of_deepspeed_fit(config: Config) -> None:
    for key in ("zero_optimization", "bf16", "fp16"):
        if not isinstance(config.deepspeed.get(key, {}), dict):
            raise ValueError(f"deepspeed.{key} must be an object, found {config.deepspeed[key]!r}")
    stage = config.deepspeed.get("zero_optimization", {}).get("stage", DEFAULT_STAGE)
    if type(stage) is not int or stage not in (0, 1, 2, 3):
        raise ValueError(f"deepspeed.zero_optimization.stage is {stage!r}; allowed: 0, 1, 2, 3")


RULES: tuple[Callable[[Config], None], ...] = (
    widths_fit,
    objective_fits,
    rows_fit,
    training_fits,
    sections_of_deepspeed_fit,
)
