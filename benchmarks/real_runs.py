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

from workload import LATENT_WIDTH

ROOT = Path(__file__).resolve().parents[1]


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


def trained(tiny: bool, changes: dict[str, Any]) -> dict[str, Any]:
    """110 M, ZeRO-1: medians of what a run logs. `changes`: other settings."""
    layers, width, heads, length, vocab, rows, steps = (12, 768, 12, 1024, 50_257, 32, 60)
    if tiny:
        layers, width, heads, length, vocab, rows, steps = (2, 32, 2, 32, 300, 2, 12)
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
            "model.layers": layers,
            "model.width": width,
            "model.heads": heads,
            "latent.width": LATENT_WIDTH,
            "latent.encoder_layers": max(1, layers // 4),
            "latent.encoder_width": width // 2,
            "diffusion.objective": "vmd",
            "training.steps": steps,
            "training.global_batch": rows,
            "training.micro_batch": rows,
            "training.precision": "fp32" if tiny else "bf16",
            "training.checkpoint_every": 10**6,
            "training.compile": "true",
            "evaluation.every": "null",
            "telemetry.log_every": 5,
            **changes,
        }
        pretrain(folder / "run", settings, timeout=200)
        records = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    logged = ("tokens_per_second", "mfu", "data_wait_fraction")
    half = records[len(records) // 2 :]
    return {key: statistics.median(record[key] or 0.0 for record in half) for key in logged}


def pretrain(run: Path, settings: dict[str, Any], timeout: float) -> None:
    """
    Raises:
        RuntimeError: it failed; the end of what it said.
    """
    overrides = [part for k, v in settings.items() for part in ("--set", f"{k}={v}")]
    config = ["--config", str(ROOT / "configs" / "quickstart.json"), "--output", str(run)]
    command = [sys.executable, str(ROOT / "launchers" / "pretrain.py"), *config, *overrides]
    path = os.pathsep.join((*filter(None, [os.environ.get("PYTHONPATH")]), str(ROOT)))
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
