"""DeepSpeed's configuration from ours, and the engine."""

import copy
import logging
from typing import Any

import torch

from vmd_scale.config import Config
from vmd_scale.errors import UserError
from vmd_scale.model import VMD
from vmd_scale.training.launch import World
from vmd_scale.training.optim import build_optimizer


def resolve_precision(config: Config, device: torch.device) -> str:
    if config.training.precision != "auto":
        return config.training.precision
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"


def accumulation_steps(config: Config, world_size: int) -> int:
    """Micro-batches that one rank computes in a step.

    Raises:
        UserError: the global batch does not divide evenly.
    """
    per_pass = config.training.micro_batch * world_size
    if config.training.global_batch % per_pass:
        raise UserError(
            f"training.global_batch ({config.training.global_batch}) must be a multiple of training.micro_batch "
            f"({config.training.micro_batch}) x the number of ranks ({world_size}) = {per_pass}"
        )
    return config.training.global_batch // per_pass


def deepspeed_config(config: Config, world_size: int, precision: str) -> dict[str, Any]:
    """The user's `deepspeed` section, completed by what the run derives.

    Raises:
        UserError: a key there contradicts one of ours; both are named.
    """
    training = config.training
    derived: dict[str, tuple[Any, str]] = {
        "train_batch_size": (training.global_batch, "training.global_batch"),
        "train_micro_batch_size_per_gpu": (training.micro_batch, "training.micro_batch"),
        "gradient_accumulation_steps": (accumulation_steps(config, world_size), "training.global_batch"),
        "gradient_clipping": (training.gradient_clip, "training.gradient_clip"),
    }
    result = copy.deepcopy(config.deepspeed)
    for key, (value, ours) in derived.items():
        if result.setdefault(key, value) != value:
            raise UserError(f"deepspeed.{key} ({result[key]}) contradicts {ours}, which makes it {value}; leave it out")
    for key, ours in (("optimizer", "training.learning_rate and its siblings"), ("scheduler", "training.lr_schedule")):
        if key in result:
            raise UserError(f"deepspeed.{key} contradicts {ours}; leave it out")
    for key in ("fp16", "bf16"):
        wanted = precision == key
        if bool(result.get(key, {}).get("enabled", wanted)) != wanted:
            raise UserError(f"deepspeed.{key}.enabled contradicts training.precision {training.precision!r}")
    stage = config.zero_stage
    if precision == "bf16" and stage == 0:
        raise UserError(
            "deepspeed.zero_optimization.stage 0 with training.precision bf16 takes a spurious optimizer step "
            "in DeepSpeed 0.19; use stage 1"
        )
    # DeepSpeed's defaults for these have changed between versions.
    result.setdefault("bf16", {"enabled": precision == "bf16"})
    result.setdefault("data_types", {"grad_accum_dtype": "fp32"})
    result.setdefault("zero_allow_untested_optimizer", True)
    result.setdefault("steps_per_print", 2**62)
    return result


def check_zero_section(config: Config) -> None:
    """What DeepSpeed itself would refuse in `deepspeed.zero_optimization`, as a `UserError` that names the key."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    try:
        DeepSpeedZeroConfig(**config.deepspeed.get("zero_optimization", {}))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, ("deepspeed", "zero_optimization", *first["loc"])))
        raise UserError(f"{key}: {first['msg']}, found {first['input']!r}") from None


def build_engine(config: Config, model: VMD, world: World, precision: str) -> Any:
    """Wrap the model into a DeepSpeed engine with our optimizer."""
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    model.to(world.device)
    if config.training.activation_checkpointing == "full":
        model.denoiser.checkpoint_blocks = True
    if config.training.compile and world.device.type == "cuda":
        for block in model.denoiser.blocks:
            block.compile(dynamic=False)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=build_optimizer(model, config.training, world.device),
        config=deepspeed_config(config, world.size, precision),
        dist_init_required=False,
    )
    return engine
