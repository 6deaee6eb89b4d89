"""`training.init_from`: the weights that a new run starts from, wherever they come from.

exported folder     what launchers/export.py wrote
run or checkpoint   its averaged weights, or the raw ones where there is no average; adapters are merged
a file              .safetensors, or .pt, .pth, .bin, .ckpt without code in it: our names, or MDLM's (mdlm_weights.py)

What the new model has and the old one has not must be a whole latent part, time conditioning or an adapter: it starts
fresh, and a model that gets it computes at first what it did before. A model that listens to z already comes with the
encoder that z means something to. What only the old one has must be a whole such part. The row may become shorter.
"""

import json
import logging
import pickle
from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vmd_scale.adapters import LATENT_PARTS, merged
from vmd_scale.checkpoints import MANIFEST, RUN_STATE, find_checkpoint, load_weights
from vmd_scale.config_file import parse_config
from vmd_scale.errors import UserError
from vmd_scale.mdlm_weights import from_mdlm, is_mdlm
from vmd_scale.model import VMD

OPTIONAL = (*LATENT_PARTS, "denoiser.time_to_condition.*")
ADAPTERS = ("*.lora_a", "*.lora_b")
INJECTION = ("denoiser.latent_to_condition.*", "denoiser.latent_to_embedding.*")
MODULATION = "denoiser.blocks.*.modulation.*"  # of which time conditioning, and MDLM's constant, have a part too
POSITION = "position.weight"
INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
WITHOUT_ENCODER = (
    "the model is conditioned on z but comes without its encoder, and a new one would make z meaningless; "
    "export it again with --encoder, or go on without a latent (latent.width=0)"
)
log = logging.getLogger(__name__)


def initialize_from(model: VMD, source: str, fingerprint: str | None = None) -> dict[str, Tensor]:
    """Fill `model` with the weights of `source`, in place.

    Args:
        fingerprint: of the tokenizer; compared where the source knows its own.

    Returns:
        What it was filled with: fp32 by parameter name, whatever becomes of the model.

    Raises:
        UserError: nothing there, another tokenizer, or weights that do not fit.
    """
    weights, its_fingerprint = read_weights(source, model)
    if fingerprint and its_fingerprint and its_fingerprint != fingerprint:
        raise UserError(
            f"training.init_from {source}: trained with a tokenizer of fingerprint {its_fingerprint[:12]}, but "
            f"data.tokenizer has {fingerprint[:12]}"
        )
    own = model.state_dict()
    fresh = [name for name in own if name not in weights]
    halves = [part for part in OPTIONAL if part != MODULATION and _has(weights, part)]
    whole = [name for name in fresh if not _is_of(name, ADAPTERS)]
    needed = [name for name in whole if not _is_of(name, OPTIONAL) or _is_of(name, halves)]
    if model.encoder is not None and not _has(weights, "encoder.*") and any(_has(weights, part) for part in INJECTION):
        raise UserError(f"training.init_from {source}: {WITHOUT_ENCODER}")
    if needed:
        raise UserError(
            f"training.init_from {source}: has no {', '.join(needed[:4])}{' ...' if len(needed) > 4 else ''}; "
            "do the sections model and latent match the old configuration?"
        )
    left = [name for name in weights if name not in own]
    unused = [name for name in left if not _is_of(name, [part for part in OPTIONAL if not _has(own, part)])]
    if unused:
        raise UserError(
            f"training.init_from {source}: this model has no place for {unused[0]} ({len(unused)} such tensors); "
            "do the sections model and latent match the old configuration?"
        )
    filled = {}
    for name, value in weights.items():
        if name in left:
            continue
        wanted = own[name].shape
        if name.endswith(POSITION) and value.shape[0] > wanted[0] and value.shape[1:] == wanted[1:]:
            value = value[: wanted[0]]
        if value.shape != wanted:
            raise UserError(
                f"training.init_from {source}: {name} is {list(value.shape)}, this model's is {list(wanted)}"
                + ("; a row may become shorter, not longer (data.row_length)" if name.endswith(POSITION) else "")
            )
        filled[name] = value
    model.load_state_dict(filled, strict=False)
    _silence(model, fresh)
    log.info(
        "weights from %s: %d tensors%s%s",
        source,
        len(filled),
        f"; fresh: {_shown(fresh)}" if fresh else "",
        f"; left out: {_shown(left)}" if left else "",
    )
    return filled


def _silence(model: VMD, fresh: Collection[str]) -> None:
    """Make parts that start fresh say nothing at first. Fresh modulations are zero already, trained ones are not."""
    layers = ["latent_to_embedding"]
    if "denoiser.blocks.0.modulation.weight" not in fresh:
        layers += ["latent_to_condition.2", "time_to_condition.2"]
    for name, parameter in model.named_parameters():
        if name in fresh and name.rpartition(".")[0].removeprefix("denoiser.") in layers:
            nn.init.zeros_(parameter)


def read_weights(source: str, model: VMD) -> tuple[dict[str, Tensor], str | None]:
    """fp32 weights by our names, and the fingerprint of their tokenizer where it is known.

    Raises:
        UserError: nothing there, or not readable.
    """
    path = Path(source)
    if not path.exists():
        raise UserError(f"training.init_from: no such file or folder: {source}")
    if (path / "checkpoints").is_dir() or (path / MANIFEST).is_file():
        return _of_checkpoint(find_checkpoint(path, "training.init_from"))
    fingerprint = None
    if path.is_dir():
        fingerprint = _fingerprint(path / "config.json")
        weights = _of_folder(path)
    else:
        weights = _of_file(path)
    if is_mdlm(weights):
        return from_mdlm(weights, model.architecture, source), None
    return {name: value.float() for name, value in weights.items()}, fingerprint


def _of_checkpoint(checkpoint: Path) -> tuple[dict[str, Tensor], str]:
    state = _json(checkpoint / RUN_STATE)
    config = parse_config(state["config"], origin=str(checkpoint / RUN_STATE))
    kind = "ema" if config.training.ema_decay else "raw"
    return merged(load_weights(checkpoint, kind), config.training.lora), state["tokenizer_fingerprint"]


def _fingerprint(path: Path) -> str | None:
    """Of an exported folder's config.json; other people's know none."""
    config = _json(path) if path.is_file() else None
    ours = config.get("vmd_scale") if isinstance(config, dict) else None
    found = ours.get("tokenizer_fingerprint") if isinstance(ours, dict) else None
    return found if isinstance(found, str) else None


def _of_folder(folder: Path) -> dict[str, Tensor]:
    """All that a folder's index names; without one model.safetensors, or else all files of weights."""
    index = next((folder / name for name in INDICES if (folder / name).is_file()), None)
    if index is not None:
        placed = _weight_map(index)
        weights = {
            name: value for file in sorted(set(placed.values())) for name, value in _of_file(folder / file).items()
        }
        lost = [name for name in placed if name not in weights]
        if lost:
            raise UserError(f"training.init_from {index}: names {lost[0]}, which is not in {placed[lost[0]]}")
        return weights
    kinds = ("model.safetensors", "*.safetensors", "pytorch_model*.bin")
    files = next((found for kind in kinds if (found := sorted(folder.glob(kind)))), [])
    if not files:
        raise UserError(f"training.init_from {folder}: no checkpoint, no *.safetensors and no pytorch_model*.bin in it")
    return {name: value for file in files for name, value in _of_file(file).items()}


def _weight_map(index: Path) -> dict[str, str]:
    """In which file each tensor is."""
    found = _json(index)
    placed = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(placed, dict) or not all(isinstance(file, str) for file in placed.values()):
        raise UserError(f"training.init_from {index}: expected a weight_map, names of tensors and of files")
    return placed


def _of_file(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, SafetensorError, pickle.UnpicklingError, EOFError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"training.init_from {path}: not readable as weights alone ({reason}); save its state dict as .safetensors"
        ) from None
    if isinstance(found, dict) and "state_dict" in found:
        if "ema" in found:
            log.warning("%s holds an average too, which is not read: these are the weights without it", path)
        found = found["state_dict"]
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise UserError(f"training.init_from {path}: expected a state dict, names and tensors")
    return found


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"training.init_from: {path}: not a readable JSON file: {error}") from None


def _is_of(name: str, parts: Iterable[str]) -> bool:
    return any(fnmatchcase(name, part) for part in parts)


def _has(weights: Iterable[str], part: str) -> bool:
    return any(fnmatchcase(name, part) for name in weights)


def _shown(names: list[str]) -> str:
    """Parts, not every tensor."""
    return ", ".join(sorted({".".join(name.split(".")[:2]) for name in names}))
