"""A tiny corpus, prepared once a session, and `lab`: everything that starts the launchers on it as real processes.

All runs are on the CPU, in fp32 and with one thread a rank: small, and the same everywhere.
"""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))

WORDS = ["the", "of", "and", "one", "two", "three", "diffusion", "mask", "latent", "row", "token", "model", "noise"]
TIMED = ("tokens_per_second", "mfu", "data_wait_fraction", "peak_memory_gib")  # what differs from run to run


def tiny_config(source: Path, shards: Path) -> dict:
    return {
        "data": {
            "corpus": "text",
            "source": str(source),
            "tokenizer": "text8",
            "normalizer": "text8",
            "row_length": 32,
            "shards": str(shards),
        },
        "model": {"layers": 2, "width": 32, "heads": 2, "dropout": 0.1},
        "latent": {"width": 8, "encoder_layers": 1},
        "diffusion": {"objective": "nelbo", "steps": [1, 4, "inf"], "kl_weight": {"start": 0.2, "warmup_steps": 6}},
        "training": {
            "steps": 12,
            "global_batch": 8,
            "micro_batch": 4,
            "learning_rate": 2e-3,
            "lr_schedule": "cosine",
            "warmup_steps": 2,
            "weight_decay": 0.1,
            "gradient_clip": 0.5,
            "ema_decay": 0.9,
            "precision": "fp32",
            "checkpoint_every": 4,
        },
        "evaluation": {"steps": [1, "inf"], "rows": 9},
        "telemetry": {"log_every": 1},
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass(frozen=True)
class Finished:
    code: int
    text: str  # stdout and stderr

    @property
    def errors(self) -> list[str]:
        return [line for line in self.text.splitlines() if line.startswith("error: ")]


class Started:
    """Ranks of a pretrain.py that was started without any launcher: nothing stands between a test and their signals."""

    def __init__(self, command: list[str], environments: list[dict[str, str]], logs: list[Path]) -> None:
        self.logs = logs
        self.processes = []
        for environment, path in zip(environments, logs, strict=True):
            with open(path, "wb") as file:
                self.processes.append(
                    subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
                )

    def signal(self, number: signal.Signals) -> None:
        for process in self.processes:
            process.send_signal(number)

    def wait(self, timeout: float = 120) -> list[Finished]:
        """Until all have ended; none is left behind."""
        deadline = time.monotonic() + timeout
        try:
            for process in self.processes:
                process.wait(max(0.1, deadline - time.monotonic()))
        finally:
            self.signal(signal.SIGKILL)
        pairs = zip(self.processes, self.logs, strict=True)
        return [Finished(process.wait(), path.read_text(errors="replace")) for process, path in pairs]


class Lab:
    """The prepared corpus, its configuration file, and the launchers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.source, self.shards, self.config = folder / "corpus.txt", folder / "shards", folder / "tiny.json"
        choice = random.Random(0).choice
        self.source.write_text("".join(" ".join(choice(WORDS) for _ in range(12)) + "\n" for _ in range(400)))
        self.config.write_text(json.dumps(tiny_config(self.source, self.shards)))
        from vmd_scale.config_file import load_config
        from vmd_scale.data.prepare import prepare

        prepare(load_config(self.config).data, progress=False)
        self._started = 0

    def environment(self, **more: str) -> dict[str, str]:
        """Of a process that sees no GPU and uses one thread, as where every core has a rank of its own."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "RANK", "LOCAL_", "WORLD_SIZE"))}
        cores = str(os.cpu_count())
        return {**kept, "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "LOCAL_WORLD_SIZE": cores, **more}

    def launch(self, launcher: str, *arguments: object, timeout: float = 120) -> Finished:
        """Plain ``python launchers/NAME.py ...``."""
        return self.command([sys.executable, f"launchers/{launcher}.py", *map(str, arguments)], timeout)

    def command(self, command: list[str], timeout: float = 180, cwd: Path = ROOT, **environment: str) -> Finished:
        """Any command; its whole process group ends with it."""
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env=self.environment(**environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            text, _ = process.communicate(timeout=timeout)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
        return Finished(process.returncode, text.decode(errors="replace"))

    def start(self, output: Path, *settings: str, ranks: int = 2, through: Path | None = None) -> Started:
        """The ranks of pretrain.py, with the variables that torchrun would give them.

        Args:
            through: a script that is given pretrain.py and its arguments.
        """
        self._started += 1
        names = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        script = [] if through is None else [str(through)]
        command = [sys.executable, *script, *self.pretrain_arguments(output, *settings)]
        environments = [self.environment(RANK=str(r), LOCAL_RANK=str(r), **names) for r in range(ranks)]
        return Started(command, environments, [self.folder / f"log-{self._started}-{r}.txt" for r in range(ranks)])

    def pretrain(self, output: Path, *settings: str, ranks: int = 2, expect: int = 0) -> list[Finished]:
        """A run from start to end; what each rank said."""
        finished = self.start(output, *settings, ranks=ranks).wait()
        assert [rank.code for rank in finished] == [expect] * ranks, (
            finished[0].text[-3000:] + finished[-1].text[-3000:]
        )
        return finished

    def pretrain_arguments(self, output: Path, *settings: str) -> list[str]:
        overrides = [part for setting in settings for part in ("--set", setting)]
        return ["launchers/pretrain.py", "--config", str(self.config), "--output", str(output), *overrides]

    free_port = staticmethod(free_port)

    @staticmethod
    def metrics(output: Path, timed: bool = False) -> list[dict]:
        """The records of metrics.jsonl, without what a clock decides."""
        records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in record.items() if timed or k not in TIMED} for record in records]

    @staticmethod
    def losses(output: Path) -> list[float]:
        return [record["loss"] for record in Lab.metrics(output)]


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("lab"))


@pytest.fixture
def loaded_alone() -> Callable[..., Any]:
    """Loads an exported folder by the folder's own code, in this process."""

    def load(folder: Path, **options: Any) -> Any:
        sys.path.insert(0, str(folder))
        try:
            sys.modules.pop("modeling_vmd", None)
            import modeling_vmd
        finally:
            sys.path.pop(0)
        return modeling_vmd.load(folder, **options)

    return load
