"""How the launchers' --help looks."""

import argparse


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """The program's description as it stands; behind the help of an option its default, where that says something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        silent = action.default is None or action.default is False or action.default in ([], argparse.SUPPRESS)
        if silent or not action.help or action.help == argparse.SUPPRESS or "default" in action.help:
            return action.help
        return f"{action.help} (default: %(default)s)"
