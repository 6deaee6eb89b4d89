"""The format of a run's checkpoints, and reading weights from them without DeepSpeed.

checkpoints/latest                        name of the newest whole checkpoint
checkpoints/best                          name of the one with the lowest bound on validation
checkpoints/step-00000100/
    weights-00000-of-00002.safetensors    each rank's fragments of the fp32 masters and their EMA: all that evaluation
                                          and export read
    optimizer-00000-of-00002.safetensors  the same fragments of the optimizer's state: what a resume reads as well
    run_state.json                        step, tokens, configuration, fingerprint of tokenizer and data, world size
    manifest.json                         size and sha256 of every file above; written last

Nothing here depends on the world size, the ZeRO stage or the precision, and nothing is a pickle.
"""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from vmd_scale.adapters import merged
from vmd_scale.build import build_architecture
from vmd_scale.config import Config
from vmd_scale.config_file import parse_config
from vmd_scale.errors import UserError
from vmd_scale.files import read_json, sha256_of
from vmd_scale.model import VMD
from vmd_scale.precision import DTYPES, precision_on
from vmd_scale.tokenization import Tokenizer, kept_tokenizer, load_tokenizer

LATEST, BEST, MANIFEST, RUN_STATE = "latest", "best", "manifest.json", "run_state.json"


def all_checkpoints(folder: Path) -> list[Path]:
    """Everything that has a checkpoint's name, whole or damaged, oldest first. A staging folder has not.

    Raises:
        OSError: the folder is there and cannot be read, which must not look like no checkpoints.
    """
    if not folder.exists():
        return []
    return sorted(path for path in folder.iterdir() if re.fullmatch(r"step-\d+", path.name) and path.is_dir())


def whole_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints that have their manifest, oldest first: all but those that lost it to damage."""
    return [path for path in all_checkpoints(folder) if (path / MANIFEST).exists()]


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def run_folder_of(checkpoint: Path) -> Path:
    return checkpoint.absolute().parents[1]


def checkpoint_id(checkpoint: Path) -> str:
    """16 hexadecimal digits that tell a checkpoint from any other, wherever it is: it has the hashes of its files."""
    return sha256_of(checkpoint / MANIFEST)[:16]


def damage(path: Path, wanted: dict[str, Any]) -> str | None:
    """How a file differs from what its manifest says, or None."""
    return missing_or_torn(path, wanted) or altered(path, wanted)


def missing_or_torn(path: Path, wanted: dict[str, Any]) -> str | None:
    """What is wrong with a file that its size can tell, or None. Does not read it."""
    if not path.exists():
        return f"{path.name} is missing"
    size = path.stat().st_size
    return f"{path.name} has {size} bytes instead of {wanted['bytes']}" if size != wanted["bytes"] else None


def altered(path: Path, wanted: dict[str, Any]) -> str | None:
    """Whether a file's content is another than its manifest says, in words, or None."""
    return f"{path.name} was altered: its sha256 differs" if sha256_of(path) != wanted["sha256"] else None


def load_weights(checkpoint: Path, kind: str, shapes_only: bool = False) -> dict[str, torch.Tensor]:
    """Whole fp32 weights of a checkpoint by parameter name, put together from all ranks' fragments.

    Args:
        kind: ema | raw.
        shapes_only: on the meta device; values and checksums are not read.

    Raises:
        UserError: a file is missing or damaged, or there is no EMA.
    """
    prefix = {"ema": "ema", "raw": "master"}[kind]
    wanted = read_json(checkpoint / MANIFEST, dict[str, Any])["files"]
    names = [name for name in sorted(wanted) if name.startswith("weights-")]
    weights: dict[str, torch.Tensor] = {}
    missing: dict[str, int] = {}
    found: set[str] = set()
    for name in names:
        problem = (missing_or_torn if shapes_only else damage)(checkpoint / name, wanted[name])
        if problem is not None:
            raise UserError(f"{checkpoint}: {problem}")
        with safe_open(checkpoint / name, framework="pt") as file:
            shapes = json.loads((file.metadata() or {}).get("shapes", "{}"))
            for key in file.keys():  # noqa: SIM118 - not a mapping
                its_kind, parameter, start = key.split("/")
                if its_kind not in (prefix, "frozen"):
                    continue
                found.add(its_kind)
                if parameter not in weights:
                    weights[parameter] = torch.empty(shapes[parameter], device="meta" if shapes_only else "cpu")
                    missing[parameter] = weights[parameter].numel()
                (count,) = file.get_slice(key).get_shape()
                if not shapes_only:
                    weights[parameter].view(-1)[int(start) : int(start) + count] = file.get_tensor(key)
                missing[parameter] -= count
    if prefix not in found:
        raise UserError(f"{checkpoint} holds no {kind} weights" + (" (training.ema_decay 0)" if kind == "ema" else ""))
    incomplete = [parameter for parameter, count in missing.items() if count]
    if incomplete:
        raise UserError(f"{checkpoint}: weights are incomplete: {', '.join(incomplete)}")
    return weights


@dataclass(frozen=True)
class TrainedModel:
    """A model out of a run, ready to be evaluated, sampled or exported."""

    model: VMD
    config: Config
    tokenizer: Tokenizer
    step: int
    weights: str  # ema | raw
    checkpoint: Path
    precision: str = "fp32"  # that it computes in: fp32 | bf16


def is_of_run(path: Path) -> bool:
    """Whether `find_checkpoint` is to look there, rather than a reader of other weights."""
    named = path.name in (LATEST, BEST) and path.is_file()
    return named or (path / "checkpoints").is_dir() or (path / MANIFEST).is_file()


def find_checkpoint(path: str | Path, key: str = "--checkpoint") -> Path:
    """The newest whole checkpoint of a run folder; a checkpoint's own folder stands for itself, as do best and latest.

    Args:
        key: where the user named it.

    Raises:
        UserError: there is none.
    """
    path = Path(path)
    if path.name in (LATEST, BEST) and path.is_file():
        path = path.parent / path.read_text().strip()
    if (path / MANIFEST).exists() and (path / RUN_STATE).exists():
        return path
    found = whole_checkpoints(path / "checkpoints")
    if not found:
        raise UserError(f"{key} {path}: no checkpoint there; expected a run folder or checkpoints/step-...")
    return found[-1]


def check_fingerprint(name: str, found: str, wanted: str, checkpoint: Path) -> None:
    """
    Args:
        name: of the tokenizer whose fingerprint was `found`.
        wanted: that of the tokenizer which the checkpoint was trained with.

    Raises:
        UserError: they differ.
    """
    if found != wanted:
        raise UserError(
            f"data.tokenizer {name!r} has fingerprint {found[:12]}, but {checkpoint} was trained with {wanted[:12]}: "
            "not the same tokenizer"
        )


def load_trained(
    path: str | Path, weights: str = "ema", device: str | torch.device = "cpu", precision: str = "fp32"
) -> TrainedModel:
    """Load a run folder or checkpoint folder.

    Args:
        weights: ema | raw.
        precision: fp32 | bf16 | auto, which is bf16 on a GPU that has it, unless the run asked for fp32.

    Raises:
        UserError: no checkpoint, damaged files, no EMA, weights of another network, or a tokenizer that is not the one
            the run was trained with.
    """
    checkpoint = find_checkpoint(path)
    wanted = read_json(checkpoint / MANIFEST, dict[str, Any])["files"]
    problem = damage(checkpoint / RUN_STATE, wanted[RUN_STATE])
    if problem is not None:
        raise UserError(f"{checkpoint}: {problem}")
    state = json.loads((checkpoint / RUN_STATE).read_text())
    config = parse_config(state["config"], origin=str(checkpoint / RUN_STATE))
    place = kept_tokenizer(config.data.tokenizer, run_folder_of(checkpoint))
    tokenizer = load_tokenizer(place)
    check_fingerprint(place, tokenizer.fingerprint, state["tokenizer_fingerprint"], checkpoint)
    architecture = build_architecture(config, tokenizer.vocab_size)
    model = VMD(replace(architecture, attention="auto"))  # trained with flash-attn, used where there is none
    try:
        model.load_state_dict(merged(load_weights(checkpoint, weights), config.training.lora))
    except RuntimeError as error:
        raise UserError(
            f"{checkpoint}: its weights do not fit the network that its configuration names (a network of your own, or "
            f"another version of this project): {' '.join(str(error).split())[:300]}"
        ) from None
    device = torch.device(device)
    if precision == "auto" and config.training.precision == "fp32":
        precision = "fp32"
    precision = precision_on(device, precision)
    model = model.to(device, DTYPES[precision]).eval()
    return TrainedModel(model, config, tokenizer, state["step"], weights, checkpoint, precision)
