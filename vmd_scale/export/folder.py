"""A Hugging Face folder: config.json, safetensors, tokenizer files, model card, and the code that loads them."""

import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict

from vmd_scale import __version__
from vmd_scale.checkpoints import TrainedModel
from vmd_scale.errors import UserError
from vmd_scale.evaluation.perplexity import Result
from vmd_scale.export.card import model_card
from vmd_scale.export.standalone import FILE_NAME, TRANSFORMERS_FILE_NAME, modelling_source, transformers_source
from vmd_scale.files import check_writable

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def check_request(folder: Path, max_shard_size: str) -> None:
    """What can be known to be wrong before a model is loaded.

    Raises:
        UserError: `folder` exists and is not an earlier export, or cannot be made; a size that is none.
    """
    check_writable(folder / "config.json", "--output")
    if folder.exists() and any(folder.iterdir()) and not (folder / FILE_NAME).exists():
        raise UserError(f"--output {folder}: exists and is not an exported model; choose another folder")
    number = re.fullmatch(r"([0-9.]+) ?[KMGT]B", max_shard_size.strip(), re.IGNORECASE)
    try:
        positive = number is not None and float(number[1]) > 0
    except ValueError:
        positive = False
    if not positive:
        raise UserError(f"--max-shard-size {max_shard_size!r}: expected a size such as 500MB or 5GB (KB, MB, GB, TB)")


def export(
    trained: TrainedModel,
    folder: Path,
    results: Sequence[Result] = (),
    encoder: bool = False,
    dtype: str = "fp32",
    max_shard_size: str = "5GB",
) -> Path:
    """Write the model into `folder`, whole or not at all.

    Args:
        results: evaluation results of these weights, for the model card.
        encoder: q(z | x0, m) as well: bounds and further training need it, sampling does not.
        dtype: fp32 | bf16 | fp16, of the weights in the files.
        max_shard_size: a larger model is cut into several files.

    Raises:
        UserError: see `check_request`.
    """
    check_request(folder, max_shard_size)
    staging = folder.with_name(f".{folder.name}.staging")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    has_encoder = encoder and trained.model.encoder is not None
    config = _config(trained, has_encoder, dtype)
    (staging / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (staging / FILE_NAME).write_text(modelling_source(), encoding="utf-8")
    (staging / TRANSFORMERS_FILE_NAME).write_text(transformers_source(), encoding="utf-8")
    (staging / "README.md").write_text(model_card(trained, results, has_encoder), encoding="utf-8")
    tokenizer = trained.tokenizer.files()
    if "tokenizer.json" in tokenizer:  # else AutoTokenizer would look for its class in config.json
        tokenizer.setdefault("tokenizer_config.json", b'{"tokenizer_class": "PreTrainedTokenizerFast"}\n')
    for name, content in tokenizer.items():
        (staging / name).write_bytes(content)
    tensors = {
        name: tensor.to("cpu", DTYPES[dtype]).contiguous()
        for name, tensor in trained.model.state_dict().items()
        if has_encoder or not name.startswith("encoder.")
    }
    save_torch_state_dict(tensors, staging, max_shard_size=max_shard_size)
    for file in staging.glob("*.safetensors"):  # which are written for their owner only
        file.chmod((staging / "config.json").stat().st_mode)
    if folder.exists():
        old = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        os.rename(folder, old)
        os.rename(staging, folder)
        shutil.rmtree(old)
    else:
        os.rename(staging, folder)
    return folder


def _config(trained: TrainedModel, has_encoder: bool, dtype: str) -> dict[str, object]:
    architecture = trained.model.architecture
    run = trained.config.publishable()
    run["training"] |= {"trainable": [], "lora": None}  # these are whole weights, with adapters merged
    module = TRANSFORMERS_FILE_NAME.removesuffix(".py")
    automatic = {"AutoConfig": "VMDConfig", "AutoModel": "VMDModel", "AutoModelForMaskedLM": "VMDModel"}
    return {
        "model_type": "vmd",
        "architectures": ["VMDModel"],
        "auto_map": {auto: f"{module}.{name}" for auto, name in automatic.items()},
        "architecture": architecture.to_dict(),
        "has_encoder": has_encoder,
        "vocab_size": architecture.vocab_size + 1,  # of the embedding, which knows the mask; no logit is the mask's
        "mask_token_id": architecture.mask_id,
        "hidden_size": architecture.width,
        "num_hidden_layers": architecture.layers,
        "num_attention_heads": architecture.heads,
        "max_position_embeddings": architecture.row_length,
        "dtype": str(DTYPES[dtype]).removeprefix("torch."),
        "torch_dtype": str(DTYPES[dtype]).removeprefix("torch."),  # its name before transformers 5
        "vmd_scale": {
            "version": __version__,
            "step": trained.step,
            "weights": trained.weights,
            "tokenizer_fingerprint": trained.tokenizer.fingerprint,
            "config": run,
        },
    }
