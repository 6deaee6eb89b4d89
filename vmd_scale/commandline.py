"""What the launchers' command lines have in common: how --help looks, and what is refused."""

import argparse
from collections.abc import Iterable

from vmd_scale.errors import UserError


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of the description; adds an option's default to its help, where that says something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        silent = action.default is None or action.default is False or action.default in ([], argparse.SUPPRESS)
        if silent or not action.help or action.help == argparse.SUPPRESS or "default" in action.help:
            return action.help
        return f"{action.help} (default: %(default)s)"


def check_at_least(args: argparse.Namespace, **least: int) -> None:
    """Raises `UserError` for the first option that is given and below its least value."""
    for name, bound in least.items():
        value = getattr(args, name)
        if value is not None and value < bound:
            raise UserError(f"{_option(name)} {value}: must be at least {bound}")


def refuse_unused(args: argparse.Namespace, parser: argparse.ArgumentParser, unused: Iterable[str], what: str) -> None:
    """Raises `UserError` for options that are given and would change nothing: their user would believe they had."""
    given = [name for name in unused if getattr(args, name) != parser.get_default(name)]
    if given:
        raise UserError(f"{what} has no use for {', '.join(map(_option, given))}")


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
