"""The measures of the reference tasks against what is known, and tables that say what was measured."""

import json
import math
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import Enumeration, tiny_model

from vmd_scale.build import build_architecture
from vmd_scale.data.corpora.four_tokens import four_tokens_distribution
from vmd_scale.diffusion.sampler import Sampler
from vmd_scale.errors import UserError
from vmd_scale.files import write_json
from vmd_scale.planning.activations import count_parameters, without_memory
from vmd_scale.reproduction import runs
from vmd_scale.reproduction.measures import count_rows, exact_bound, js_divergence, kl_divergence
from vmd_scale.reproduction.page import rows_of, write_page
from vmd_scale.reproduction.runs import jobs_of
from vmd_scale.reproduction.task import Measurement, Row
from vmd_scale.reproduction.tasks import TASKS
from vmd_scale.reproduction.verdicts import verdicts

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
RESULTS = CONFIGS.parent / "docs" / "results"


def test_samples_of_the_data_have_no_divergence_and_unigrams_that_of_their_product():
    rows, p = four_tokens_distribution("d1")
    x = np.repeat(rows, 1000, axis=0)
    counts = count_rows(rows, x, 10)
    assert counts.tolist() == [1000] * 10 + [0]
    assert abs(kl_divergence(p, counts)) < 1e-3
    uniform = np.random.default_rng(0).integers(0, 10, (1_000_000, 4))
    counts = count_rows(rows, uniform, 10)
    assert counts.sum() == 1_000_000
    assert 1 - counts[-1] / counts.sum() == pytest.approx(0.001, rel=0.15)  # the 0.1 % that MDM gets in one step
    assert kl_divergence(p, counts) == pytest.approx(math.log(1000), rel=0.05)


def test_kl_counts_what_is_outside_the_data_and_what_was_never_drawn():
    p = np.array([0.5, 0.5])
    assert kl_divergence(p, np.array([4000, 4000, 2000])) == pytest.approx(-math.log(0.8), abs=1e-3)
    assert kl_divergence(p, np.array([8000, 2000, 0])) == pytest.approx(0.5 * math.log(1 / 0.64), abs=1e-3)
    assert 3 < kl_divergence(p, np.array([10_000, 0, 0])) < 6


def test_js_divergence_is_symmetric_and_at_most_ln_2():
    p, q = np.array([0.5, 0.5, 0.0, 0.0]), np.array([0.0, 0.0, 0.3, 0.7])
    assert js_divergence(p, q) == pytest.approx(math.log(2))
    assert js_divergence(p, p) == 0
    r = np.array([0.25, 0.25, 0.25, 0.25])
    assert js_divergence(p, r) == js_divergence(r, p)
    assert js_divergence(p, r) == pytest.approx(0.5 * math.log(4 / 3) + 0.25 * math.log(2 / 3) + 0.25 * math.log(2))


def test_the_bound_of_a_listed_distribution_is_its_cross_entropy_with_the_model():
    model = tiny_model(14)
    exact = Enumeration(model)
    p = np.random.default_rng(0).dirichlet(np.ones(27))
    truth = -(torch.from_numpy(p) * exact.likelihood(1, "fixed", "balanced").log()).sum().item()
    bound, error = exact_bound(model, exact.rows.numpy(), p, Sampler(1), 10, 256)
    assert truth - 4 * error < bound < truth + 0.05
    loose, _ = exact_bound(model, exact.rows.numpy(), p, Sampler(1), 10, 1)
    assert loose > bound + 0.1


def jobs(name, seeds=1, fast=False, extra=(), runs=Path("runs")):
    return jobs_of(TASKS[name], seeds, fast, extra, CONFIGS, runs)


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("name", TASKS)
def test_every_model_of_every_task_has_a_valid_configuration_and_a_folder_of_its_own(name, fast):
    task, found = TASKS[name], jobs(name, 2, fast)
    assert len({job.folder for job in found}) == len(found) == 2 * len(task.variants) * len(task.methods)
    assert {job.method for job in found} >= {"mdm", "vmd"}
    for job in found:
        assert (job.config.latent.width == 0) == job.method.startswith("mdm")
        assert job.config.training.steps % job.config.training.checkpoint_every == 0
        assert job.config.diffusion.objective != "iw" or not job.config.diffusion.kl_weight.at(10**9) < 1
        assert job.config.diffusion.kl_weight.warmup_steps < job.config.training.steps
    models = [json.dumps(job.config.model_dump(mode="json"), sort_keys=True) for job in found]
    assert len(set(models)) == len(models)  # no model is trained under two names
    images = {"mnist": 784, "cifar10": 3072}
    assert {job.config.data.row_length for job in found} == {images.get(name, found[0].config.data.row_length)}


def test_a_folder_is_found_again_by_the_same_configuration_only():
    (first, *_), (again, *_) = jobs("four_tokens_d1"), jobs("four_tokens_d1")
    assert first.folder == again.folder
    others = [
        jobs("four_tokens_d1", fast=True)[0],
        jobs("four_tokens_d1", extra=["training.learning_rate=1e-4"])[0],
        jobs("four_tokens_d1", extra=["data.packing=pad"])[0],
    ]
    assert len({first.folder, *(job.folder for job in others)}) == 4
    (prepared_by_many, *_) = jobs("four_tokens_d1", extra=["data.workers=8"])
    assert (prepared_by_many.folder, prepared_by_many.changes_data) == (first.folder, False)
    assert [job.changes_data for job in others] == [False, False, True]
    assert others[2].config.data.shards != first.config.data.shards
    assert others[1].config.data.shards == first.config.data.shards


def test_what_methods_and_seeds_decide_is_not_overridden():
    for name, override, who in (
        ("sudoku", "training.seed=7", "task 'sudoku'"),
        ("toy2d", "data.source=circles", "task 'toy2d'"),
        ("four_tokens_d1", "data.source=d2", "task 'four_tokens_d1'"),
        ("four_tokens_d1", "training.global_batch=80", "method 'mdm' of task 'four_tokens_d1'"),
        ("sudoku", "latent.prior=standard", "method 'vmd' of task 'sudoku'"),
    ):
        with pytest.raises(UserError, match=f"--set {override}: {who} decides"):
            jobs(name, extra=[override])


@pytest.mark.parametrize("fast", [False, True])
def test_sudoku_is_compared_at_equal_parameters(fast):
    counts = {}
    for job in jobs("sudoku", fast=fast):
        counts[job.method] = count_parameters(without_memory(build_architecture(job.config, 9)))
    assert counts["mdm"] == pytest.approx(counts["vmd"], rel=0.003)
    assert counts["vmd_surrogate"] < counts["mdm"]


def test_measurements_keep_their_date_and_are_made_again_by_other_code(tmp_path, monkeypatch):
    job = jobs("four_tokens_d1", runs=tmp_path)[0]
    found = Measurement("accuracy", 0.9, 1, "none", "balanced")
    asked = json.loads(json.dumps(job.asked))

    class TrainedAgain(Exception):
        pass

    def train(job):
        raise TrainedAgain

    monkeypatch.setattr(runs, "train", train)
    saved = {"asked": asked, "measurements": [asdict(found)], "date": "2025-01-31", "hardware": "an abacus"}
    write_json(job.folder / "measurements.json", saved)
    assert runs.run_job(job) == runs.Measured((found,), "2025-01-31", "an abacus")
    for change in ({"code": "another"}, {"sizes": {**asked["sizes"], "samples": 1}}):
        write_json(job.folder / "measurements.json", {**saved, "asked": {**asked, **change}})
        with pytest.raises(TrainedAgain):
            runs.run_job(job)


def test_a_table_holds_mean_and_spread_over_seeds_beside_the_published_figure(tmp_path, monkeypatch):
    task = TASKS["four_tokens_d1"]
    found = [job for job in jobs(task.name, 3, runs=tmp_path) if job.method == "vmd"]
    results = []
    for n, job in enumerate(found):
        accuracy = Measurement(
            "accuracy", 0.9 + 0.01 * n, job.config.groups, "fixed", "balanced", "drawn", standard_error=0.002
        )
        results.append(runs.Measured((accuracy,), f"2026-01-0{n + 1}", "two cores"))
    one, two = rows_of(task, found, results)
    assert (one.blocks, one.seeds, one.published, one.objective) == (1, 3, 0.873, "iw")
    assert (two.blocks, two.published) == (2, 0.942)
    assert one.mean == pytest.approx(0.91)
    assert one.std == pytest.approx(0.01)
    monkeypatch.setattr(sys, "argv", ["launchers/reproduce.py", "four_tokens_d1", "--set", "a=b c"])
    page = write_page(task, found, results, [one, two], tmp_path, tmp_path / "copy.json")
    text = page.read_text()
    assert "| vmd | 1 | 1 | 0.9100 ± 0.0100 [0.873] |" in text
    assert "In all lines: objective iw, latent fixed, law balanced." in text
    assert "accuracy drawn" in text
    assert "standard deviation over 3 seeds" in text
    assert "python launchers/reproduce.py four_tokens_d1 --set 'a=b c'\n" in text
    assert "between 2026-01-01 and 2026-01-06 on two cores." in text
    for path in (tmp_path / "copy.json", tmp_path / "four_tokens_d1.json"):
        assert json.loads(path.read_text())[0]["mean"] == one.mean


def test_a_published_figure_stands_only_where_it_was_measured():
    task, (*_, job) = TASKS["sudoku"], jobs("sudoku")
    measured = [
        Measurement("accuracy", 0.5, 10, "fixed", law, "argmax", split)
        for law in ("margin", "balanced")
        for split in ("validation", "24-28 clues")
    ]
    rows = rows_of(task, [job], [runs.Measured(tuple(measured), "2026-01-01", "two cores")])
    assert [row.published for row in rows] == [0.990, None, None, None]
    easier = rows_of(task, [replace(job, fast=True)], [runs.Measured(tuple(measured), "2026-01-01", "two cores")])
    assert [row.published for row in easier] == [None] * 4  # of puzzles with more clues
    other = rows_of(
        task, [replace(job, changes_data=True)], [runs.Measured(tuple(measured), "2026-01-01", "two cores")]
    )
    assert [row.published for row in other] == [None] * 4
    assert all(row.std is None for row in rows)


@pytest.mark.parametrize("name", [name for name in TASKS if (RESULTS / f"{name}.json").is_file()])
def test_the_results_in_the_repository_are_of_its_tasks(name):
    """Of the methods, data and lengths of training that tasks and configurations name today."""
    rows, page = json.loads((RESULTS / f"{name}.json").read_text()), (RESULTS / f"{name}.md").read_text()
    wanted = jobs(name, fast=rows[0]["scaled_down"])
    assert {(r["variant"], r["method"], r["objective"], r["blocks"]) for r in rows} == {
        (job.variant, job.method, job.config.diffusion.objective, job.config.groups) for job in wanted
    }
    for job in wanted:
        assert f"| {job.method} | {job.config.groups} |" in page
        assert f"| {job.config.training.steps:,} |" in page
    assert "## Goals" in page
    found = [Row(**{f.name: r.get(f.name, ()) for f in fields(Row)}) for r in rows]
    blocks = {row.blocks for row in found}
    for goal in TASKS[name].goals:  # one that no row can be about would be left out without a word
        assert goal.blocks not in blocks or verdicts(goal, [replace(row, scaled_down=False) for row in found])
