"""wandb logging, on which a run never depends: what goes wrong there is a warning, never the end of a run.

The run's id is kept in its folder, so that a resumed run is the same curve. Everything is drawn over our own `step`,
because wandb's must not go back, and a resumed run makes the steps after its last checkpoint again.
"""

import logging
import platform
import subprocess
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vmd_scale import __version__
from vmd_scale.config import Config
from vmd_scale.errors import first_line
from vmd_scale.files import write_atomically

ID_FILE = "wandb_id"
SECONDS_TO_CONNECT = 30
FINISH_SECONDS = 120
MOST_FAILURES = 3
log = logging.getLogger(__name__)


class WandbLog:
    """One run's log. After `MOST_FAILURES` failed calls it gives up, and every method does nothing."""

    def __init__(self, module: Any, run: Any) -> None:
        self._wandb, self._run, self._failures = module, run, 0

    @classmethod
    def start(cls, run_folder: Path, config: Config) -> "WandbLog | None":
        """None with telemetry.wandb 'disabled', without the package, and where it cannot even log offline."""
        mode = config.telemetry.wandb
        if mode == "disabled":
            return None
        try:
            import wandb
        except ImportError:
            log.warning("telemetry.wandb is %r, but wandb is not installed; going on without", mode)
            return None
        for attempt in (mode, "offline"):
            try:
                # else init would ask for a key, where there is a terminal, and wait forever
                if attempt == "online" and not wandb.login(timeout=SECONDS_TO_CONNECT, verify=False):
                    raise ConnectionError("nobody is logged in; call 'wandb login' once")
                run = wandb.init(
                    project=config.telemetry.wandb_project,
                    dir=str(run_folder),
                    mode=attempt,
                    name=run_folder.resolve().name,
                    id=_id(run_folder),
                    resume="allow",
                    config={**config.publishable(), "code": code_version()},
                    # other ranks wait meanwhile, and at the end GPUs do
                    settings=wandb.Settings(init_timeout=SECONDS_TO_CONNECT, finish_timeout=FINISH_SECONDS),
                )
                run.define_metric("step")
                run.define_metric("*", step_metric="step")
                if attempt != mode:
                    log.warning("wandb logs offline; send it later: wandb sync %s/wandb/offline-run-*", run_folder)
                return cls(wandb, run)
            except Exception as error:  # no network, no login, a broken installation
                log.warning("wandb does not start %s: %s", attempt, first_line(error))
                with suppress(Exception):
                    wandb.teardown()  # its service would say that the id is in use
        return None

    def metrics(self, record: Mapping[str, Any]) -> None:
        self._try(lambda: self._run.log({k: v for k, v in record.items() if v is not None}))

    def evaluation(self, record: Mapping[str, Any]) -> None:
        name = f"{record['protocol']}/bits_per_token, T = {record['steps']}"
        self._try(lambda: self._run.log({"step": record["step"], name: record["bits_per_token"]}))

    def latent(self, record: Mapping[str, Any]) -> None:
        """Mean and histogram of the KL at every mask ratio."""

        def send() -> None:
            values = {f"latent/kl, mask ratio {r}": kl for r, kl in record["kl_by_mask_ratio"].items()}
            for ratio, histogram in record.get("kl_histograms", {}).items():
                pair = (np.array(histogram["counts"]), np.array(histogram["edges"]))
                values[f"latent/kl histogram, mask ratio {ratio}"] = self._wandb.Histogram(np_histogram=pair)
            self._run.log({"step": record["step"], "latent/active_units": record["active_units"], **values})

        self._try(send)

    def samples(self, step: int, steps: object, texts: Sequence[str]) -> None:
        """A table of texts that a T-step sampler drew."""

        def send() -> None:
            table = self._wandb.Table(columns=["step", "T", "text"], data=[[step, str(steps), text] for text in texts])
            self._run.log({"step": step, "samples": table})

        self._try(send)

    def event(self, kind: str, step: int) -> None:
        """A point where a curve shows none; events.jsonl has its details."""
        self._try(lambda: self._run.log({"step": step, f"event/{kind}": 1}))

    def close(self, failed: bool = False) -> None:
        """Send the rest; but GPUs do not wait long for a network."""
        finish = threading.Thread(
            target=self._try, args=(lambda: self._run.finish(exit_code=int(failed)),), name="wandb", daemon=True
        )
        finish.start()
        finish.join(FINISH_SECONDS)
        if finish.is_alive():
            log.warning("wandb is still sending after %d s: given up; metrics.jsonl has everything", FINISH_SECONDS)

    def _try(self, send: Callable[[], object]) -> None:
        if self._failures >= MOST_FAILURES:
            return
        try:
            send()
        except Exception as error:
            self._failures += 1
            stop = "; no more is sent to it" if self._failures == MOST_FAILURES else ""
            log.warning("wandb: %s%s; metrics.jsonl has everything", first_line(error), stop)


def code_version() -> dict[str, str]:
    """What ran: this package, its commit where it is a git checkout, and what it stands on."""
    folder = Path(__file__).resolve().parents[2]
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40"]
    commit = ""
    if (folder / ".git").exists():  # else git looks further up, and finds whose checkout this is installed in
        with suppress(OSError, subprocess.SubprocessError):
            found = subprocess.run(command, capture_output=True, text=True, timeout=10)
            commit = found.stdout.strip() if found.returncode == 0 else ""
    return {
        "vmd_scale": __version__,
        "commit": commit,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "host": platform.node(),
    }


def _id(run_folder: Path) -> str:
    path = run_folder / ID_FILE
    if not path.exists():
        write_atomically(path, uuid.uuid4().hex[:16] + "\n")
    return path.read_text().strip()
