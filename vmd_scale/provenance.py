"""How a result was made: every number in docs/results says when, by which command, and on what."""

import os
import platform
import shlex
import sys
from datetime import UTC, datetime

import torch


def command() -> str:
    """The command line of this process, as it would be typed."""
    return shlex.join(["python", *sys.argv])


def today() -> str:
    """The date, UTC, as 2026-01-31."""
    return f"{datetime.now(UTC):%Y-%m-%d}"


def hardware() -> str:
    """Devices and versions in one line."""
    if torch.cuda.is_available():
        where = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    else:
        where = f"{len(os.sched_getaffinity(0))} CPU cores ({platform.machine()}), no GPU"
    return f"{where}; PyTorch {torch.__version__}, Python {platform.python_version()}"


def provenance() -> dict[str, str]:
    """All three, for a JSON file."""
    return {"date": today(), "command": command(), "hardware": hardware()}
