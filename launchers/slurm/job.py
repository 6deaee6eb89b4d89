"""What pretrain.sbatch asks before and after its step. Not meant to be called by hand.

job.py before ARGUMENTS-OF-PRETRAIN...    three lines: run folder, "go" or "finished", a free port
job.py after RUN                          one line: finished | stopped | asked | died, and what happened in words
"""

import os
import socket
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path

from vmd_scale.config_file import load_config
from vmd_scale.errors import UserError, reports_user_errors
from vmd_scale.tokenization import load_tokenizer
from vmd_scale.training.preemption import BY_FILE
from vmd_scale.training.same_run import check_newest
from vmd_scale.training.status import read_status, this_start


@reports_user_errors
def main() -> None:
    if sys.argv[1:2] == ["after"] and len(sys.argv) == 3:
        print(after(Path(sys.argv[2])))
    elif sys.argv[1:2] == ["before"]:
        print(*before(sys.argv[2:]), sep="\n")
    else:
        raise UserError("job.py is for pretrain.sbatch; to submit a run: python launchers/slurm/submit.py --help")


def before(arguments: list[str]) -> tuple[Path, str, int]:
    """Run folder, whether there is anything to do, and a port on this node, which is the first of the job.

    Raises:
        UserError: bad input, another job is at work in the folder, or another experiment has finished in it.
    """
    parser = ArgumentParser(prog="pretrain.sbatch", add_help=False)
    parser.add_argument("--config")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--output", type=Path)
    args, _ = parser.parse_known_args(arguments)  # the others are for pretrain.py to judge
    if args.config is None:
        raise UserError("--config FILE is missing: sbatch launchers/slurm/pretrain.sbatch --config FILE ...")
    config = load_config(args.config, args.set)
    run = args.output or Path("runs") / Path(args.config).stem
    status = read_status(run)
    if status is not None and status.state == "finished" and status.step >= config.training.steps:
        check_newest(config, load_tokenizer(config.data.tokenizer).fingerprint, run)  # or another one is finished
        return run, "finished", 0
    if status is not None and status.state == "running":
        job = status.start.split(".")[0]
        if job not in ("", os.environ["SLURM_JOB_ID"]) and job_is_running(job):
            raise UserError(f"job {job} is already running in {run}; two would overwrite each other's files")
    return run, "go", free_port(12000 + int(os.environ["SLURM_JOB_ID"]) % 20000)


def job_is_running(job: str) -> bool:
    queue = subprocess.run(
        ["squeue", "--noheader", f"--jobs={job}", "--format=%T"], capture_output=True, text=True, check=False
    )
    return queue.stdout.split() == ["RUNNING"]


def free_port(start: int) -> int:
    """The first that nobody listens on: jobs that share a node start from different numbers."""
    for port in range(start, start + 100):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise UserError(f"no free port from {start} to {start + 99} on {socket.gethostname()}")


def after(run: Path) -> str:
    """The verdict and its reason. Only what this start of this job wrote counts: an older record proves nothing."""
    status = read_status(run)
    if status is None or status.start != this_start():
        return "died the processes ended before their first step"
    if status.state == "running":
        return f"died the processes ended between checkpoints; they had started from step {status.step}"
    if status.state == "failed":
        return f"died {status.reason}"
    if status.state == "finished":
        return f"finished {status.step} steps are done"
    verdict = "asked" if status.reason == BY_FILE else "stopped"
    return f"{verdict} stopped by {status.reason}: the checkpoint of step {status.step} is written"


if __name__ == "__main__":
    main()
