"""The one exception that means: the input is wrong, not the program."""

import functools
import gc
import sys
from collections.abc import Callable
from typing import ParamSpec

P = ParamSpec("P")

FAILED_EXIT_CODE = 1
USAGE_EXIT_CODE = 2
INTERRUPTED_EXIT_CODE = 130  # as a shell reports SIGINT


class UserError(Exception):
    """Bad input. The message names the key or file, what was found and what is allowed."""


class RunFailed(Exception):
    """The run cannot go on, though nothing is wrong with its input."""


def reports_user_errors(main: Callable[P, None]) -> Callable[P, None]:
    """Wrap a launcher's ``main``: `UserError` becomes one line and exit code 2, `RunFailed` 1; Ctrl-C no traceback."""

    @functools.wraps(main)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            main(*args, **kwargs)
            return
        except UserError as error:
            message, code = f"error: {error}", USAGE_EXIT_CODE
        except RunFailed as error:
            message, code = f"error: {error}", FAILED_EXIT_CODE
        except KeyboardInterrupt:
            message, code = "interrupted; the same command goes on", INTERRUPTED_EXIT_CODE
        # Out here the exception and its traceback are gone, and with them what they held: a process group that lives
        # until the interpreter dies can abort it, with another exit code.
        gc.collect()
        print(message, file=sys.stderr, flush=True)
        sys.exit(code)

    return wrapper
