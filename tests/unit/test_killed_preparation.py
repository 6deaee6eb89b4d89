"""A preparation that was killed goes on after its last finished shard, to the same files, or starts anew."""

import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from preparations import Pipe, data, files, finished_shards, launch, until, workers_of, write_text

from vmd_scale.config import DataConfig
from vmd_scale.data import encode
from vmd_scale.data.corpora import text8
from vmd_scale.data.normalize import to_text8_alphabet
from vmd_scale.data.packing import PackedRows
from vmd_scale.data.prepare import prepare
from vmd_scale.data.shards import ShardReader, verify_folder
from vmd_scale.data.split import SplitPreparation
from vmd_scale.errors import UserError


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
        assert ("train: goes on after" in errors) == bool(kept)
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

    def save_and_die(self: SplitPreparation, last: PackedRows) -> None:
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
    original = encode.DocumentEncoder.encode
    monkeypatch.setattr(
        encode.DocumentEncoder, "encode", lambda self, chunk: encoded.extend(chunk) or original(self, chunk)
    )
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
