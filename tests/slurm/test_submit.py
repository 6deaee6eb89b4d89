"""submit.py, and what pretrain.sbatch asks of job.py: without any cluster."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vmd_scale.config_file import load_config
from vmd_scale.files import sha256_of
from vmd_scale.tokenization import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]


def load(name: str):
    spec = importlib.util.spec_from_file_location(f"slurm_{name}", ROOT / "launchers" / "slurm" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SUBMIT, JOB = load("submit"), load("job")


@pytest.fixture
def call(monkeypatch, capsys):
    """A launcher's `main` with arguments: exit code, lines of standard output, lines of standard error."""
    monkeypatch.chdir(ROOT)

    def run(main, *arguments: object) -> tuple[int, list[str], list[str]]:
        monkeypatch.setattr(sys, "argv", [main.__module__, *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code
        printed = capsys.readouterr()
        return code, printed.out.splitlines(), printed.err.splitlines()

    return run


def test_dry_run_prints_the_command_and_leaves_nothing(lab, call, tmp_path):
    run = tmp_path / "run"
    shape = ("--nodes", 2, "--gpus-per-node", 1, "--time", "2-12", "--partition", "big", "--account", "me")
    more = ("--set", "training.steps=5", "--sbatch=--constraint=h100", "--stop-before", 300, "--launcher", "deepspeed")
    code, out, err = call(
        SUBMIT.main, "--config", lab.config, "--output", run, "--dry-run", "--chain", 2, *shape, *more
    )
    assert (code, len(out), err) == (0, 2, [])
    words = shlex.split(out[0])
    wanted = (
        "--nodes=2 --gpus-per-node=1 --ntasks-per-node=1 --cpus-per-task=8 --time=2-12 --signal=USR1@300 "
        "--export=ALL,LAUNCHER=deepspeed,STOP_BEFORE_END=300 --partition=big --account=me --no-requeue "
        "--constraint=h100 launchers/slurm/pretrain.sbatch"
    )
    assert words[0] == "sbatch"
    assert [word for word in words if word in wanted.split()] == wanted.split()
    assert words[-6:] == ["--config", str(lab.config), "--output", str(run), "--set", "training.steps=5"]
    assert not any("--dependency" in word for word in words)
    assert "--dependency=afterany:JOB1" in shlex.split(out[1])
    assert not run.exists()


def test_one_job_may_requeue_itself(lab, call):
    _, (line,), _ = call(SUBMIT.main, "--config", lab.config, "--gpus-per-node", 2, "--dry-run")
    assert "--no-requeue" not in line
    assert "--output=runs/tiny/slurm/%j.out" in line


def test_elements_of_an_array_have_a_folder_for_their_output(lab, call, monkeypatch, tmp_path):
    """Slurm puts each one's number in the place of %a, in a path too, and makes no folder."""
    (tmp_path / "sbatch").write_text(f'#!/bin/sh\necho "$@" >{tmp_path}/called; echo 7\n')
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    seeds = ("--output", tmp_path / "runs" / "seed%a", "--set", "training.seed=%a", "--sbatch=--array=0-2")
    code, out, _ = call(SUBMIT.main, "--config", lab.config, "--gpus-per-node", 0, *seeds)
    assert (code, out[0]) == (0, "job 7")
    words = (tmp_path / "called").read_text().split()
    assert f"--output={tmp_path}/runs/slurm/%A_%a.out" in words
    assert words[-4:] == ["--output", str(tmp_path / "runs" / "seed%a"), "--set", "training.seed=%a"]
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["slurm"]
    for element in range(3):  # a configuration each is a folder each too
        shutil.copy(lab.config, tmp_path / f"seed{element}.json")
    array = ("--config", tmp_path / "seed%a.json", "--sbatch=--array=0-2", "--dry-run")
    code, (line,), _ = call(SUBMIT.main, *array, "--gpus-per-node", 0)
    assert (code, "--output runs/seed%a" in line) == (0, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--set", "training.stepz=3"), "unknown key 'training.stepz'; did you mean 'training.steps'"),
        (("--nodes", 3), r"global_batch \(8\) must be a multiple of .* x the number of ranks \(3\) = 12"),
        (("--nodes", 0), "--nodes must be at least 1, found 0"),
        (("--chain", 0), "--chain must be at least 1, found 0"),
        (("--gpus-per-node", -1), "--gpus-per-node must not be negative"),
        (("--gpus-per-node", 2, "--ranks-per-node", 2), "--ranks-per-node is for nodes without GPUs"),
        (("--ranks-per-node", 0), "--ranks-per-node must be at least 1"),
        (("--output", "runs/seed%a"), "%a stands for the number of an element of a job array: add --sbatch=--array"),
        (("--sbatch=--array=1-2", "--set", "training.seed=%a"), "%a makes several runs, .* --output runs/NAME%a"),
        (("--sbatch=--array=1-2", "--set", "training.seed=x%a", "--output=r%a"), "training.seed: .*found 'x1'"),
        (("--set", "deepspeed.zero_optimisation={}"), "unknown key 'deepspeed.zero_optimisation'; did you mean"),
        (("--set", 'evaluation.protocols=["nope"]'), "'nope' does not exist"),
        (("--time", "tomorrow"), "--time 'tomorrow': expected MINUTES"),
        (("--time", "2"), "--time 2 leaves no time before --stop-before 120 seconds"),
    ],
)
def test_bad_input_is_one_line_and_code_2(lab, call, arguments, message):
    code, out, err = call(SUBMIT.main, "--config", lab.config, "--gpus-per-node", 0, "--dry-run", *arguments)
    assert (code, out, len(err)) == (2, [], 1)
    assert err[0].startswith("error: ")
    assert re.search(message, err[0])


def test_elsewhere_than_in_the_root_nothing_is_submitted(lab, call, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, _, (line,) = call(SUBMIT.main, "--config", lab.config)
    assert code == 2
    assert "from the root of the repository" in line


@pytest.mark.parametrize(
    ("script", "message"),
    [(None, "no sbatch on this machine"), ("echo 'Invalid account' >&2; exit 1", "sbatch refuses: Invalid account")],
    ids=["absent", "refuses"],
)
def test_when_sbatch_cannot_the_reason_is_one_line(lab, call, monkeypatch, tmp_path, script, message):
    if script is not None:
        (tmp_path / "sbatch").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path) + (":/bin" if script else ""))
    arguments = ("--config", lab.config, "--gpus-per-node", 1, "--output", tmp_path / "run")
    code, _, (line,) = call(SUBMIT.main, *arguments)
    assert code == 2
    assert message in line


@pytest.mark.parametrize(
    ("limit", "wanted"),
    [("90", 5400), ("1:30", 90), ("24:00:00", 86400), ("2-12", 216000), ("1-00:30", 88200), ("1-01:01:01", 90061)],
)
def test_time_limits_in_all_of_slurms_forms(limit, wanted):
    assert SUBMIT.seconds(limit) == wanted
    assert SUBMIT.seconds("UNLIMITED") is None


@pytest.fixture
def start(monkeypatch):
    """The second start of job 7."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")


@pytest.mark.parametrize(
    ("status", "verdict"),
    [
        (None, "died the processes ended before their first step"),
        ({"state": "stopped", "step": 5, "start": "7.0"}, "died the processes ended before their first step"),
        ({"state": "running", "step": 5, "start": "7.1"}, "died the processes ended between checkpoints"),
        ({"state": "stopped", "step": 5, "reason": "time", "start": "7.1"}, "stopped stopped by time: the checkpoint"),
        ({"state": "stopped", "step": 5, "reason": "STOP file", "start": "7.1"}, "asked stopped by STOP file"),
        ({"state": "finished", "step": 5, "start": "7.1"}, "finished 5 steps are done"),
    ],
    ids=["none", "older", "running", "stopped", "asked", "finished"],
)
def test_only_a_record_of_this_start_counts_after_the_step(start, call, tmp_path, status, verdict):
    if status is not None:
        (tmp_path / "status.json").write_text(json.dumps(status))
    code, (line,), _ = call(JOB.main, "after", tmp_path)
    assert code == 0
    assert line.startswith(verdict)


def test_a_finished_run_has_something_to_do_when_its_steps_are_raised(start, lab, call, tmp_path):
    (tmp_path / "status.json").write_text(json.dumps({"state": "finished", "step": 12, "start": "3.0"}))
    arguments = ("before", "--config", lab.config, f"--output={tmp_path}", "--resume", "auto")
    assert call(JOB.main, *arguments) == (0, [str(tmp_path), "finished", "0"], [])
    code, (run, verdict, port), _ = call(JOB.main, *arguments, "--set", "training.steps=13")
    assert (code, run, verdict) == (0, str(tmp_path), "go")
    assert int(port) >= 12007


def test_another_experiment_is_not_finished_because_one_in_its_folder_is(start, lab, call, tmp_path):
    (tmp_path / "status.json").write_text(json.dumps({"state": "finished", "step": 12, "start": "3.0"}))
    newest = tmp_path / "checkpoints" / "step-00000012"
    newest.mkdir(parents=True)
    config = load_config(lab.config)
    state = {"config": config.model_dump(mode="json"), "tokenizer_fingerprint": load_tokenizer("text8").fingerprint}
    (newest / "run_state.json").write_text(json.dumps(state))
    wanted = {"bytes": (newest / "run_state.json").stat().st_size, "sha256": sha256_of(newest / "run_state.json")}
    (newest / "manifest.json").write_text(json.dumps({"files": {"run_state.json": wanted}}))
    arguments = ("before", "--config", lab.config, f"--output={tmp_path}")
    assert call(JOB.main, *arguments) == (0, [str(tmp_path), "finished", "0"], [])
    code, _, err = call(JOB.main, *arguments, "--set", "training.seed=5")
    assert code == 2
    assert "training.seed is 5" in err[0]


def test_two_jobs_at_work_in_one_folder_are_refused(start, lab, call, monkeypatch, tmp_path):
    (tmp_path / "status.json").write_text(json.dumps({"state": "running", "step": 0, "start": "3.0"}))
    arguments = ("before", "--config", lab.config, "--output", tmp_path)
    for running, wanted in ((True, 2), (False, 0)):
        monkeypatch.setattr(JOB, "job_is_running", lambda job, running=running: running and job == "3")
        code, _, err = call(JOB.main, *arguments)
        assert code == wanted
        assert err == (
            [f"error: job 3 is already running in {tmp_path}; two would overwrite each other's files"] if wanted else []
        )


def test_without_a_configuration_job_py_says_what_is_missing(start, call):
    code, out, (line,) = call(JOB.main, "before", "--output", "x")
    assert (code, out) == (2, [])
    assert line.startswith("error: --config FILE is missing")


def test_a_port_in_use_is_passed_over():
    with socket.socket() as busy:
        busy.bind(("", 0))
        busy.listen()
        taken = busy.getsockname()[1]
        assert JOB.free_port(taken) > taken


def test_a_signal_to_a_nodes_shell_alone_reaches_its_ranks_and_not_the_launcher(tmp_path):
    """As Slurm signals where cgroups track processes. The launcher is a stand-in; SIGUSR1 would kill it, too."""
    rank = "import signal,sys,time; signal.signal(10, lambda *_: sys.exit(75)); open(sys.argv[2], 'w'); time.sleep(60)"
    ready = tmp_path / "ready"
    launcher = tmp_path / "python"
    launcher.write_text(f'#!/bin/bash\n"{sys.executable}" -c "{rank}" --local_rank=0 "{ready}"\nexit $?\n')
    launcher.chmod(0o755)
    names = {"PYTHON": str(launcher), "SLURM_NODEID": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    shell = subprocess.Popen(
        ["bash", "launchers/slurm/deepspeed_node.sh", "hostfile"],
        cwd=ROOT,
        env={**os.environ, **names},
        start_new_session=True,
    )
    try:
        for _ in range(1000):
            if ready.exists():
                break
            time.sleep(0.01)
        shell.send_signal(signal.SIGUSR1)
        assert shell.wait(10) == 75
    finally:
        if shell.poll() is None:
            os.killpg(shell.pid, signal.SIGKILL)
