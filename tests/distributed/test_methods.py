"""Objective iw with a conditional prior: the same losses on one rank and on two, however ZeRO divides the weights.

Under ZeRO-3 every call of a layer is a collective: this would hang if ranks had inputs of different shapes.
"""

import json

import pytest

SETTINGS = (
    "training.steps=4",
    "training.micro_batch=2",
    "model.dropout=0.0",
    "latent.prior=conditional",
    "diffusion.objective=iw",
    "diffusion.importance_samples=2",
    "diffusion.steps=1,1,4",
    "evaluation.every=4",
)


@pytest.fixture(scope="module")
def runs(lab, tmp_path_factory):
    folder = tmp_path_factory.mktemp("methods")
    for stage, ranks in ((0, 1), (3, 2)):
        lab.pretrain(folder / f"stage{stage}", *SETTINGS, f"deepspeed.zero_optimization.stage={stage}", ranks=ranks)
    return folder


def test_losses_do_not_depend_on_ranks_or_stage(runs, lab):
    alone, together = (lab.losses(runs / f"stage{stage}") for stage in (0, 3))
    assert len(alone) == 4
    assert together == pytest.approx(alone, rel=1e-5)


def test_use_of_the_latent_is_recorded_at_every_evaluation(runs):
    alone, together = (json.loads((runs / f"stage{stage}" / "latent.jsonl").read_text()) for stage in (0, 3))
    assert (alone["step"], alone["latent_width"]) == (4, 8)
    assert list(alone["kl_by_mask_ratio"]) == ["1.0"]  # an encoder that was trained on nothing else
    assert together["kl_by_mask_ratio"]["1.0"] == pytest.approx(alone["kl_by_mask_ratio"]["1.0"], rel=1e-4)
    assert together["active_units"] == alone["active_units"]
