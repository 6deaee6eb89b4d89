"""What breaks in a run costs at most what it must: steps without a finite gradient, spikes, full disks.

Each run is a real one of one or two ranks, in which one thing was made to fail.
"""

import errno
import itertools
import json
import math
import os
import runpy
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from ranks import run_in_processes

from vmd_scale.checkpoints import find_checkpoint, load_weights, whole_checkpoints
from vmd_scale.files import sha256_of, write_json
from vmd_scale.training.lock import RunLock

LAST = 12


def launch(lab, folder: Path, fault: str, *settings: str, ranks: int = 1) -> list[int]:
    """Exit codes of a pretrain.py in which `fault` happens."""
    return run_in_processes(pretrain_with, ranks, lab.pretrain_arguments(folder, *settings), fault)


def pretrain_with(arguments: list[str], fault: str) -> int:
    os.environ["LOCAL_WORLD_SIZE"] = str(os.cpu_count())  # one thread, as all other runs
    FAULTS[fault]()
    sys.argv = arguments
    try:
        runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def nothing() -> None:
    pass


def bad_batches(*bad: int):
    """In steps bad + 1, one row's noise is not a number, on one rank."""

    def make() -> None:
        from vmd_scale.training import loop

        prepare = loop.Trainer._prepare

        def poisoned(self, step, batch):
            inputs = prepare(self, step, batch)
            if step in bad and 3 in batch.positions:
                inputs.epsilon[0] = math.nan
            return inputs

        loop.Trainer._prepare = poisoned

    return make


def spike(*bad: int):
    """These batches are ones that the loss does not survive; the detector sees at least 16 steps before them."""

    def make() -> None:
        from vmd_scale.training import meter

        measured = meter.Meter.record

        def risen(self, done, losses, progress, gradient_norm):
            record = measured(self, done, losses, progress, gradient_norm)
            return record | {"loss": 100.0} if done - 1 + progress.skipped_batches in bad else record

        meter.Meter.record = risen

    return make


def full_disk() -> None:
    """While step 8 is saved, the last rank's disk is full."""
    from vmd_scale.training import checkpoint

    save_file = checkpoint.save_file

    def full(tensors, path, metadata):
        if "step-00000008" in str(path) and os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1):
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(tensors, path, metadata=metadata)

    checkpoint.save_file = full


def no_pointer() -> None:
    """There is room for the checkpoint of step 8, but not for the file that points to it."""
    from vmd_scale.training import checkpoint

    write = checkpoint.write_atomically

    def full(path, content):
        if content == "step-00000008\n":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, content)

    checkpoint.write_atomically = full


def folders_of_their_own() -> None:
    """Rank 1 saves where rank 0 does not see it, and nothing said so at the start."""
    from vmd_scale.training import checkpoint

    start = checkpoint.Checkpointer.__init__

    def elsewhere(self, folder, world, *arguments):
        start(self, folder if world.is_main else folder.with_name("elsewhere"), world, *arguments)

    checkpoint.Checkpointer.__init__ = elsewhere


def at_bounds(do):
    """Before each batch that an evaluation scores, `do` is told its number, from 1."""

    def make() -> None:
        from vmd_scale.evaluation import perplexity

        elbo, numbers = perplexity.elbo, itertools.count(1)

        def disturbed(*arguments):
            do(next(numbers))
            return elbo(*arguments)

        perplexity.elbo = disturbed

    return make


def stopped_at_bound(last: int):
    """SIGTERM to the last rank alone while it scores that batch; it must be the last that is scored."""

    def do(number: int) -> None:
        assert number <= last, "the evaluation goes on"
        if number == last and os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1):
            signal.raise_signal(signal.SIGTERM)

    return at_bounds(do)


FAULTS = {
    "nothing": nothing,
    "stopped at bound 3": stopped_at_bound(3),
    "stopped at bound 8": stopped_at_bound(8),
    "slow bounds": at_bounds(lambda number: time.sleep(1)),
    "two bad batches": bad_batches(2, 3),
    "a bad beginning": bad_batches(*range(4)),
    "bad batches without end": bad_batches(*range(4, 100)),
    "spike": spike(19),
    "spikes without end": spike(*range(39, 200)),
    "full disk": full_disk,
    "no pointer": no_pointer,
    "folders of their own": folders_of_their_own,
}


def events(folder: Path, kind: str) -> list[dict]:
    found = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [event for event in found if event["event"] == kind]


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "bf16")])
def test_a_step_without_a_finite_gradient_is_left_out_and_its_rows_are_named(lab, runs, one_rank, stage, precision):
    folder = runs / f"bad-{stage}"
    settings = (f"deepspeed.zero_optimization.stage={stage}", f"training.precision={precision}")
    codes = launch(lab, folder, "two bad batches", *settings, ranks=2)
    assert codes == [0, 0]
    assert [(event["step"], len(event["rows"])) for event in events(folder, "skipped")] == [(3, 8), (4, 8)]
    records = lab.metrics(folder)
    assert [record["skipped_steps"] for record in records] == [0, 0, 1, *[2] * 9]
    assert math.isnan(records[2]["loss"])
    assert all(math.isfinite(record["loss"]) for record in records[4:])
    assert "step 3 skipped: its gradient is not finite; rows of the batch: [" in (folder / "log.txt").read_text()
    rounding = 1e-5 if precision == "fp32" else 2e-2
    assert lab.losses(folder)[:2] == pytest.approx(lab.losses(one_rank)[:2], rel=rounding)
    state = json.loads((find_checkpoint(folder) / "run_state.json").read_text())
    assert state["ema_updates"] == state["optimizer_updates"] == LAST - 2
    for kind in ("raw", "ema"):
        assert all(torch.isfinite(weights).all() for weights in load_weights(find_checkpoint(folder), kind).values())


def test_a_run_resumes_from_a_checkpoint_before_its_first_update(lab, runs):
    """All four steps up to the first checkpoint were skipped: there are no moments to load."""
    folder = runs / "beginning"
    folder.mkdir()
    assert launch(lab, folder, "a bad beginning", "training.steps=4", "training.lr_schedule=constant") == [0]
    assert launch(lab, folder, "nothing", "training.lr_schedule=constant") == [0]
    state = json.loads((find_checkpoint(folder) / "run_state.json").read_text())
    assert (state["step"], state["optimizer_updates"], state["ema_updates"]) == (LAST, LAST - 4, LAST - 4)


def test_too_many_in_a_row_end_the_run_and_leave_what_was_saved(lab, runs):
    folder = runs / "endless"
    assert launch(lab, folder, "bad batches without end", "training.max_skipped_steps=3", ranks=2) == [1, 1]
    assert find_checkpoint(folder).name == "step-00000004"
    assert len(events(folder, "skipped")) == 3


@pytest.mark.parametrize("stage", [1, 3])
def test_after_a_spike_the_run_goes_back_and_passes_over_the_batches(lab, runs, stage):
    """To the weights, moments and average of the checkpoint: what follows is what a new start from it makes."""
    folder, again = runs / f"spike-{stage}", runs / f"spike-{stage}-again"
    settings = ("training.steps=24", f"deepspeed.zero_optimization.stage={stage}")
    assert launch(lab, folder, "spike", "training.loss_spike=rollback", *settings, ranks=2) == [0, 0]
    assert [event["step"] for event in events(folder, "spike")] == [20]
    assert [(event["step"], event["rolled_back_from"]) for event in events(folder, "rolled back")] == [(16, 20)]
    records = lab.metrics(folder)
    assert [record["step"] for record in records] == list(range(1, 25))
    assert max(record["loss"] for record in records) < 10
    state = json.loads((find_checkpoint(folder) / "run_state.json").read_text())
    assert state["skipped_batches"] == 4
    text = (folder / "log.txt").read_text()
    assert "rolled back to step 16; the rows at positions 128 to 159 of the sample order are left out" in text

    shutil.copytree(folder, again)
    for step in (20, 24):
        shutil.rmtree(again / "checkpoints" / f"step-{step:08d}")
    pass_over(again / "checkpoints" / "step-00000016", 4)
    assert launch(lab, again, "nothing", *settings, ranks=2) == [0, 0]
    assert lab.metrics(again) == records
    for kind in ("raw", "ema"):
        found, wanted = (load_weights(find_checkpoint(run), kind) for run in (folder, again))
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def pass_over(checkpoint: Path, batches: int) -> None:
    """As if the run of a checkpoint had left out so many batches."""
    state, manifest = (json.loads((checkpoint / name).read_text()) for name in ("run_state.json", "manifest.json"))
    write_json(checkpoint / "run_state.json", state | {"skipped_batches": batches})
    path = checkpoint / "run_state.json"
    manifest["files"][path.name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    write_json(checkpoint / "manifest.json", manifest)


def test_roll_backs_are_counted_over_all_starts(lab, runs):
    """Called again, the run knows what it has left out, and that it may not go back for a sixth time."""
    folder = runs / "spikes"
    settings = ("training.loss_spike=rollback", "training.steps=60", "training.keep_checkpoints=10")
    for _ in range(2):
        assert launch(lab, folder, "spikes without end", *settings) == [1]
        assert [event["step"] for event in events(folder, "rolled back")] == [36, 32, 28, 24, 20]
        checkpoint = find_checkpoint(folder)
        state = json.loads((checkpoint / "run_state.json").read_text())
        assert (checkpoint.name, state["rollbacks"], state["skipped_batches"]) == ("step-00000020", 5, 24)
    assert "after 5 roll-backs" in json.loads((folder / "status.json").read_text())["reason"]


def test_a_spike_is_only_said_when_nothing_else_is_asked(lab, runs):
    folder = runs / "warned"
    assert launch(lab, folder, "spike", "training.steps=20") == [0]
    assert [event["step"] for event in events(folder, "spike")] == [20]
    assert not events(folder, "rolled back")


def test_a_full_disk_costs_a_checkpoint_not_the_run(lab, runs):
    folder = runs / "full"
    assert launch(lab, folder, "full disk", ranks=2) == [0, 0]
    assert [path.name for path in whole_checkpoints(folder / "checkpoints")] == ["step-00000004", "step-00000012"]
    assert not list((folder / "checkpoints").glob(".staging-*"))
    text = (folder / "log.txt").read_text()
    assert "CHECKPOINT OF STEP 8 NOT WRITTEN (rank 1: OSError: [Errno 28] No space left on device)" in text
    assert "training goes on; the newest is step-00000004" in text


def test_a_pointer_that_cannot_be_written_costs_no_checkpoint(lab, runs):
    folder = runs / "pointer"
    assert launch(lab, folder, "no pointer", "training.steps=8", "training.keep_checkpoints=1") == [0]
    assert [path.name for path in whole_checkpoints(folder / "checkpoints")] == ["step-00000008"]
    text = (folder / "log.txt").read_text()
    assert "step-00000008 is whole, but latest cannot be made to name it: [Errno 28] No space left" in text
    assert "NOT WRITTEN" not in text


def test_a_checkpoint_that_rank_0_cannot_see_whole_is_not_published(lab, runs):
    folder = runs / "elsewhere"
    assert launch(lab, folder, "folders of their own", "training.steps=4", ranks=2) == [1, 1]
    assert not [*(folder / "checkpoints").glob("*step-*"), *(folder / "checkpoints").glob("latest")]
    text = (folder / "log.txt").read_text()
    missing = "weights-00001-of-00002.safetensors is missing, as rank 0 sees it"
    assert f"CHECKPOINT OF STEP 4 NOT WRITTEN ({missing}): training goes on; there is none" in text


def test_a_folder_in_use_is_refused(lab, runs, one_rank):
    lock = RunLock(one_rank)
    lock.acquire()
    try:
        (finished,) = lab.pretrain(one_rank, "training.steps=20", ranks=1, expect=2)
    finally:
        lock.release()
    (line,) = finished.errors
    assert f"is in use by process {os.getpid()} on" in line
    assert line.endswith(f"(If that node is dead, delete {one_rank / '.lock'})")


def test_a_stop_is_obeyed_within_an_evaluation_and_the_next_start_makes_up_for_it(lab, runs, one_rank):
    """Stopped in the middle of the evaluations of step 6 and of the last step: each is made once, as a whole.

    One rank scores 9 rows at 2 T in 6 batches. The last start scores them in 6 seconds, which is no hang, though
    nothing may last longer than 5.
    """
    folder, every = runs / "evaluated", "evaluation.every=6"
    starts = (
        ("stopped at bound 3", 2, 75, [], ("stopped", 6)),
        ("stopped at bound 8", 1, 75, [6, 6], ("stopped", 12)),
        ("slow bounds", 1, 0, [6, 6, 12, 12], ("finished", 12)),
    )
    for fault, ranks, code, evaluated, state in starts:
        assert launch(lab, folder, fault, every, "training.hang_timeout=5", ranks=ranks) == [code] * ranks
        file = folder / "evaluations.jsonl"
        records = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        assert [record["step"] for record in records] == evaluated
        status = json.loads((folder / "status.json").read_text())
        assert (status["state"], status["step"]) == state
        assert status["reason"] == ("signal" if code else "")
    assert find_checkpoint(folder).name == "step-00000012"
    assert (folder / "checkpoints" / "best").read_text().strip() in ("step-00000006", "step-00000012")
    assert lab.losses(folder) == pytest.approx(lab.losses(one_rank), rel=1e-5)
    assert not json.loads((find_checkpoint(folder) / "run_state.json").read_text())["owes_evaluation"]
