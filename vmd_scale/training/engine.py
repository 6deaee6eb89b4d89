"""DeepSpeed's configuration from ours, and the engine."""

import copy
import difflib
import logging
from typing import Any

import torch

from vmd_scale.config import Config
from vmd_scale.data.loader import accumulation_steps
from vmd_scale.errors import UserError
from vmd_scale.model import VMD
from vmd_scale.model.layers import Block
from vmd_scale.planning.zero import BUCKET
from vmd_scale.precision import DTYPES, precision_on
from vmd_scale.training.fp8 import convert_to_fp8
from vmd_scale.training.launch import World
from vmd_scale.training.optim import build_optimizer

log = logging.getLogger(__name__)

# Top-level keys of DeepSpeed's configuration, version 0.19; it ignores any other, or fails for those of older versions.
_KEYS = """
activation_checkpointing aio autotuning bf16 bfloat16 checkpoint comet comms_logger communication_data_type compile
csv_monitor data_efficiency data_types disable_allgather dump_state flops_profiler fp16 gradient_accumulation_steps
gradient_clipping gradient_predivide_factor hybrid_engine load_universal_checkpoint memory_breakdown optimizer pipeline
prescale_gradients scheduler seq_parallel_communication_data_type steps_per_print tensor_parallel tensorboard timers
torch_autocast train_batch_size train_micro_batch_size_per_gpu use_data_before_expert_parallelism wall_clock_breakdown
wandb zero_allow_untested_optimizer zero_force_ds_cpu_optimizer zero_optimization
"""
DEEPSPEED_KEYS = frozenset(_KEYS.split())
# What a key of theirs would do behind the back of one of ours.
CONTRADICTIONS = {
    "optimizer": "training.learning_rate and its siblings",
    "scheduler": "training.lr_schedule",
    "bfloat16": "training.precision",
    "torch_autocast": "training.precision",
    "data_efficiency": "training.seed, which alone decides what a step is made of",
    "tensor_parallel": "training.global_batch, of which every rank takes a share",
}


def resolve_precision(config: Config, device: torch.device) -> str:
    return precision_on(device, config.training.precision)


def deepspeed_config(config: Config, world_size: int, precision: str) -> dict[str, Any]:
    """The user's `deepspeed` section, completed by what the run derives.

    Raises:
        UserError: a key there contradicts one of ours; both are named. Also see `accumulation_steps`.
    """
    training = config.training
    accumulation = accumulation_steps(training.global_batch, training.micro_batch, world_size)
    derived: dict[str, tuple[Any, str]] = {
        "train_batch_size": (training.global_batch, "training.global_batch"),
        "train_micro_batch_size_per_gpu": (training.micro_batch, "training.micro_batch"),
        "gradient_accumulation_steps": (accumulation, "training.global_batch"),
        "gradient_clipping": (training.gradient_clip, "training.gradient_clip"),
    }
    result = copy.deepcopy(config.deepspeed)
    for key, (value, ours) in derived.items():
        if result.setdefault(key, value) != value:
            raise UserError(f"deepspeed.{key} ({result[key]}) contradicts {ours}, which makes it {value}; leave it out")
    for key, ours in CONTRADICTIONS.items():
        if key in result:
            raise UserError(f"deepspeed.{key} contradicts {ours}; leave it out")
    for key in ("fp16", "bf16"):
        wanted = precision == key
        if bool(result.get(key, {}).get("enabled", wanted)) != wanted:
            raise UserError(f"deepspeed.{key}.enabled contradicts training.precision {training.precision!r}")
    for key in ("bf16_master_weights_and_grads", "bf16_optimizer_states"):
        if result.get("bf16", {}).get(key):
            raise UserError(
                f"deepspeed.bf16.{key} contradicts training.precision {training.precision!r}: masters, moments and "
                "their average are kept in fp32; leave it out"
            )
    stage = config.zero_stage
    if precision == "bf16" and stage == 0:
        raise UserError(
            "deepspeed.zero_optimization.stage 0 with training.precision bf16 takes a spurious optimizer step "
            "in DeepSpeed 0.19; use stage 1"
        )
    zero = result.get("zero_optimization", {})
    if training.optimizer == "muon":
        _check_muon(precision, stage, result)
    if zero.get("round_robin_gradients"):
        raise UserError(
            "deepspeed.zero_optimization.round_robin_gradients: checkpoints do not know its layout; leave it out"
        )
    for part in ("offload_optimizer", "offload_param"):
        if (zero.get(part) or {}).get("device") == "nvme":
            raise UserError(
                f"deepspeed.zero_optimization.{part}.device 'nvme' is not supported; allowed: 'cpu', 'none'"
            )
    if (zero.get("offload_optimizer") or {}).get("device", "none") != "none":
        result.setdefault("zero_force_ds_cpu_optimizer", False)  # ours, rather than one that is compiled for minutes
    # DeepSpeed's defaults for these have changed between versions.
    # Gradients are added to the fp32 ones as soon as they are there, and not kept beside them.
    bf16 = {"check_grad_overflow": True, "immediate_grad_update": True}
    result["bf16"] = {**bf16, **result.get("bf16", {}), "enabled": precision == "bf16"}
    result.setdefault("communication_data_type", "fp32")  # else gradients are rounded to bf16 before they are summed
    result["data_types"] = {"grad_accum_dtype": "fp32", **result.get("data_types", {})}
    result["zero_optimization"] = {"overlap_comm": stage == 3, **result.get("zero_optimization", {}), "stage": stage}
    if stage == 3 and training.activation_checkpointing == "selective":
        # In it DeepSpeed's own linear layer computes gradients that drift off; and it saves nothing that is not
        # computed again there anyway.
        result["zero_optimization"].setdefault("memory_efficient_linear", False)
    result.setdefault("zero_allow_untested_optimizer", True)
    result.setdefault("steps_per_print", 2**62)
    # Its throughput timer, which nothing here reads, waits for the device at both ends of every micro-batch.
    result.setdefault("timers", {"throughput": {"enabled": False}})
    return result


def _check_muon(precision: str, stage: int, settings: dict[str, Any]) -> None:
    """Muon as it is published is in two of DeepSpeed 0.19's optimizers: BF16_Optimizer, and that without ZeRO.

    The others clip after they have orthogonalized: the length of an update would depend on training.gradient_clip and
    on the number of matrices, and nothing would know the gradient's norm.

    Raises:
        UserError: another one would be used.
    """
    wanted = {"bf16": 1, "fp32": 0}[precision]
    if stage != wanted:
        raise UserError(
            f"training.optimizer 'muon' with training.precision {precision!r} needs deepspeed.zero_optimization.stage "
            f"{wanted}, found {stage}: in the others DeepSpeed 0.19 clips the orthogonalized update, not the gradient"
        )
    if (settings.get("zero_optimization", {}).get("offload_optimizer") or {}).get("device", "none") != "none":
        raise UserError("training.optimizer 'muon' contradicts deepspeed.zero_optimization.offload_optimizer")
    accumulated = settings.get("data_types", {}).get("grad_accum_dtype", "fp32")
    if accumulated != "fp32":
        raise UserError(
            f"training.optimizer 'muon' contradicts deepspeed.data_types.grad_accum_dtype {accumulated!r}; leave it out"
        )


def check_deepspeed_keys(config: Config) -> None:
    """What DeepSpeed would ignore (unknown keys of its section) or refuse with a traceback (the ZeRO part).

    Raises:
        UserError: names the key, and the nearest one that exists.
    """
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    section = config.deepspeed.get("zero_optimization", {})
    for prefix, found, known in (
        ("deepspeed", config.deepspeed, DEEPSPEED_KEYS),
        ("deepspeed.zero_optimization", section, DeepSpeedZeroConfig.model_fields),
    ):
        for key in found:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"allowed: {', '.join(sorted(known))}"
                raise UserError(f"unknown key '{prefix}.{key}'; {hint}")
    try:
        DeepSpeedZeroConfig(**section)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, ("deepspeed", "zero_optimization", *first["loc"])))
        raise UserError(f"{key}: {first['msg']}, found {first['input']!r}") from None


def compiles_on(device: torch.device) -> bool:
    """On a CPU it takes longer than it gains."""
    return device.type == "cuda"


def gather_whole_blocks(model: VMD) -> bool:
    """Stage 3: DeepSpeed's hooks around each block only, instead of around its layers too, where they break its graph.

    It costs the memory of a whole block's weights and gradients: for a compiler alone. DeepSpeed then takes a block's
    gradients when the one of the block's input is there. A block whose input needs none (after frozen embeddings)
    would lose them, and of blocks that are not ours nothing is known.

    Returns whether it is done: not if anything is frozen, or some block is of another kind.
    """
    from deepspeed.utils import set_z3_leaf_module

    blocks = [block for stack in model.stacks for block in stack]
    if not all(isinstance(block, Block) for block in blocks):
        cause = "some are not of our own class"
    elif not all(parameter.requires_grad for parameter in model.parameters()):
        cause = "some weights are frozen"
    else:
        for block in blocks:
            set_z3_leaf_module(block, True)
        return True
    log.info("ZeRO stage 3: blocks are not compiled, %s", cause)
    return False


def _partition(model: VMD, device: torch.device, precision: str, settings: dict[str, Any]) -> None:
    """Stage 3: from the host to the ranks, one parameter at a time: too large for a GPU, a model is whole on none."""
    import deepspeed

    for parameter in model.parameters():
        parameter.data = parameter.data.to(DTYPES[precision])
    for buffer in model.buffers():  # of a network of one's own; these stay whole, and in their precision
        buffer.data = buffer.data.to(device)
    deepspeed.zero.Init(
        module=model,
        config_dict_or_path=settings,
        # of an engine before this one, in the same process; Init would make it again
        zero_param_parallel_group=deepspeed.utils.groups._get_zero_param_intra_parallel_group(),
    )


def build_engine(config: Config, model: VMD, world: World, precision: str) -> Any:
    """Wrap the model into a DeepSpeed engine with our optimizer."""
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if config.zero_stage < 3:
        model.to(world.device)
    model.fused_loss = config.zero_stage < 3
    model.checkpoint_activations(config.training.activation_checkpointing)
    if config.training.fp8:
        convert_to_fp8(model)
    if config.training.compile and compiles_on(world.device):
        model.compiled_loss = True
        if config.zero_stage < 3 or gather_whole_blocks(model):
            model.compile_blocks(dynamic=False)
    if config.training.optimizer == "muon" and world.device.type == "cpu":
        torch.compiler.set_stance("force_eager")  # DeepSpeed compiles Muon's updates, for minutes without a GPU
    settings = deepspeed_config(config, world.size, precision)
    if config.zero_stage > 0:  # DeepSpeed allocates the whole of it, 1 or 2 GB by default
        parameters = sum(p.numel() for p in model.parameters())
        settings["zero_optimization"].setdefault("reduce_bucket_size", min(BUCKET, parameters))
    optimizer = build_optimizer(model, config.training, world.device)
    if config.zero_stage == 3:
        _partition(model, world.device, precision, settings)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config=settings,
        dist_init_required=False,
    )
    if precision == "bf16" and config.zero_stage == 1:
        from vmd_scale.training.lean_bf16 import make_lean

        make_lean(engine)
    return engine
