"""Parts of the GPU check that start `pretrain.py`: the real thing, with DeepSpeed, its loader, loop and telemetry."""

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from workload import LATENT_WIDTH, LENGTH, ROWS, SIZES, VOCAB

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART, LADDER = ROOT / "configs" / "quickstart.json", ROOT / "configs" / "ladder"


def resumed(tiny: bool) -> dict[str, Any]:
    """ZeRO-1: six steps against three, a checkpoint and three more; bit for bit."""
    with tempfile.TemporaryDirectory() as name:
        folder, losses = Path(name), {}
        for run, stops in (("whole", (6,)), ("resumed", (3, 6))):
            for steps in stops:
                settings = {
                    "data.shards": folder / "shards",
                    "data.row_length": 64 if tiny else 1024,  # a short row's gradient is always the same
                    "training.steps": steps,
                    "training.warmup_steps": 2,
                    "training.lr_schedule": "constant",
                    "training.global_batch": 8,
                    "training.micro_batch": 4,
                    "training.precision": "fp32" if tiny else "bf16",
                    "training.deterministic": "true",
                    "training.checkpoint_every": 3,
                    "evaluation.every": "null",
                    "telemetry.log_every": 1,
                }
                pretrain(folder / run, settings, timeout=120)
            records = (folder / run / "metrics.jsonl").read_text().splitlines()
            losses[run] = [json.loads(record)["loss"] for record in records]
    apart = max(abs(a - b) for a, b in zip(losses["whole"], losses["resumed"], strict=True))
    return {"ok": apart == 0, "largest difference": apart, **losses}


def trained(tiny: bool, size: str, changes: dict[str, Any]) -> dict[str, Any]:
    """ZeRO-1: medians of what a run logs; the most memory that it took, beside what is predicted on paper.

    On a CPU the former is of the whole process, and the latter of its tensors.

    Args:
        size: 110M | 1B, with the encoder that is default; or a file of configs/ladder, as it is.
        changes: other settings.
    """
    config = LADDER / size if size.endswith(".json") else QUICKSTART
    length, vocab, steps = (32, 300, 12) if tiny else (LENGTH, VOCAB, 60)
    with tempfile.TemporaryDirectory() as name:
        folder, generator = Path(name), random.Random(0)
        text = folder / "numbers.txt"
        rows_of_text = (" ".join(str(generator.randrange(vocab)) for _ in range(length)) for _ in range(256))
        text.write_text("\n\n".join(rows_of_text))
        settings = {
            "data.source": text,
            "data.corpus": "text",
            "data.normalizer": "none",
            "data.tokenizer": f"symbols:{vocab}",
            "data.shards": folder / "shards",
            "data.row_length": length,
            "data.workers": 1,
            "data.row_specials": "false",
            "data.validation_documents": "null",
            "training.steps": steps,
            "training.precision": "fp32" if tiny else "bf16",
            "training.checkpoint_every": 10**6,
            "evaluation.every": "null",
            "telemetry.log_every": 5,
            **(model_of(size) if config == QUICKSTART else {"training.global_batch": 32}),
            **(TINY if tiny else {}),
            **changes,
        }
        pretrain(folder / "run", settings, timeout=400, config=config)
        records = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    logged = ("tokens_per_second", "mfu", "data_wait_fraction")
    half = records[len(records) // 2 :]
    found = {key: statistics.median(record[key] or 0.0 for record in half) for key in logged}
    memory = {"peak_memory_gib": records[-1]["peak_memory_gib"], "predicted_memory_gib": predicted(settings, config)}
    return {**found, **memory}


TINY = {
    "model.layers": 2,
    "model.width": 32,
    "model.heads": 2,
    "latent.encoder_layers": 1,
    "latent.encoder_width": 16,
    "training.global_batch": 2,
    "training.micro_batch": 2,
}


def model_of(size: str) -> dict[str, Any]:
    """Settings of a network of this size with the default encoder, all of whose rows are of one micro-batch."""
    layers, width, heads = SIZES[size]
    return {
        "model.layers": layers,
        "model.width": width,
        "model.heads": heads,
        "latent.width": LATENT_WIDTH,
        "latent.encoder_layers": max(1, layers // 4),
        "latent.encoder_width": width // 2,
        "diffusion.objective": "vmd",
        "training.global_batch": ROWS[size],
        "training.micro_batch": ROWS[size],
        "training.compile": "true",
    }


def predicted(settings: dict[str, Any], config_file: Path) -> float:
    """GiB that one rank of such a run takes, by the formulas behind plan.py."""
    from vmd_scale.build import build_architecture
    from vmd_scale.config_file import load_config
    from vmd_scale.planning.memory import memory_of
    from vmd_scale.tokenization import load_tokenizer

    config = load_config(config_file, overrides_of(settings))
    architecture = build_architecture(config, load_tokenizer(config.data.tokenizer).vocab_size)
    memory = memory_of(config, architecture, 1, config.training.precision, torch.cuda.is_available())
    return memory.total / 2**30


def overrides_of(settings: dict[str, Any]) -> list[str]:
    return [f"{key}={value}" for key, value in settings.items()]


def pretrain(run: Path, settings: dict[str, Any], timeout: float, config: Path = QUICKSTART) -> None:
    """
    Raises:
        RuntimeError: it failed; the end of what it said.
    """
    overrides = [part for setting in overrides_of(settings) for part in ("--set", setting)]
    command = [sys.executable, str(ROOT / "launchers" / "pretrain.py"), "--config", str(config), "--output", str(run)]
    command += overrides
    path = os.pathsep.join((*filter(None, [os.environ.get("PYTHONPATH")]), str(ROOT)))
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
