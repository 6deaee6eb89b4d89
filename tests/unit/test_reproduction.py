"""The measures of the reference tasks against what is known, and tables that say what was measured."""

import json
import math

import numpy as np
import pytest
import torch
from tiny_models import Enumeration, tiny_model

from vmd_scale.config import load_config
from vmd_scale.data.corpora.four_tokens import four_tokens_distribution
from vmd_scale.diffusion.sampler import Sampler
from vmd_scale.reproduction.measures import count_rows, exact_bound, js_divergence, kl_divergence
from vmd_scale.reproduction.page import rows_of, write_page
from vmd_scale.reproduction.runs import ROOT, Job, jobs_of
from vmd_scale.reproduction.task import Measurement, Sizes
from vmd_scale.reproduction.tasks import TASKS


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
    bound, error = exact_bound(model, exact.rows.numpy(), p, Sampler(1), Sizes(0, 256, 270))
    assert truth - 4 * error < bound < truth + 0.05
    loose, _ = exact_bound(model, exact.rows.numpy(), p, Sampler(1), Sizes(0, 1, 270))
    assert loose > bound + 0.1


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("name", TASKS)
def test_every_model_of_every_task_has_a_valid_configuration_and_a_folder_of_its_own(name, fast, tmp_path):
    jobs = jobs_of(name, 2, fast, [], tmp_path)
    assert len({job.folder for job in jobs}) == len(jobs) == 2 * len(TASKS[name].variants) * len(TASKS[name].methods)
    assert {job.method for job in jobs} >= {"mdm", "vmd"}
    for job in jobs:
        assert (job.config.latent.width == 0) == (job.method == "mdm")
        checkpoints = job.config.training.checkpoint_every
        assert job.config.training.steps % checkpoints == 0 or checkpoints < job.config.training.steps


def test_a_table_holds_mean_and_spread_over_seeds_beside_the_published_figure(tmp_path):
    task = TASKS["four_tokens_d1"]
    jobs = [job for job in jobs_of(task.name, 3, True, [], tmp_path) if job.method == "vmd"]
    results = [
        [Measurement("accuracy", 0.9 + 0.01 * n, job.config.groups, "drawn", "balanced")] for n, job in enumerate(jobs)
    ]
    one, two = rows_of(task, jobs, results)
    assert (one.blocks, one.seeds, one.published) == (1, 3, 0.873)
    assert (two.blocks, two.published) == (2, 0.942)
    assert one.mean == pytest.approx(0.91)
    assert one.std == pytest.approx(0.01)
    page = write_page(task, [one, two], "python launchers/reproduce.py four_tokens_d1", tmp_path, tmp_path / "t.json")
    text = page.read_text()
    assert "0.9100 ± 0.0100" in text
    assert "python launchers/reproduce.py four_tokens_d1" in text
    assert json.loads((tmp_path / "t.json").read_text())[0]["mean"] == one.mean


def test_a_single_seed_has_no_spread(tmp_path):
    task = TASKS["sudoku"]
    config = load_config(ROOT / "configs" / task.config)
    job = Job("sudoku", "", "vmd", config, (), task.sizes, tmp_path)
    (row,) = rows_of(task, [job], [[Measurement("accuracy", 0.5, 10, "argmax", "margin", split="validation")]])
    assert row.std is None
    assert row.published == 0.990
