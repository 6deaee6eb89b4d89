"""One run folder, one run: a lock that the operating system lets go of when its holder dies.

On NFS the server lets go of it, for a node that is lost when its lease ends: a requeued job waits for that. Where locks
are those of each node alone (Lustre mounted with localflock), it keeps apart only runs on one node. NFS before
version 4 has no leases: the lock of a node that is never started again stays until somebody deletes the file.
"""

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
PATIENCE = 10.0  # seconds: a run that is started again may find the one before still dying
PATIENCE_AFTER_REQUEUE = 150.0
log = logging.getLogger(__name__)


class RunLock:
    """Held by rank 0 while the run writes to its folder."""

    def __init__(self, run_folder: Path) -> None:
        self._path = run_folder / LOCK
        self._file: IO[str] | None = None

    def acquire(self, patience: float | None = None) -> None:
        """Raises:
        UserError: another run holds it; says which.
        """
        if patience is None:
            patience = PATIENCE_AFTER_REQUEUE if os.environ.get("SLURM_RESTART_COUNT") else PATIENCE
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
                raise UserError(
                    f"{self._path.parent} is in use by {holder}; choose another --output. (If that node is dead, "
                    f"delete {self._path})"
                ) from None
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
