"""Submit a pretraining run to Slurm: checks the configuration, then calls sbatch with launchers/slurm/pretrain.sbatch.

    python launchers/slurm/submit.py --config configs/lm1b.json --nodes 2 --gpus-per-node 4 --time 24:00:00
    ... --dry-run                              print the command, submit nothing
    ... --chain 5                              5 jobs, one after the other, where jobs may not requeue themselves
    ... --gpus-per-node 0 --ranks-per-node 4   nodes without GPUs
    ... --sbatch=--constraint=h100             any other option of sbatch
    ... --sbatch=--array=0-2 --output runs/seed%a --set training.seed=%a      three runs; %a is the element's number

A job that is stopped before its time limit, or that loses a node, requeues itself until the run is finished. With
--chain nothing is requeued: the next job of the chain continues where the last one was stopped, and those that find the
run finished end at once. Bad input: one line and exit code 2, before anything is in the queue.
"""

import argparse
import re
import shlex
import subprocess
from pathlib import Path

from vmd_scale.commandline import HelpFormatter
from vmd_scale.config_file import load_config
from vmd_scale.errors import UserError, reports_user_errors

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path("launchers/slurm/pretrain.sbatch")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    run = parser.add_argument_group("the run, as in launchers/pretrain.py")
    run.add_argument("--config", required=True, metavar="FILE", help="the run's configuration, JSON")
    run.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override, may be repeated")
    run.add_argument("--output", type=Path, metavar="DIR", help="run folder; default: runs/NAME-OF-CONFIG")
    job = parser.add_argument_group("the job")
    job.add_argument("--nodes", type=int, default=1, metavar="N", help="nodes of a job")
    job.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="one rank for each")
    job.add_argument("--ranks-per-node", type=int, metavar="N", help="with --gpus-per-node 0 only; default: 1")
    job.add_argument("--cpus-per-rank", type=int, default=8, metavar="N", help="cores")
    job.add_argument("--time", default="24:00:00", metavar="LIMIT", help="as sbatch takes it")
    job.add_argument("--partition", metavar="NAME", help="default: the cluster's")
    job.add_argument("--account", metavar="NAME", help="default: yours")
    job.add_argument("--chain", type=int, default=1, metavar="N", help="N jobs, each after the one before")
    job.add_argument(
        "--stop-before", type=int, default=120, metavar="SECONDS", help="write a checkpoint so long before the limit"
    )
    job.add_argument("--launcher", choices=["srun", "deepspeed"], default="srun", help="what starts ranks on a node")
    job.add_argument("--sbatch", action="append", default=[], metavar="OPTION", help="another option, may be repeated")
    parser.add_argument("--dry-run", action="store_true", help="print the commands, submit nothing")
    return parser.parse_args()


@reports_user_errors
def main() -> None:
    args = parse()
    run = args.output or Path("runs") / Path(args.config).stem
    check(args, run)
    logs = log_folder(run)
    if not args.dry_run:
        logs.mkdir(parents=True, exist_ok=True)  # sbatch makes no folder for --output
    job = first = ""
    for link in range(args.chain):
        command = sbatch_command(args, run, after=job)
        if args.dry_run:
            print(shlex.join(command))
            job = f"JOB{link + 1}"
        else:
            job = submit(command)
            first = first or job
            print(f"job {job}" + (f", {link + 1} of {args.chain}" if args.chain > 1 else ""))
    if not args.dry_run:
        print(f"logs: {logs}/    queue: squeue --me    stop with a checkpoint: scancel --signal=USR1 {first}")


def check(args: argparse.Namespace, run: Path) -> None:
    """What would otherwise be found out when the job has waited for its turn.

    Raises:
        UserError: names the option or key.
    """
    for name in ("nodes", "cpus_per_rank", "chain", "stop_before"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, found {getattr(args, name)}")
    if args.gpus_per_node < 0:
        raise UserError(f"--gpus-per-node must not be negative, found {args.gpus_per_node}")
    if args.gpus_per_node and args.ranks_per_node is not None:
        raise UserError("--ranks-per-node is for nodes without GPUs (--gpus-per-node 0); each GPU has one rank")
    if args.ranks_per_node is not None and args.ranks_per_node < 1:
        raise UserError(f"--ranks-per-node must be at least 1, found {args.ranks_per_node}")
    if Path.cwd() != ROOT:
        raise UserError(f"call this from the root of the repository, {ROOT}: paths are relative to it in the job too")
    limit = seconds(args.time)
    if limit is not None and limit <= args.stop_before:
        raise UserError(f"--time {args.time} leaves no time before --stop-before {args.stop_before} seconds")
    element = next((match[1] for option in args.sbatch if (match := re.match(r"--array=(\d+)", option))), None)
    asked = [args.config, *args.set]
    if element is None and any("%a" in text for text in [*asked, str(run)]):
        raise UserError("%a stands for the number of an element of a job array: add --sbatch=--array=FIRST-LAST")
    if any("%a" in text for text in asked) and "%a" not in str(run):
        raise UserError("%a makes several runs, and each needs a folder of its own: --output runs/NAME%a")
    path, *overrides = (text.replace("%a", element or "") for text in asked)
    config = load_config(path, overrides)

    from vmd_scale.training.start import check_settings  # imports torch: after all that is quick

    precision = config.training.precision
    if precision == "auto":
        precision = "bf16" if args.gpus_per_node else "fp32"
    check_settings(config, args.nodes * ranks_per_node(args), precision)


def log_folder(run: Path) -> Path:
    """Where Slurm writes the output of jobs: of a job array, beside the folders of its elements."""
    whole = next(folder for folder in (run, *run.parents) if "%a" not in str(folder))
    return whole / "slurm"


def seconds(limit: str) -> int | None:
    """A time limit in one of Slurm's forms: minutes, [[hours:]minutes:]seconds or days-hours[:minutes[:seconds]].

    Raises:
        UserError: another form.
    """
    if limit.upper() in ("UNLIMITED", "INFINITE"):
        return None
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", limit)
    if match is None:
        raise UserError(f"--time {limit!r}: expected MINUTES, HOURS:MINUTES:SECONDS or DAYS-HOURS:MINUTES:SECONDS")
    days, *parts = (int(part) if part else 0 for part in match.groups())
    if match[1] is None and match[4] is None:  # minutes[:seconds]
        parts = [0, *parts[:2]]
    return days * 86400 + parts[0] * 3600 + parts[1] * 60 + parts[2]


def ranks_per_node(args: argparse.Namespace) -> int:
    return args.gpus_per_node or args.ranks_per_node or 1


def sbatch_command(args: argparse.Namespace, run: Path, after: str = "") -> list[str]:
    """One job; `after` is the job that has to end first."""
    name = "%A_%a" if "%a" in str(run) else "%j"
    command = ["sbatch", "--parsable", f"--job-name={run.name}", f"--output={log_folder(run)}/{name}.out"]
    command += [f"--nodes={args.nodes}", f"--gpus-per-node={args.gpus_per_node}"]
    command += [f"--ntasks-per-node={ranks_per_node(args)}", f"--cpus-per-task={args.cpus_per_rank}"]
    command += [f"--time={args.time}", f"--signal=USR1@{args.stop_before}"]
    command += [f"--export=ALL,LAUNCHER={args.launcher},STOP_BEFORE_END={args.stop_before}"]
    command += [f"--{name}={getattr(args, name)}" for name in ("partition", "account") if getattr(args, name)]
    if args.chain > 1:
        command += ["--no-requeue"]
    if after:
        command += [f"--dependency=afterany:{after}"]
    command += [*args.sbatch, str(SCRIPT), "--config", args.config, "--output", str(run)]
    return command + [part for override in args.set for part in ("--set", override)]


def submit(command: list[str]) -> str:
    """Call sbatch. Returns the job's number.

    Raises:
        UserError: there is no sbatch here, or it refuses.
    """
    try:
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UserError("no sbatch on this machine: call this where jobs are submitted, or add --dry-run") from None
    if finished.returncode:
        raise UserError(f"sbatch refuses: {' '.join(finished.stderr.split())}")
    return finished.stdout.strip().split(";")[0]  # JOB;CLUSTER where there are several


if __name__ == "__main__":
    main()
