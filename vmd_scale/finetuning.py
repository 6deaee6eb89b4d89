"""The configuration of a fine-tuning run: the network of the weights that it starts from, and data of its own."""

from pathlib import Path
from typing import Any

from vmd_scale.checkpoints import RUN_STATE, find_checkpoint, is_of_run, run_folder_of
from vmd_scale.config import Config
from vmd_scale.config_file import parse_config
from vmd_scale.errors import UserError
from vmd_scale.files import read_json
from vmd_scale.initial_weights import WITHOUT_ENCODER
from vmd_scale.planning.workload import fitting_micro_batch
from vmd_scale.tokenization import kept_tokenizer, load_tokenizer

LABELS = "labels"
WITH_PROMPTS = ("prompts", LABELS)
TEXT8 = ("text8", "text8_mdlm")  # tokenizers of nothing but the letters that text8, which comes so, has
KEPT_DATA = ("row_length", "documents_per_row", "cache", "cache_gib", "workers")
KEPT_TRAINING = ("seed", "precision", "activation_checkpointing", "compile", "hang_timeout")
DERIVED = (  # keys of the deepspeed section that follow from the batch, which is another one
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
)
LABEL_KL_WEIGHT = 20.0  # as good as infinite
MICRO_BATCH = 8  # at most, where the weights were not trained with less
TRAINING = {
    "steps": 500,
    "global_batch": 32,
    "lr_schedule": "cosine",
    "warmup_steps": 20,
    "ema_decay": 0.99,
    "checkpoint_every": 250,
    "keep_checkpoints": 1,
}
FULL_LEARNING_RATE, PARTIAL_LEARNING_RATE = 2e-4, 1e-3


def finetuning_config(
    weights: str,
    corpus: str,
    source: str | dict[str, str] | None,
    output: Path,
    trainable: tuple[str, ...] = (),
    lora_rank: int | None = None,
    base: Config | None = None,
    overrides: tuple[str, ...] = (),
    ranks: int = 1,
) -> Config:
    """What `start` needs to fine-tune.

    Args:
        weights: becomes training.init_from.
        corpus, source: become data.corpus and data.source; shards go into `output`.
        trainable: becomes training.trainable.
        lora_rank: becomes training.lora.rank.
        base: the network of weights that do not tell their own, MDLM's for example.
        overrides: ``a.b=value``, applied last.
        ranks: the micro-batch is made to fit their number.

    Raises:
        UserError: weights without a configuration and no `base`; whatever is wrong with the overrides; a latent whose
            encoder was not exported; labels for a network that draws block by block.
    """
    values, tokenizer = (base.model_dump(mode="json"), base.data.tokenizer) if base else _of_weights(weights)
    has_lost_encoder = base is None and values["latent"]["width"] > 0 and _without_encoder(weights)
    weight = values["diffusion"]["kl_weight"]["end"]
    if corpus == LABELS:
        # A label is drawn, and scored, in one step, and z by the prior: had it told the label in training, nothing
        # would have been learned from the text.
        values["diffusion"] |= {"objective": "nelbo", "steps": [1], "free_bits": 0.0}
        weight = LABEL_KL_WEIGHT
    values["diffusion"]["kl_weight"] = {"start": weight, "end": weight, "warmup_steps": 0}
    old = values["data"]
    of_text8 = old["tokenizer"] in TEXT8 and corpus in (*WITH_PROMPTS, "text")
    values["data"] = {
        "corpus": corpus,
        "source": source,
        "tokenizer": tokenizer,
        **{key: old[key] for key in KEPT_DATA},
        "packing": "pad" if corpus in WITH_PROMPTS else old["packing"],
        "row_specials": False if corpus in WITH_PROMPTS else old["row_specials"],
        "normalizer": old["normalizer"] or ("text8" if of_text8 else None),
        "shards": str(output / "shards"),
    }
    partial = bool(trainable) or lora_rank is not None
    old_training = values["training"]
    values["training"] = {
        **TRAINING,
        **{key: old_training[key] for key in KEPT_TRAINING},
        "micro_batch": 1,
        "learning_rate": PARTIAL_LEARNING_RATE if partial else FULL_LEARNING_RATE,
        "init_from": weights,
        "trainable": list(trainable),
        "lora": None if lora_rank is None else {"rank": lora_rank},
    }
    values["model"]["attention"] = "auto"
    samples = values["evaluation"]["samples"]
    values["evaluation"] = {"every": 250, "steps": [1, "inf"], "rows": 512, "samples": samples}
    values["telemetry"]["log_every"] = 10
    values["deepspeed"] = {key: value for key, value in values["deepspeed"].items() if key not in DERIVED}
    origin = f"fine-tuning {weights}"
    global_batch = parse_config(values, origin, overrides).training.global_batch
    most = min(old_training["micro_batch"], MICRO_BATCH)
    values["training"]["micro_batch"] = fitting_micro_batch(most, global_batch, ranks) or 1
    config = parse_config(values, origin, overrides)
    if has_lost_encoder and config.latent.width:
        raise UserError(f"--from {weights}: {WITHOUT_ENCODER}")
    if corpus == LABELS and config.groups > 1:
        raise UserError(
            f"--corpus labels: needs diffusion.block_size=null, found {config.diffusion.block_size}; labels are scored "
            "under the sampler that draws the whole row in one step"
        )
    return config


def _of_weights(weights: str) -> tuple[dict[str, Any], str]:
    """The configuration that weights come with, and where their tokenizer is: with them too, as a rule."""
    path = Path(weights)
    if is_of_run(path):
        checkpoint = find_checkpoint(path, "--from")
        values = _parsed(read_json(checkpoint / RUN_STATE, dict[str, Any])["config"], weights)
        return values, kept_tokenizer(values["data"]["tokenizer"], run_folder_of(checkpoint))
    if (path / "config.json").is_file():
        exported = read_json(path / "config.json", dict[str, Any]).get("vmd_scale")
        if isinstance(exported, dict) and "config" in exported:
            load_tokenizer(weights)  # or an error that says what is missing
            return _parsed(exported["config"], weights), weights
    if not path.exists():
        raise UserError(f"--from {weights}: no such file or folder")
    raise UserError(f"--from {weights}: contains no description of its network; give one with --config FILE")


def _without_encoder(weights: str) -> bool:
    """Whether this is an exported folder that says so."""
    path = Path(weights) / "config.json"
    return path.is_file() and read_json(path, dict[str, Any]).get("has_encoder") is False


def _parsed(values: dict[str, Any], weights: str) -> dict[str, Any]:
    return parse_config(values, origin=weights).model_dump(mode="json")
