"""Pretrain a variational masked diffusion language model.

    deepspeed launchers/pretrain.py --config configs/lm1b.json                 all GPUs of this machine
    deepspeed --num_gpus 2 launchers/pretrain.py --config configs/lm1b.json    two ranks
    python launchers/pretrain.py --config configs/quickstart.json              one process
    torchrun --nproc-per-node 2 launchers/pretrain.py --config ...             likewise, and under srun
    ... --set training.micro_batch=16 --set model.layers=6                     any key can be overridden

Run again with the same --output, it continues from its newest whole checkpoint. After SIGTERM, SIGUSR1 or when
a file named STOP appears in the run folder, it writes a checkpoint and exits with code 75. Bad input: exit code 2.
"""

import argparse
import sys
from pathlib import Path

from vmd_scale.commandline import HelpFormatter, check_at_least
from vmd_scale.config import Config
from vmd_scale.config_file import load_config
from vmd_scale.errors import UserError, reports_user_errors
from vmd_scale.tokenization import load_tokenizer, vocab_size_of
from vmd_scale.training.launch import rank_from_environment, world_size_from_environment


@reports_user_errors
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--config", required=True, metavar="FILE", help="the run's configuration, JSON")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override, may be repeated")
    parser.add_argument("--output", type=Path, metavar="DIR", help="run folder; default: runs/NAME-OF-CONFIG")
    parser.add_argument(
        "--resume",
        choices=["auto", "never"],
        default="auto",
        help="never: fail if the folder holds checkpoints already",
    )
    parser.add_argument("--dry-run", action="store_true", help="print parameters, memory, FLOPs and hours, then stop")
    parser.add_argument("--ranks", type=int, metavar="N", help="with --dry-run: plan for N ranks")
    parser.add_argument(
        "--preview", action="store_true", help="prepare the data, print decoded rows, clean and masked, then stop"
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    args = parser.parse_args()

    check_at_least(args, ranks=1)
    if args.ranks is not None and not args.dry_run:
        raise UserError(f"--ranks {args.ranks}: only with --dry-run; a run has the ranks that its launcher starts")
    config = load_config(args.config, args.set)
    if args.dry_run or args.preview:
        if rank_from_environment() == 0:
            print(dry_run(config, args.ranks) if args.dry_run else show_rows(config))
    else:
        sys.exit(run(config, args.output or Path("runs") / Path(args.config).stem, args.resume))


def dry_run(config: Config, ranks: int | None) -> str:
    import torch

    from vmd_scale.build import build_architecture
    from vmd_scale.planning.describe import describe_run
    from vmd_scale.planning.hardware import peak_flops
    from vmd_scale.training.engine import resolve_precision
    from vmd_scale.training.start import check_attention, check_before_start

    check_before_start(config, ranks)
    check_attention(config)
    world_size = ranks or world_size_from_environment()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = resolve_precision(config, device)
    architecture = build_architecture(config, vocab_size_of(config.data.tokenizer))
    on_gpu = device.type == "cuda"
    return describe_run(config, architecture, world_size, precision, on_gpu, peak_flops(device, precision))


def show_rows(config: Config) -> str:
    from vmd_scale.data.prepare import prepare_all
    from vmd_scale.preview import preview

    prepare_all(config.data)
    return preview(config, load_tokenizer(config.data.tokenizer))


def run(config: Config, output: Path, resume: str) -> int:
    from vmd_scale.checkpoints import all_checkpoints
    from vmd_scale.training.start import start

    if resume == "never" and all_checkpoints(output / "checkpoints"):
        raise UserError(f"--resume never, but {output} holds a run already; choose another --output")
    return start(config, output)


if __name__ == "__main__":
    main()
