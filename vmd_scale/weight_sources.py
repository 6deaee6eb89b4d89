"""Reading weights from wherever they are: names, shapes and values; on the meta device names and shapes alone.

exported folder     what launchers/export.py wrote
run or checkpoint   its averaged weights, or the raw ones where there is no average; adapters are merged
a file              .safetensors, or .pt, .pth, .bin, .ckpt without code in it: our names, or MDLM's (mdlm_weights.py)
"""

import logging
import pickle
import re
import struct
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from vmd_scale.adapters import merged
from vmd_scale.checkpoints import RUN_STATE, find_checkpoint, is_of_run, load_weights
from vmd_scale.config_file import parse_config
from vmd_scale.errors import UserError
from vmd_scale.files import read_json
from vmd_scale.mdlm_weights import from_mdlm, is_mdlm
from vmd_scale.model import Architecture

INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
# what safetensors and the unpickler raise, the latter of arbitrary bytes
UNREADABLE = (
    *(OSError, RuntimeError, SafetensorError, pickle.UnpicklingError, EOFError),
    *(ValueError, LookupError, AttributeError, TypeError, AssertionError, struct.error),
)
log = logging.getLogger(__name__)


def read_weights(source: str, architecture: Architecture, device: torch.device) -> tuple[dict[str, Tensor], str | None]:
    """fp32 weights by our names, and the fingerprint of their tokenizer where it is known.

    Args:
        architecture: of the model that takes them.
        device: cpu, or meta: then no value is read, and damage inside of a file is not found.

    Raises:
        UserError: nothing there, or not readable.
    """
    path = Path(source)
    if not path.exists():
        raise UserError(f"training.init_from: no such file or folder: {source}")
    if is_of_run(path):
        return _of_checkpoint(find_checkpoint(path, "training.init_from"), device)
    fingerprint = None
    if path.is_dir():
        fingerprint = _fingerprint(path / "config.json")
        weights = _of_folder(path, device)
    else:
        weights = _of_file(path, device)
    if is_mdlm(weights):
        with device:
            return from_mdlm(weights, architecture, source), None
    return {name: value.float() for name, value in weights.items()}, fingerprint


def settled(source: str) -> str:
    """Which checkpoint that is now, where `source` is a run: it may continue, and ranks must not each find another one.

    Raises:
        UserError: the run has none.
    """
    path = Path(source)
    return str(find_checkpoint(path, "training.init_from")) if is_of_run(path) else source


def _of_checkpoint(checkpoint: Path, device: torch.device) -> tuple[dict[str, Tensor], str]:
    state = read_json(checkpoint / RUN_STATE, dict[str, Any])
    config = parse_config(state["config"], origin=str(checkpoint / RUN_STATE))
    kind = "ema" if config.training.ema_decay else "raw"
    weights = load_weights(checkpoint, kind, shapes_only=device.type == "meta")
    return merged(weights, config.training.lora), state["tokenizer_fingerprint"]


def _fingerprint(path: Path) -> str | None:
    """The tokenizer's, from an exported folder's config.json; other people's have none."""
    config = read_json(path, object) if path.is_file() else None
    ours = config.get("vmd_scale") if isinstance(config, dict) else None
    found = ours.get("tokenizer_fingerprint") if isinstance(ours, dict) else None
    return found if isinstance(found, str) else None


def _of_folder(folder: Path, device: torch.device) -> dict[str, Tensor]:
    """All that a folder's index names; without one model.safetensors, or else all files of weights."""
    index = next((folder / name for name in INDICES if (folder / name).is_file()), None)
    if index is not None:
        placed = _weight_map(index)
        files = [folder / file for file in sorted(set(placed.values()))]
        weights = {name: value for file in files for name, value in _of_file(file, device).items()}
        lost = [name for name in placed if name not in weights]
        if lost:
            raise UserError(f"training.init_from {index}: names {lost[0]}, which is not in {placed[lost[0]]}")
        return weights
    kinds = ("model.safetensors", "*.safetensors", "pytorch_model*.bin")
    files = next((found for kind in kinds if (found := sorted(folder.glob(kind)))), [])
    if not files:
        raise UserError(f"training.init_from {folder}: no checkpoint, no *.safetensors and no pytorch_model*.bin in it")
    return {name: value for file in files for name, value in _of_file(file, device).items()}


def _weight_map(index: Path) -> dict[str, str]:
    """In which file each tensor is."""
    placed = read_json(index, dict[str, Any]).get("weight_map")
    if not isinstance(placed, dict) or not all(isinstance(file, str) for file in placed.values()):
        raise UserError(f"training.init_from {index}: expected a weight_map, names of tensors and of files")
    return placed


def _of_file(path: Path, device: torch.device) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path) if device.type != "meta" else _shapes_of(path)
        with warnings.catch_warnings(action="ignore"):  # of pickles that are refused in the next moment
            found: Any = torch.load(path, map_location=device, weights_only=True)
    except UNREADABLE as error:
        raise UserError(
            f"training.init_from {path}: not readable as weights alone ({_reason(error)}); save its state dict as "
            ".safetensors"
        ) from None
    if isinstance(found, dict) and "state_dict" in found:
        if "ema" in found and device.type != "meta":
            log.warning("%s holds an average too, which is not read: these are the weights without it", path)
        found = found["state_dict"]
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise UserError(f"training.init_from {path}: expected a state dict, names and tensors")
    return found


def _shapes_of(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        names = file.keys()
        return {name: torch.empty(file.get_slice(name).get_shape(), device="meta") for name in names}


def _reason(error: Exception) -> str:
    """In our own words: PyTorch's message advises to load with code execution enabled."""
    if isinstance(error, OSError):
        return error.strerror or "it cannot be opened"
    if isinstance(error, SafetensorError):
        return f"damaged: {error}"
    code = re.search(r"GLOBAL ([\w.]+)", str(error))
    if code is not None:
        return f"it holds {code[1]}, which is no tensor"
    return "damaged, or not written by torch.save"
