"""Where a run stands, in ``status.json`` of its folder: what a batch script asks when the processes have ended.

Exit codes do not answer that: the deepspeed launcher may return 0 after a failure, and srun returns the code of one
task, perhaps of one that it killed itself. A record that says ``running`` after the end of its processes means: they
died.
"""

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from vmd_scale.files import read_json, write_json

STATUS = "status.json"
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
