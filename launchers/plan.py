"""A run on paper: does it fit, how fast is it, how long does it take, what does it cost.

    python launchers/plan.py --config configs/openwebtext.json --gpus 8 --gpu h100
    python launchers/plan.py --config configs/openwebtext.json --gpus 512 --gpu h200 --zero 2 --json plan.json
    python launchers/plan.py --config configs/ladder/*.json --gpus 64        several side by side

The GPUs need not be here. Memory of a GPU by part for every ZeRO stage and the largest micro-batch that fits; expected
tokens/s, days and dollars, also with up to thousands of GPUs. What it assumes about machines is in vmd_scale/planning,
with its sources.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from vmd_scale.build import build_architecture
from vmd_scale.commandline import HelpFormatter
from vmd_scale.config_file import load_config
from vmd_scale.errors import UserError, reports_user_errors
from vmd_scale.files import check_writable, write_json
from vmd_scale.planning.describe import describe, describe_several
from vmd_scale.planning.hardware import GPU, GPUS
from vmd_scale.planning.plan import ATTAINED_MFU, Plan
from vmd_scale.tokenization import vocab_size_of


@reports_user_errors
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--config", required=True, nargs="+", metavar="FILE", help="the run's configuration, JSON")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override, may be repeated")
    parser.add_argument("--gpus", type=int, default=8, help="ranks of the run")
    parser.add_argument("--gpu", choices=list(GPUS), default="h100", help="whose peak, memory and links count")
    parser.add_argument("--zero", type=int, choices=[0, 1, 2, 3], help="instead of the configuration's stage")
    parser.add_argument(
        "--mfu", type=float, default=ATTAINED_MFU, help="assumed of computation alone, without communication"
    )
    parser.add_argument("--price", type=float, metavar="DOLLARS", help="of a GPU-hour, instead of a rough one of 2025")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the plan there too")
    args = parser.parse_args()
    if args.gpus < 1:
        raise UserError(f"--gpus {args.gpus}: at least 1")
    if not 0 < args.mfu <= 1:
        raise UserError(f"--mfu {args.mfu}: a number above 0 and at most 1")
    if args.price is not None and not args.price >= 0:
        raise UserError(f"--price {args.price}: dollars, at least 0")
    gpu = GPUS[args.gpu] if args.price is None else replace(GPUS[args.gpu], price=args.price)
    check_writable(args.json, "--json")
    stage = [] if args.zero is None else [f"deepspeed.zero_optimization.stage={args.zero}"]
    plans = {path: plan_of(path, [*args.set, *stage], gpu, args.mfu) for path in args.config}
    (first, *others) = plans.values()
    print(describe_several(plans, args.gpus) if others else describe(first, args.gpus))
    if args.json is not None:
        found = {path: plan.to_dict(args.gpus) for path, plan in plans.items()} if others else first.to_dict(args.gpus)
        write_json(args.json, found)


def plan_of(path: str, overrides: list[str], gpu: GPU, mfu: float) -> Plan:
    config = load_config(path, overrides)
    architecture = build_architecture(config, vocab_size_of(config.data.tokenizer))
    precision = "fp32" if config.training.precision == "fp32" else "bf16"
    return Plan(config, architecture, gpu, precision, mfu)


if __name__ == "__main__":
    main()
