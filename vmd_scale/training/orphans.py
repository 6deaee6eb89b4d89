"""Does the launcher that started this rank still live?

A signal that kills deepspeed or torchrun (any but SIGTERM and SIGINT; SIGTERM too, for deepspeed) does not reach the
ranks: they would train on, held by nobody, with the run folder locked. The kernel gives an orphan another parent, which
is how it is noticed. Nothing is known of launchers on other nodes: their own ranks notice them.
"""

import os
from pathlib import Path

LAUNCHERS = {"deepspeed", "deepspeed.launcher.runner", "deepspeed.launcher.launch"}
LAUNCHERS |= {"torchrun", "torch.distributed.run", "torch.distributed.launch"}


def launchers_above() -> list[int]:
    """This process' ancestors up to the outermost launcher, nearest first; none where there is no launcher.

    Nor where there is no /proc. A shell or a terminal above is no launcher: a run may outlive them.
    """
    chain: list[int] = []
    pid, outermost = os.getppid(), 0
    while pid > 1:
        chain.append(pid)
        if is_launcher(_command(pid)):
            outermost = len(chain)
        pid = _parent(pid)
    return chain[:outermost]


def are_above(chain: list[int]) -> bool:
    """Whether these are our ancestors still. A few microseconds."""
    parents = (_parent(pid) for pid in chain[:-1])
    return not chain or (os.getppid() == chain[0] and all(p == q for p, q in zip(parents, chain[1:], strict=True)))


def is_launcher(command: list[str]) -> bool:
    """By a process' arguments: ``deepspeed ...``, ``python deepspeed ...``, ``python -u -m torch.distributed.run``."""
    return any(Path(word).name in LAUNCHERS for word in command[:4])


def _command(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
    except OSError:
        return []


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[1])
    except OSError:
        return 0
