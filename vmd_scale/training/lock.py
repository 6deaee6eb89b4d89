"""One run folder, one run: a lock that the operating system lets go of when its holder dies, however it dies."""

import errno
import fcntl
import logging
import os
import socket
import time
from pathlib import Path
from typing import IO

from vmd_scale.errors import UserError

LOCK = ".lock"
PATIENCE = 10.0  # seconds: a run that was requeued may meet the last breath of the one before
log = logging.getLogger(__name__)


class RunLock:
    """Held by rank 0 from before the run folder is touched until the process ends."""

    def __init__(self, run_folder: Path) -> None:
        self._path = run_folder / LOCK
        self._file: IO[str] | None = None

    def acquire(self, patience: float = PATIENCE) -> None:
        """Raises:
        UserError: another run holds it; says which.
        """
        self._path.parent.mkdir(parents=True, exist_ok=True)
        file = open(self._path, "a+", encoding="utf-8")  # noqa: SIM115 - open as long as the lock is held
        deadline = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() < deadline:
                    time.sleep(0.2)
                    continue
                file.seek(0)
                holder = file.read().strip() or "another process"
                file.close()
                raise UserError(f"{self._path.parent} is in use by {holder}; choose another --output") from None
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
                    raise
                log.warning("%s: this file system has no locks; see to it that no other run uses it", self._path)
                break
        file.seek(0)
        file.truncate()
        job = os.environ.get("SLURM_JOB_ID")
        file.write(f"process {os.getpid()} on {socket.gethostname()}" + (f", Slurm job {job}" if job else "") + "\n")
        file.flush()
        self._file = file

    def release(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
