"""A Hugging Face folder: config.json, safetensors, tokenizer files, model card, and the code that loads them.

Only files of the names below are ever written or replaced. Whatever else is in the folder is its owner's: the .git of a
repository of the hub, notes, results.
"""

import json
import os
import re
import shutil
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict

from vmd_scale import __version__, precision
from vmd_scale.checkpoints import TrainedModel
from vmd_scale.errors import UserError
from vmd_scale.evaluation.classification import Accuracy
from vmd_scale.evaluation.perplexity import Result
from vmd_scale.export.card import model_card
from vmd_scale.export.standalone import FILE_NAME, TRANSFORMERS_FILE_NAME, modelling_source, transformers_source
from vmd_scale.files import check_writable, flush_to_disk
from vmd_scale.tokenization import TOKENIZER_FILES

DTYPES = {**precision.DTYPES, "fp16": torch.float16}
CONFIG = "config.json"
OWN = (  # patterns of the names of all that an export may hold
    CONFIG,
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    FILE_NAME,
    TRANSFORMERS_FILE_NAME,
    "README.md",
    *TOKENIZER_FILES,
)
WORK = ".export"  # inside the folder, which may be a mounted volume: `new` is not yet the export, `old` no longer


def check_request(folder: Path, max_shard_size: str) -> None:
    """What can be known to be wrong before a model is loaded.

    Raises:
        UserError: `folder` exists and is not an earlier export, or cannot be made; a size that is none.
    """
    check_writable(folder / CONFIG, "--output")
    known = any((folder / name).exists() for name in (FILE_NAME, WORK))
    if folder.exists() and any(folder.iterdir()) and not known:
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
    accuracies: Sequence[Accuracy] = (),
) -> Path:
    """Write the model into `folder`, which loads whole or not at all; files that are not an export's stay.

    Args:
        results, accuracies: what was measured of these weights, for the model card.
        encoder: q(z | x0, m) as well: bounds and further training need it, sampling does not.
        dtype: fp32 | bf16 | fp16, of the weights in the files.
        max_shard_size: a larger model is cut into several files.

    Raises:
        UserError: see `check_request`.
    """
    check_request(folder, max_shard_size)
    new = folder / WORK / "new"
    shutil.rmtree(new, ignore_errors=True)  # of an export that was interrupted
    new.mkdir(parents=True)
    has_encoder = encoder and trained.model.encoder is not None
    config = _config(trained, has_encoder, dtype)
    (new / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (new / FILE_NAME).write_text(modelling_source(), encoding="utf-8")
    (new / TRANSFORMERS_FILE_NAME).write_text(transformers_source(), encoding="utf-8")
    (new / "README.md").write_text(model_card(trained, results, has_encoder, accuracies), encoding="utf-8")
    for name, content in trained.tokenizer.files().items():
        (new / name).write_bytes(content)
    tensors = {
        name: tensor.to("cpu", DTYPES[dtype]).contiguous()
        for name, tensor in trained.model.state_dict().items()
        if has_encoder or not name.startswith("encoder.")
    }
    save_torch_state_dict(tensors, new, max_shard_size=max_shard_size)
    for file in new.glob("*.safetensors"):  # which are written for their owner only
        file.chmod((new / CONFIG).stat().st_mode)
    _replace(folder, new)
    return folder


def exported_files(folder: Path, own: Sequence[str] = OWN) -> list[Path]:
    """Those of the names that an export has, config.json first."""
    files = (file for file in folder.iterdir() if any(fnmatchcase(file.name, pattern) for pattern in own))
    return sorted(files, key=lambda file: (file.name != CONFIG, file.name))


def _replace(folder: Path, new: Path) -> None:
    """Put the files of `new` in the place of those of an earlier export, of which a loader would read what stayed.

    No rename is one of many files. So config.json, without which nothing loads, goes first and comes last: killed
    between, the folder loads nowhere, rather than as a mixture of two models, and one of `new` and `old` is whole.
    """
    unknown = [file.name for file in new.iterdir() if file not in exported_files(new)]
    assert not unknown, f"{unknown} would survive the next export: add their names to OWN"
    for file in new.iterdir():
        flush_to_disk(file)
    old = new.with_name("old")
    shutil.rmtree(old, ignore_errors=True)
    old.mkdir()
    for file in exported_files(folder):
        os.replace(file, old / file.name)
    for file in reversed(exported_files(new)):
        os.replace(file, folder / file.name)
    flush_to_disk(folder)
    shutil.rmtree(new.parent)


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
