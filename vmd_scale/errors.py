"""Two exceptions, for wrong input and for a run that cannot continue, and how launchers report them."""

import atexit
import functools
import os
import sys
from collections.abc import Callable
from typing import NoReturn, ParamSpec

P = ParamSpec("P")

FAILED_EXIT_CODE = 1
USAGE_EXIT_CODE = 2
INTERRUPTED_EXIT_CODE = 130  # as a shell reports SIGINT


class UserError(Exception):
    """Bad input. The message names the key or file, what was found and what is allowed."""


class RunFailed(Exception):
    """The run cannot continue, though nothing is wrong with its input."""


def first_line(error: Exception) -> str:
    """What an error of somebody else's says, short enough to be part of one of ours."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def reports_user_errors(main: Callable[P, None]) -> Callable[P, None]:
    """Wrap a launcher's ``main``: `UserError` becomes one line and exit code 2, `RunFailed` 1; Ctrl-C no traceback.

    A program that has used DeepSpeed ends here, without the interpreter's teardown: DeepSpeed never lets go of its
    process groups, and their threads can abort the teardown with exit code 134, whatever it was to be.
    """

    @functools.wraps(main)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> None:
        is_program = sys._getframe(1).f_back is None  # not called by another, which continues
        message, code = "", None
        try:
            main(*args, **kwargs)
        except SystemExit as end:
            code = end.code
        except UserError as error:
            message, code = f"error: {error}", USAGE_EXIT_CODE
        except RunFailed as error:
            message, code = f"error: {error}", FAILED_EXIT_CODE
        except KeyboardInterrupt:
            message, code = "interrupted; the same command continues", INTERRUPTED_EXIT_CODE
        if message:
            print(message, file=sys.stderr, flush=True)
        if is_program and "deepspeed" in sys.modules and not isinstance(code, str):
            _end(code or 0)
        if code is not None:
            sys.exit(code)

    return wrapper


def _end(code: int) -> NoReturn:
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
