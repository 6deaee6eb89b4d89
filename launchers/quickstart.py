"""The whole path on the documentation that comes with Python: from text to exported weights and a report.

    python launchers/quickstart.py                              about four minutes on two CPU cores, offline
    python launchers/quickstart.py --set training.steps=5000    another setting, in an empty folder

If it is interrupted, run it again and it continues: a step whose result is newer than what it was made from is not made
again. Everything lands in quickstart/.
"""

import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import torch

from vmd_scale.checkpoints import find_checkpoint, whole_checkpoints
from vmd_scale.commandline import HelpFormatter
from vmd_scale.config_file import load_config
from vmd_scale.data.manifest import read_manifest
from vmd_scale.errors import UserError, reports_user_errors
from vmd_scale.training.launch import free_port

LAUNCHERS = Path(__file__).resolve().parent
CONFIG = LAUNCHERS.parent / "configs" / "quickstart.json"
FOLDER = Path("quickstart")
RUN, EXPORTED = FOLDER / "run", FOLDER / "exported"


@reports_user_errors
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override any key")
    overrides = parser.parse_args().set
    settings = [part for override in overrides for part in ("--set", override)]
    config = load_config(CONFIG, overrides)
    shards = Path(config.data.shards)
    say("shards of the embedded corpus")
    python("prepare_data.py", "--config", CONFIG, *settings)
    unigram = read_manifest(shards).splits["validation"].unigram_entropy / math.log(2)

    say("pretraining by the deepspeed launcher")
    wanted = f"step-{config.training.steps:08d}"
    if not any(path.name >= wanted for path in whole_checkpoints(RUN / "checkpoints")):
        pretrain(settings)
    if find_checkpoint(RUN).name < wanted:  # the launcher may exit with 0 after a failure
        raise UserError(f"pretraining ended before step {config.training.steps}; see {RUN / 'log.txt'} and run again")
    trained = find_checkpoint(RUN) / "manifest.json"

    say("bounds on the validation split")
    evaluation, by_k = RUN / "evaluation.json", RUN / "by_k.json"
    if is_older(evaluation, trained):
        bound = ("evaluate.py", "--checkpoint", RUN)
        python(*bound, "--steps", "1,4", "--k", "1,4,16", "--rows", "192", "--json", by_k)
        python(*bound, "--steps", "1,4,16,64,inf", "--draws", "2", "--json", evaluation)

    say("samples")
    if is_older(RUN / "samples.json", trained):
        python("sample.py", "--checkpoint", RUN, "--steps", "1,4,16,64", "--count", "4", "--json", RUN / "samples.json")

    say("export")
    if is_older(EXPORTED / "config.json", evaluation):
        python("export.py", "--checkpoint", RUN, "--output", EXPORTED, "--encoder", "--evaluation", evaluation)

    say("report")
    python("report.py", RUN)

    print(f"\nvalidation bits per character; the unigram entropy is {unigram:.4f}")
    print(f"{'T':>6} {'K':>4} {'bits':>8} {'+-':>7} {'rows':>6}")
    for r in json.loads(evaluation.read_text()) + json.loads(by_k.read_text()):
        error = r["standard_error"] / math.log(2)
        print(f"{r['steps']:>6} {r['k']:>4} {r['bits_per_token']:>8.4f} {error:>7.4f} {r['rows']:>6}")
    print("\nwhat            where")
    for what, where in (
        ("shards", shards),
        ("run, metrics", RUN / "metrics.jsonl"),
        ("checkpoints", RUN / "checkpoints"),
        ("bounds", evaluation),
        ("bounds by K", by_k),
        ("samples", RUN / "samples.json"),
        ("exported model", EXPORTED),
        ("report", RUN / "report.html"),
    ):
        print(f"{what:<15} {where}")


def pretrain(settings: list[str]) -> None:
    """Two ranks, on GPUs where there are some; as a user would start it."""
    ranks = min(torch.cuda.device_count(), 2) or 2
    deepspeed = Path(sys.executable).with_name("deepspeed")
    arguments = ["--num_gpus", str(ranks), "--master_port", str(free_port()), str(LAUNCHERS / "pretrain.py")]
    call([str(deepspeed), *arguments, "--config", str(CONFIG), "--output", str(RUN), *settings])


def python(launcher: str, *arguments: str | Path) -> None:
    call([sys.executable, str(LAUNCHERS / launcher), *map(str, arguments)])


def call(command: list[str]) -> None:
    print("$ " + " ".join(command), flush=True)
    environment = os.environ if torch.cuda.is_available() else {**os.environ, "DS_ACCELERATOR": "cpu"}
    code = subprocess.run(command, env=environment).returncode
    if code:
        raise UserError(f"exit code {code} from: {' '.join(command)}")


def is_older(target: Path, source: Path) -> bool:
    return not target.exists() or target.stat().st_mtime < source.stat().st_mtime


def say(what: str) -> None:
    print(f"\n== {what}", flush=True)


if __name__ == "__main__":
    main()
