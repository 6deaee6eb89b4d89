"""What pretraining is worth to a task with few examples: AG News labels, and Sudoku completion; tables on the terminal.

    python benchmarks/finetune.py ag_news --data FOLDER      FOLDER holds wiki/, openwebtext/, zero_shot/ (see below)
    python benchmarks/finetune.py sudoku --data FOLDER       FOLDER holds sudoku/
    ... --scale 0.1                                          a tenth of the steps: does it work?

ag_news: a small masked diffusion model is pretrained on general text (three rows of wiki/wiki2019_docs.jsonl.xz for one
of openwebtext/openwebtext_1000docs.jsonl.xz) and fine-tuned on 200 and on 2,000 labelled news, in full and by adapters;
the same network learns from the same labels from scratch. The labelled news are zero_shot/ag_news_test.csv.xz, the only
part at hand, shuffled once: the first 200 or 2,000 train, 600 others choose the best of five learning rates, and the
last 2,000 test.
sudoku: pretrained on puzzles with many clues (sudoku/kids.csv.xz), fine-tuned on 2,000 of those with the fewest
(sudoku/expert.csv.xz): in full, by adapters, and by training nothing but a latent that the pretrained network did not
have; cells and whole puzzles that are right, of 500 unseen ones, by the margin order in 2 and in 10 steps.

Everything goes through the launchers, and into runs/finetune-benchmark; what is there already is not made again.
Standard errors are over the rows of the test; another seed of training would differ by more. On two CPU cores ag_news
takes an hour, sudoku ten minutes.
"""

import argparse
import csv
import itertools
import json
import lzma
import math
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from comparing import Report, table

from vmd_scale.build import masks_of
from vmd_scale.checkpoints import load_trained
from vmd_scale.data.loader import evaluation_batches
from vmd_scale.data.shards import ShardReader
from vmd_scale.diffusion.noise import Noise
from vmd_scale.diffusion.sampler import Sampler, sample
from vmd_scale.files import write_json
from vmd_scale.training.status import read_status

ROOT = Path(__file__).resolve().parents[1]
RUNS = Path("runs/finetune-benchmark")
NAMES = {"1": " World", "2": " Sports", "3": " Business", "4": " Science"}
LABELLED = (200, 2000)
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)  # of learning from labels
SAMPLER_STEPS = (2, 10)  # in which a puzzle is filled in
STARTS = {  # what a fine-tuning run is made of, beside its data
    "scratch": ("--set", "training.init_from=null"),
    "pretrained": (),
    "adapters": ("--lora", 8),
}
LATENT = ("--train-only", "latent", "--set", "latent.width=32", "--set", "latent.encoder_width=96",
          "--set", "latent.encoder_layers=1", "--set", "latent.prior=conditional",
          "--set", "diffusion.steps=[1,2,10]")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["ag_news", "sudoku"])
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies all numbers of steps")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table there as well")
    args = parser.parse_args()
    report = Report(__doc__, args.json)
    folder = RUNS / (args.task if args.scale == 1 else f"{args.task}-{args.scale:g}")
    folder.mkdir(parents=True, exist_ok=True)
    rows = (ag_news if args.task == "ag_news" else sudoku)(args.data, folder, args.scale)
    report.add("rows", rows, table(list(rows[0]), [list(row.values()) for row in rows]))


def ag_news(data: Path, folder: Path, scale: float) -> list[dict[str, object]]:
    wiki = data / "wiki" / "wiki2019_docs.jsonl.xz"
    web = data / "openwebtext" / "openwebtext_1000docs.jsonl.xz"
    tokenizer = subwords((web, wiki), folder, vocab_size=8192)
    less = {"corpus": "text", "source": str(web), "shards": str(folder / "web-shards"), "weight": 1}
    data_of = {"corpus": "text", "source": wiki, "tokenizer": tokenizer, "row_length": 64, "weight": 3,
               "mixture": [less]}  # fmt: skip
    config = network(folder, data_of, width=128, batch=32, learning_rate=2e-3)
    # Without decay, matrices grow until attention is saturated, and a hundred steps from labels no longer change it.
    settings = ("--set", "training.weight_decay=0.1", "--set", "model.tie_embeddings=true")
    train(folder / "pretrained", "pretrain.py", "--config", config, *settings, *steps_of(14000, scale))
    with lzma.open(data / "zero_shot" / "ag_news_test.csv.xz", "rt", encoding="utf-8", newline="") as file:
        news = [{"prompt": f"{title}. {body[:150]}\nTopic:", "label": NAMES[n]} for n, title, body in csv.reader(file)]
    random.Random(0).shuffle(news)
    parts = {"validation": news[5000:5600], "test": news[5600:]}
    results: list[dict[str, object]] = []
    for count in LABELLED:
        parts["train"] = news[:count]
        for name, records in parts.items():
            (folder / f"{name}-{count}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        source = ",".join(f"{name}={folder / f'{name}-{count}.jsonl'}" for name in ("train", "validation", "test"))
        for start, options in STARTS.items():
            options = ("--corpus", "labels", "--source", source, *options)
            found = classified(folder, f"{start}-{count}", options, scale)
            results.append({"labelled": count, "start": start, **found})
    return results


def subwords(corpora: Sequence[Path], folder: Path, vocab_size: int) -> Path:
    """A SentencePiece model of the first documents of some corpora."""
    model, text = folder / "bpe.model", folder / "lines.txt"
    if not model.exists():
        with text.open("w", encoding="utf-8") as lines:
            for corpus in corpora:
                with lzma.open(corpus, "rt", encoding="utf-8") as file:
                    lines.writelines(json.loads(record)["text"] + "\n" for record in itertools.islice(file, 3000))
        call("tokenizer/train_sentencepiece.py", "--input", text, "--vocab-size", vocab_size, "--output", model)
    return model


def classified(folder: Path, name: str, options: Sequence[object], scale: float) -> dict[str, object]:
    """On test, with the learning rate that is best on validation."""
    tried = {}
    for rate in RATES:
        run = folder / f"{name}-{rate:g}"
        tune(run, folder, options, 300, scale, 32, rate)
        tried[rate] = {part["split"]: part for part in json.loads((run / "classification.json").read_text())}
    best = max(tried, key=lambda rate: tried[rate]["validation"]["accuracy"])
    keys = ("accuracy", "standard_error", "label_nll", "rows")
    return {"learning_rate": best, **{key: tried[best]["test"][key] for key in keys}}


def sudoku(data: Path, folder: Path, scale: float) -> list[dict[str, object]]:
    data_of = {"corpus": "sudoku", "tokenizer": "sudoku", "row_length": 81}
    easy = data / "sudoku" / "kids.csv.xz"
    config = network(folder, {**data_of, "source": easy}, width=96, batch=64, learning_rate=2e-3)
    train(folder / "pretrained", "pretrain.py", "--config", config, *steps_of(1200, scale))
    with lzma.open(data / "sudoku" / "expert.csv.xz", "rt") as file:
        puzzles = file.read().splitlines()
    parts = {"train": puzzles[:2000], "validation": puzzles[2000:2100], "test": puzzles[2100:2600]}
    for name, lines in parts.items():
        (folder / f"{name}.csv").write_text("\n".join(lines) + "\n")
    source = ",".join(f"{name}={folder / f'{name}.csv'}" for name in parts)
    runs = {"pretrained alone": folder / "pretrained"}
    for start, options in {**STARTS, "latent alone": LATENT}.items():
        runs[start] = folder / f"{start.replace(' ', '-')}-2000"
        tune(runs[start], folder, ("--corpus", "sudoku", "--source", source, *options), 400, scale, 64, 1e-3)
    test = ShardReader(runs["scratch"] / "shards", "test")
    grid = itertools.product(runs.items(), SAMPLER_STEPS)
    return [{"start": start, "steps": steps, **completed(run, test, steps)} for (start, run), steps in grid]


def completed(run: Path, puzzles: ShardReader, steps: int) -> dict[str, object]:
    """Shares of empty cells and of puzzles that the model fills in rightly."""
    model = load_trained(run).model
    right_cells = cells = right = 0
    for batch in evaluation_batches(puzzles, np.arange(puzzles.rows, dtype=np.int64), 250):
        maskable, _ = masks_of(batch, puzzles.manifest)
        sampler = Sampler(steps, law="margin", temperature=0)
        found = sample(model, sampler, Noise(0), batch.positions, batch.tokens, maskable)
        same = found == batch.tokens
        right_cells += int((same & maskable).sum())
        cells += int(maskable.sum())
        right += int(same.all(-1).sum())
    share = right / puzzles.rows
    error = math.sqrt(share * (1 - share) / puzzles.rows)
    return {
        "cells right": right_cells / cells,
        "puzzles right": share,
        "standard_error": error,
        "puzzles": puzzles.rows,
    }


def network(folder: Path, data: dict[str, object], width: int, batch: int, learning_rate: float) -> Path:
    """A small plain model of 3 layers."""
    values = {
        "data": {**{key: str(v) if isinstance(v, Path) else v for key, v in data.items()},
                 "shards": str(folder / "pretrained-shards")},
        "model": {"layers": 3, "width": width, "heads": width // 32},
        "latent": {"width": 0},
        "diffusion": {"objective": "nelbo", "steps": ["inf"]},
        "training": {"steps": 1, "global_batch": batch, "micro_batch": batch, "learning_rate": learning_rate,
                     "lr_schedule": "cosine", "warmup_steps": 50, "betas": [0.9, 0.98], "ema_decay": 0.99,
                     "checkpoint_every": 1000, "keep_checkpoints": 1},
    }  # fmt: skip
    write_json(folder / "config.json", values)
    return folder / "config.json"


def tune(
    run: Path, folder: Path, options: Sequence[object], steps: int, scale: float, batch: int, learning_rate: float
) -> None:
    """Without bounds on the way."""
    settings = (f"training.global_batch={batch}", f"training.micro_batch={batch}", "training.checkpoint_every=1000",
                f"training.learning_rate={learning_rate}", "evaluation.every=null")  # fmt: skip
    sets = [part for setting in settings for part in ("--set", setting)]
    train(run, "finetune.py", "--from", folder / "pretrained", *options, *sets, *steps_of(steps, scale))


def steps_of(steps: int, scale: float) -> tuple[str, str]:
    return "--set", f"training.steps={max(2, round(steps * scale))}"


def train(run: Path, launcher: str, *options: object) -> None:
    """Unless that was done before."""
    status = read_status(run)
    if status is None or status.state != "finished":
        call(f"launchers/{launcher}", *options, "--output", run)


def call(script: str, *arguments: object) -> None:
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    print("$ " + " ".join(command), file=sys.stderr, flush=True)
    subprocess.run(command, check=True, cwd=Path.cwd())


if __name__ == "__main__":
    main()
