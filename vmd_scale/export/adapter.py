"""Adapters alone, in the format of peft: small files on top of an exported base, which many of them can share."""

from pathlib import Path

import safetensors.torch

from vmd_scale.checkpoints import RUN_STATE, find_checkpoint, load_weights
from vmd_scale.config_file import parse_config
from vmd_scale.errors import UserError
from vmd_scale.export.card import base_name
from vmd_scale.files import check_writable, read_json, write_atomically, write_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
OWN = (CONFIG, WEIGHTS, "README.md")
NAMES = {".lora_a": ".lora_A.weight", ".lora_b": ".lora_B.weight"}  # ours, peft's
CARD = """---
library_name: peft
tags: [masked-diffusion, lora, custom_code]
---
# Adapters for a masked diffusion model, trained on `{corpus}`

LoRA of rank {rank}, {steps:,} steps, on top of the weights of `{base}`; these are the {weights} weights.

```python
from peft import PeftModel
from transformers import AutoModel

base = AutoModel.from_pretrained("EXPORTED BASE", trust_remote_code=True)
model = PeftModel.from_pretrained(base, "THIS FOLDER")
rows = model.generate(steps=32, count=4)  # token ids
```
"""


def check_adapter_request(folder: Path) -> None:
    """What can be known to be wrong before anything is read.

    Raises:
        UserError: `folder` exists and holds no adapters of an earlier export, or cannot be made.
    """
    check_writable(folder / CONFIG, "--output")
    earlier = any((folder / name).exists() for name in (CONFIG, WEIGHTS))  # also one that was killed on the way
    if folder.exists() and any(folder.iterdir()) and not earlier:
        raise UserError(f"--output {folder}: exists and holds no exported adapters; choose another folder")


def export_adapter(path: str | Path, folder: Path, weights: str = "ema") -> tuple[Path, int]:
    """Write the adapters of a run or checkpoint into `folder`; its own files there are replaced, others stay.

    Args:
        weights: ema | raw.

    Returns:
        The checkpoint, and its step.

    Raises:
        UserError: see `check_adapter_request`; no whole checkpoint; a run without adapters, or one that trained other
            weights beside them, which adapters on top of the old ones would leave out.
    """
    check_adapter_request(folder)
    checkpoint = find_checkpoint(path)
    state = read_json(checkpoint / RUN_STATE, dict)
    config = parse_config(state["config"], origin=str(checkpoint / RUN_STATE))
    lora = config.training.lora
    if lora is None:
        raise UserError(f"--adapter: {checkpoint} has none (training.lora); leave --adapter out for whole weights")
    if config.training.trainable:
        raise UserError(
            f"--adapter: {checkpoint} trained other weights too (training.trainable); leave --adapter out: whole "
            "weights have the adapters merged in"
        )
    tensors = {
        f"base_model.model.{name[: -len(ours)]}{theirs}": value
        for name, value in load_weights(checkpoint, weights).items()
        for ours, theirs in NAMES.items()
        if name.endswith(ours)
    }
    adapted = sorted(name.removeprefix("base_model.model.").removesuffix(NAMES[".lora_a"]) for name in tensors)
    description = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,  # whoever loads them says where it is
        "r": lora.rank,
        "lora_alpha": lora.scale * lora.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": [name for name in adapted if not name.endswith(NAMES[".lora_b"])],
        "inference_mode": True,
    }
    card = CARD.format(
        corpus=config.data.corpus,
        rank=lora.rank,
        steps=state["step"],
        base=base_name(config.training.init_from or ""),
        weights=weights,
    )
    (folder / CONFIG).unlink(missing_ok=True)  # which scales the weights: gone first and back last, it fits them
    write_atomically(folder / WEIGHTS, safetensors.torch.save(tensors, {"format": "pt"}))
    write_atomically(folder / "README.md", card)
    write_json(folder / CONFIG, description)
    return checkpoint, int(state["step"])
