"""The model card of an exported folder: what the weights are, how to use them, and what was measured of them."""

import json
from collections.abc import Sequence
from pathlib import Path

from vmd_scale import __version__
from vmd_scale.checkpoints import TrainedModel, checkpoint_id
from vmd_scale.errors import UserError
from vmd_scale.evaluation.perplexity import Result, read_results
from vmd_scale.export.standalone import FILE_NAME
from vmd_scale.files import checked

MEASURED = (
    "protocol",
    "split",
    "interval",
    "steps",
    "latent",
    "paths",
    "k",
    "bound",
    "bits_per_token",
    "standard_error",
    "perplexity",
    "rows",
    "precision",
)
RUN_RESULTS = ("evaluations.jsonl", "evaluation.json")  # of a run folder: made by training, and by evaluate.py


def results_of(trained: TrainedModel, named: Path | None) -> list[Result]:
    """What was measured of exactly these weights: in the file that the user names, else in the run folder.

    What training wrote into its own folder is told by its step; all else by the checkpoint that it is of.

    Raises:
        UserError: the named file holds no bounds, or some of another checkpoint or of other weights.
    """
    wanted = (trained.step, trained.weights)
    if named is not None:
        results = read_results(named)
        if not results:
            raise UserError(f"--evaluation {named} holds no bounds: expected what evaluate.py wrote with --json")
        for result in results:
            if (result.step, result.weights) != wanted:
                raise UserError(
                    f"--evaluation {named} holds results of step {result.step}, {result.weights} weights; the model "
                    f"card is about step {trained.step}, {trained.weights} weights"
                )
            if result.checkpoint != checkpoint_id(trained.checkpoint):
                other = (
                    "another checkpoint of the same step" if result.checkpoint else "a checkpoint that it does not name"
                )
                raise UserError(
                    f"--evaluation {named} holds results of {other}; expected what evaluate.py wrote of "
                    f"{trained.checkpoint}"
                )
        return results
    found: list[Result] = []
    run = trained.checkpoint.parent.parent
    if (run / RUN_RESULTS[0]).is_file():
        lines = (run / RUN_RESULTS[0]).read_text(encoding="utf-8").splitlines()
        found += [checked(Result, json.loads(line), str(run / RUN_RESULTS[0])) for line in lines if line.endswith("}")]
    if (run / RUN_RESULTS[1]).is_file():
        found += read_results(run / RUN_RESULTS[1])
    found = [result for result in found if (result.step, result.weights) == wanted]
    return [r for r in found if r.checkpoint is None or r.checkpoint == checkpoint_id(trained.checkpoint)]


def model_card(trained: TrainedModel, results: Sequence[Result], has_encoder: bool) -> str:
    """Markdown, with the metadata that a hub reads."""
    config, a = trained.config, trained.model.architecture
    kind = f"variational masked diffusion, latent of {a.latent_width}" if a.latent_width else "masked diffusion"
    has_bounds = has_encoder or not a.latent_width
    less = "" if has_bounds else " The encoder q(z | x0, m) is not in this folder: it samples, and has no bounds."
    module = FILE_NAME.removesuffix(".py")
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [masked-diffusion, variational-masked-diffusion, custom_code]",
        "---",
        f"# A {kind} model",
        "",
        f"Trained by vmd_scale {__version__} for {trained.step:,} steps of {config.training.global_batch} rows x "
        f"{a.row_length} tokens on `{config.data.corpus}` (tokenizer `{Path(config.data.tokenizer).name}`, "
        f"{a.vocab_size:,} symbols and the mask), objective `{config.diffusion.objective}`. "
        f"{a.layers} layers, {a.width} wide. These are the {trained.weights} weights.{less}",
        "",
        "With transformers:",
        "",
        "```python",
        "from transformers import AutoModel",
        'model = AutoModel.from_pretrained("THIS FOLDER", trust_remote_code=True)',
        "rows = model.generate(steps=32, count=4)  # token ids",
        "```",
        "",
        "With torch and safetensors alone, in this folder:",
        "",
        "```python",
        f"from {module} import bound, generate, load",
        'model = load(".")',
        "rows = generate(model, steps=32, count=4)",
        *(["nats = bound(model, rows, steps=32)  # upper bounds on -log p of each row"] if has_bounds else []),
        "```",
        "",
        "## Measured",
        "",
    ]
    if results:
        lines.append(
            "Upper bounds (in expectation) on the negative log-likelihood of the T-step sampler named; where `bound` "
            "is `compat`, the estimate of published code, which bounds nothing."
        )
        lines += ["", "| " + " | ".join(MEASURED) + " |", "|" + "---|" * len(MEASURED)]
        for result in results:
            values = [getattr(result, key) for key in MEASURED]
            cells = [f"{v:.4f}" if isinstance(v, float) else "not recorded" if v is None else str(v) for v in values]
            lines.append("| " + " | ".join(cells) + " |")
        lines += ["", "`standard_error` is of nats per token, over rows."]
        lines += [f"\nCaveat: {caveat}" for caveat in dict.fromkeys(r.caveat for r in results) if caveat]
    else:
        lines.append("Nothing was evaluated when this folder was written.")
    return "\n".join(lines) + "\n"
