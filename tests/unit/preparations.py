"""Preparations of small texts, in this process or in one of their own, and texts that come little by little."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO

import psutil

from vmd_scale.config import DataConfig

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = ROOT / "launchers" / "prepare_data.py"


def data(folder: Path, **more: object) -> DataConfig:
    values = {
        "corpus": "text",
        "source": str(folder / "text.txt"),
        "tokenizer": "text8",
        "normalizer": "text8",
        "row_length": 16,
        "shard_tokens": 4096,
        "shards": str(folder / "shards"),
        **more,
    }
    return DataConfig.model_validate(values)


def write_text(folder: Path, documents: int) -> None:
    lines = (f"document {n * 7919} of many, it says {'so ' * (n % 13)}" for n in range(documents))
    (folder / "text.txt").write_text("\n\n".join(lines))


def files(folder: str | Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.name != ".lock"}


def launch(folder: Path, *arguments: str, **more: object) -> "subprocess.Popen[str]":
    config = {"data": data(folder, **more).model_dump(), "training": {"steps": 1, "global_batch": 1, "micro_batch": 1}}
    (folder / "config.json").write_text(json.dumps(config))
    return subprocess.Popen(
        [sys.executable, str(LAUNCHER), *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=folder,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


class Pipe:
    """A named pipe for a source: who reads it waits for more, so that nothing depends on how fast it is."""

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        self._path = path
        self._file: IO[str] | None = None

    def write(self, text: str) -> None:
        """Returns when nearly all of it was read."""
        self._file = self._file or open(self._path, "w")  # noqa: SIM115  closed by close()
        self._file.write(text)
        self._file.flush()

    def close(self) -> None:
        assert self._file is not None
        with suppress(BrokenPipeError):
            self._file.close()


def until(condition: Callable[[], object], process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def finished_shards(folder: Path) -> dict[str, int]:
    """When each was written, in ns; without the last one, which may not have been recorded yet."""
    names = sorted(path.name for path in folder.glob("train-*.tokens"))
    return {name: (folder / name).stat().st_mtime_ns for name in names[:-1]}


def workers_of(process: "subprocess.Popen[str]") -> list[psutil.Process]:
    children = psutil.Process(process.pid).children()
    return [child for child in children if any("spawn_main" in part for part in child.cmdline())]
