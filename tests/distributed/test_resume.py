"""A run that is killed or stopped ends as if nothing had happened; what cannot be resumed says why.

`whole`, an uninterrupted run of two ranks, is what all others are compared with.
"""

import json
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from same_run import LAST, assert_same_run

from vmd_scale.checkpoints import find_checkpoint, whole_checkpoints
from vmd_scale.config_file import load_config
from vmd_scale.data.prepare import prepare
from vmd_scale.files import sha256_of

# Bounds at so many T that the evaluation after step 7 takes seconds: a signal sent when step 6 is seen finds the run
# before its end.
LINGER = ("evaluation.every=7", "evaluation.steps=" + ",".join(map(str, range(1, 200))))


@pytest.fixture(scope="module")
def killed(lab, runs, whole) -> dict:
    """SIGKILL to both ranks after step 6, then the same command again."""
    run = lab.start(runs / "killed", *LINGER)
    wait_for_step(lab, runs / "killed", 6)
    run.signal(signal.SIGKILL)
    codes = [rank.code for rank in run.wait()]
    records = lab.metrics(runs / "killed")
    lab.pretrain(runs / "killed")
    return {"folder": runs / "killed", "codes": codes, "records": records}


@pytest.fixture(scope="module")
def stopped(lab, runs, whole) -> dict:
    """SIGTERM to one rank of two after step 6, then the same command again."""
    run = lab.start(runs / "stopped", *LINGER)
    wait_for_step(lab, runs / "stopped", 6)
    run.processes[1].send_signal(signal.SIGTERM)
    finished = run.wait()
    records, checkpoint = lab.metrics(runs / "stopped"), find_checkpoint(runs / "stopped")
    status = json.loads((runs / "stopped" / "status.json").read_text())
    lab.pretrain(runs / "stopped")
    return {
        "folder": runs / "stopped",
        "finished": finished,
        "records": records,
        "checkpoint": checkpoint.name,
        "status": status,
    }


@pytest.fixture(scope="module")
def evaluated(lab, runs, whole) -> Path:
    """The same seed again, by torchrun, with evaluations and one checkpoint kept."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"]
    settings = ("evaluation.every=5", "training.keep_checkpoints=1")
    finished = lab.command([*command, str(lab.free_port()), *lab.pretrain_arguments(runs / "evaluated", *settings)])
    assert finished.code == 0, finished.text[-3000:]
    return runs / "evaluated"


def wait_for_step(lab, folder: Path, step: int, timeout: float = 90) -> None:
    deadline = time.monotonic() + timeout
    path = folder / "metrics.jsonl"
    while not path.exists() or path.read_text().count("\n") < step:
        assert time.monotonic() < deadline, f"{path} has not come to step {step}"
        time.sleep(0.02)


UNIMPORTANT = ("log.txt", "latest", ".lock")


def files_of(folder: Path) -> dict[Path, tuple[int, int]]:
    """Sizes and times of change of a run's files, but for the log, the pointer and the lock."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in UNIMPORTANT)
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


def test_the_run_learns_something_and_its_records_are_complete(lab, whole):
    records = lab.metrics(whole, timed=True)
    assert np.mean(lab.losses(whole)[-3:]) < np.mean(lab.losses(whole)[:3])
    wanted = {"step", "tokens", "loss", "reconstruction", "kl", "kl_weight", "lr", "grad_norm", "skipped_steps"}
    assert all(
        wanted | {"tokens_per_second", "mfu", "data_wait_fraction", "peak_memory_gib"} == record.keys()
        for record in records
    )
    assert all(0.05 < record["peak_memory_gib"] < 8 for record in records)
    assert [record["tokens"] for record in records] == [256 * (n + 1) for n in range(LAST)]
    assert json.loads((whole / "config.json").read_text())["training"]["steps"] == LAST


def test_a_deterministic_run_is_what_a_cpu_computes_anyway(lab, runs, whole):
    """And draws its samples, which on a GPU would take an operation that has no deterministic form."""
    settings = ("training.deterministic=true", "evaluation.every=12", "evaluation.samples=1", "evaluation.steps=2")
    lab.pretrain(runs / "deterministic", *settings)
    assert_same_run(lab, runs / "deterministic", whole)


def test_a_run_killed_without_warning_goes_on_bit_for_bit(lab, whole, killed):
    assert killed["codes"] == [-signal.SIGKILL] * 2
    assert 6 <= killed["records"][-1]["step"] < LAST  # on the way: what came after step 4 was lost
    assert_same_run(lab, killed["folder"], whole)


def test_sigterm_to_any_rank_writes_a_checkpoint_and_exits_with_75_on_all(lab, stopped):
    assert [rank.code for rank in stopped["finished"]] == [75, 75]
    last = stopped["records"][-1]["step"]
    assert 6 <= last < LAST
    assert stopped["checkpoint"] == f"step-{last:08d}"
    assert f"checkpoint of step {last} written" in stopped["finished"][0].text


def test_a_stopped_run_goes_on_bit_for_bit(lab, whole, stopped):
    assert_same_run(lab, stopped["folder"], whole)


def test_the_status_of_a_stopped_run_names_the_signal(stopped, whole):
    assert (stopped["status"]["state"], stopped["status"]["reason"]) == ("stopped", "signal")
    assert stopped["checkpoint"] == f"step-{stopped['status']['step']:08d}"
    assert json.loads((whole / "status.json").read_text())["state"] == "finished"


def test_the_same_seed_gives_the_same_run_and_evaluations_change_nothing(lab, whole, evaluated):
    assert_same_run(lab, evaluated, whole)
    records = [json.loads(line) for line in (evaluated / "evaluations.jsonl").read_text().splitlines()]
    assert [(record["step"], record["steps"]) for record in records] == [(5, 1), (5, "inf"), (10, 1), (10, "inf")]
    assert {(record["rows"], record["weights"], record["bound"]) for record in records} == {(9, "ema", "elbo")}
    assert not (whole / "evaluations.jsonl").exists()


def test_another_seed_gives_another_run(lab, runs, whole):
    lab.pretrain(runs / "seed", "training.seed=1", "training.steps=2", ranks=1)
    assert abs(lab.losses(runs / "seed")[0] - lab.losses(whole)[0]) > 1e-4


def test_latest_names_a_whole_checkpoint_and_old_ones_are_thrown_away(whole, evaluated):
    """`evaluated` keeps one, and the best: both its evaluations were better than what was before."""
    for folder, kept, others in ((whole, [4, 8, 12], {"latest"}), (evaluated, [10, 12], {"latest", "best"})):
        names = [path.name for path in whole_checkpoints(folder / "checkpoints")]
        assert names == [f"step-{step:08d}" for step in kept]
        assert (folder / "checkpoints" / "latest").read_text().strip() == names[-1]
        assert {path.name for path in (folder / "checkpoints").iterdir()} == {*names, *others}
    assert (evaluated / "checkpoints" / "best").read_text() == "step-00000010\n"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["model.width=64"], "model.width is 64, but .*step-00000012 was trained with 32; choose another --output"),
        (["training.seed=3"], "training.seed is 3, but .*step-00000012 was trained with 0"),
    ],
    ids=["width", "seed"],
)
def test_what_cannot_be_resumed_is_refused_in_one_line(lab, runs, whole, settings, message):
    before = files_of(whole)
    (finished,) = lab.pretrain(whole, "training.steps=20", *settings, ranks=1, expect=2)
    (line,) = finished.errors
    assert re.search(message, line)
    assert "Traceback" not in finished.text
    assert files_of(whole) == before


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("rows", lambda text: text + "one row more\n" * 20),
        ("unigram_entropy", lambda text: text.replace("mask", "bask")),
        (None, lambda text: text),
    ],
    ids=["more", "others", "the same in smaller shards"],
)
def test_other_data_under_the_same_name_are_refused(lab, runs, whole, key, change):
    """Another number of rows is another permutation: rows would be repeated and left out."""
    folder, source, shards = runs / f"other-{key}", runs / f"{key}.txt", runs / f"shards-{key}"
    shutil.copytree(whole, folder)
    source.write_text(change(lab.source.read_text()))
    settings = [f"data.source={source}", f"data.shards={shards}", "data.shard_tokens=1000"]
    prepare(load_config(lab.config, settings).data, progress=False)
    assert len(list(shards.glob("train-*.tokens"))) > 1
    before = files_of(folder)
    (finished,) = lab.pretrain(folder, *settings, ranks=1, expect=0 if key is None else 2)
    if key is None:
        assert "nothing to do: 12 steps are done" in finished.text
    else:
        (line,) = finished.errors
        assert re.search(
            f"data.shards '{shards}': {key} of split 'train' is .*, but .*-00000012 was trained with", line
        )
        assert files_of(folder) == before


def test_a_checkpoint_that_does_not_know_its_data_is_resumed(lab, runs, whole):
    """One of a version that did not write that down."""
    folder = runs / "older"
    shutil.copytree(whole, folder)
    checkpoint = find_checkpoint(folder)
    state, manifest = (json.loads((checkpoint / name).read_text()) for name in ("run_state.json", "manifest.json"))
    for key in ("contents", "rollbacks"):
        state.pop(key, None)
    (checkpoint / "run_state.json").write_text(json.dumps(state))
    record = {
        "bytes": (checkpoint / "run_state.json").stat().st_size,
        "sha256": sha256_of(checkpoint / "run_state.json"),
    }
    (checkpoint / "manifest.json").write_text(
        json.dumps({**manifest, "files": {**manifest["files"], "run_state.json": record}})
    )
    lab.pretrain(folder, "training.steps=13")
    assert find_checkpoint(folder).name == "step-00000013"


def test_a_finished_run_has_nothing_to_do(lab, whole):
    before = (whole / "metrics.jsonl").read_bytes()
    finished = lab.pretrain(whole)
    assert "nothing to do: 12 steps are done" in finished[0].text
    assert (whole / "metrics.jsonl").read_bytes() == before
