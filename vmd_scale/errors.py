"""The one exception that means: the input is wrong, not the program."""

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec

P = ParamSpec("P")

USAGE_EXIT_CODE = 2
INTERRUPTED_EXIT_CODE = 130  # as a shell reports SIGINT


class UserError(Exception):
    """Bad input. The message names the key or file, what was found and what is allowed."""


def reports_user_errors(main: Callable[P, None]) -> Callable[P, None]:
    """Wrap a launcher's ``main``: a `UserError` becomes one line and exit code 2; Ctrl-C leaves no traceback."""

    @functools.wraps(main)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            main(*args, **kwargs)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            sys.exit(USAGE_EXIT_CODE)
        except KeyboardInterrupt:
            print("interrupted; call again to go on", file=sys.stderr, flush=True)
            sys.exit(INTERRUPTED_EXIT_CODE)

    return wrapper
