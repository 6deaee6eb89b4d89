"""Stop requests: SIGTERM, SIGUSR1 or a file named STOP in the run folder. A flag, acted on between steps."""

import signal
from pathlib import Path
from types import FrameType

STOPPED_EXIT_CODE = 75  # EX_TEMPFAIL: checkpoint written, call again to go on


class StopRequest:
    def __init__(self, run_folder: Path) -> None:
        self._file = run_folder / "STOP"
        self._signalled = False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True

    def seen(self) -> bool:
        """This rank's view; the ranks must agree before any of them acts."""
        return self._signalled or self._file.exists()

    def obeyed(self) -> None:
        """The checkpoint is written: the file has done its work, and must not stop the run when called again."""
        self._file.unlink(missing_ok=True)
