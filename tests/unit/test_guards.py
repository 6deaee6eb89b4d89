"""A spike is told from scatter; a rank that makes no progress ends itself; one run holds a run folder."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from vmd_scale.errors import UserError
from vmd_scale.training.faults import FEWEST, WINDOW, SpikeDetector
from vmd_scale.training.lock import LOCK, RunLock


def losses(count: int, seed: int = 0) -> list[float]:
    """Falling, with heavy-tailed scatter, as those of masked diffusion."""
    generator = np.random.default_rng(seed)
    return list(2 + np.exp(-np.arange(count) / 100) + 0.05 * generator.standard_t(5, count))


@pytest.mark.parametrize("seed", range(5))
def test_scatter_is_no_spike(seed):
    detector = SpikeDetector()
    assert not any(detector.is_spike(loss) for loss in losses(1000, seed))


@pytest.mark.parametrize("spike", [6.0, float("inf"), float("nan")])
def test_a_spike_is_seen_and_does_not_become_what_is_normal(spike):
    detector = SpikeDetector()
    for loss in losses(200):
        detector.is_spike(loss)
    assert all(detector.is_spike(spike) for _ in range(2 * WINDOW))
    assert not detector.is_spike(losses(200)[-1])


def test_a_constant_loss_needs_more_than_rounding_to_spike():
    detector = SpikeDetector([2.0] * WINDOW)
    assert not detector.is_spike(2.0 + 1e-6)
    assert detector.is_spike(3.0)


@pytest.mark.parametrize("place", [3, 10, 40])
def test_a_loss_that_is_not_a_number_leaves_no_trace(place):
    detector, values = SpikeDetector(), losses(300)
    values.insert(place, float("nan"))
    verdicts = [detector.is_spike(loss) for loss in values]
    assert [n for n, verdict in enumerate(verdicts) if verdict] == ([place] if place >= FEWEST else [])


def test_too_few_losses_judge_nothing():
    detector = SpikeDetector()
    assert not any(detector.is_spike(loss) for loss in [1.0] * (FEWEST - 1) + [100.0])


def test_a_resumed_detector_goes_on_as_the_one_before():
    whole, values = SpikeDetector(), [*losses(150), 5.0, *losses(20, seed=1)]
    verdicts = [whole.is_spike(loss) for loss in values]
    first = SpikeDetector()
    halves = [first.is_spike(loss) for loss in values[:100]]
    second = SpikeDetector(first.state())
    assert halves + [second.is_spike(loss) for loss in values[100:]] == verdicts


HANGS = """
import threading, sys
from vmd_scale.training.faults import Watchdog
watchdog = Watchdog(1.0)
for _ in range(3):
    watchdog.progress()
def wait_for_a_rank_that_never_comes():
    threading.Event().wait(60)
wait_for_a_rank_that_never_comes()
"""


def test_a_rank_that_hangs_ends_itself_and_says_where():
    started = time.monotonic()
    finished = subprocess.run([sys.executable, "-c", HANGS], capture_output=True, text=True, timeout=50)
    assert finished.returncode == 1
    assert 1.0 <= time.monotonic() - started < 40
    assert "Timeout" in finished.stderr
    assert "wait_for_a_rank_that_never_comes" in finished.stderr


HOLDS = """
import sys, time
from pathlib import Path
from vmd_scale.training.lock import RunLock
lock = RunLock(Path(sys.argv[1]))
lock.acquire()
print("held", flush=True)
time.sleep(60)
"""


def test_a_second_run_in_the_same_folder_is_refused_until_the_first_is_dead(tmp_path: Path):
    holder = subprocess.Popen([sys.executable, "-c", HOLDS, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=rf"in use by process {holder.pid} on .*choose another --output"):
            RunLock(tmp_path).acquire(patience=0.3)
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    second = RunLock(tmp_path)
    second.acquire(patience=5)
    assert f"process {os.getpid()} " in (tmp_path / LOCK).read_text()
    second.release()
    RunLock(tmp_path).acquire(patience=0)


def test_deleting_the_lock_of_a_dead_node_frees_the_folder(tmp_path: Path):
    """As the error says. The other lock stands for one that a file server keeps for ever."""
    dead, ours = RunLock(tmp_path), RunLock(tmp_path)
    dead.acquire()
    with pytest.raises(UserError, match="delete"):
        ours.acquire(patience=0)
    (tmp_path / LOCK).unlink()
    ours.acquire(patience=0)
    with pytest.raises(UserError, match=f"process {os.getpid()} on"):
        RunLock(tmp_path).acquire(patience=0)
    for lock in (ours, dead):
        lock.release()


def test_a_run_that_is_just_ending_is_waited_for(tmp_path: Path):
    first, second = RunLock(tmp_path), RunLock(tmp_path)
    first.acquire()
    import threading

    threading.Timer(0.5, first.release).start()
    second.acquire(patience=10)
    second.release()
