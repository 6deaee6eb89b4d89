"""What goes wrong in the numbers or in a collective, and is noticed: spikes of the loss, ranks that hang."""

import faulthandler
import math
import statistics
import sys
from collections import deque
from collections.abc import Iterable

WINDOW = 64  # logged losses that a new one is compared with
FEWEST = 16  # before that many, nothing is called a spike
THRESHOLD = 8.0  # in robust standard deviations: losses of masked diffusion scatter widely


class SpikeDetector:
    """Tells whether a loss is far above those before it: median + 8 robust deviations, over 64 logged steps."""

    def __init__(self, losses: Iterable[float] = ()) -> None:
        self._losses: deque[float] = deque(losses, maxlen=WINDOW)

    def is_spike(self, loss: float) -> bool:
        """Judge a logged loss; one that is no spike joins those that the next are compared with."""
        enough = len(self._losses) >= FEWEST
        if not math.isfinite(loss):  # never among those that others are compared with
            return enough
        if enough:
            middle = statistics.median(self._losses)
            deviation = 1.4826 * statistics.median(abs(x - middle) for x in self._losses)
            if loss > middle + THRESHOLD * max(deviation, 1e-3 * abs(middle)):
                return True
        self._losses.append(loss)
        return False

    def state(self) -> list[float]:
        """What a checkpoint keeps."""
        return list(self._losses)


class Watchdog:
    """Ends this process, with the stacks of all its threads on stderr, when nothing was finished for so many seconds.

    A collective that waits for a rank which will never come would wait for hours. The timer is a thread of the
    interpreter's own, which needs no lock that a hanging call might hold.
    """

    def __init__(self, seconds: float | None) -> None:
        self._seconds = seconds

    def progress(self) -> None:
        """A step, an evaluation or a save was finished: the time starts over."""
        if self._seconds is not None:
            faulthandler.dump_traceback_later(self._seconds, exit=True, file=sys.__stderr__ or sys.stderr)

    def close(self) -> None:
        faulthandler.cancel_dump_traceback_later()
