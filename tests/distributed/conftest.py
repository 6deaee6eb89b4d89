"""Undisturbed runs that disturbed ones are compared with: made once for all files of this folder, changed by none."""

import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def whole(lab, tmp_path_factory) -> Path:
    """Two ranks, by the launcher that DeepSpeed's users use."""
    folder = tmp_path_factory.mktemp("undisturbed") / "whole"
    deepspeed = Path(sys.executable).with_name("deepspeed")
    command = [str(deepspeed), "--num_gpus", "2", "--master_port", str(lab.free_port())]
    finished = lab.command([*command, *lab.pretrain_arguments(folder)])
    assert finished.code == 0, finished.text[-3000:]
    return folder


@pytest.fixture(scope="session")
def one_rank(lab, tmp_path_factory) -> Path:
    """One process, started by plain python."""
    folder = tmp_path_factory.mktemp("undisturbed") / "one"
    finished = lab.command([sys.executable, *lab.pretrain_arguments(folder)])
    assert finished.code == 0, finished.text[-3000:]
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory, request) -> Path:
    """A folder for those of one file."""
    return tmp_path_factory.mktemp(request.module.__name__.removeprefix("test_"))
