"""What pretraining is worth to a task with few examples: AG News labels, and Sudoku completion; tables on the terminal.

    python benchmarks/finetune.py ag_news --data FOLDER      FOLDER holds openwebtext/ and zero_shot/ (see below)
    python benchmarks/finetune.py sudoku --data FOLDER       FOLDER holds sudoku/
    ... --scale 0.1                                          a tenth of the steps: does it work?

ag_news: a small masked diffusion model is pretrained on openwebtext/openwebtext_1000docs.jsonl.xz and fine-tuned on
200, 1,000 and 5,000 labelled news; the same network learns from the same labels from scratch. The labelled news are
zero_shot/ag_news_test.csv.xz, the only part at hand, cut by a fixed shuffle: 5,000 / 600 / 2,000 for training,
validation and test. Learning rates were not tuned.
sudoku: pretrained on puzzles with few clues (sudoku/expert.csv.xz), fine-tuned on 2,000 of another sort
(sudoku/kids.csv.xz); cells and whole puzzles that are right, of 500 unseen ones, by the margin order in 10 steps.

Everything goes through the launchers, and into runs/finetune-benchmark; what is there already is not made again.
"""

import argparse
import csv
import json
import lzma
import random
import subprocess
import sys
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
LABELLED = (200, 1000, 5000)


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
    text, tokenizer = folder / "owt.txt", folder / "bpe.model"
    corpus = data / "openwebtext" / "openwebtext_1000docs.jsonl.xz"
    if not tokenizer.exists():
        with lzma.open(corpus, "rt", encoding="utf-8") as file:
            lines = [line for record in file for line in json.loads(record)["text"].split("\n") if line.strip()]
        text.write_text("\n".join(lines), encoding="utf-8")
        call("tokenizer/train_sentencepiece.py", "--input", text, "--vocab-size", 4096, "--output", tokenizer)
    config = network(folder, corpus="text", source=corpus, tokenizer=tokenizer, row_length=96)
    train(folder / "pretrained", "pretrain.py", "--config", config, steps=3000, scale=scale)
    with lzma.open(data / "zero_shot" / "ag_news_test.csv.xz", "rt", encoding="utf-8", newline="") as file:
        news = [{"prompt": f"{title}. {body[:300]}\nTopic:", "label": NAMES[n]} for n, title, body in csv.reader(file)]
    random.Random(0).shuffle(news)
    parts = {"validation": news[5000:5600], "test": news[5600:]}
    results: list[dict[str, object]] = []
    for count in LABELLED:
        parts["train"] = news[:count]
        for name, records in parts.items():
            (folder / f"{name}-{count}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        source = ",".join(f"{name}={folder / f'{name}-{count}.jsonl'}" for name in ("train", "validation", "test"))
        for start in ("pretrained", "scratch", "lora"):
            run = folder / f"{start}-{count}"
            options = ["--from", folder / "pretrained", "--corpus", "labels", "--source", source]
            options += ["--set", "data.row_length=96", "--set", "evaluation.every=null"]
            if start == "scratch":
                options += ["--set", "training.init_from=null", "--set", "training.learning_rate=1e-3"]
            if start == "lora":
                options += ["--lora", 8]
            train(run, "finetune.py", *options, steps=600, scale=scale)
            test = json.loads((run / "classification.json").read_text())[-1]
            keys = ("accuracy", "standard_error", "label_nll", "rows")
            results.append({"labelled": count, "start": start, **{key: test[key] for key in keys}})
    return results


def sudoku(data: Path, folder: Path, scale: float) -> list[dict[str, object]]:
    base = {"corpus": "sudoku", "tokenizer": "sudoku", "row_length": 81}
    config = network(folder, source=data / "sudoku" / "expert.csv.xz", **base)
    train(folder / "pretrained", "pretrain.py", "--config", config, steps=4000, scale=scale)
    with lzma.open(data / "sudoku" / "kids.csv.xz", "rt") as file:
        puzzles = file.read().splitlines()
    parts = {"train": puzzles[:2000], "validation": puzzles[2000:2100], "test": puzzles[2100:2600]}
    for name, lines in parts.items():
        (folder / f"{name}.csv").write_text("\n".join(lines) + "\n")
    source = ",".join(f"{name}={folder / f'{name}.csv'}" for name in parts)
    results: list[dict[str, object]] = []
    for start in ("pretrained alone", "pretrained", "scratch"):
        run = folder / ("pretrained" if start == "pretrained alone" else f"tuned-{start}")
        if run.name != "pretrained":
            options = ["--from", folder / "pretrained", "--corpus", "sudoku", "--source", source]
            options += ["--set", "evaluation.every=null", "--set", "training.learning_rate=1e-3"]
            options += ["--set", "training.init_from=null"] if start == "scratch" else []
            train(run, "finetune.py", *options, steps=1000, scale=scale)
        cells, whole, rows = completed(run, folder / "tuned-pretrained" / "shards", options_of=folder)
        results.append({"start": start, "cells right": cells, "puzzles right": whole, "puzzles": rows})
    return results


def completed(run: Path, shards: Path, options_of: Path) -> tuple[float, float, int]:
    """Shares of empty cells and of puzzles that the model fills in rightly."""
    if not shards.exists():  # made by the run that is fine-tuned later
        source = ",".join(f"{name}={options_of / f'{name}.csv'}" for name in ("train", "validation", "test"))
        mapping = json.dumps(dict(part.split("=") for part in source.split(",")))
        config = options_of / "config.json"
        call("launchers/prepare_data.py", "--config", config, "--set", f"data.source={mapping}",
             "--set", f"data.shards={shards}")  # fmt: skip
    model, reader = load_trained(run).model, ShardReader(shards, "test")
    right_cells = cells = right = 0
    for batch in evaluation_batches(reader, np.arange(reader.rows, dtype=np.int64), 250):
        maskable, _ = masks_of(batch, reader.manifest)
        found = sample(
            model, Sampler(10, law="margin", temperature=0), Noise(0), batch.positions, batch.tokens, maskable
        )
        same = found == batch.tokens
        right_cells += int((same & maskable).sum())
        cells += int(maskable.sum())
        right += int(same.all(-1).sum())
    return right_cells / cells, right / reader.rows, reader.rows


def network(folder: Path, **data: object) -> Path:
    """A small plain model: 3 layers of 192."""
    values = {
        "data": {**{key: str(v) if isinstance(v, Path) else v for key, v in data.items()},
                 "shards": str(folder / "pretrained-shards")},
        "model": {"layers": 3, "width": 192, "heads": 6},
        "latent": {"width": 0},
        "diffusion": {"objective": "nelbo", "steps": ["inf"]},
        "training": {"steps": 1, "global_batch": 32, "micro_batch": 32, "learning_rate": 1e-3, "lr_schedule": "cosine",
                     "warmup_steps": 50, "betas": [0.9, 0.98], "ema_decay": 0.99, "checkpoint_every": 1000,
                     "keep_checkpoints": 1},
    }  # fmt: skip
    write_json(folder / "config.json", values)
    return folder / "config.json"


def train(run: Path, launcher: str, *options: object, steps: int, scale: float) -> None:
    status = read_status(run)
    if status is not None and status.state == "finished":
        return
    count = max(2, round(steps * scale))
    call(f"launchers/{launcher}", *options, "--output", run, "--set", f"training.steps={count}",
         "--set", "training.micro_batch=32")  # fmt: skip


def call(script: str, *arguments: object) -> None:
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    print("$ " + " ".join(command), file=sys.stderr, flush=True)
    subprocess.run(command, check=True, cwd=Path.cwd())


if __name__ == "__main__":
    main()
