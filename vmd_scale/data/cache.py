"""Remote shards are fetched into a bounded cache on a local disk, which all processes of a node share.

``data.shards`` may be s3://, gs://, hf://, http(s)://, memory:// or any other URL that fsspec knows; file:// too, which
copies a slow disk's files to a fast one. A cached file bears its sha256 as name, so that nothing in the cache is ever
out of date. What is open is locked by the kernel (flock), which forgets no lock and keeps none of a process that died:

    fetching    one process has the file's .lock and writes SHA.tmp, whose size is reserved; the others wait
    complete    size and checksum compared, SHA.tmp renamed to SHA
    open        a shared lock on SHA for as long as it is mapped
    evicting    the least recently opened file goes first, if an exclusive lock on it can be had: nobody has it open

A shuffled order asks for rows of all shards all the time: a cache that is smaller than the corpus works, slowly.
Files of other names that are in the folder are neither counted nor touched.
"""

import fcntl
import hashlib
import logging
import os
import re
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import fsspec

from vmd_scale.data.manifest import FileRecord
from vmd_scale.data.remote import Altered, persistently
from vmd_scale.errors import UserError

CHUNK = 1 << 23
DEFAULT_FOLDER = Path("~/.cache/vmd_scale/shards")
COPY = re.compile(r"[0-9a-f]{64}(\.tmp)?")

log = logging.getLogger(__name__)


class CacheFull(UserError):
    """All that is in the cache is open, and there is no room for one more file."""


class ShardCache:
    """Local copies of remote files.

    Args:
        folder: on a local disk of the node; made when needed. None: ``~/.cache/vmd_scale/shards``.
        limit: bytes that the copies may take together.
    """

    def __init__(self, folder: str | Path | None, limit: int) -> None:
        self.folder = Path(folder or DEFAULT_FOLDER).expanduser()
        self.limit = limit

    def open(self, url: str, file: FileRecord) -> IO[bytes]:
        """The file's local copy, fetched if need be. It is not evicted before it is closed, and unmapped if mapped.

        Raises:
            UserError: not there; not what the manifest says, each time that it was fetched; larger than the limit.
            CacheFull: see there.
            RunFailed: it could not be fetched, again and again.
        """
        if file.bytes > self.limit:
            raise UserError(f"{url}: {file.bytes:,} bytes, more than data.cache_gib allows ({self.limit:,})")
        path = self.folder / file.sha256
        self.folder.mkdir(parents=True, exist_ok=True)
        while (opened := _open_locked(path, file.bytes)) is None:
            with _locked(path.with_suffix(".lock"), fcntl.LOCK_EX):
                if not path.exists() or path.stat().st_size != file.bytes:  # cut off by whoever also writes there
                    self._fetch(url, file, path)
        return opened

    def _fetch(self, url: str, file: FileRecord, path: Path) -> None:
        temporary = path.with_suffix(".tmp")
        log.info("fetching %s, %.1f MB", url, file.bytes / 1e6)
        try:
            with self.counting():
                temporary.unlink(missing_ok=True)  # of a process that was killed
                self._make_room(file.bytes)
                with open(temporary, "wb") as copy:
                    if file.bytes:
                        os.posix_fallocate(copy.fileno(), 0, file.bytes)
            persistently(url, lambda: _copy(url, file, temporary))
            with self.counting():  # a folder that is listed during a rename may show both names, or none
                os.replace(temporary, path)
        except FileNotFoundError:
            raise UserError(f"{url}: missing, but the manifest names it") from None
        except OSError as error:
            raise UserError(f"data.cache {str(self.folder)!r} cannot be written: {error.strerror or error}") from None
        finally:
            temporary.unlink(missing_ok=True)

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Meanwhile nobody else adds, renames or evicts a file."""
        with _locked(self.folder / "room.lock", fcntl.LOCK_EX):
            yield

    def _make_room(self, needed: int) -> None:
        """Evict until `needed` bytes fit. The caller is `counting`."""
        sizes: dict[Path, tuple[float, int]] = {}  # when it was last opened, bytes
        for path in filter(lambda path: COPY.fullmatch(path.name), self.folder.iterdir()):
            with suppress(FileNotFoundError):
                if path.suffix == ".tmp" and _is_free(path.with_suffix(".lock")):
                    path.unlink()  # likewise
                else:
                    status = path.stat()
                    sizes[path] = status.st_mtime, status.st_size
        used = sum(size for _, size in sizes.values())
        for path, (_, size) in sorted(sizes.items(), key=lambda item: item[1]):
            if used + needed <= self.limit:
                return
            if path.suffix != ".tmp" and _evict(path):
                used -= size
        if used + needed > self.limit:
            raise CacheFull(
                f"data.cache {str(self.folder)!r} may hold {self.limit:,} bytes (data.cache_gib), {used:,} of them are "
                f"in use, and a shard of {needed:,} is wanted; give it more room"
            )


def _open_locked(path: Path, size: int) -> IO[bytes] | None:
    """Open for reading with a shared lock, or None where there is no such file of this size (any more)."""
    try:
        file = open(path, "rb")  # noqa: SIM115  the caller closes it
    except FileNotFoundError:
        return None
    fcntl.flock(file, fcntl.LOCK_SH)
    status = os.fstat(file.fileno())
    if status.st_nlink == 0 or status.st_size != size:  # evicted between the two lines before; not what it was
        file.close()
        return None
    os.utime(path)
    return file


def _evict(path: Path) -> bool:
    try:
        with _locked(path, fcntl.LOCK_EX | fcntl.LOCK_NB, "rb"):
            path.unlink()
    except OSError:  # somebody has it open, or has evicted it
        return False
    return True


def _is_free(lock: Path) -> bool:
    try:
        with _locked(lock, fcntl.LOCK_EX | fcntl.LOCK_NB):
            return True
    except BlockingIOError:
        return False


@contextmanager
def _locked(path: Path, how: int, mode: str = "ab") -> Iterator[None]:
    with open(path, mode) as file:
        fcntl.flock(file, how)
        yield


def verify_remote(url: str, file: FileRecord) -> None:
    """Read the file where it is and compare its checksum; nothing is kept.

    Raises:
        UserError: not there; not what the manifest says, each time that it was read.
        RunFailed: it could not be read, again and again.
    """
    try:
        persistently(url, lambda: deque(_chunks(url, file), maxlen=0))
    except FileNotFoundError:
        raise UserError(f"{url}: missing, but the manifest names it") from None


def _copy(url: str, file: FileRecord, to: Path) -> None:
    """Fetch once; `Altered` when it is not what the manifest says."""
    with open(to, "r+b") as copy:
        copy.writelines(_chunks(url, file))
        copy.flush()
        os.fsync(copy.fileno())


def _chunks(url: str, file: FileRecord) -> Iterator[bytes]:
    """What is in the file; in the end `Altered` when it is not what the manifest says."""
    digest, size = hashlib.sha256(), 0
    with fsspec.open(url, "rb") as source:
        while size <= file.bytes and (chunk := source.read(CHUNK)):
            digest.update(chunk)
            size += len(chunk)
            yield chunk
    if size != file.bytes:
        raise Altered(f"{url}: truncated or altered: expected {file.bytes} bytes, found {size}")
    if digest.hexdigest() != file.sha256:
        raise Altered(f"{url}: altered since it was written: sha256 {digest.hexdigest()}, expected {file.sha256}")
