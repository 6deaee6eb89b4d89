"""A Hugging Face style folder: config.json, model.safetensors, tokenizer files, model card, modelling file."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save_file

from vmd_scale import __version__
from vmd_scale.checkpoints import TrainedModel
from vmd_scale.errors import UserError
from vmd_scale.evaluation.perplexity import Result
from vmd_scale.export.standalone import FILE_NAME, modelling_source

MEASURED = (
    "protocol",
    "split",
    "steps",
    "latent",
    "paths",
    "k",
    "bound",
    "bits_per_token",
    "standard_error",
    "perplexity",
)


def export(trained: TrainedModel, folder: Path, results: Sequence[Result] = ()) -> Path:
    """Write the model into `folder`, whole or not at all.

    Args:
        results: evaluation results for the model card, as ``evaluate.py --json`` writes them.

    Raises:
        UserError: `folder` exists and is not an earlier export; results of another checkpoint or of other weights.
    """
    for result in results:
        if (result.step, result.weights) != (trained.step, trained.weights):
            raise UserError(
                f"--evaluation holds results of step {result.step}, {result.weights} weights; the model card is about "
                f"step {trained.step}, {trained.weights} weights"
            )
    if folder.exists() and any(folder.iterdir()) and not (folder / FILE_NAME).exists():
        raise UserError(f"--output {folder}: exists and is not an exported model; choose another folder")
    staging = folder.with_name(f".{folder.name}.staging")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    architecture = trained.model.architecture
    config = {
        "model_type": "vmd",
        "architectures": ["VMD"],
        "architecture": architecture.to_dict(),
        "vocab_size": architecture.vocab_size,
        "mask_token_id": architecture.mask_id,
        "torch_dtype": "float32",
        "vmd_scale": {
            "version": __version__,
            "step": trained.step,
            "weights": trained.weights,
            "tokenizer_fingerprint": trained.tokenizer.fingerprint,
            "config": trained.config.model_dump(mode="json"),
        },
    }
    (staging / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (staging / FILE_NAME).write_text(modelling_source(), encoding="utf-8")
    (staging / "README.md").write_text(_model_card(trained, results), encoding="utf-8")
    for name, content in trained.tokenizer.files().items():
        (staging / name).write_bytes(content)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in trained.model.state_dict().items()}
    save_file(tensors, staging / "model.safetensors", metadata={"format": "pt"})
    if folder.exists():
        old = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        os.rename(folder, old)
        os.rename(staging, folder)
        shutil.rmtree(old)
    else:
        os.rename(staging, folder)
    return folder


def _model_card(trained: TrainedModel, results: Sequence[Result]) -> str:
    config, a = trained.config, trained.model.architecture
    kind = f"variational masked diffusion, latent of {a.latent_width}" if a.latent_width else "masked diffusion"
    lines = [
        "---",
        "library_name: pytorch",
        "tags: [masked-diffusion, variational-masked-diffusion]",
        "---",
        f"# A {kind}",
        "",
        f"Trained by vmd_scale {__version__} for {trained.step:,} steps of {config.training.global_batch} rows x "
        f"{a.row_length} tokens on `{config.data.corpus}` (tokenizer `{config.data.tokenizer}`, {a.vocab_size:,} "
        f"symbols and the mask), objective `{config.diffusion.objective}`. "
        f"{a.layers} layers, {a.width} wide. These are the {trained.weights} weights.",
        "",
        "```python",
        f"from {FILE_NAME.removesuffix('.py')} import load, negative_elbo",
        'model = load(".")',
        "```",
        "",
        "## Measured",
        "",
    ]
    if results:
        lines.append("Upper bounds (in expectation) on the negative log-likelihood of the T-step sampler named.")
        lines += ["", "| " + " | ".join(MEASURED) + " |", "|" + "---|" * len(MEASURED)]
        for result in results:
            cells = [f"{v:.4f}" if isinstance(v := getattr(result, key), float) else str(v) for key in MEASURED]
            lines.append("| " + " | ".join(cells) + " |")
    else:
        lines.append("Nothing was evaluated when this folder was written.")
    return "\n".join(lines) + "\n"
