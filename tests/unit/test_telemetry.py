"""What a run says while it trains: lines where it is read from a file, a bar on a terminal."""

import io
import json
import logging
import sys
from pathlib import Path

import pytest

from vmd_scale.config_file import load_config
from vmd_scale.training.telemetry import LOG, Telemetry, share, start_logging

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "quickstart.json"


class Screen(io.StringIO):
    def __init__(self, is_terminal):
        super().__init__()
        self._is_terminal = is_terminal

    def isatty(self):
        return self._is_terminal


@pytest.fixture
def plain_logging():
    """`start_logging` changes the package's logger for good."""
    logger = logging.getLogger("vmd_scale")
    before = logger.level, logger.propagate, list(logger.handlers)
    yield
    logger.setLevel(before[0])
    logger.propagate, logger.handlers = before[1:]


@pytest.mark.parametrize("is_terminal", [False, True])
def test_every_logged_step_is_a_line_and_only_a_terminal_has_a_bar(tmp_path, monkeypatch, plain_logging, is_terminal):
    screen = Screen(is_terminal)
    monkeypatch.setattr(sys, "stderr", screen)
    start_logging(tmp_path, rank=0)
    telemetry = Telemetry(tmp_path, load_config(CONFIG), True, 0)
    for step in range(1, 41):
        telemetry.step()
        if step % 20 == 0:
            record = {"step": step, "loss": step / 7, "kl": 0.5, "tokens_per_second": 1234.5, "mfu": 0.25}
            telemetry.log({**record, "peak_memory_gib": 12.34})
    telemetry.went_back_to(20)
    telemetry.close()
    said = [line.partition(" INFO ")[2] for line in (tmp_path / LOG).read_text().splitlines()]
    assert len(said) == 2
    assert said[0].startswith("step 20 of 1200: loss 2.8571, KL 0.5000, 1,234 tokens/s, MFU 25%, 12.3 GiB, ")
    assert said[1].endswith(" left")
    assert ("\r" in screen.getvalue()) == is_terminal
    assert ("% step " in screen.getvalue()) == is_terminal
    assert all(line in screen.getvalue() for line in said)


@pytest.mark.parametrize(
    ("value", "shown"), [(0.0004, "0.0%"), (0.004, "0.4%"), (0.0994, "9.9%"), (0.0996, "10%"), (0.254, "25%")]
)
def test_a_small_share_is_not_nothing(value, shown):
    """A small model on a CPU, or the first step of a large one."""
    assert share(value) == shown


def test_the_time_left_is_that_of_the_steps_of_this_start(tmp_path, monkeypatch):
    """A resumed run knows nothing of how fast the one before was."""
    now = [1000.0]
    monkeypatch.setattr("vmd_scale.training.telemetry.time.monotonic", lambda: now[0])
    telemetry = Telemetry(tmp_path, load_config(CONFIG), True, 1000)
    now[0] += 50
    assert telemetry._time_left(1100) == "00:50"  # 100 steps in 50 s, 100 to go
    telemetry.went_back_to(1000)
    now[0] += 10
    assert telemetry._time_left(1100) == "00:10"
    telemetry.close()


def test_a_torn_event_is_forgotten_and_no_other(tmp_path, plain_logging):
    """A node lost its power; what happened at steps that are made again did happen."""
    kept = json.dumps({"event": "skipped", "step": 9, "time": 1.0})
    (tmp_path / "events.jsonl").write_text(f'{kept}\n{{"event": "sto')
    telemetry = Telemetry(tmp_path, load_config(CONFIG), True, 5)
    telemetry.event("resumed", 5)
    telemetry.close()
    lines = (tmp_path / "events.jsonl").read_text().splitlines()
    assert lines[0] == kept
    assert [json.loads(line)["event"] for line in lines] == ["skipped", "resumed"]
