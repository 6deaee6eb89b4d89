"""Where a run stands, in ``status.json`` of its folder: what a batch script asks when the processes have ended.

Exit codes do not answer that: the deepspeed launcher may return 0 after a failure, and srun returns the code of one
task, perhaps of one that it killed itself. A record that says ``running`` after the end of its processes means: they
died.
"""

import fcntl
import os
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from vmd_scale.files import read_json, write_json
from vmd_scale.training.lock import LOCK

STATUS = "status.json"
SILENCE = 3600.0  # seconds: no run that is alive writes nothing for so long
State = Literal["running", "stopped", "finished", "failed"]


@dataclass(frozen=True)
class Status:
    state: State
    step: int  # of the checkpoint that the run started from, stopped at or finished with
    reason: str = ""  # what stopped it, or why it failed
    start: str = ""  # who wrote this: `this_start` of that time


def this_start() -> str:
    """Names one start of a batch job, ``JOB.RESTARTS``: a requeued job keeps its number. Empty outside of Slurm."""
    job = os.environ.get("SLURM_JOB_ID")
    return f"{job}.{os.environ.get('SLURM_RESTART_COUNT', '0')}" if job else ""


def write_status(run_folder: Path, state: State, step: int, reason: str = "") -> None:
    """To be called by rank 0 only."""
    write_json(run_folder / STATUS, asdict(Status(state, step, reason, this_start())))


def read_status(run_folder: Path) -> Status | None:
    """None where no step was ever tried.

    Raises:
        UserError: the file is not ours.
    """
    path = run_folder / STATUS
    return read_json(path, Status) if path.exists() else None


def has_died(run_folder: Path, status: Status | None) -> bool:
    """Whether `status` says ``running`` of processes that are gone: killed, or out of memory.

    Rank 0 of a run holds a lock, which a node may see of its own processes only. Where it tells nothing, a run has died
    that wrote nothing for `SILENCE`.
    """
    if status is None or status.state != "running":
        return False
    try:
        with open(run_folder / LOCK, encoding="utf-8") as file:
            holder = file.read()
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            if socket.gethostname() in holder.replace(",", " ").split():
                return True
    except BlockingIOError:
        return False
    except OSError:  # no such file; no locks
        pass
    written = [path.stat().st_mtime for path in (run_folder / STATUS, *run_folder.glob("*.jsonl"))]
    return time.time() - max(written) > SILENCE
