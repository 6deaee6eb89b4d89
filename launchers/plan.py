"""What a run would cost on GPUs that need not be here.

    python launchers/plan.py --config configs/openwebtext.json --gpus 8 --gpu h100
    python launchers/plan.py --config configs/openwebtext.json --gpus 512 --gpu h200 --zero 2 --json plan.json

Memory of a GPU by part for every ZeRO stage and the largest micro-batch that fits; expected tokens/s, days and dollars,
also with up to thousands of GPUs. What it assumes about machines is in vmd_scale/planning, with its sources.
"""

import argparse
import json
from pathlib import Path

from vmd_scale.build import build_architecture
from vmd_scale.commandline import HelpFormatter
from vmd_scale.config_file import load_config
from vmd_scale.errors import UserError, reports_user_errors
from vmd_scale.files import write_atomically
from vmd_scale.planning.hardware import GPUS
from vmd_scale.planning.plan import ATTAINED_MFU, Plan, describe
from vmd_scale.tokenization import vocab_size_of


@reports_user_errors
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--config", required=True, metavar="FILE", help="the run's configuration, JSON")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override, may be repeated")
    parser.add_argument("--gpus", type=int, default=8, help="ranks of the run")
    parser.add_argument("--gpu", choices=list(GPUS), default="h100", help="whose peak, memory and links count")
    parser.add_argument("--zero", type=int, choices=[0, 1, 2, 3], help="instead of the configuration's stage")
    parser.add_argument(
        "--mfu", type=float, default=ATTAINED_MFU, help="assumed of computation alone, without communication"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the plan there too")
    args = parser.parse_args()
    if args.gpus < 1:
        raise UserError(f"--gpus {args.gpus}: at least 1")
    if not 0 < args.mfu <= 1:
        raise UserError(f"--mfu {args.mfu}: a number above 0 and at most 1")
    stage = [] if args.zero is None else [f"deepspeed.zero_optimization.stage={args.zero}"]
    config = load_config(args.config, [*args.set, *stage])
    architecture = build_architecture(config, vocab_size_of(config.data.tokenizer))
    precision = "fp32" if config.training.precision == "fp32" else "bf16"
    plan = Plan(config, architecture, GPUS[args.gpu], precision, args.mfu)
    print(describe(plan, args.gpus))
    if args.json is not None:
        write_atomically(args.json, json.dumps(plan.to_dict(args.gpus), indent=2) + "\n")


if __name__ == "__main__":
    main()
