"""Checkpoints that are damaged, or died half-written, cost no more than what came after the last whole one."""

import json
import os
import runpy
import shutil
import sys
from pathlib import Path

import pytest
from ranks import run_in_processes
from same_run import assert_same_run

from vmd_scale.checkpoints import find_checkpoint, load_weights


@pytest.fixture(scope="module")
def damaged(lab, runs, whole) -> dict:
    """A run whose newest checkpoint has a flipped bit and the one before lost its end, asked to stop at once."""
    folder = runs / "damaged"
    shutil.copytree(whole, folder)
    flip_a_bit(folder / "checkpoints" / "step-00000012" / "weights-00001-of-00002.safetensors")
    torn = folder / "checkpoints" / "step-00000008" / "optimizer-00000-of-00002.safetensors"
    torn.write_bytes(torn.read_bytes()[:-100])
    leftover = folder / "checkpoints" / ".staging-step-00000012"  # what a kill in the middle of a save leaves
    leftover.mkdir()
    (leftover / "weights-00000-of-00002.safetensors").write_bytes(b"half")
    (folder / "STOP").touch()
    finished = lab.pretrain(folder, "training.keep_checkpoints=1", expect=75)
    checkpoints = sorted(path.name for path in (folder / "checkpoints").iterdir())
    latest = (folder / "checkpoints" / "latest").read_text().strip()
    newest = load_weights(find_checkpoint(folder), "raw")
    assert not (folder / "STOP").exists()  # obeyed once
    status = json.loads((folder / "status.json").read_text())
    lab.pretrain(folder)
    return {
        "folder": folder,
        "text": finished[0].text,
        "checkpoints": checkpoints,
        "latest": latest,
        "newest": newest,
        "status": status,
    }


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def die_in_save(arguments: list[str], place: str) -> None:
    """pretrain.py, killed while it saves step 8: in the middle of a file, before the folder gets its name, before
    `latest` points to it, or while step 4 is thrown away."""
    from vmd_scale.training import checkpoint

    os.environ["LOCAL_WORLD_SIZE"] = str(os.cpu_count())  # one thread, as all other runs
    begin = checkpoint.Checkpointer.begin

    def doomed(self, step, *arguments):
        if step == 8:
            self.finish()
            owner = {"rename": checkpoint.os, "rmtree": checkpoint.shutil}.get(place, checkpoint)
            half = {"save_file": half_of_a_file, "rmtree": half_of_a_folder}
            setattr(owner, place, half.get(place, lambda *_: os._exit(9)))
        return begin(self, step, *arguments)

    checkpoint.Checkpointer.begin = doomed
    sys.argv = arguments
    runpy.run_path(arguments[0], run_name="__main__")


def half_of_a_file(tensors, path, metadata):
    path.write_bytes(b"half of it")
    os._exit(9)


def half_of_a_folder(folder, ignore_errors=False):
    if folder.exists():
        (folder / "manifest.json").unlink()
        os._exit(9)


def test_damaged_checkpoints_are_named_and_passed_over(damaged):
    assert "step-00000012 is damaged (weights-00001-of-00002.safetensors was altered" in damaged["text"]
    assert "step-00000008 is damaged (optimizer-00000-of-00002.safetensors has" in damaged["text"]
    assert "step-00000004 at step 4" in damaged["text"]


def test_a_damaged_checkpoint_never_pushes_out_a_whole_one(damaged):
    """One is kept: the one just written, though the damaged ones have higher numbers. Half a save is cleared away."""
    kept = ["damaged-step-00000008", "damaged-step-00000012", "latest", "step-00000005"]
    assert (damaged["checkpoints"], damaged["latest"]) == (kept, "step-00000005")
    assert damaged["newest"]


def test_after_damage_the_run_is_made_again_bit_for_bit(lab, whole, damaged):
    assert_same_run(lab, damaged["folder"], whole)


def test_the_status_tells_a_stop_that_was_asked_for(damaged):
    """Unlike one by a signal, it is not for a batch system to undo."""
    assert (damaged["status"]["state"], damaged["status"]["reason"]) == ("stopped", "STOP file")


def test_when_every_checkpoint_is_damaged_the_run_does_not_silently_start_anew(lab, runs, whole):
    folder = runs / "all_damaged"
    shutil.copytree(whole, folder)
    for checkpoint in (folder / "checkpoints").glob("step-*"):
        flip_a_bit(checkpoint / "weights-00000-of-00002.safetensors")
    (folder / "checkpoints" / "step-00000012" / "manifest.json").unlink()
    metrics = (folder / "metrics.jsonl").read_bytes()
    for _ in range(2):  # as the jobs of a chain would
        finished = lab.pretrain(folder, "training.steps=20", expect=2)
        assert "all checkpoints in" in finished[0].errors[0]
        assert (folder / "metrics.jsonl").read_bytes() == metrics
        damaged = sorted(path.name for path in (folder / "checkpoints").glob("*step-*"))
        assert damaged == [f"damaged-step-{step:08d}" for step in (4, 8, 12)]


@pytest.mark.parametrize(
    ("place", "newest", "latest"), [("save_file", 4, 4), ("rename", 4, 4), ("write_atomically", 8, 4), ("rmtree", 8, 8)]
)
def test_a_death_in_the_middle_of_a_save_costs_at_most_that_save(lab, runs, one_rank, place, newest, latest):
    """One is kept: what was thrown away in half, or replaced, leaves nothing behind."""
    folder = runs / f"dies-in-{place}"
    arguments = lab.pretrain_arguments(folder, "training.keep_checkpoints=1")
    with pytest.raises(RuntimeError, match="died without a word"):
        run_in_processes(die_in_save, 1, arguments, place)
    assert (folder / "checkpoints" / "latest").read_text() == f"step-{latest:08d}\n"
    assert find_checkpoint(folder).name == f"step-{newest:08d}"
    finished = lab.pretrain(folder, "training.keep_checkpoints=1", ranks=1)
    assert f"step-{newest:08d} at step {newest}" in finished[0].text
    assert_same_run(lab, folder, one_rank)
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"step-00000012", "latest"}
