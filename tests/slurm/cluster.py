"""A Slurm cluster of two nodes on this machine: real daemons, everything they write in one temporary folder.

Needs root, because slurmd starts the steps' processes, and Debian's packages, which it installs when they are missing.
Every process of the cluster carries the path of its slurm.conf in its environment: by this it is found and ended.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from debian import PATH, why_missing

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("slurm-wlm", "munge")
DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch")
NODES = ("node1", "node2")
CREDENTIALS_EXPIRE = 5  # seconds; a requeued job waits at least as long
CONFIGURATION = """
ClusterName=virtual
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/socket,cred_expire={expire}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
GresTypes=gpu
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SlurmdTimeout=30
MessageTimeout=5
KillWait=15
MinJobAge=600
JobRequeue=1
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_min_interval=0
PartitionName=all Nodes=ALL Default=YES State=UP
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 RealMemory=1000\n"


def missing() -> str | None:
    """Why there can be no cluster here, or None; installs the packages if it may."""
    if os.geteuid() != 0:
        return "not root: slurmd and munged cannot be started"
    return why_missing(DAEMONS, PACKAGES)


def wait_until(true: Callable[[], object], what: str, timeout: float = 60, every: float = 0.2) -> None:
    deadline = time.monotonic() + timeout
    while not true():
        assert time.monotonic() < deadline, f"waited {timeout:.0f} s in vain: {what}"
        time.sleep(every)


def free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as probes:
        sockets = [probes.enter_context(socket.socket()) for _ in range(number)]
        for probe in sockets:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in sockets]


class Cluster:
    def __init__(self) -> None:
        # Not pytest's folder: munged wants all parents of its socket to be open, and a socket's path to be short.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.conf = self.folder / "slurm.conf"
        self.environment = {**os.environ, "PATH": PATH, "SLURM_CONF": str(self.conf)}

    def start(self) -> None:
        self.folder.chmod(0o755)
        host = os.uname().nodename
        controller, *ports = free_ports(1 + len(NODES))
        nodes = [NODE.format(name=name, host=host, port=port) for name, port in zip(NODES, ports, strict=True)]
        common = CONFIGURATION.format(folder=self.folder, host=host, controller=controller, expire=CREDENTIALS_EXPIRE)
        self.conf.write_text(common + "".join(nodes))
        (self.folder / "state").mkdir()
        for name in NODES:
            (self.folder / f"spool-{name}").mkdir()
        munge = self.folder / "munge"
        munge.mkdir()
        key = munge / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        names = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        self.run("munged", *(f"--{option}={munge / name}" for option, name in names.items()))
        self.run("slurmctld")
        for name in NODES:
            self.start_node(name)
        wait_until(self.all_idle, f"the nodes are idle; see {self.folder}/*.log")

    def stop(self) -> None:
        """No process is left, and no file."""

        def none_left() -> bool:
            self._kill(self.processes())
            return not self.processes()

        wait_until(none_left, "all processes have ended")
        shutil.rmtree(self.folder)

    def run(self, *command: object, **environment: str) -> str:
        """A command of Slurm's; what it prints."""
        finished = subprocess.run(
            list(map(str, command)),
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        assert finished.returncode == 0, f"{command}: {finished.stdout}{finished.stderr}"
        return finished.stdout.strip()

    def all_idle(self) -> bool:
        return self.run("sinfo", "--noheader", "--Node", "--format=%T").split() == ["idle"] * len(NODES)

    def start_node(self, name: str) -> None:
        self.run("slurmd", "-N", name)

    def give_up_node(self, name: str) -> None:
        """What Slurm does when a node has not answered for long. A node that comes back within seconds, as no machine
        does, would be given the requeued job while the credential of its last start is still being revoked."""
        self.run("scontrol", "update", f"NodeName={name}", "State=DOWN", "Reason=dead")
        time.sleep(2 * CREDENTIALS_EXPIRE)

    def kill_node(self, name: str, half: bool = False) -> None:
        """As if its power was cut: slurmd, the steps' managers and all tasks at once; half of it: all but the managers,
        which report the deaths of their tasks."""
        tasks = [pid for pid, variables in self.processes().items() if f"SLURMD_NODENAME={name}" in variables]
        managers = {parent for parent in map(_parent, tasks) if _command(parent)[0].startswith("slurmstepd")}
        self._kill([int((self.folder / f"slurmd-{name}.pid").read_text()), *(() if half else managers), *tasks])

    def ranks(self) -> list[int]:
        """Processes of pretrain.py and its launchers on the nodes, of any job."""
        commands = {pid: _command(pid) for pid in self.processes()}
        return [pid for pid, words in commands.items() if "launchers/pretrain.py" in words and words[0] != "srun"]

    def state(self, job: str) -> str:
        """RUNNING, PENDING, COMPLETED, ..."""
        return self.run("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T")

    def field(self, job: str, name: str) -> str:
        """One of what ``scontrol show job`` knows."""
        pairs = (word.partition("=") for word in self.run("scontrol", "--oneliner", "show", "job", job).split())
        return next(value for key, _, value in pairs if key == name)

    def wait_for(self, job: str, state: str, timeout: float = 120) -> None:
        ended = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"} - {state}

        def reached() -> bool:
            now = self.state(job)
            assert now not in ended, f"job {job} is {now}, not {state}"
            return now == state

        wait_until(reached, f"job {job} is {state}, found {self.state(job)}", timeout)

    def processes(self) -> dict[int, list[str]]:
        """All that belong to the cluster, daemons and ranks, with their environments."""
        mine = f"SLURM_CONF={self.conf}"
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            try:
                variables = (path / "environ").read_bytes().decode(errors="replace").split("\0")
            except OSError:  # gone, or a zombie
                continue
            if mine in variables:
                found[int(path.name)] = variables
        return found

    @staticmethod
    def _kill(pids: Iterable[int]) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _command(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except OSError:
        return [""]
