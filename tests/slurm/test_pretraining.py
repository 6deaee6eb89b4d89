"""Two nodes of a virtual cluster: whatever stops a job, the run ends as if nothing had happened.

The undisturbed run, which all others are compared with, knows nothing of Slurm.
"""

import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from cluster import Cluster, missing, wait_until

from vmd_scale.checkpoints import find_checkpoint

LAST = 12
SCRIPT = "launchers/slurm/pretrain.sbatch"
MANY_BOUNDS = "evaluation.steps=" + ",".join(map(str, range(1, 120)))


def linger_after(step: int) -> tuple[str, str]:
    """An evaluation of several seconds: a signal that is sent when the step before is seen finds the run at work."""
    return f"evaluation.every={step}", MANY_BOUNDS


@dataclass(frozen=True)
class Desk:
    """Where jobs are submitted."""

    cluster: Cluster
    lab: object
    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        """One thread a rank, as all runs of `lab` have."""
        return {**self.lab.environment(), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "MY_TOKEN": "secret"}

    def sbatch(self, run: Path, *settings: str, options: tuple[str, ...] = (), **environment: str) -> str:
        """The run on two nodes with a rank each. Returns the job's number."""
        shape = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=0", "--time=20")
        arguments = self.lab.pretrain_arguments(run, *settings)[1:]
        command = ("sbatch", "--parsable", *shape, f"--output={self.folder}/%j.out", *options, SCRIPT, *arguments)
        return self.cluster.run(*command, **self.environment, **environment)

    def submit(self, run: Path, *options: str) -> list[str]:
        """The same by submit.py. Returns the numbers of the jobs of the chain."""
        shape = ("--nodes", "2", "--gpus-per-node", "0", "--cpus-per-rank", "1", "--time", "20")
        arguments = ("--config", self.lab.config, "--output", run, *shape, *options)
        told = self.cluster.run(sys.executable, "launchers/slurm/submit.py", *arguments, **self.environment)
        return [line.split()[1].strip(",") for line in told.splitlines() if line.startswith("job ")]

    def said(self, job: str) -> str:
        return (self.folder / f"{job}.out").read_text(errors="replace")

    def wait_for_step(self, run: Path, step: int, start: str) -> None:
        """Until that start of a job has made the step."""

        def made() -> bool:
            try:
                status = json.loads((run / "status.json").read_text())
                return status["start"] == start and self.lab.metrics(run)[-1]["step"] >= step
            except (OSError, ValueError, IndexError):  # not yet, or half a line
                return False

        wait_until(made, f"step {step} of {run} by {start}", 120, 0.05)

    def wait_for_requeue(self, job: str, restarts: int) -> None:
        wait_until(lambda: self.cluster.field(job, "Restarts") == str(restarts), f"restart {restarts} of {job}", 180)


@pytest.fixture(scope="module")
def desk(cluster, lab, tmp_path_factory) -> Desk:
    return Desk(cluster, lab, tmp_path_factory.mktemp("desk"))


@pytest.fixture(scope="module")
def whole(desk) -> Path:
    """Two ranks without Slurm."""
    desk.lab.pretrain(desk.folder / "whole")
    return desk.folder / "whole"


@pytest.fixture(scope="module")
def chain(desk) -> dict:
    """A chain of two jobs, of which the first comes to the end."""
    run = desk.folder / "chain"
    jobs = desk.submit(run, "--chain", "2")
    for job in jobs:
        desk.cluster.wait_for(job, "COMPLETED")
    return {"run": run, "jobs": jobs}


@pytest.fixture(scope="module")
def stopped(desk) -> dict:
    """Cancelled at step 2; submitted again and stopped by SIGUSR1 at step 4, where it may not come back; at step 6."""
    run = desk.folder / "stopped"
    cancelled = desk.sbatch(run, *linger_after(3))
    desk.wait_for_step(run, 2, f"{cancelled}.0")
    desk.cluster.run("scancel", cancelled)
    desk.cluster.wait_for(cancelled, "CANCELLED")
    wait_until(lambda: not desk.cluster.ranks(), "its ranks have ended")
    restarts = desk.cluster.field(cancelled, "Restarts")
    left = json.loads((run / "status.json").read_text())
    assert find_checkpoint(run).name == f"step-{left['step']:08d}"
    tired = desk.sbatch(run, *linger_after(5), MAX_REQUEUES="0")
    desk.wait_for_step(run, 4, f"{tired}.0")
    desk.cluster.run("scancel", "--signal=USR1", tired)
    desk.cluster.wait_for(tired, "FAILED")
    # Without a limit, there is no clock: not that of a job from which this one was submitted either.
    job = desk.sbatch(run, *linger_after(7), options=("--time=UNLIMITED",), VMD_STOP_AT="1")
    desk.wait_for_step(run, 6, f"{job}.0")
    desk.cluster.run("scancel", "--signal=USR1", job)
    desk.wait_for_requeue(job, 1)
    status = json.loads((run / "status.json").read_text())
    desk.cluster.wait_for(job, "COMPLETED")
    jobs = {"cancelled": cancelled, "tired": tired, "job": job}
    return {"run": run, "restarts": restarts, "status": status, "left": left, **jobs}


@pytest.fixture(scope="module")
def lost(desk) -> dict:
    """Both nodes die, one after the other, and come back when they have been given up.

    Of node2, slurmd and the rank die, and srun learns it at once: the batch script asks all nodes and requeues. Of
    node1, everything dies, the batch script too: Slurm requeues, after its SlurmdTimeout.
    """
    run, cluster = desk.folder / "lost", desk.cluster
    job = desk.sbatch(run, *linger_after(7))
    reached = []
    for node, half in (("node2", True), ("node1", False)):
        desk.wait_for_step(run, 6, f"{job}.{len(reached)}")
        cluster.kill_node(node, half)
        wait_until(lambda: not cluster.ranks(), "ranks on the other node have ended")
        reached.append(desk.lab.metrics(run)[-1]["step"])
        desk.wait_for_requeue(job, len(reached))
        cluster.give_up_node(node)
        cluster.start_node(node)
    cluster.wait_for(job, "COMPLETED")
    return {"run": run, "job": job, "reached": reached}


@pytest.fixture(scope="module")
def limits(desk) -> dict[str, str]:
    """Two jobs at once: one that Slurm signals before its limit of 2 minutes, one that its clock stops in 20 seconds.

    Slurm signals up to half a minute early: after the ranks have started, even on a busy machine.
    """
    endless = ("training.steps=1000000", "training.checkpoint_every=1000000")
    kinds = {"signal": (("--time=2", "--signal=USR1@60"), "1"), "time": (("--time=20", "--signal=USR1@1"), "1180")}
    jobs = {}
    for reason, (options, before) in kinds.items():
        variables = {"STOP_BEFORE_END": before, "MAX_REQUEUES": "0"}
        jobs[reason] = desk.sbatch(desk.folder / f"limit-{reason}", *endless, options=options, **variables)
    for job in jobs.values():
        desk.cluster.wait_for(job, "FAILED")
    return jobs


@pytest.fixture(scope="module")
def launchers(desk) -> dict:
    """One DeepSpeed launcher a node; a chain of two jobs, of which the first is stopped by SIGUSR1 at step 6."""
    run = desk.folder / "launchers"
    settings = [part for setting in linger_after(7) for part in ("--set", setting)]
    first, second = desk.submit(run, "--launcher", "deepspeed", "--chain", "2", *settings)
    desk.wait_for_step(run, 6, f"{first}.0")
    desk.cluster.run("scancel", "--signal=USR1", first)
    desk.cluster.wait_for(first, "FAILED")
    desk.cluster.wait_for(second, "COMPLETED")
    return {"run": run, "jobs": (first, second)}


def test_a_run_on_two_nodes_has_the_losses_of_one_without_slurm(desk, whole, chain):
    assert desk.lab.metrics(chain["run"]) == desk.lab.metrics(whole)
    assert [record["step"] for record in desk.lab.metrics(whole)] == list(range(1, LAST + 1))
    status = json.loads((chain["run"] / "status.json").read_text())
    assert status == {"state": "finished", "step": LAST, "reason": "", "start": f"{chain['jobs'][0]}.0"}


def test_each_node_has_a_log_and_the_environment_is_recorded_without_secrets(desk, chain):
    folder, job = chain["run"] / "slurm", chain["jobs"][0]
    host = os.uname().nodename  # both nodes are this machine
    logs = [folder / f"{job}.0.{node}-{host}.log" for node in (0, 1)]
    assert sorted(folder.glob(f"{job}.0.*.log")) == logs
    assert "0: " in logs[0].read_text()
    recorded = (folder / f"{job}.0.environment.txt").read_text()
    for wanted in ("vmd_scale 0.1", "SLURM_JOB_NODELIST=node[1-2]", "OMP_NUM_THREADS=1", "Python 3.", "\ntorch=="):
        assert wanted in recorded
    assert "secret" not in recorded
    assert "TOKEN" not in recorded


def test_a_job_of_a_chain_that_finds_the_run_finished_ends_at_once(desk, chain):
    first, second = chain["jobs"]
    said = (chain["run"] / "slurm" / f"{second}.out").read_text()
    assert "is finished: nothing to do" in said
    assert not list((chain["run"] / "slurm").glob(f"{second}.*.log"))
    assert "finished: 12 steps are done" in (chain["run"] / "slurm" / f"{first}.out").read_text()
    assert desk.cluster.field(first, "Requeue") == "0"


def test_elements_of_a_job_array_have_folders_of_their_own(desk, chain):
    for element in (1, 2):
        shutil.copytree(chain["run"], desk.folder / f"element{element}")
    job = desk.sbatch(desk.folder / "element%a", options=("--array=1-2", f"--output={desk.folder}/%A.%a.out"))
    for element in (1, 2):
        desk.cluster.wait_for(f"{job}_{element}", "COMPLETED")
        assert f"element{element} is finished" in desk.said(f"{job}.{element}")


def test_a_signal_stops_the_run_and_the_job_goes_on_by_itself(desk, whole, stopped):
    status, job = stopped["status"], stopped["job"]
    assert (status["state"], status["reason"], status["start"]) == ("stopped", "signal", f"{job}.0")
    assert 6 <= status["step"] < LAST
    said = desk.said(job)
    assert f"stopped by signal: the checkpoint of step {status['step']} is written; requeueing" in said
    assert f"job {job}, start 2: finished: 12 steps are done" in said
    assert desk.lab.metrics(stopped["run"]) == desk.lab.metrics(whole)


def test_a_cancelled_job_leaves_a_checkpoint_and_does_not_come_back(desk, stopped):
    left = stopped["left"]
    assert (left["state"], left["reason"], left["start"]) == ("stopped", "signal", f"{stopped['cancelled']}.0")
    assert 2 <= left["step"] < 6
    assert stopped["restarts"] == "0"
    assert desk.cluster.state(stopped["cancelled"]) == "CANCELLED"
    assert "requeueing" not in desk.said(stopped["cancelled"])


def test_requeueing_has_an_end(desk, stopped):
    said = desk.said(stopped["tired"])
    assert "is written; not requeued: it was already 0 times (MAX_REQUEUES); sbatch again to go on" in said
    assert desk.cluster.field(stopped["tired"], "Restarts") == "0"
    assert desk.cluster.field(stopped["tired"], "ExitCode") == "75:0"


def test_the_loss_of_any_node_costs_only_the_steps_since_the_last_checkpoint(desk, whole, lost):
    assert all(6 <= step < LAST for step in lost["reached"])
    assert desk.lab.metrics(lost["run"]) == desk.lab.metrics(whole)
    assert desk.cluster.field(lost["job"], "Restarts") == "2"
    said = desk.said(lost["job"])
    assert "start 1: the processes ended between checkpoints; they had started from step 0; a node does not" in said
    assert f"job {lost['job']}, start 3: finished" in said


def test_a_job_stops_itself_before_its_time_limit(desk, limits):
    """By Slurm's signal, and by the clock where no signal comes; each within the time that it was given."""
    for reason, job in limits.items():
        said = desk.said(job)
        assert f"stopped by {reason}: the checkpoint of step " in said
        assert "is written; not requeued: it was already 0 times" in said
        assert desk.cluster.field(job, "ExitCode") == "75:0"
        status = json.loads((desk.folder / f"limit-{reason}" / "status.json").read_text())
        assert (status["state"], status["reason"]) == ("stopped", reason)
        assert find_checkpoint(desk.folder / f"limit-{reason}").name == f"step-{status['step']:08d}"


def test_one_deepspeed_launcher_a_node_gives_the_same_losses(desk, whole, launchers):
    assert desk.lab.metrics(launchers["run"]) == desk.lab.metrics(whole)
    folder, (first, _) = launchers["run"] / "slurm", launchers["jobs"]
    assert "2 nodes (node[1-2]) x 1 ranks by deepspeed" in (folder / f"{first}.out").read_text()
    assert (folder / f"{first}.0.hostfile").read_text() == "node1 slots=1\nnode2 slots=1\n"


def test_a_job_of_a_chain_goes_on_where_the_one_before_was_stopped(desk, launchers):
    folder, (first, second) = launchers["run"] / "slurm", launchers["jobs"]
    said = (folder / f"{first}.out").read_text()
    assert "is written; not requeued (--no-requeue): the next job of the chain goes on" in said
    assert desk.cluster.field(first, "ExitCode") == "75:0"
    assert "resumed from" in (folder / f"{second}.0.0-{os.uname().nodename}.log").read_text()
    assert "finished: 12 steps are done" in (folder / f"{second}.out").read_text()


def test_a_failed_run_is_not_requeued_and_says_why(desk, chain):
    """Its configuration is good, but not for the checkpoints that are there: only the ranks find that out."""
    job = desk.sbatch(chain["run"], "training.steps=20", "model.width=64")
    desk.cluster.wait_for(job, "FAILED")
    said = desk.said(job)
    assert "failed, not requeued: the processes ended before their first step" in said
    assert "error: model.width is 64, but" in said
    assert desk.cluster.field(job, "Restarts") == "0"
    assert json.loads((chain["run"] / "status.json").read_text())["state"] == "finished"


@pytest.mark.parametrize(
    ("settings", "options", "variables", "message"),
    [
        (("training.stepz=3",), (), {}, "training.stepz"),
        ((), ("--gpus-per-node=0", "--ntasks-per-node=1"), {"LAUNCHER": "mpirun"}, "found 'mpirun'"),
    ],
    ids=["configuration", "launcher"],
)
def test_bad_input_fails_before_any_rank_is_started(desk, settings, options, variables, message):
    job = desk.sbatch(desk.folder / "bad", *settings, options=options, **variables)
    desk.cluster.wait_for(job, "FAILED")
    (line,) = [line for line in desk.said(job).splitlines() if line.startswith("error: ")]
    assert message in line
    assert desk.cluster.field(job, "ExitCode") == "2:0"
    assert not (desk.folder / "bad").exists()


def test_no_rank_outlives_its_job(desk, chain, stopped, lost, limits, launchers):
    assert desk.cluster.ranks() == []


def test_without_a_cluster_the_reason_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name, path=None: None)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert missing().endswith("slurmd, sbatch not found, and there is no apt-get to install slurm-wlm, munge")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert missing() == "not root: slurmd and munged cannot be started"


def test_a_cluster_leaves_nothing_behind():
    """Of `Cluster.stop` itself: also what is no child of ours, as all that slurmd starts."""
    cluster = Cluster()
    cluster.run("sh", "-c", "sleep 1000 >/dev/null 2>&1 & sleep 1000 >/dev/null 2>&1 &")
    wait_until(lambda: len(cluster.processes()) == 2, "both have their environment")  # not while they are in exec
    cluster.stop()
    assert not cluster.processes()
    assert not cluster.folder.exists()
