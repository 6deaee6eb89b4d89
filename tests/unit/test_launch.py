"""Who am I in this job, and shall I stop: answers from the environment, and the record that a run leaves."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from vmd_scale.errors import UserError
from vmd_scale.training import launch
from vmd_scale.training.launch import World
from vmd_scale.training.orphans import is_launcher
from vmd_scale.training.preemption import StopRequest
from vmd_scale.training.status import Status, read_status, this_start, write_status

STEP = {
    "SLURM_JOB_ID": "70001",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
}


@pytest.fixture
def environment(monkeypatch):
    """Sets variables, and none of those that a launcher would have set."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", *STEP, "SLURM_RESTART_COUNT", "VMD_STOP_AT"):
        monkeypatch.delenv(name, raising=False)
    return lambda values: [monkeypatch.setenv(name, value) for name, value in values.items()]


@pytest.fixture
def handlers():
    """A `StopRequest` takes over signals: they are given back."""
    numbers = (signal.SIGTERM, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def test_a_task_of_srun_knows_its_rank(environment):
    environment(STEP)
    assert (launch.rank_from_environment(), launch.world_size_from_environment()) == (5, 8)
    found = launch._environment()
    assert {name: found[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")} == {
        "RANK": "5",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "8",
        "LOCAL_WORLD_SIZE": "4",
    }
    assert found["MASTER_ADDR"] == "gpu07"


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu[07-08]", "gpu07"),
        ("gpu[007-010,12],x1", "gpu007"),
        ("n[1-2]-ib", "n1-ib"),
        ("n[3,7-9]-ib,m[1-2]", "n3-ib"),
        ("rack[2-3]node[05-09]", "rack2node05"),
        ("login.cluster,n1", "login.cluster"),
    ],
)
def test_the_first_node_of_a_list(nodes, first):
    assert launch.first_host(nodes) == first


def test_a_task_with_a_gpu_of_its_own_sees_it_as_number_0(environment, monkeypatch):
    environment(STEP)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert launch._environment()["LOCAL_RANK"] == "0"


def test_a_single_task_of_srun_and_a_launcher_under_srun_are_no_step_of_ours(environment):
    environment({**STEP, "SLURM_STEP_NUM_TASKS": "1"})
    assert (launch.rank_from_environment(), launch.world_size_from_environment()) == (0, 1)
    assert launch._environment()["MASTER_ADDR"] == "127.0.0.1"
    environment({**STEP, "RANK": "3", "WORLD_SIZE": "16"})
    assert (launch.rank_from_environment(), launch.world_size_from_environment()) == (3, 16)
    assert launch._environment() == {}


def test_jobs_and_steps_that_share_a_node_have_ports_of_their_own():
    ports = [launch.step_port(job, step) for job in range(4_000_000, 4_000_600) for step in range(31)]
    assert len(set(ports)) == len(ports)
    assert 12000 <= min(ports) <= max(ports) < 32768


def test_a_run_stops_by_signal_file_or_time_and_knows_why(environment, handlers, tmp_path):
    stop = StopRequest(tmp_path, True)
    assert not stop.seen()
    signal.raise_signal(signal.SIGUSR1)
    assert (stop.seen(), stop.reason()) == (True, "signal")
    (tmp_path / "STOP").touch()
    assert (stop.seen(), stop.reason()) == (True, "STOP file")
    stop.obeyed()
    environment({"VMD_STOP_AT": str(int(time.time()) + 1000)})
    assert not StopRequest(tmp_path, True).seen()
    environment({"VMD_STOP_AT": str(int(time.time()) - 1)})
    late = StopRequest(tmp_path, True)
    assert (late.seen(), late.reason()) == (True, "time")


def test_a_run_stops_when_its_launcher_is_dead(environment, handlers, tmp_path):
    assert not StopRequest(tmp_path, True, [os.getppid()]).seen()
    orphan = StopRequest(tmp_path, False, [2**30])
    assert (orphan.seen(), orphan.reason()) == (True, "the death of its launcher")
    signal.raise_signal(signal.SIGTERM)
    assert orphan.reason() == "signal"  # to all of its process group, perhaps: what the launcher died of


RANK = """
import sys, time
from vmd_scale.training.orphans import are_above, launchers_above
chain = launchers_above()
print(len(chain), are_above(chain), flush=True)
for _ in range(3000 if chain else 0):
    if not are_above(chain):
        print("orphan", flush=True)
        break
    time.sleep(0.01)
"""


@pytest.mark.parametrize(("outer", "found"), [("deepspeed", 2), ("shell", 0)])
def test_a_rank_notices_the_death_of_launchers_and_of_nobody_else_above(tmp_path, outer, found):
    """Of the outer of two processes above it, as `deepspeed` is; it is killed."""
    (tmp_path / "rank.py").write_text(RANK)
    for name, child in ((outer, "inner"), ("inner", "rank.py")):
        (tmp_path / name).write_text(f"import subprocess, sys; subprocess.run([sys.executable, {child!r}])\n")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, outer]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == f"{found} True\n"
        process.kill()
        assert process.stdout.read() == ("orphan\n" if found else "")  # to its end: the rank has ended


@pytest.mark.parametrize(
    ("command", "is_one"),
    [
        ("/venv/bin/python /venv/bin/deepspeed --num_gpus 2 launchers/pretrain.py", True),
        ("python -u -m deepspeed.launcher.launch --world_info=None", True),
        ("/venv/bin/python -m torch.distributed.run --nproc-per-node 2 launchers/pretrain.py", True),
        ("torchrun launchers/pretrain.py", True),
        ("bash -c deepspeed\0launchers/pretrain.py", False),
        ("python launchers/reproduce.py --output runs/deepspeed/1 deepspeed", False),
        ("slurmstepd: [7.0]", False),
    ],
)
def test_what_is_a_launcher(command, is_one):
    assert is_launcher([word.replace("\0", " ") for word in command.split()]) == is_one


@pytest.mark.parametrize(
    ("last", "code"), [("return", 0), ("sys.exit(75)", 75), ("raise UserError('the last layer is missing')", 2)]
)
def test_a_program_that_has_joined_a_world_ends_with_its_own_exit_code_come_what_may(tmp_path, last, code):
    """DeepSpeed's process groups outlive all of Python, and what they do then must not count; exit functions do.

    A program that calls it as a function goes on.
    """
    program = f"""
import atexit, os, sys
from vmd_scale.errors import UserError, reports_user_errors
from vmd_scale.training.launch import join_world, leave_world

@reports_user_errors
def called_by_another():
    {last}

def call():
    join_world()
    try:
        called_by_another()
    except SystemExit:
        pass
    leave_world()

class AbortsTheTeardown:
    def __init__(self, abort):
        self.abort = abort
    def __del__(self):
        self.abort()

kept = AbortsTheTeardown(os.abort)
atexit.register(print, "goodbye")

@reports_user_errors
def main():
    join_world()
    leave_world()
    {last}

call()
main()
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "CUDA_VISIBLE_DEVICES": ""}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", *STEP):
        environment.pop(name, None)
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert ended.returncode == code, ended.stderr
    assert ended.stdout == "goodbye\n"
    assert ("error: the last layer is missing" in ended.stderr) == (code == 2)


def test_a_time_that_is_none_is_refused(environment, tmp_path):
    environment({"VMD_STOP_AT": "noon"})
    with pytest.raises(UserError, match="VMD_STOP_AT must be a unix time, found 'noon'"):
        StopRequest(tmp_path, True)


def test_the_record_of_a_run_names_the_start_that_wrote_it(environment, tmp_path):
    assert read_status(tmp_path) is None
    write_status(tmp_path, "running", 4)
    assert read_status(tmp_path) == Status("running", 4)
    environment({"SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": "3"})
    assert this_start() == "12.3"
    write_status(tmp_path, "stopped", 6, "signal")
    assert read_status(tmp_path) == Status("stopped", 6, "signal", "12.3")
    (tmp_path / "status.json").write_text(json.dumps({"state": "resting", "step": 1}))
    allowed = "'running', 'stopped', 'finished' or 'failed'"
    with pytest.raises(UserError, match=rf"status.json: state: input should be {allowed}"):
        read_status(tmp_path)


@pytest.mark.parametrize(("device", "takes_leave"), [("cpu", True), ("cuda", False)])
def test_a_rank_that_fails_alone_does_not_wait_for_the_others(device, takes_leave, monkeypatch):
    """NCCL's farewell would; a world that ends well is left on every device."""
    left = []
    world = World(0, 0, 2, torch.device(device), None)
    monkeypatch.setattr(launch, "join_world", lambda timeout: world)
    monkeypatch.setattr(launch, "leave_world", lambda: left.append(True))
    with pytest.raises(MemoryError, match="out of"), launch.joined_world():
        raise MemoryError("out of memory")
    assert bool(left) == takes_leave
    left.clear()
    with launch.joined_world() as joined:
        assert joined is world
    assert left
