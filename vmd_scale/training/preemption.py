"""Stop requests: SIGTERM, SIGUSR1, a file named STOP in the run folder, the end of a batch job's time, or the death of
the launcher.

A flag, acted on between steps.
"""

import os
import signal
import time
from pathlib import Path
from types import FrameType

from vmd_scale.errors import UserError
from vmd_scale.training.orphans import are_above

STOPPED_EXIT_CODE = 75  # EX_TEMPFAIL: checkpoint written, run again to continue
STOP_AT = "VMD_STOP_AT"  # environment: unix time; should the signal before the time limit be lost, this is not
BY_FILE, BY_TIME, BY_SIGNAL, BY_DEATH = "STOP file", "time", "signal", "the death of its launcher"


class StopRequest:
    """Only rank 0 (`is_main`) looks for the file: the ranks tell each other.

    Args:
        launchers: of this rank, as `launchers_above` found them when it was started.
    """

    def __init__(self, run_folder: Path, is_main: bool, launchers: list[int] | None = None) -> None:
        self._is_main = is_main
        self._launchers = launchers or []
        self._file = run_folder / "STOP"
        self._signalled = False
        self._deadline = _deadline()
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True

    def seen(self) -> bool:
        """This rank's view; the ranks must agree before any of them acts."""
        if self._signalled or time.time() >= self._deadline or not are_above(self._launchers):
            return True
        return self._is_main and self._file.exists()

    def reason(self) -> str:
        """What this rank knows of the cause; a signal may have reached another one only."""
        if self._file.exists():
            return BY_FILE
        if self._signalled:
            return BY_SIGNAL
        if time.time() >= self._deadline:
            return BY_TIME
        return BY_SIGNAL if are_above(self._launchers) else BY_DEATH

    def obeyed(self) -> None:
        """The checkpoint is written: the file has done its work, and must not stop the run when it is started again."""
        if self._is_main:
            self._file.unlink(missing_ok=True)


def _deadline() -> float:
    value = os.environ.get(STOP_AT, "inf")
    try:
        return float(value)
    except ValueError:
        raise UserError(f"environment: {STOP_AT} must be a unix time, found {value!r}") from None
