"""Token files: flat, little-endian, a row after the other; written once, then memory-mapped.

train-00000.tokens   uint16 or uint32 [rows, L]
train-00000.roles    uint8 [rows, L], only where some position is not ordinary
manifest.json        everything else
"""

import hashlib
import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np

from vmd_scale.config import CACHE_GIB, DataConfig
from vmd_scale.data.cache import CacheFull, ShardCache, verify_remote
from vmd_scale.data.manifest import FileRecord, Manifest, Shard, read_manifest
from vmd_scale.data.remote import is_remote
from vmd_scale.errors import UserError
from vmd_scale.files import sha256_of

READERS = 16  # that share a node's cache: eight processes, each with its training and its validation rows
PATIENCE = 60.0  # seconds for those who do not hold, but read
MAPPED_FILES = 512  # at once; the kernel limits the number of maps of a process

log = logging.getLogger(__name__)


class SplitWriter:
    """Writes the shards of one split; every file gets its name when it is complete.

    Args:
        finished: shards that are there already; the next one follows them.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        dtype: np.dtype,
        row_length: int,
        rows_per_shard: int,
        finished: Sequence[Shard] = (),
    ) -> None:
        self._folder = folder
        self._split = split
        self._dtype = dtype.newbyteorder("<")
        self._row_length = row_length
        self._rows_per_shard = rows_per_shard
        self._open: tuple[_HashedFile, _HashedFile | None] | None = None
        self._rows_in_open = 0
        self._shards = list(finished)

    @property
    def finished(self) -> tuple[Shard, ...]:
        return tuple(self._shards)

    @property
    def rows_in_open(self) -> int:
        """Rows, the last ones, that are in no finished shard."""
        return self._rows_in_open

    def append(self, tokens: np.ndarray, roles: np.ndarray | None) -> None:
        """Add rows: ids [n, L], roles uint8 [n, L] for all rows of the split or for none."""
        while len(tokens):
            room = self._rows_per_shard - self._rows_in_open
            self._write(tokens[:room], None if roles is None else roles[:room])
            tokens, roles = tokens[room:], None if roles is None else roles[room:]
            if self._rows_in_open == self._rows_per_shard:
                self._finish_shard()

    def close(self) -> tuple[Shard, ...]:
        """Finish the last shard."""
        if self._open is not None:
            self._finish_shard()
        return self.finished

    def _write(self, tokens: np.ndarray, roles: np.ndarray | None) -> None:
        assert tokens.shape[1] == self._row_length
        if self._open is None:
            stem = self._folder / f"{self._split}-{len(self._shards):05d}"
            self._open = (
                _HashedFile(stem.with_suffix(".tokens")),
                None if roles is None else _HashedFile(stem.with_suffix(".roles")),
            )
        token_file, role_file = self._open
        token_file.write(np.ascontiguousarray(tokens, dtype=self._dtype).data)
        assert (role_file is None) == (roles is None)
        if role_file is not None and roles is not None:
            role_file.write(np.ascontiguousarray(roles, dtype=np.uint8).data)
        self._rows_in_open += len(tokens)

    def _finish_shard(self) -> None:
        assert self._open is not None
        token_file, role_file = self._open
        roles = None if role_file is None else role_file.finish()
        self._shards.append(Shard(rows=self._rows_in_open, tokens=token_file.finish(), roles=roles))
        self._open, self._rows_in_open = None, 0


class _HashedFile:
    """A file under a temporary name whose checksum is taken on the way."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._temporary = path.with_name(path.name + ".tmp")
        self._file: IO[bytes] = open(self._temporary, "wb")  # noqa: SIM115  closed by finish()
        self._hash = hashlib.sha256()
        self._bytes = 0

    def write(self, content: memoryview) -> None:
        self._file.write(content)
        self._hash.update(content)
        self._bytes += content.nbytes

    def finish(self) -> FileRecord:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._temporary, self._path)
        return FileRecord(name=self._path.name, bytes=self._bytes, sha256=self._hash.hexdigest())


class ShardReader:
    """Random access to the rows of one split. Files are mapped when a row of theirs is first asked for.

    Args:
        folder: data.shards; a URL is read through `cache`, a path directly.
        split: train, validation or test.
        manifest: given by who has read (or received) it already; null reads it.
        check_sizes: look at every local file's size at once. One of many ranks is enough: each checks what it maps.
        cache: for remote files; null is the default one.
        sharing: readers of this process that are open at the same time, but for that of the validation rows. So many
            share what one would map of the cache, and none waits for another to let go.

    Raises:
        UserError: see `read_manifest`; a split that was not prepared; a missing or truncated file.
        RunFailed: see `ShardCache.open`.
    """

    def __init__(
        self,
        folder: str | Path,
        split: str,
        manifest: Manifest | None = None,
        check_sizes: bool = True,
        cache: ShardCache | None = None,
        sharing: int = 1,
    ) -> None:
        self.folder = folder if is_remote(folder) else Path(folder)
        self._cache = (cache or ShardCache(None, int(CACHE_GIB * 2**30))) if is_remote(folder) else None
        self.split = split
        self.manifest = manifest or read_manifest(folder)
        if split not in self.manifest.splits:
            raise UserError(
                f"data.shards {str(folder)!r}: no {split!r} split; prepared: {', '.join(self.manifest.splits)}"
            )
        self._record = self.manifest.splits[split]
        self._shards = self._record.shards
        self._ends = np.cumsum([shard.rows for shard in self._shards])
        self._token_files = [shard.tokens for shard in self._shards]
        self._role_files = [shard.roles for shard in self._shards]
        self._starts = self._ends - [shard.rows for shard in self._shards]
        self._maps: OrderedDict[str, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()
        self._most_mapped = MAPPED_FILES
        if self._cache is not None:
            largest = max(file.bytes for file in self.files())
            self._most_mapped = min(MAPPED_FILES, self._cache.limit // (READERS * sharing * largest))
        self.rows = self._record.rows
        self.row_length = self.manifest.row_length
        self.has_roles = self._shards[0].roles is not None
        if self._cache is not None:
            corpus_bytes = sum(file.bytes for file in self.files())
            if corpus_bytes > self._cache.limit:
                log.warning("%s: %s takes %d bytes, more than data.cache_gib", folder, split, corpus_bytes)
        elif check_sizes:
            for file in self.files():
                self._check_size(file)

    def read(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Rows by number (int64 [n]), in the order asked.

        Returns:
            ids int64 [n, L], and `Role` numbers uint8 [n, L] or None where every position is ordinary.

        Raises:
            UserError: a missing or truncated file, or an id outside the vocabulary in it.
            IndexError: a row number outside 0 .. rows - 1.
        """
        rows = np.asarray(rows, dtype=np.int64)
        if rows.size and (rows.min() < 0 or rows.max() >= self.rows):
            raise IndexError(f"rows must lie in 0..{self.rows - 1}, found {rows.min()}..{rows.max()}")
        shard_of_row = np.searchsorted(self._ends, rows, side="right")
        inside = rows - self._starts[shard_of_row]
        tokens = self._gather(self._token_files, shard_of_row, inside, self.manifest.numpy_dtype)
        if tokens.size and tokens.max() >= self.manifest.vocab_size:
            worst = int(tokens.max(1).argmax())
            raise UserError(
                f"{self._name(self._shards[shard_of_row[worst]].tokens)}: token id {tokens[worst].max()} is outside "
                f"the vocabulary of {self.manifest.vocab_size}; the file is damaged, prepare the shards again with "
                "--force"
            )
        roles = None
        if self.has_roles:
            roles = self._gather(self._role_files, shard_of_row, inside, np.dtype(np.uint8))
        return tokens.astype(np.int64), roles

    def _gather(
        self, files: Sequence[FileRecord | None], shard_of_row: np.ndarray, inside: np.ndarray, dtype: np.dtype
    ) -> np.ndarray:
        """Rows [n, L] of the files, one of each shard; shard after shard, so that each is opened once."""
        found = np.empty((len(inside), self.row_length), dtype=dtype)
        shards, rows = shard_of_row.tolist(), inside.tolist()
        current, mapped = -1, found
        for at in shard_of_row.argsort(kind="stable").tolist():
            if shards[at] != current:
                current = shards[at]
                file = files[current]
                assert file is not None
                mapped = self._map(file, dtype)
            found[at] = mapped[rows[at]]
        return found

    def verify(self, files: Sequence[FileRecord] | None = None) -> None:
        """Read the files, or all there are, and compare checksums. `UserError` names the one that was altered."""
        for file in self.files() if files is None else files:
            if self._cache is not None:
                verify_remote(self._name(file), file)  # not the copy, which was compared when it was fetched
                continue
            self._check_size(file)
            found = sha256_of(Path(self._name(file)))
            if found != file.sha256:
                raise UserError(
                    f"{self._name(file)}: altered since it was written: sha256 {found}, expected {file.sha256}"
                )

    def files(self) -> list[FileRecord]:
        return [file for shard in self._shards for file in (shard.tokens, shard.roles) if file is not None]

    def _name(self, file: FileRecord) -> str:
        return f"{str(self.folder).rstrip('/')}/{file.name}"

    def _check_size(self, file: FileRecord) -> None:
        path = Path(self._name(file))
        try:
            found = path.stat().st_size
        except FileNotFoundError:
            raise UserError(f"{path}: missing, but the manifest names it; prepare the shards again") from None
        if found != file.bytes:
            raise UserError(f"{path}: truncated or altered: expected {file.bytes} bytes, found {found}")

    def _map(self, file: FileRecord, dtype: np.dtype) -> np.ndarray:
        with self._lock:  # a reader may serve the training loop and its prefetching thread
            if file.name in self._maps:
                self._maps.move_to_end(file.name)
                return self._maps[file.name]
            with self._open(file) as opened:  # a map keeps the file's lock when the file is closed
                # As a plain array: indexing a np.memmap makes another one each time, which is slow.
                mapped = np.asarray(np.memmap(opened, dtype=dtype, mode="r")).reshape(-1, self.row_length)
            self._maps[file.name] = mapped
            if len(self._maps) > self._most_mapped:
                self._maps.popitem(last=False)
            return mapped

    def _open(self, file: FileRecord) -> IO[bytes]:
        if self._cache is None:
            self._check_size(file)
            return open(self._name(file), "rb")
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                return self._cache.open(self._name(file), file)
            except CacheFull:
                if self._maps:
                    self._maps.popitem(last=False)
                elif time.monotonic() > deadline:
                    raise
                else:  # others have it open only as long as they read
                    time.sleep(0.05)


def shard_cache(data: DataConfig) -> ShardCache:
    """Where the configuration wants copies of remote shards."""
    return ShardCache(data.cache, int(data.cache_gib * 2**30))


def verify_folder(folder: str | Path) -> Manifest:
    """Check the checksums of all prepared splits; `UserError` names the first file that is not what was written."""
    manifest = read_manifest(folder)
    for split in manifest.splits:
        ShardReader(folder, split, manifest).verify()
    return manifest
