"""What the encoder's size buys: bounds on validation characters after the same training, beside the cost of a step.

    python benchmarks/encoder.py --json encoder.json                                the quickstart's characters
    python benchmarks/encoder.py --encoder 1x64 --encoder 2x128 --set training.steps=3000

Each encoder, LAYERSxWIDTH, is trained by pretrain.py from the same configuration, with each of the seeds; `none` has no
latent. Characters come in blocks of four, each in T steps; training is for T = 1, where only a latent can know what one
character says of the next. `share` is the encoder's part of the FLOPs of a step, `tokens/s` what the runs logged (the
median); in brackets the spread over the seeds.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from comparing import Report, table

from vmd_scale.build import build_architecture
from vmd_scale.config_file import load_config
from vmd_scale.planning.flops import FlopsPerToken
from vmd_scale.planning.workload import masked_share
from vmd_scale.tokenization import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "quickstart.json"
SETTINGS = (
    "diffusion.block_size=4",
    "diffusion.steps=1",
    "diffusion.kl_weight.warmup_steps=400",
    "latent.scope=block",
    "training.steps=800",
    "training.checkpoint_every=1000000",
    "evaluation.steps=1,2",
    "evaluation.rows=1024",
    "training.keep_checkpoints=1",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", action="append", metavar="LAYERSxWIDTH")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--folder", type=Path, default=Path("runs/encoder-benchmark"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    common = [*SETTINGS, f"data.shards={args.folder / 'shards'}", *args.set]
    report = Report(__doc__, args.json, settings=common, seeds=args.seeds)
    rows, encoders = [], {}
    for encoder in args.encoder or ["none", "1x32", "1x64", "1x128", "2x128"]:
        settings = [*common, *settings_of(encoder)]
        runs = [train(settings, seed, args.folder / f"{encoder}-{seed}") for seed in range(args.seeds)]
        found = {steps: [bounds[steps] for bounds, _ in runs] for steps in runs[0][0]}
        speed = statistics.median(speed for _, speed in runs)
        config = load_config(CONFIG, settings)
        masked = masked_share(config)
        flops = FlopsPerToken.of(build_architecture(config, load_tokenizer(config.data.tokenizer).vocab_size), masked)
        share = flops.encoder / flops.total
        encoders[encoder] = {"share": share, "tokens_per_second": speed, "bits_per_token": found}
        rows.append((encoder, f"{share:.0%}", speed, *(_cell(values) for values in found.values())))
        report.save("encoders", encoders)
    report.add(
        "encoders", encoders, table(("encoder", "share", "tokens/s", *(f"T = {steps}" for steps in found)), rows)
    )


def settings_of(encoder: str) -> list[str]:
    if encoder == "none":
        return ["latent.width=0"]
    layers, width = encoder.split("x")
    return [f"latent.encoder_layers={layers}", f"latent.encoder_width={width}"]


def train(settings: list[str], seed: int, run: Path) -> tuple[dict[str, float], float]:
    """Validation bounds, bits per token by T, at the end of a run; and its tokens per second."""
    shutil.rmtree(run, ignore_errors=True)
    steps = load_config(CONFIG, settings).training.steps
    every = [*settings, f"training.seed={seed}", f"evaluation.every={steps}"]
    command = [sys.executable, str(ROOT / "launchers" / "pretrain.py"), "--config", str(CONFIG), "--output", str(run)]
    subprocess.run([*command, *(part for s in every for part in ("--set", s))], check=True, stderr=subprocess.DEVNULL)
    bounds, steps_made = (
        [json.loads(line) for line in (run / name).read_text().splitlines()]
        for name in ("evaluations.jsonl", "metrics.jsonl")
    )
    speed = statistics.median(record["tokens_per_second"] for record in steps_made)
    return {str(record["steps"]): record["bits_per_token"] for record in bounds}, speed


def _cell(values: list[float]) -> str:
    spread = f" ({max(values) - min(values):.3f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


if __name__ == "__main__":
    main()
