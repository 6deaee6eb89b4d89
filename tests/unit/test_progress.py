"""What a run counts is what a checkpoint keeps and a roll-back changes; what is measured is of training alone."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from vmd_scale.config_file import load_config
from vmd_scale.planning.flops import FlopsPerToken
from vmd_scale.training import meter
from vmd_scale.training.launch import World
from vmd_scale.training.meter import Meter
from vmd_scale.training.progress import Progress

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "quickstart.json"
CPU = torch.device("cpu")
KEYS = ("tokens", "skipped_steps", "skipped_batches", "rollbacks", "owes_evaluation", "losses")  # on disk, for good


def disturbed() -> Progress:
    """After 20 steps of 7 tokens, of which the last two were skipped, and one roll-back."""
    progress = Progress.at_start(CPU)
    for step in range(20):
        skipped = max(0, step - 17)
        assert progress.count_step(torch.tensor(7), skipped) == (skipped > 0)
        progress.spikes.is_spike(step / 7)
    progress.after_rollback(Progress(torch.tensor(0), skipped_batches=3, rollbacks=1), 4)
    return progress


def test_a_checkpoint_keeps_all_but_the_steps_that_were_skipped_just_now():
    progress = disturbed()
    assert (progress.skipped_in_a_row, progress.skipped_batches, progress.rollbacks) == (2, 7, 2)
    progress.owes_evaluation = True
    state = json.loads(json.dumps(progress.to_state()))
    assert state.keys() == set(KEYS)
    assert (state["tokens"], state["skipped_steps"], len(state["losses"])) == (140, 2, 20)
    resumed = Progress.from_state(state, CPU)
    assert resumed.to_state() == state
    assert resumed.skipped_in_a_row == 0


def test_counting_goes_on_after_a_checkpoint_was_read():
    resumed = Progress.from_state(disturbed().to_state(), CPU)
    assert not resumed.count_step(torch.tensor(5), 2)
    assert resumed.count_step(torch.tensor(5), 3)
    assert (int(resumed.tokens), resumed.skipped_steps, resumed.skipped_in_a_row) == (150, 3, 1)


def test_older_checkpoints_do_not_know_all_of_it():
    state = disturbed().to_state()
    del state["rollbacks"], state["owes_evaluation"]
    older = Progress.from_state(state, CPU)
    assert (older.rollbacks, older.owes_evaluation, older.skipped_batches) == (0, False, 7)


def test_a_roll_back_forgets_an_owed_evaluation_and_counts_what_was_abandoned():
    restored = Progress(torch.tensor(0), skipped_batches=1, rollbacks=1, owes_evaluation=True)
    restored.after_rollback(Progress(torch.tensor(0), skipped_batches=5, rollbacks=2), 4)
    assert (restored.skipped_batches, restored.rollbacks, restored.owes_evaluation) == (9, 3, False)


def test_speed_is_of_the_steps_since_the_last_record_without_pauses(monkeypatch):
    clock, loader = SimpleNamespace(now=100.0), SimpleNamespace(wait_seconds=50.0)
    monkeypatch.setattr(meter, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    monkeypatch.setattr(meter, "peak_flops", lambda device, precision: {"fp32": 1e3}[precision])
    config, world = load_config(CONFIG), World(0, 0, 1, CPU, host_group=None, launchers=[])
    positions = config.training.global_batch * config.data.row_length
    measured = Meter(config, world, loader, FlopsPerToken(denoiser=2.0, head=3.0, encoder=1.0, latent=1.0), "fp32")
    progress = Progress(torch.tensor(1000))
    clock.now = 200.0  # building an engine is no training
    measured.start(10, progress)

    def record(step):
        return measured.record(step, torch.tensor([8.0, 6.0, 2.0, 4.0], dtype=torch.float64), progress, 0.5)

    def steps(count, seconds, tokens, waited):
        for _ in range(count):
            progress.count_step(torch.tensor(tokens), 0)
        clock.now += seconds
        loader.wait_seconds += waited

    steps(4, seconds=6.0, tokens=25, waited=2.0)
    with measured.paused():
        clock.now += 1000.0
    steps(1, seconds=4.0, tokens=20, waited=0.5)
    first = record(15)
    assert [first[key] for key in ("step", "tokens", "loss", "reconstruction", "kl")] == [15, 1120, 2.0, 1.5, 0.5]
    assert first["tokens_per_second"] == 12.0
    assert first["data_wait_fraction"] == 0.25
    assert first["mfu"] == pytest.approx((5 * positions * 4.0 + 120 * 3.0) / (10.0 * 1e3))

    measured.went_back_to(12, Progress(torch.tensor(1050)))
    progress.tokens.fill_(1050)
    steps(2, seconds=5.0, tokens=30, waited=0.0)
    second = record(14)
    assert (second["tokens_per_second"], second["data_wait_fraction"]) == (12.0, 0.0)
    assert second["mfu"] == pytest.approx((2 * positions * 4.0 + 60 * 3.0) / (5.0 * 1e3))
