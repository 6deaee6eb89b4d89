"""Who am I in this job? Started by deepspeed, torchrun, srun or plain python, the answer has one form."""

import io
import logging
import os
import re
import socket
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from vmd_scale.errors import RunFailed, UserError
from vmd_scale.training.orphans import launchers_above

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed reads it when it is imported, below

Answer = TypeVar("Answer")
COLLECTIVE_TIMEOUT = timedelta(minutes=30)
_added: dict[str, str] = {}  # what `join_world` put into the environment
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class World:
    rank: int
    local_rank: int
    size: int
    device: torch.device
    host_group: dist.ProcessGroup  # gloo: agreement between ranks without touching a GPU
    launchers: list[int] = field(default_factory=launchers_above)  # looked up early: preparing data may take hours

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def any(self, *mine: bool) -> list[bool]:
        """For each question: true on every rank if it is true on any. One small collective."""
        return self.ask_any(*mine)()

    def ask_any(self, *mine: bool) -> Callable[[], list[bool]]:
        """The same, without waiting for the others: what is returned is called for the answer.

        Of a thousand ranks it takes tens of milliseconds, in which there may be something else to do.
        """
        flags = torch.tensor(mine, dtype=torch.int32)
        asked = dist.all_reduce(flags, dist.ReduceOp.MAX, group=self.host_group, async_op=True)

        def answer() -> list[bool]:
            asked.wait()
            return flags.bool().tolist()

        return answer

    def first_problem(self, mine: str | None, group: dist.ProcessGroup | None = None) -> str | None:
        """What went wrong on the lowest rank on which something did; the same answer on every rank.

        Args:
            group: of all ranks, with a timeout of its own; None is `host_group`.
        """
        problems: list[str | None] = [None] * self.size
        dist.all_gather_object(problems, mine, group=group or self.host_group)
        return next((p for p in problems if p is not None), None)

    def on_main(self, do: Callable[[], object], group: dist.ProcessGroup | None = None) -> None:
        """Do something on rank 0; where it fails, all ranks raise its error.

        Args:
            group: of all ranks, with a timeout of its own; None is `host_group`.
        """
        problem = [_failure(do) if self.is_main else None]
        dist.broadcast_object_list(problem, src=0, group=group or self.host_group)
        if problem[0] is not None:
            raise problem[0]

    def from_main(self, find: Callable[[], Answer]) -> Answer:
        """What rank 0 finds, on every rank; where it fails, all ranks raise its error."""
        answer: list[Any] = [None]

        def ask() -> None:
            answer[0] = find()

        self.on_main(ask)
        dist.broadcast_object_list(answer, src=0, group=self.host_group)
        return answer[0]

    def on_all(self, do: Callable[[], object], group: dist.ProcessGroup | None = None) -> None:
        """Do something on every rank. It may fail on one node only; then all ranks raise the error."""
        problems: list[UserError | RunFailed | None] = [None] * self.size
        dist.all_gather_object(problems, _failure(do), group=group or self.host_group)
        for problem in problems:
            if problem is not None:
                raise problem

    def barrier(self) -> None:
        dist.barrier(group=self.host_group)


def _failure(do: Callable[[], object]) -> UserError | RunFailed | None:
    try:
        do()
    except (UserError, RunFailed) as error:
        return error
    except OSError as error:
        return UserError(str(error))
    except Exception as error:  # the other ranks must not wait for one that is gone
        log.exception("this rank failed")
        return RunFailed(f"{type(error).__name__}: {error}")
    return None


def rank_from_environment() -> int:
    """This process' rank, before anything is initialized."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0) if _under_srun() else 0))


def world_size_from_environment() -> int:
    """Number of ranks, before anything is initialized."""
    return int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_STEP_NUM_TASKS", 1) if _under_srun() else 1))


def join_world(timeout: timedelta = COLLECTIVE_TIMEOUT) -> World:
    """Initialize torch.distributed through DeepSpeed and choose this rank's device and number of threads.

    Args:
        timeout: of a collective. Longer than `training.hang_timeout`, it leaves a hang to the watchdog, who knows more.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # of calls by DeepSpeed
    beside = str(Path(sys.executable).parent)  # ninja is there, which DeepSpeed calls by name
    built = Path(sys.prefix) / "torch_extensions"  # DeepSpeed's CPU op, compiled by `make setup`
    if built.is_dir():
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(built))
    os.environ["PATH"] = os.pathsep.join((beside, os.environ.get("PATH", "")))
    _added.update({key: value for key, value in _environment().items() if key not in os.environ})
    os.environ.update(_added)
    local_rank = int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
        device = torch.device("cuda", local_rank)
    else:
        device = torch.device("cpu")
        if "OMP_NUM_THREADS" not in os.environ:
            local_size = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", 1)))
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size))
    backend = get_accelerator().communication_backend_name() if device.type == "cuda" else "gloo"
    with redirect_stdout(io.StringIO()):  # each rank would say that an op was built
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False, timeout=timeout)
    group = dist.new_group(backend="gloo", timeout=timeout)
    return World(dist.get_rank(), local_rank, dist.get_world_size(), device, group)


@contextmanager
def joined_world(timeout: timedelta = COLLECTIVE_TIMEOUT) -> Iterator[World]:
    """`join_world`, and in the end `leave_world`.

    Not on GPUs after an error: NCCL's farewell waits for all ranks, and one that fails by itself would wait in it,
    before it has said why, until the others give up.
    """
    world, failed = join_world(timeout), True
    try:
        yield world
        failed = False
    finally:
        if not failed or world.device.type != "cuda":
            leave_world()


def leave_world() -> None:
    """Undo `join_world`, so that this process, or one that it starts, can join another world."""
    import deepspeed.comm

    if dist.is_initialized():
        deepspeed.comm.destroy_process_group()  # which also lets DeepSpeed forget groups of this world
    for key in _added:
        os.environ.pop(key, None)
    _added.clear()


def _under_srun() -> bool:
    """srun sets the number of tasks of the step; the batch script itself is no step of ours."""
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", "0")) > 1


def _environment() -> dict[str, str]:
    """RANK and its siblings, for the ways to start that do not set them."""
    if "RANK" in os.environ:
        return {}
    if _under_srun():
        return {
            "RANK": os.environ["SLURM_PROCID"],
            # A task that was given one GPU of its own sees it as number 0.
            "LOCAL_RANK": "0" if torch.cuda.device_count() == 1 else os.environ["SLURM_LOCALID"],
            "WORLD_SIZE": os.environ["SLURM_STEP_NUM_TASKS"],
            "LOCAL_WORLD_SIZE": os.environ.get("SLURM_STEP_TASKS_PER_NODE", "1").split("(")[0].split(",")[0],
            "MASTER_ADDR": first_host(os.environ["SLURM_STEP_NODELIST"]),
            "MASTER_PORT": str(step_port(int(os.environ["SLURM_JOB_ID"]), int(os.environ.get("SLURM_STEP_ID", 0)))),
        }
    return {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }


def free_port() -> int:
    """One of this machine, for ranks that all run on it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def step_port(job: int, step: int) -> int:
    """The same on all ranks without asking, another for each job and step that may share a node.

    Elements of a job array have job numbers of their own. Below 32768, where Linux takes ports for outgoing
    connections from.
    """
    return 12000 + (31 * job + step) % 20000


def first_host(nodelist: str) -> str:
    """The first name in Slurm's compact form: ``gpu[007-010,12]-ib,x1`` -> ``gpu007-ib``."""
    match = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodelist)
    if match is None:
        raise ValueError(f"not a Slurm node list: {nodelist!r}")
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", match[0])
