"""Programs that no Python package brings: found, or installed from Debian's packages."""

import os
import shutil
import subprocess
from collections.abc import Sequence

PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"  # where Debian puts daemons, which not every shell looks at


def why_missing(programs: Sequence[str], packages: Sequence[str]) -> str | None:
    """Why a program cannot be had here, or None; installs the packages if it may."""
    absent = [name for name in programs if shutil.which(name, path=PATH) is None]
    if not absent:
        return None
    needed = f"{', '.join(absent)} not found, and "
    if os.geteuid() != 0:
        return f"{needed}only root may install {', '.join(packages)}"
    if shutil.which("apt-get") is None:
        return f"{needed}there is no apt-get to install {', '.join(packages)}"
    command = ["apt-get", "install", "-y", "--no-install-recommends", *packages]
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    installed = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if installed.returncode:  # its lists may be old, or absent
        subprocess.run(["apt-get", "update"], env=environment, capture_output=True, check=False)
        installed = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if installed.returncode:
        return f"{' '.join(command)} failed: {' '.join(installed.stderr.split()[-30:])}"
    return None
