"""Files on remote file systems: s3://, gs://, hf://, http(s)://, memory://, file:// and whatever else fsspec knows."""

import errno
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import fsspec

from vmd_scale.errors import RunFailed, UserError

Answer = TypeVar("Answer")

ATTEMPTS = 6
FIRST_PAUSE = 0.5  # seconds; each pause is twice the one before

log = logging.getLogger(__name__)


def is_remote(folder: str | Path) -> bool:
    return isinstance(folder, str) and "://" in folder


def read_remote(url: str) -> bytes | None:
    """A small file, or None where there is none.

    Raises:
        UserError: the file system is unknown, its package missing, or access denied.
        RunFailed: it could not be read, again and again.
    """

    def read() -> bytes:
        with fsspec.open(url, "rb") as file:
            return file.read()

    with suppress(FileNotFoundError):
        return persistently(url, read)
    return None


class Altered(Exception):
    """What was fetched is not what was asked for; perhaps it was cut off on the way."""


def persistently(url: str, fetch: Callable[[], Answer]) -> Answer:
    """What `fetch` gives; it is called again, after a pause, when it fails for a reason that may pass.

    Raises:
        UserError: a reason that stays the same, or `Altered` each time.
        FileNotFoundError, and OSError for a full disk: as they are.
        RunFailed: any other reason, each time.
    """
    for attempt in range(ATTEMPTS):
        try:
            return fetch()
        except FileNotFoundError:
            raise
        except (ImportError, ValueError, PermissionError) as error:
            raise UserError(f"{url}: cannot be opened: {error}") from None
        except Exception as error:  # the libraries of the file systems have no common base for theirs
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise
            if attempt == ATTEMPTS - 1:
                if isinstance(error, Altered):
                    raise UserError(str(error)) from None
                raise RunFailed(
                    f"{url}: could not be fetched in {ATTEMPTS} attempts: {str(error) or type(error).__name__}"
                ) from None
            pause = FIRST_PAUSE * 2**attempt
            log.warning("%s: %s; trying again in %g s", url, str(error) or type(error).__name__, pause)
            time.sleep(pause)
    raise AssertionError("unreachable")
