import json
import logging
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO

import numpy as np
import psutil
import pytest

from vmd_scale.config import DataConfig
from vmd_scale.data import encode
from vmd_scale.data.corpora import text8
from vmd_scale.data.normalize import to_text8_alphabet
from vmd_scale.data.packing import Rows
from vmd_scale.data.prepare import prepare
from vmd_scale.data.roles import is_counted
from vmd_scale.data.shards import ShardReader, verify_folder
from vmd_scale.data.split import SplitPreparation
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


@pytest.mark.parametrize("packing", ["wrap", "pad", "document"])
def test_output_does_not_depend_on_workers(packing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "CHUNK_DOCUMENTS", 32)
    write_text(tmp_path, 1000)
    one = data(tmp_path, packing=packing, shards=str(tmp_path / "one"))
    three = one.model_copy(update={"shards": str(tmp_path / "three"), "workers": 3})
    assert prepare(one, progress=False) == prepare(three, progress=False)
    assert files(tmp_path / "one") == files(tmp_path / "three")
    verify_folder(tmp_path / "one")


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


def test_a_killed_preparation_goes_on_where_it_was(tmp_path: Path) -> None:
    """kill -9 in the middle of a split, twice; the bytes are those of an undisturbed preparation."""
    write_text(tmp_path, 20_000)
    text, source, folder = (tmp_path / "text.txt").read_text(), tmp_path / "source.txt", tmp_path / "shards"
    settings = {"source": {"train": str(source)}, "shard_tokens": 40_000}
    kept: dict[str, int] = {}
    for part in (0.5, 0.9):
        pipe, enough = Pipe(source), len(kept) + 2
        process = launch(tmp_path, "--config", "config.json", **settings, workers=2)
        pipe.write(text[: int(part * len(text))])
        until(lambda enough=enough: len(finished_shards(folder)) > enough, process)
        workers = workers_of(process)
        process.send_signal(signal.SIGKILL)
        _, errors = process.communicate()
        pipe.close()
        source.unlink()
        assert ("train: goes on behind" in errors) == bool(kept)
        assert len(workers) == 2
        assert not psutil.wait_procs(workers, timeout=30)[1]  # none is left behind
        assert not (folder / "manifest.json").exists()
        with pytest.raises(UserError, match=r"launchers/prepare_data\.py"):
            ShardReader(folder, "train")
        kept = finished_shards(folder)

    source.write_text(text)
    prepare(data(tmp_path, **settings), progress=False)
    assert kept.items() <= finished_shards(folder).items()
    undisturbed = data(tmp_path, **settings, shards=str(tmp_path / "undisturbed"))
    prepare(undisturbed, progress=False)
    assert files(folder) == files(undisturbed.shards)


def test_a_killed_worker_ends_the_preparation_with_an_error(tmp_path: Path) -> None:
    """Not with a wait for ever; what was finished is kept."""
    write_text(tmp_path, 20_000)
    text, source, folder = (tmp_path / "text.txt").read_text(), tmp_path / "source.txt", tmp_path / "shards"
    pipe, settings = Pipe(source), {"source": {"train": str(source)}}
    process = launch(tmp_path, "--config", "config.json", **settings, workers=2)
    pipe.write(text[: len(text) // 2])
    until(lambda: len(finished_shards(folder)) > 2, process)
    workers_of(process)[0].kill()
    with suppress(BrokenPipeError):  # it may have noticed at once
        pipe.write(text[len(text) // 2 :])
    pipe.close()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "error: a worker process of the preparation (data.workers=2) was killed" in errors
    assert "Traceback" not in errors
    assert not (folder / "manifest.json").exists()
    kept = finished_shards(folder)
    source.unlink()
    source.write_text(text)
    prepare(data(tmp_path, **settings), progress=False)
    assert kept
    assert kept.items() <= finished_shards(folder).items()
    undisturbed = data(tmp_path, **settings, shards=str(tmp_path / "undisturbed"))
    prepare(undisturbed, progress=False)
    assert files(folder) == files(undisturbed.shards)


class Killed(BaseException):
    """What no `except Exception` and no `except UserError` sees."""


def killed_after(shards: int, config: DataConfig) -> None:
    """A preparation that ends abruptly when it has so many times written down where it is."""
    save, saved = SplitPreparation._save, []

    def save_and_die(self: SplitPreparation, last: Rows) -> None:
        save(self, last)
        saved.append(last)
        if len(saved) == shards:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SplitPreparation, "_save", save_and_die)
        with pytest.raises(Killed):
            prepare(config, progress=False)


HOW = [
    {"packing": "wrap"},
    {"packing": "wrap", "tokenizer": "text8_mdlm", "row_specials": True},
    {"packing": "pad"},
    {"packing": "document", "documents_per_row": 3, "row_length": 100},
]


@pytest.mark.parametrize("how", HOW)
def test_whatever_is_packed_is_taken_up_again(how: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "CHUNK_DOCUMENTS", 32)
    write_text(tmp_path, 1000)
    (tmp_path / "text.txt").write_text("\n\n\n" + (tmp_path / "text.txt").read_text() + "\nlong " * 300)
    killed = data(tmp_path, **how, shard_tokens=1600)
    whole = killed.model_copy(update={"shards": str(tmp_path / "whole")})
    manifest = prepare(whole, progress=False)
    for shards in (1, 2, 2):
        killed_after(shards, killed)
    encoded = []
    original = encode.Encoder.encode
    monkeypatch.setattr(encode.Encoder, "encode", lambda self, chunk: encoded.extend(chunk) or original(self, chunk))
    assert prepare(killed, progress=False) == manifest
    assert files(tmp_path / "shards") == files(tmp_path / "whole")
    again = sum(record.documents + record.skipped_documents for record in manifest.splits.values())
    assert len(encoded) < again - 5 * 32  # what was encoded before is not encoded again


def test_pieces_of_one_document_are_taken_up_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text8, "PIECE", 500)
    monkeypatch.setattr(encode, "CHUNK_DOCUMENTS", 3)
    write_text(tmp_path, 1000)
    (tmp_path / "text.txt").write_text(to_text8_alphabet((tmp_path / "text.txt").read_text()))
    for packing in ("wrap", "document"):
        whole = data(tmp_path, corpus="text8", packing=packing, shards=str(tmp_path / f"whole {packing}"))
        killed = whole.model_copy(update={"shards": str(tmp_path / packing)})
        manifest = prepare(whole, progress=False)
        killed_after(2, killed)
        assert prepare(killed, progress=False) == manifest
        assert files(killed.shards) == files(whole.shards)


def spoil_shard(folder: Path) -> None:
    path = folder / "shards" / "train-00000.tokens"
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])


def spoil_progress(folder: Path) -> None:
    path = folder / "shards" / "train.progress"
    path.write_bytes(path.read_bytes()[:-100])


def change_source(folder: Path) -> None:
    path = folder / "text.txt"
    path.write_text("more " + path.read_text())


def shorten_source(folder: Path) -> None:
    path = folder / "text.txt"
    path.write_text(path.read_text()[:2000])


CHANGED = "train: data.source has changed since the preparation was interrupted, the split starts anew"


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (spoil_shard, "train-00000.tokens: missing or altered, the split starts anew"),
        (spoil_progress, "train.progress: damaged, the split starts anew"),
        (change_source, CHANGED),
        (shorten_source, CHANGED),
    ],
)
def test_nothing_is_taken_up_that_is_not_as_it_was(
    spoil: Callable[[Path], None],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(encode, "CHUNK_DOCUMENTS", 32)
    write_text(tmp_path, 1000)
    killed_after(2, data(tmp_path))
    spoil(tmp_path)
    prepare(data(tmp_path), progress=False)
    assert said in caplog.text
    prepare(data(tmp_path, shards=str(tmp_path / "whole")), progress=False)
    assert files(tmp_path / "shards") == files(tmp_path / "whole")


def test_other_settings_do_not_go_on_with_what_a_killed_preparation_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "CHUNK_DOCUMENTS", 32)
    write_text(tmp_path, 1000)
    killed_after(2, data(tmp_path))
    before = files(tmp_path / "shards")
    for change, said in (
        ({"row_length": 32}, r"data\.row_length is 32"),
        ({"shard_tokens": 8192}, r"data\.shard_tokens 8192 makes shards of 512 rows, .* have 256; .*--force"),
    ):
        with pytest.raises(UserError, match=said):
            prepare(data(tmp_path, **change), progress=False)
        assert files(tmp_path / "shards") == before
    prepare(data(tmp_path, shard_tokens=8192), progress=False, force=True)
    assert not (tmp_path / "shards" / "train.progress").exists()
    verify_folder(tmp_path / "shards")


def test_what_was_finished_before_bad_text_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "CHUNK_DOCUMENTS", 32)
    write_text(tmp_path, 1000)
    good = (tmp_path / "text.txt").read_bytes()
    (tmp_path / "text.txt").write_bytes(good + b"caf\xe9\n")
    config = data(tmp_path, source={"train": str(tmp_path / "text.txt")})
    with pytest.raises(UserError, match="not UTF-8"):
        prepare(config, progress=False)
    kept = finished_shards(tmp_path / "shards")
    assert kept
    (tmp_path / "text.txt").write_bytes(good)
    prepare(config, progress=False)
    assert kept.items() <= finished_shards(tmp_path / "shards").items()
    prepare(config.model_copy(update={"shards": str(tmp_path / "whole")}), progress=False)
    assert files(tmp_path / "shards") == files(tmp_path / "whole")


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
