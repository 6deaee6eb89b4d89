"""Ranks that do not mean the same run, or cannot add, are found before the first step; on every rank alike."""

import os
import shutil
import socket

import pytest
import torch
import torch.distributed as dist
from ranks import run_in_processes

from vmd_scale.config_file import load_config
from vmd_scale.errors import UserError
from vmd_scale.tokenization import load_tokenizer
from vmd_scale.training import preflight


def check(config_path: object, fault: str) -> str | None:
    from vmd_scale.training.launch import join_world, leave_world

    world = join_world()
    on_last = os.environ["RANK"] == "1"
    config = load_config(config_path, ["training.learning_rate=1e-3"] if fault == "config" and on_last else [])
    if fault == "torch" and on_last:
        torch.__version__ = "0.1"
    if fault == "sum" and on_last:
        all_reduce = dist.all_reduce

        def broken(tensor, *arguments, **options):
            all_reduce(tensor, *arguments, **options)
            tensor[7] += 1

        preflight.dist.all_reduce = broken
    try:
        preflight.check_ranks(config, world)
    except UserError as error:
        return str(error)
    finally:
        leave_world()
    return None


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("none", None),
        ("config", "the configuration differs between ranks: "),
        ("torch", "the version of torch differs between ranks: "),
        ("sum", "rank 1: an all-reduce gave "),
    ],
)
def test_all_ranks_hear_what_differs_on_one(lab, fault, words):
    answers = run_in_processes(check, 2, lab.config, fault)
    assert answers[0] == answers[1]
    assert answers[0] is None if words is None else words in answers[0]


def train_in(folders: list, config_path: object) -> str:
    """Each rank in its own folder; before that, all in the first."""
    from vmd_scale.training.launch import join_world, leave_world
    from vmd_scale.training.start import pretrain

    world, config = join_world(), load_config(config_path)
    preflight.check_shared(folders[0], world)
    try:
        pretrain(config, folders[world.rank], world, load_tokenizer(config.data.tokenizer))
    except UserError as error:
        return str(error)
    finally:
        leave_world()
    return "trained"


def test_ranks_that_do_not_share_the_run_folder_are_refused(lab, tmp_path):
    """As where each node has a /scratch of its own."""
    ours, theirs = tmp_path / "a", tmp_path / "b"
    for folder in (ours, theirs):
        folder.mkdir()
    answers = run_in_processes(train_in, 2, [ours, theirs], lab.config)
    assert answers[0] == answers[1]
    assert answers[0].startswith(f"{theirs}: rank 1 on {socket.gethostname()} does not see what rank 0 writes there")
    assert [path.name for path in (*ours.iterdir(), *theirs.iterdir())] == [".lock"]


def test_a_disk_without_room_for_a_checkpoint_is_refused(tmp_path, monkeypatch, caplog):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda folder: usage._replace(free=1600))
    preflight.check_disk(tmp_path, each=320, keep=3)
    assert not caplog.records
    preflight.check_disk(tmp_path, each=1600, keep=3)
    assert "4 checkpoints to come, one being written among them, take" in caplog.text
    caplog.clear()
    preflight.check_disk(tmp_path, each=800, keep=3, there=2)  # resumed: two of the three are there
    preflight.check_disk(tmp_path, each=1600, keep=3, there=5)  # fewer are kept than before
    assert not caplog.records
    preflight.check_disk(tmp_path, each=801, keep=3, there=2)
    assert "2 checkpoints to come" in caplog.text
    with pytest.raises(UserError, match=r"GB are free, and one checkpoint takes"):
        preflight.check_disk(tmp_path, each=1601, keep=3)


def test_what_is_frozen_has_no_moments_and_no_average_on_the_disk():
    model = torch.nn.Linear(10, 5)
    assert preflight.bytes_of_checkpoint(model, with_ema=True) == 16 * 55
    assert preflight.bytes_of_checkpoint(model, with_ema=False) == 12 * 55
    model.weight.requires_grad_(False)
    assert preflight.bytes_of_checkpoint(model, with_ema=True) == 16 * 5 + 4 * 50
