"""The model card of an exported folder: what the weights are, how to use them, and what was measured of them."""

import json
from collections.abc import Sequence
from pathlib import Path

from vmd_scale import __version__
from vmd_scale.checkpoints import TrainedModel, checkpoint_id, run_folder_of
from vmd_scale.config import TOKENIZER_SUFFIXES
from vmd_scale.errors import UserError
from vmd_scale.evaluation.classification import CLASSIFICATION, Accuracy
from vmd_scale.evaluation.perplexity import Result, read_results
from vmd_scale.export.standalone import FILE_NAME
from vmd_scale.files import checked, read_json
from vmd_scale.tokenization import KEPT, CharacterTokenizer, SymbolTokenizer
from vmd_scale.tokenization.exported import TOKENIZER_JSON

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
CLASSIFIED = ("split", "rows", "labels", "accuracy", "standard_error", "label_nll")
PROMPT = "the first [MASK] of the"
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
    run = run_folder_of(trained.checkpoint)
    if (run / RUN_RESULTS[0]).is_file():
        lines = (run / RUN_RESULTS[0]).read_text(encoding="utf-8").splitlines()
        found += [checked(Result, json.loads(line), str(run / RUN_RESULTS[0])) for line in lines if line.endswith("}")]
    if (run / RUN_RESULTS[1]).is_file():
        found += read_results(run / RUN_RESULTS[1])
    found = [result for result in found if (result.step, result.weights) == wanted]
    return [r for r in found if r.checkpoint is None or r.checkpoint == checkpoint_id(trained.checkpoint)]


def accuracies_of(trained: TrainedModel) -> list[Accuracy]:
    """What finetune.py wrote of a classifier's run, if it is of exactly these weights.

    Raises:
        UserError: a file that finetune.py has not written.
    """
    file = run_folder_of(trained.checkpoint) / CLASSIFICATION
    if not file.is_file():
        return []
    found = read_json(file, list[Accuracy])
    wanted = (trained.step, trained.weights, checkpoint_id(trained.checkpoint))
    return [accuracy for accuracy in found if (accuracy.step, accuracy.weights, accuracy.checkpoint) == wanted]


def model_card(
    trained: TrainedModel, results: Sequence[Result], has_encoder: bool, accuracies: Sequence[Accuracy] = ()
) -> str:
    """Markdown, with the metadata that a hub reads."""
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            "pipeline_tag: text-generation",
            "tags: [masked-diffusion, variational-masked-diffusion, custom_code]",
            "---",
            *_origin(trained, has_encoder),
            "",
            *_usage(trained, has_encoder),
            "",
            "## Measured",
            "",
            *_bounds(results),
            *_accuracies(accuracies),
            *([] if results or accuracies else ["Nothing was evaluated when this folder was written."]),
            "",
        ]
    )


def _origin(trained: TrainedModel, has_encoder: bool) -> list[str]:
    config, a = trained.config, trained.model.architecture
    training = config.training
    kind = "Variational masked diffusion model" if a.latent_width else "Masked diffusion model"
    text = (
        f"Trained by vmd_scale {__version__} for {trained.step:,} steps of {training.global_batch} rows x "
        f"{a.row_length} tokens on `{config.data.corpus}` (tokenizer `{_tokenizer_name(trained)}`, "
        f"{a.vocab_size:,} symbols and the mask), objective `{config.diffusion.objective}`. "
        f"{a.layers} layers, {a.width} wide"
    )
    if a.latent_width:
        text += f", and a latent variable z of {a.latent_width} units for each {'block' if a.groups > 1 else 'row'}"
    text += f". These are the {trained.weights} weights."
    if training.init_from is not None:
        text += f" Training started from the weights of `{base_name(training.init_from)}`"
        if training.lora is not None:
            text += f", with adapters (LoRA of rank {training.lora.rank}) that are merged into these"
        elif training.trainable:
            text += f"; of them only {', '.join(f'`{pattern}`' for pattern in training.trainable)} was trained"
        text += "."
    if a.latent_width and not has_encoder:
        text += " The encoder q(z | x0, m) is not in this folder: it samples, and has no bounds."
    return [
        f"# {kind}, {'trained' if training.init_from is None else 'fine-tuned'} on `{config.data.corpus}`",
        "",
        text,
    ]


def _usage(trained: TrainedModel, has_encoder: bool) -> list[str]:
    has_bounds = has_encoder or not trained.model.architecture.latent_width
    tokenizer = 'tokenizer = AutoTokenizer.from_pretrained("THIS FOLDER", trust_remote_code=True)'
    if TOKENIZER_JSON in trained.tokenizer.files():
        imports, decoded = "from transformers import AutoModel, AutoTokenizer", "tokenizer.batch_decode(rows)"
    else:  # a SentencePiece model that is no unigram
        imports, decoded = "import sentencepiece\nfrom transformers import AutoModel", "tokenizer.decode(rows.tolist())"
        tokenizer = 'tokenizer = sentencepiece.SentencePieceProcessor(model_file="THIS FOLDER/spiece.model")'
    lines = [
        "With transformers:",
        "",
        "```python",
        imports,
        "",
        'model = AutoModel.from_pretrained("THIS FOLDER", trust_remote_code=True)',
        tokenizer,
        "rows = model.generate(steps=32, count=4)  # token ids",
        f"print({decoded})",
    ]
    if "batch_decode" in decoded and _takes(PROMPT.replace("[MASK]", ""), trained):
        lines += [
            f'prompt = tokenizer("{PROMPT}", return_tensors="pt")  # [MASK] stands for a token that is drawn',
            "print(tokenizer.batch_decode(model.generate(**prompt, steps=32)))",
        ]
    return [
        *lines,
        "```",
        "",
        "With torch and safetensors alone, in this folder:",
        "",
        "```python",
        f"from {FILE_NAME.removesuffix('.py')} import bound, generate, load",
        "",
        'model = load(".")',
        "rows = generate(model, steps=32, count=4)",
        *(["nats = bound(model, rows, steps=32)  # upper bounds on -log p of each row"] if has_bounds else []),
        "```",
    ]


def _bounds(results: Sequence[Result]) -> list[str]:
    if not results:
        return []
    caveats = dict.fromkeys(result.caveat for result in results if result.caveat)
    return [
        "Upper bounds (in expectation) on the negative log-likelihood of the T-step sampler named; where `bound` is "
        "`compat`, the estimate of published code, which bounds nothing.",
        "",
        *_table(MEASURED, results),
        "",
        "`standard_error` is of nats per token, over rows.",
        *(f"\nCaveat: {caveat}" for caveat in caveats),
        "",
    ]


def _accuracies(accuracies: Sequence[Accuracy]) -> list[str]:
    if not accuracies:
        return []
    return [
        "Accuracy of the most probable label, under the one-step sampler; `label_nll` is the mean of -log p(true label "
        "| prompt) in nats.",
        "",
        *_table(CLASSIFIED, accuracies),
        "",
        "`standard_error` is of the accuracy, over rows.",
        "",
    ]


def _table(columns: Sequence[str], records: Sequence[object]) -> list[str]:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for record in records:
        values = [getattr(record, key) for key in columns]
        cells = [f"{v:.4f}" if isinstance(v, float) else "not recorded" if v is None else str(v) for v in values]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _tokenizer_name(trained: TrainedModel) -> str:
    """For people, without folders of this machine: gpt2 for gpt2:FOLDER, mine for FOLDER/mine.model."""
    if isinstance(trained.tokenizer, CharacterTokenizer | SymbolTokenizer):
        return trained.tokenizer.name
    kind, colon, _ = trained.config.data.tokenizer.partition(":")
    path = Path(trained.config.data.tokenizer)
    if colon:
        return kind
    if path.suffix not in TOKENIZER_SUFFIXES:
        return path.parent.name if path.name == KEPT else path.name
    return path.stem if path.suffix == ".model" else path.absolute().parent.name


def base_name(weights: str) -> str:
    """The name of a run, an exported folder or a file; a checkpoint is named with its run."""
    path = Path(weights)
    return f"{path.parent.parent.name}, {path.name}" if path.parent.name == "checkpoints" else path.name


def _takes(prompt: str, trained: TrainedModel) -> bool:
    """Whether it can be encoded, and leaves room in a row."""
    try:
        return len(trained.tokenizer.encode(prompt)) < trained.model.architecture.row_length
    except UserError:
        return False
