"""A corpus becomes shards: the same ones whatever the number of workers, in bounded memory, or one clear error."""

import errno
import json
import logging
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from preparations import ROOT, Pipe, data, files, finished_shards, launch, until, write_text

from vmd_scale.data import encode, shards
from vmd_scale.data.manifest import FileRecord
from vmd_scale.data.prepare import prepare
from vmd_scale.data.roles import is_counted
from vmd_scale.data.shards import ShardReader, verify_folder
from vmd_scale.errors import UserError

SHARED = Path(os.environ.get("VMD_SHARED_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))


@pytest.mark.parametrize("packing", ["wrap", "pad", "document"])
def test_output_does_not_depend_on_workers(packing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "CHUNK_DOCUMENTS", 32)
    write_text(tmp_path, 1000)
    one = data(tmp_path, packing=packing, shards=str(tmp_path / "one"))
    three = one.model_copy(update={"shards": str(tmp_path / "three"), "workers": 3})
    assert prepare(one, progress=False) == prepare(three, progress=False)
    assert files(tmp_path / "one") == files(tmp_path / "three")
    verify_folder(tmp_path / "one")


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


@pytest.mark.parametrize("finished", [0, 2])
def test_a_full_disk_is_one_clear_error_and_the_next_call_goes_on(
    finished: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "CHUNK_DOCUMENTS", 32)
    write_text(tmp_path, 1000)
    whole = prepare(data(tmp_path, shards=str(tmp_path / "whole")), progress=False)
    write, written = shards._HashedFile.write, []

    def fill(self: shards._HashedFile, content: memoryview) -> None:
        if len(written) == finished:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, content)

    def finish(self: shards._HashedFile) -> FileRecord:
        written.append(self)
        return whole_finish(self)

    whole_finish = shards._HashedFile.finish
    with monkeypatch.context() as patch:
        patch.setattr(shards._HashedFile, "write", fill)
        patch.setattr(shards._HashedFile, "finish", finish)
        with pytest.raises(UserError, match=r"data\.shards '.*shards': .*No space left on device"):
            prepare(data(tmp_path), progress=False)
    assert bool(list(tmp_path.glob("shards/train-*.tokens"))) is bool(finished)
    assert prepare(data(tmp_path), progress=False) == whole
    assert files(tmp_path / "shards") == files(tmp_path / "whole")


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    write_text(tmp_path, 100)
    with pytest.raises(UserError, match=r"data\.shards '.*text\.txt/shards': .*Not a directory"):
        prepare(data(tmp_path, shards=str(tmp_path / "text.txt" / "shards")), progress=False)


def test_figures_of_other_texts_do_not_compare(tmp_path: Path) -> None:
    """The same text does, wherever it lies and however it was cut into shards."""
    write_text(tmp_path, 300)
    first = prepare(data(tmp_path), progress=False)
    again = prepare(data(tmp_path, shards=str(tmp_path / "again"), shard_tokens=64), progress=False)
    (tmp_path / "text.txt").write_text((tmp_path / "text.txt").read_text().replace("a", "o"))
    other = prepare(data(tmp_path, shards=str(tmp_path / "other")), progress=False)
    assert first.described("train") == again.described("train") != other.described("train")
    assert first.described("train") != first.described("validation")


def test_two_writers(tmp_path: Path) -> None:
    """Two real preparations at once: the second is told so, and the first does not notice it."""
    write_text(tmp_path, 3000)
    text, source, folder = (tmp_path / "text.txt").read_text(), tmp_path / "source.txt", tmp_path / "shards"
    pipe, settings = Pipe(source), {"source": {"train": str(source)}}
    first = launch(tmp_path, "--config", "config.json", **settings)
    pipe.write(text[: len(text) // 2])
    until(lambda: finished_shards(folder), first)
    for arguments in ((), ("--force",)):
        second = launch(tmp_path, "--config", "config.json", *arguments, **settings)
        _, errors = second.communicate(timeout=120)
        assert errors == f"error: data.shards {str(folder)!r}: another process is preparing shards there\n"
        assert second.returncode == 2
    pipe.write(text[len(text) // 2 :])
    pipe.close()
    _, errors = first.communicate(timeout=120)
    assert first.returncode == 0, errors
    source.unlink()
    source.write_text(text)
    undisturbed = data(tmp_path, **settings, shards=str(tmp_path / "undisturbed"))
    prepare(undisturbed, progress=False)
    assert files(folder) == files(undisturbed.shards)


MEMORY = """
import sys
from pathlib import Path
from vmd_scale.config import DataConfig
from vmd_scale.data.prepare import prepare

prepare(DataConfig.model_validate_json(sys.argv[1]), progress=False)
status = Path("/proc/self/status").read_text()
print(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peaks are read from /proc")
def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    """27 MB more of text, which would be 54 MB more of ids: neither is kept."""
    line = "a document of a hundred characters " * 30 + "\n"
    how = {"normalizer": "none", "row_length": 1024, "shard_tokens": 1 << 20}
    peaks = []
    for megabytes in (3, 30):
        path = tmp_path / f"{megabytes}.txt"
        path.write_text(line * (megabytes * 10**6 // len(line)))
        config = data(tmp_path, source={"train": str(path)}, shards=str(tmp_path / path.stem), **how)
        child = [sys.executable, "-c", MEMORY, config.model_dump_json()]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        peaks.append(int(subprocess.run(child, env=environment, check=True, capture_output=True).stdout))
    assert peaks[1] - peaks[0] < 8 * 1024, peaks  # KiB


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
