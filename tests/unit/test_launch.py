"""Who am I in this job, and shall I stop: answers from the environment, and the record that a run leaves."""

import json
import signal
import time

import pytest
import torch

from vmd_scale.errors import UserError
from vmd_scale.training import launch
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
