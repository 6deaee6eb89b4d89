"""Worker processes that do not outlive whoever started them."""

import multiprocessing
import os
import threading
from collections.abc import Callable


def end_with_parent(first: Callable[[], object] | None = None) -> None:
    """In a worker: end with exit code 1 when the parent has ended, whatever this process is doing then.

    A parent that was killed cannot end its workers, and they would wait for work for ever.

    Args:
        first: done before the end.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        if first is not None:
            first()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
