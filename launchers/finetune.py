"""Fine-tune a pretrained model: on prompts with responses, on labels, or on another corpus; in full or in part.

    python launchers/finetune.py --from runs/owt --corpus prompts --source pairs.jsonl --output runs/chat
    python launchers/finetune.py --from runs/owt --corpus labels --source news.jsonl --output runs/news --lora 8
    python launchers/finetune.py --from exported/owt --corpus text --source papers.txt --output runs/papers
    python launchers/finetune.py --from runs/mdm --corpus text --source owt.txt --output runs/vmd \\
        --train-only latent --set latent.width=64                            gives a plain model a latent
    python launchers/finetune.py --from mdlm.safetensors --config configs/openwebtext_mdlm_weights.json \\
        --corpus text --source papers.txt --output runs/from_mdlm

--from takes a run, a checkpoint, an exported folder or, with --config, a state dict (our names or MDLM's). The network
is that of the weights. A file of JSON lines holds {"prompt": ..., "response": ...} for corpus prompts and {"prompt":
..., "label": ...} for labels, which may also be CSV of class and text; prompts are never masked. --source
train=A,validation=B,test=C gives each split a file of its own; else 1 record in 20 is validation and 1 is test. Any
other corpus is continued pretraining.

Engine, loop and checkpoints are pretrain.py's, and so are deepspeed, torchrun and srun in front of it, resuming and
exit codes. With labels, the accuracy on validation and test is printed at the end and written to classification.json.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch

from vmd_scale.checkpoints import checkpoint_id, load_trained
from vmd_scale.commandline import HelpFormatter
from vmd_scale.config_file import load_config
from vmd_scale.data.shards import ShardReader, shard_cache
from vmd_scale.errors import UserError, reports_user_errors
from vmd_scale.files import write_json
from vmd_scale.finetuning import LABELS, finetuning_config
from vmd_scale.tokenization import load_tokenizer
from vmd_scale.training.launch import rank_from_environment, world_size_from_environment


@reports_user_errors
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument(
        "--from",
        required=True,
        dest="weights",
        metavar="WEIGHTS",
        help="run, checkpoint, exported folder or state dict to start from",
    )
    parser.add_argument("--corpus", required=True, help="prompts, labels, text, or any named corpus")
    parser.add_argument("--source", metavar="FILE", help="data.source; or train=A,validation=B,test=C")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="run folder")
    parser.add_argument("--lora", type=int, metavar="RANK", help="train low-rank adapters instead of the weights")
    parser.add_argument(
        "--train-only",
        metavar="NAMES",
        help="patterns of parameter names, with commas; 'latent': all that z needs",
    )
    parser.add_argument("--config", metavar="FILE", help="describes the network; needed for a bare state dict")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override, may be repeated")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    args = parser.parse_args()

    from vmd_scale.evaluation.classification import label_tokens
    from vmd_scale.training.start import start

    config = finetuning_config(
        args.weights,
        args.corpus,
        parse_source(args.source),
        args.output,
        parse_names(args.train_only),
        args.lora,
        load_config(args.config) if args.config else None,
        tuple(args.set),
        world_size_from_environment(),
    )
    has_labels = config.data.corpus == LABELS
    if has_labels:
        label_tokens(config, load_tokenizer(config.data.tokenizer))  # labels that nothing can tell apart end here
    code = start(config, args.output)
    if code == 0 and has_labels and rank_from_environment() == 0:
        print(accuracies(args.output, "ema" if config.training.ema_decay else "raw"))
    sys.exit(code)


def parse_source(text: str | None) -> str | dict[str, str] | None:
    """``FILE``, or ``train=A,validation=B`` as a mapping."""
    if text is None or not text.startswith(("train=", "validation=", "test=")):
        return text
    parts = [part.partition("=") for part in text.split(",")]
    wrong = [name for name, _, file in parts if name not in ("train", "validation", "test") or not file]
    if wrong:
        raise UserError(f"--source {text!r}: expected train=FILE,validation=FILE,test=FILE, found {wrong[0]!r}")
    return {name: file for name, _, file in parts}


def parse_names(text: str | None) -> tuple[str, ...]:
    """Patterns with commas between them; an empty one would train all there is."""
    names = () if text is None else tuple(part.strip() for part in text.split(","))
    if not all(names):
        raise UserError(
            f"--train-only {text!r}: expected names with commas between them, such as denoiser.head.* or latent"
        )
    return names


def accuracies(run: Path, weights: str) -> str:
    """The accuracies on validation and test: returns a table, writes classification.json."""
    from vmd_scale.data.manifest import read_manifest
    from vmd_scale.evaluation.classification import CLASSIFICATION, classify, label_tokens, table

    trained = load_trained(run, weights, device="cuda" if torch.cuda.is_available() else "cpu")
    _, labels = label_tokens(trained.config, trained.tokenizer)
    shards = trained.config.data.shards
    splits = [split for split in ("validation", "test") if split in read_manifest(shards).splits]
    readers = {split: ShardReader(shards, split, cache=shard_cache(trained.config.data)) for split in splits}
    found = [classify(trained.model, reader, labels, split) for split, reader in readers.items()]
    checkpoint = checkpoint_id(trained.checkpoint)
    results = [replace(r, step=trained.step, weights=trained.weights, checkpoint=checkpoint) for r in found]
    write_json(run / CLASSIFICATION, [result.to_dict() for result in results])
    return table(results)


if __name__ == "__main__":
    main()
