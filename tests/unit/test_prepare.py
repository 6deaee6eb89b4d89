import fcntl
import json
import logging
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from vmd_scale.config import DataConfig
from vmd_scale.data import encode
from vmd_scale.data.prepare import prepare
from vmd_scale.data.roles import is_counted
from vmd_scale.data.shards import ShardReader, verify_folder
from vmd_scale.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = ROOT / "launchers" / "prepare_data.py"
SHARED = Path(os.environ.get("VMD_SHARED_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))


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


def launch(folder: Path, *arguments: str) -> "subprocess.Popen[str]":
    config = {"data": data(folder).model_dump(), "training": {"steps": 1, "global_batch": 1, "micro_batch": 1}}
    (folder / "config.json").write_text(json.dumps(config))
    return subprocess.Popen(
        [sys.executable, str(LAUNCHER), *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=folder,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.mark.parametrize("packing", ["wrap", "pad", "document"])
def test_output_does_not_depend_on_workers(packing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "CHUNK_DOCUMENTS", 32)
    write_text(tmp_path, 1000)
    one = data(tmp_path, packing=packing, shards=str(tmp_path / "one"))
    three = one.model_copy(update={"shards": str(tmp_path / "three"), "workers": 3})
    assert prepare(one, progress=False) == prepare(three, progress=False)
    assert files(tmp_path / "one") == files(tmp_path / "three")
    verify_folder(tmp_path / "one")


def test_a_killed_preparation_is_resumed(tmp_path: Path) -> None:
    """kill -9 in the middle of a split; what follows ends with the same bytes as an undisturbed run."""
    write_text(tmp_path, 60_000)
    folder = tmp_path / "shards"
    arguments = ["--config", str(tmp_path / "config.json"), "--set", "data.workers=2"]
    process = launch(tmp_path, *arguments)
    deadline = time.monotonic() + 120
    while not list(folder.glob("train-0000[1-9].tokens")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    workers = workers_of(process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert len(workers) == 2
    assert not psutil.wait_procs(workers, timeout=30)[1]  # none is left behind
    assert not (folder / "manifest.json").exists()
    with pytest.raises(UserError, match=r"launchers/prepare_data\.py"):
        ShardReader(folder, "train")

    prepare(data(tmp_path), splits=["train"], progress=False)
    kept = (folder / "train-00000.tokens").stat().st_mtime_ns
    prepare(data(tmp_path), progress=False)
    assert (folder / "train-00000.tokens").stat().st_mtime_ns == kept
    undisturbed = data(tmp_path, shards=str(tmp_path / "undisturbed"))
    prepare(undisturbed, progress=False)
    assert files(folder) == files(undisturbed.shards)


def workers_of(process: "subprocess.Popen[str]") -> list[psutil.Process]:
    children = psutil.Process(process.pid).children()
    return [child for child in children if any("spawn_main" in part for part in child.cmdline())]


def test_a_killed_worker_ends_the_preparation_with_an_error(tmp_path: Path) -> None:
    """Not with a wait for ever; what comes after is as if nothing had happened."""
    write_text(tmp_path, 60_000)
    process = launch(tmp_path, "--config", "config.json", "--set", "data.workers=2")
    deadline = time.monotonic() + 120
    while not (tmp_path / "shards" / "train-00001.tokens").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    workers_of(process)[0].kill()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "error: a worker process of the preparation (data.workers=2) was killed" in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "shards" / "manifest.json").exists()
    prepare(data(tmp_path), progress=False)
    undisturbed = data(tmp_path, shards=str(tmp_path / "undisturbed"))
    prepare(undisturbed, progress=False)
    assert files(tmp_path / "shards") == files(undisturbed.shards)


def test_finished_splits_of_a_killed_preparation_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vmd_scale.data import prepare as module

    write_text(tmp_path, 100)
    config = data(tmp_path)
    original, calls = module._prepare_split, []

    def dies_in_validation(config: DataConfig, split: str, *rest: object) -> object:
        calls.append(split)
        if len(calls) == 2:
            (Path(config.shards) / "validation-00000.tokens.tmp").write_bytes(b"half")
            raise KeyboardInterrupt
        return original(config, split, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "_prepare_split", dies_in_validation)
    with pytest.raises(KeyboardInterrupt):
        prepare(config, progress=False)
    assert not (Path(config.shards) / "manifest.json").exists()
    prepare(config, progress=False)
    assert calls == ["train", "validation", "validation", "test"]
    assert not list(Path(config.shards).glob("*.tmp"))
    assert not (Path(config.shards) / "manifest.partial.json").exists()
    verify_folder(config.shards)


def test_nothing_to_do_the_second_time(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_text(tmp_path, 100)
    first = prepare(data(tmp_path), progress=False)
    before = files(tmp_path / "shards")
    with caplog.at_level(logging.INFO):
        assert prepare(data(tmp_path, workers=2), progress=False) == first
    assert "nothing to do" in caplog.text
    assert files(tmp_path / "shards") == before


def test_other_settings_never_overwrite_unless_forced(tmp_path: Path) -> None:
    write_text(tmp_path, 100)
    prepare(data(tmp_path), progress=False)
    (tmp_path / "shards" / "notes.txt").write_text("mine")
    before = files(tmp_path / "shards")
    other = data(tmp_path, row_length=32)
    with pytest.raises(UserError, match=r"data\.row_length is 32"):
        prepare(other, progress=False)
    assert files(tmp_path / "shards") == before
    assert prepare(other, progress=False, force=True).row_length == 32
    assert (tmp_path / "shards" / "notes.txt").read_text() == "mine"
    verify_folder(tmp_path / "shards")


def test_two_writers(tmp_path: Path) -> None:
    write_text(tmp_path, 100)
    (tmp_path / "shards").mkdir()
    with open(tmp_path / "shards" / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is preparing"):
            prepare(data(tmp_path), progress=False)
    prepare(data(tmp_path), progress=False)


def test_statistics(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n".join(["", "abab", "!!!", "  ", "ba é"]))
    config = data(tmp_path, source={"train": str(tmp_path / "text.txt")}, row_length=2)
    record = prepare(config, progress=False).splits["train"]
    # " abab" + " ba" (the é and the marks are no letters)
    assert (record.documents, record.skipped_documents) == (2, 3)
    assert (record.characters, record.utf8_bytes) == (8, 8)
    assert (record.rows, record.counted_tokens, record.dropped_tokens) == (4, 8, 0)
    p = np.array([2, 3, 3]) / 8
    assert math.isclose(record.unigram_entropy, -(p * np.log(p)).sum())


@pytest.mark.parametrize("content", ["", "\n\n\n", "short"])
def test_empty_corpus(content: str, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(content)
    with pytest.raises(UserError, match=r"data\.source: split 'train' of corpus 'text' fills no row"):
        prepare(data(tmp_path), progress=False)
    assert not (tmp_path / "shards" / "manifest.json").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_text_is_one_clear_error(workers: int, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("fine\nnot Fine\n")
    with pytest.raises(UserError, match=r"'F' at position 4 .*'not Fine'"):
        prepare(data(tmp_path, normalizer="none", workers=workers), progress=False)


@pytest.mark.parametrize("packing", ["wrap", "pad", "document"])
def test_a_document_longer_than_a_shard_is_no_trouble(packing: str, tmp_path: Path) -> None:
    """It goes on in the next file; what does not fit a padded row is counted."""
    (tmp_path / "text.txt").write_text("a\n" + "b" * 1000 + "\nc\n")
    source = {"train": str(tmp_path / "text.txt")}
    config = data(tmp_path, source=source, packing=packing, shard_tokens=64)
    record = prepare(config, progress=False).splits["train"]
    reader = ShardReader(config.shards, "train")
    tokens, roles = reader.read(np.arange(reader.rows))
    written = tokens if roles is None else tokens[is_counted(roles)]
    # Normalised, a line begins with a space.
    assert record.characters == 2 + 1001 + 2
    kept = {"wrap": record.characters - record.dropped_tokens, "pad": 2 + 16 + 2, "document": record.characters}
    assert written.size == record.counted_tokens == kept[packing]
    assert len(record.shards) == (1 if packing == "pad" else 16)
    assert (record.truncated_documents, record.split_documents) == (packing == "pad", packing == "document")


@pytest.mark.parametrize("workers", [1, 2])
def test_text_that_is_not_utf8_is_one_clear_error(workers: int, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes(b"fine\n" * 1000 + b"caf\xe9\n" + b"fine\n")
    with pytest.raises(UserError, match=r"text\.txt: not UTF-8 at byte 5003 \(0xe9\); convert the file to UTF-8"):
        prepare(data(tmp_path, workers=workers), progress=False)
    assert not (tmp_path / "shards").exists()


def test_unknown_split(tmp_path: Path) -> None:
    write_text(tmp_path, 30)
    with pytest.raises(UserError, match="no 'dev' here; it has: train, validation, test"):
        prepare(data(tmp_path), splits=["dev"], progress=False)


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"sample corpora not at {SHARED}")
def test_lm1b_packed_protocol(tmp_path: Path) -> None:
    """[CLS], 126 tokens of sentences each closed by [SEP], [SEP]."""
    config = data(
        tmp_path,
        corpus="lm1b",
        source={"validation": str(SHARED / "lm1b" / "dev_sample.tokens.xz")},
        tokenizer=f"bert:{SHARED / 'tokenizers'}",
        normalizer=None,
        row_length=128,
        row_specials=True,
    )
    record = prepare(config, progress=False).splits["validation"]
    reader = ShardReader(config.shards, "validation")
    tokens, roles = reader.read(np.arange(reader.rows))
    assert roles is None
    assert np.all(tokens[:, 0] == 101)
    assert np.all(tokens[:, -1] == 102)
    assert abs(int((tokens[:, 1:-1] == 102).sum()) - record.documents) <= 10
    assert record.dropped_tokens < 126


def test_launcher(tmp_path: Path) -> None:
    write_text(tmp_path, 100)
    process = launch(tmp_path, "--config", "config.json", "--splits", "train", "validation", "--json", "out.json")
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "unigram entropy" in output
    assert list(json.loads((tmp_path / "out.json").read_text())["splits"]) == ["train", "validation"]
    output, errors = launch(tmp_path, "inspect", "shards", "--plot", "lengths.png").communicate(timeout=60)
    assert "train: documents by their length in tokens" in output, errors
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")
    for action, expected in [("verify", "is as it was written"), ("inspect", "train[0]: ' document zero")]:
        output, errors = launch(tmp_path, action, "shards").communicate(timeout=60)
        assert expected in output, errors
    process = launch(tmp_path, "verify", "nowhere")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
