"""Shards on remote file systems: fetched once, checked, tried again, and never too many of them on the local disk."""

import multiprocessing
import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import ClassVar

import fsspec
import numpy as np
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from vmd_scale.config import DataConfig
from vmd_scale.data import remote, shards
from vmd_scale.data.cache import CacheFull, ShardCache
from vmd_scale.data.inspection import inspect
from vmd_scale.data.manifest import FileRecord, read_manifest
from vmd_scale.data.mixture import training_rows
from vmd_scale.data.prepare import prepare
from vmd_scale.data.shards import ShardReader, verify_folder
from vmd_scale.data.verification import verify_share
from vmd_scale.errors import RunFailed, UserError
from vmd_scale.evaluation.judges import load_judge
from vmd_scale.tokenization import load_tokenizer

ROWS_PER_SHARD = 16
PLENTY = 10**9


class Troubled(MemoryFileSystem):
    """troubled://: the first transfers of a file fail, are cut off, or bring something else."""

    protocol = "troubled"
    store: ClassVar[dict] = {}
    pseudo_dirs: ClassVar[list] = [""]
    trouble: ClassVar[dict[str, list[str]]] = {}  # what befalls the next transfers of a file name
    transfers: ClassVar[Counter] = Counter()
    seconds = 0.0

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).removeprefix("troubled://"))

    def _open(self, path, mode="rb", **options):
        if mode != "rb":
            return super()._open(path, mode, **options)
        name = path.rsplit("/", 1)[-1]
        self.transfers[name] += 1
        time.sleep(self.seconds)
        befalls = self.trouble.get(name)
        kind = befalls.pop(0) if befalls else "nothing"
        if kind == "refused":
            raise ConnectionError("connection refused")
        content = super()._open(path, mode, **options).read()
        if kind == "cut":
            content = content[: len(content) // 2]
        elif kind == "altered":
            content = content[:-1] + bytes([content[-1] ^ 1])
        return BytesIO(content)


fsspec.register_implementation("troubled", Troubled, clobber=True)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "text.txt").write_text("\n".join(f"line {n} of the corpus" for n in range(400)))
    config = DataConfig(
        corpus="text", source=str(folder / "text.txt"), tokenizer="text8", normalizer="text8", row_length=32,
        packing="pad", shard_tokens=32 * ROWS_PER_SHARD, shards=str(folder / "shards"),
    )  # fmt: skip
    prepare(config, progress=False)
    return config


@pytest.fixture
def elsewhere(prepared: DataConfig, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The shards at troubled://, where there is no trouble yet."""
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.0)
    system = fsspec.filesystem("troubled")
    system.makedirs("/shards", exist_ok=True)
    for path in Path(prepared.shards).iterdir():
        system.pipe_file(f"/shards/{path.name}", path.read_bytes())
    Troubled.trouble.clear()
    Troubled.transfers.clear()
    yield "troubled://shards"
    Troubled.seconds = 0.0
    system.rm("/shards", recursive=True)


def same_rows(reader: ShardReader, prepared: DataConfig, rows: np.ndarray | None = None) -> None:
    local = ShardReader(prepared.shards, reader.split)
    rows = np.arange(local.rows)[::-1] if rows is None else rows
    for found, wanted in zip(reader.read(rows), local.read(rows), strict=True):
        assert found is not None
        assert wanted is not None
        assert np.array_equal(found, wanted)


def held(cache: ShardCache) -> int:
    total = 0
    with cache.counting():
        for path in cache.folder.iterdir():
            with suppress(FileNotFoundError):  # what failed to come is thrown away at any time
                total += path.stat().st_size
    return total


@pytest.mark.parametrize("protocol", ["memory", "file", "troubled"])
def test_remote_rows_are_the_local_ones(
    protocol: str, prepared: DataConfig, elsewhere: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = {"memory": "memory://shards", "file": f"file://{prepared.shards}", "troubled": elsewhere}[protocol]
    if protocol == "memory":
        fsspec.filesystem("memory").put(prepared.shards, "/shards", recursive=True)
    cache = ShardCache(tmp_path / "cache", PLENTY)
    assert read_manifest(url) == read_manifest(prepared.shards)
    reader = ShardReader(url, "train", cache=cache)
    assert not (tmp_path / "cache").exists()  # nothing is fetched before a row of it is wanted
    same_rows(reader, prepared)
    names = {path.name for path in cache.folder.iterdir() if not path.suffix}
    assert names == {file.sha256 for file in reader.files()}
    monkeypatch.setenv("HOME", str(tmp_path))
    assert verify_folder(url) == read_manifest(prepared.shards)
    load_judge("ngram:1", url, load_tokenizer("text8"), torch.device("cpu"), cache)
    assert not (tmp_path / ".cache").exists()
    assert verify_share(url, ["train"], 0, 1) == (None, {})
    assert inspect(url) == inspect(prepared.shards)
    assert (tmp_path / ".cache" / "vmd_scale" / "shards").is_dir()
    here = prepared.model_copy(update={"shards": url})
    assert prepare(here, progress=False) == read_manifest(prepared.shards)
    with pytest.raises(UserError, match="remote shards are only read"):
        prepare(here, progress=False, force=True)


def test_transfers_that_fail_are_made_again(prepared: DataConfig, elsewhere: str, tmp_path: Path) -> None:
    Troubled.trouble.update({
        "manifest.json": ["refused", "refused"],
        "train-00000.tokens": ["refused", "cut", "altered", "refused"],
        "train-00001.roles": ["cut"],
    })  # fmt: skip
    same_rows(ShardReader(elsewhere, "train", cache=ShardCache(tmp_path, PLENTY)), prepared)
    assert not Troubled.trouble["train-00000.tokens"]
    assert Troubled.transfers["train-00000.tokens"] == 5
    assert Troubled.transfers["train-00002.tokens"] == 1
    assert not list(tmp_path.glob("*.tmp"))


def test_transfers_that_always_fail(elsewhere: str, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, PLENTY)
    reader = ShardReader(elsewhere, "train", cache=cache)
    endless = remote.ATTEMPTS
    Troubled.trouble["train-00000.tokens"] = ["refused"] * endless
    with pytest.raises(RunFailed, match=r"troubled://shards/train-00000\.tokens: could not be fetched in 6 att"):
        reader.read(np.array([0]))
    for kind, message in (("cut", "truncated or altered: expected 1024 bytes, found 512"), ("altered", "sha256")):
        Troubled.trouble["train-00000.tokens"] = [kind] * endless
        with pytest.raises(UserError, match=rf"troubled://shards/train-00000\.tokens: .*{message}"):
            reader.read(np.array([0]))
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".lock"]
    fsspec.filesystem("troubled").rm("/shards/train-00000.tokens")
    with pytest.raises(UserError, match=r"train-00000\.tokens: missing, but the manifest names it"):
        reader.read(np.array([0]))
    assert Troubled.transfers["train-00000.tokens"] == 3 * endless + 1
    with pytest.raises(UserError, match=r"data\.shards 'troubled://nowhere': no manifest\.json there"):
        read_manifest("troubled://nowhere")
    with pytest.raises(UserError, match=r"ftpx://a/manifest\.json: cannot be opened: Protocol not known: ftpx"):
        read_manifest("ftpx://a")


def test_verifying_reads_what_is_there_and_not_the_copies(
    prepared: DataConfig, elsewhere: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    reader = ShardReader(elsewhere, "train")
    same_rows(reader, prepared)  # now there is a copy of every file
    Troubled.trouble["train-00001.roles"] = ["refused", "cut"]
    assert verify_folder(elsewhere) == reader.manifest
    name = "train-00001.tokens"
    content = (Path(prepared.shards) / name).read_bytes()
    for altered, message in ((b"?" + content[1:], "altered since it was written"), (content[:-2], "found 1022")):
        fsspec.filesystem("troubled").pipe_file(f"/shards/{name}", altered)
        with pytest.raises(UserError, match=rf"troubled://shards/{name}: .*{message}"):
            verify_folder(elsewhere)
    fsspec.filesystem("troubled").rm(f"/shards/{name}")
    with pytest.raises(UserError, match=rf"troubled://shards/{name}: missing, but the manifest names it"):
        verify_folder(elsewhere)


def test_the_cache_is_bounded(prepared: DataConfig, elsewhere: str, tmp_path: Path) -> None:
    """Rows in any order, with room for five of the many files: all are right, and never more is held."""
    cache = ShardCache(tmp_path, 5 * 1024)
    reader = ShardReader(elsewhere, "train", cache=cache)
    assert sum(file.bytes for file in reader.files()) > 20_000
    generator = np.random.default_rng(0)
    for _ in range(8):
        same_rows(reader, prepared, generator.integers(0, reader.rows, size=6))
        assert held(cache) <= cache.limit
    assert max(Troubled.transfers.values()) > 1  # it was too small for all


def test_a_copy_that_was_cut_off_is_fetched_again(prepared: DataConfig, elsewhere: str, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 1 << 20)
    same_rows(ShardReader(elsewhere, "train", cache=cache), prepared, np.arange(4))
    for path in tmp_path.iterdir():
        if len(path.name) == 64:
            os.truncate(path, path.stat().st_size // 2)
    same_rows(ShardReader(elsewhere, "train", cache=cache), prepared, np.arange(4))


def test_a_mixture_on_every_rank_leaves_room_for_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight ranks of a node keep mapped what they read last, of three corpora; the cache holds a few of their files."""
    monkeypatch.setattr(shards, "PATIENCE", 0.0)
    corpora = []
    for name in ("one", "two", "three"):
        (tmp_path / f"{name}.txt").write_text("\n".join(f"line {n} of corpus {name}" for n in range(1200)))
        values = {"corpus": "text", "source": str(tmp_path / f"{name}.txt"), "shards": str(tmp_path / name)}
        settings = {"tokenizer": "text8", "normalizer": "text8", "row_length": 32, "shard_tokens": 32 * ROWS_PER_SHARD}
        prepare(DataConfig.model_validate({**values, **settings}), progress=False)
        corpora.append({**values, "shards": f"file://{tmp_path / name}"})
    limit = 48 * 1024  # bytes: so many files
    cached = {"cache": str(tmp_path / "cache"), "cache_gib": limit / 2**30}
    data = DataConfig.model_validate({**corpora[0], **settings, **cached, "mixture": tuple(corpora[1:])})
    ranks = [training_rows(data, seed=0)[0] for _ in range(8)]
    for shift in range(3):
        for rank, reader in enumerate(ranks):
            shards_of_each = np.arange(3) + 3 * (rank + shift)
            starts = np.arange(3) * (reader.rows // 3)
            reader.read(np.add.outer(starts, shards_of_each * ROWS_PER_SHARD).ravel())
            assert held(ShardCache(cached["cache"], limit)) <= limit


def test_what_is_open_is_never_evicted(prepared: DataConfig, elsewhere: str, tmp_path: Path) -> None:
    files = [file for file in ShardReader(elsewhere, "train").files() if file.name.endswith(".tokens")]
    cache = ShardCache(tmp_path, 2 * 1024 + 100)
    url = f"{elsewhere}/{{}}".format
    with cache.open(url(files[0].name), files[0]) as opened:
        for file in files[1:6]:
            cache.open(url(file.name), file).close()
            assert (tmp_path / files[0].sha256).exists()
        with (
            cache.open(url(files[6].name), files[6]),
            pytest.raises(CacheFull, match=r"data\.cache_gib.*2,048 of them"),
        ):
            cache.open(url(files[7].name), files[7])
        assert opened.read() == (Path(prepared.shards) / files[0].name).read_bytes()
    cache.open(url(files[7].name), files[7]).close()
    with pytest.raises(UserError, match=r"1,024 bytes, more than data\.cache_gib allows \(1,000\)"):
        ShardReader(elsewhere, "train", cache=ShardCache(tmp_path / "tiny", 1000)).read(np.array([0]))


def test_the_least_recently_opened_goes_first(elsewhere: str, tmp_path: Path) -> None:
    files = [file for file in ShardReader(elsewhere, "train").files() if file.name.endswith(".tokens")][:4]
    cache = ShardCache(tmp_path, 3 * 1024)

    def use(file: FileRecord) -> None:
        cache.open(f"{elsewhere}/{file.name}", file).close()
        time.sleep(0.02)

    for file in (*files[:3], files[0], files[3]):
        use(file)
    assert [file for file in files if (tmp_path / file.sha256).exists()] == [files[0], files[2], files[3]]


def test_what_a_killed_process_left_is_thrown_away(elsewhere: str, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 1500)
    (tmp_path / f"{'0123' * 16}.tmp").write_bytes(bytes(1400))
    file = ShardReader(elsewhere, "train").files()[0]
    cache.open(f"{elsewhere}/{file.name}", file).close()
    assert held(cache) == file.bytes


def test_files_of_others_in_the_folder_stay(elsewhere: str, tmp_path: Path) -> None:
    """However small the cache, and however old they are."""
    names = (
        "notes.txt",
        "train-00000.tokens",
        "draft.tmp",
        "draft.lock",
        "cafe",
        "A" * 64,
        "0" * 63,
        "0" * 64 + ".txt",
    )
    for name in names:
        (tmp_path / name).write_bytes(name.encode() * 100)
        os.utime(tmp_path / name, (0, 0))
    reader = ShardReader(elsewhere, "train", cache=ShardCache(tmp_path, 2 * 1024))
    reader.read(np.arange(reader.rows))
    assert {name: (tmp_path / name).read_bytes() for name in names} == {name: name.encode() * 100 for name in names}


def test_many_at_once_fetch_a_file_once(prepared: DataConfig, elsewhere: str, tmp_path: Path) -> None:
    Troubled.seconds = 0.01
    failures: list[BaseException] = []

    def read() -> None:
        try:
            same_rows(ShardReader(elsewhere, "train", cache=ShardCache(tmp_path, PLENTY)), prepared)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=read) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    fetched = {name: count for name, count in Troubled.transfers.items() if name != "manifest.json"}
    assert set(fetched.values()) == {1}


def _read_at_random(url: str, shards: str, cache: str, seed: int) -> None:
    local = ShardReader(shards, "train")
    reader = ShardReader(url, "train", cache=ShardCache(cache, 5 * 1024))
    generator = np.random.default_rng(seed)
    for _ in range(30):
        rows = generator.integers(0, local.rows, size=4)
        if not np.array_equal(reader.read(rows)[0], local.read(rows)[0]):
            os._exit(1)


def test_processes_share_a_small_cache(prepared: DataConfig, tmp_path: Path) -> None:
    """Real processes that fetch and evict at the same time; one of them is killed meanwhile."""
    spawn = multiprocessing.get_context("spawn")
    cache = ShardCache(tmp_path, 5 * 1024)
    arguments = (f"file://{prepared.shards}", prepared.shards, str(tmp_path))
    processes = [spawn.Process(target=_read_at_random, args=(*arguments, seed)) for seed in range(3)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("*.lock")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    processes[0].kill()
    while any(process.is_alive() for process in processes):
        assert held(cache) <= cache.limit
        time.sleep(0.01)
    assert [process.exitcode for process in processes[1:]] == [0, 0]


def test_over_http(prepared: DataConfig, tmp_path: Path) -> None:
    pytest.importorskip("aiohttp", reason="fsspec reads http:// with aiohttp, which is not installed")

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=prepared.shards))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}"
        same_rows(ShardReader(url, "train", cache=ShardCache(tmp_path, PLENTY)), prepared)
        with pytest.raises(UserError, match=r"no manifest\.json there"):
            read_manifest(f"{url}/nowhere")
    finally:
        server.shutdown()
        shutil.rmtree(tmp_path)
