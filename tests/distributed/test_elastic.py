"""A run goes on with other ranks, ZeRO stages, micro-batches and precisions, from the very weights that it had."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import run_in_processes
from same_run import LAST

from vmd_scale.checkpoints import find_checkpoint, load_weights
from vmd_scale.config_file import load_config


@pytest.fixture(scope="module")
def elastic(lab, runs) -> dict:
    """Stopped and called again with other ranks, ZeRO stages and micro-batches: 2 -> 1 -> 2 ranks, 1 -> 3 -> 2 -> 0."""
    folder, texts = runs / "elastic", []
    lab.pretrain(runs / "no_dropout", "model.dropout=0.0", ranks=1)
    for ranks, stage, micro_batch in ((2, 1, 4), (1, 3, 4), (2, 2, 2), (2, 3, 4)):
        folder.mkdir(exist_ok=True)
        (folder / "STOP").touch()  # seen after one more step
        texts.append(lab.pretrain(folder, *elastic_settings(stage, micro_batch), ranks=ranks, expect=75)[0].text)
    texts.append(lab.pretrain(folder, *elastic_settings(0, 8), ranks=1)[0].text)
    return {"folder": folder, "texts": texts, "undisturbed": runs / "no_dropout"}


def elastic_settings(stage: int, micro_batch: int) -> tuple[str, ...]:
    """Without dropout, which is drawn for a micro-batch, not for a row."""
    return (f"deepspeed.zero_optimization.stage={stage}", f"training.micro_batch={micro_batch}", "model.dropout=0.0")


def fragments_after_resume(config_path: Path, folder: Path, cases: tuple[tuple[str, ...], ...]) -> list:
    """On each rank, for each case of settings: kind -> [(parameter, first element, values)], before any step."""
    from vmd_scale.tokenization import load_tokenizer
    from vmd_scale.training.launch import join_world, leave_world
    from vmd_scale.training.loop import Trainer
    from vmd_scale.training.zero import fragment_values

    world, found = join_world(), []
    for settings in cases:
        config = load_config(config_path, settings)
        trainer = Trainer(config, folder, world, load_tokenizer(config.data.tokenizer))
        assert trainer.resume() == trainer.ema.updates == LAST
        partitions = {"ema": trainer.ema.partitions, "raw": trainer.master.partitions}
        found.append(
            {
                kind: [(f.name, f.start, fragment_values(f, where).detach().clone()) for f in trainer.master.fragments]
                for kind, where in partitions.items()
            }
        )
    leave_world()
    return found


def test_one_rank_sees_the_same_rows_noise_and_dropout_as_two(lab, whole, one_rank):
    """Accumulation 2 instead of two ranks: equal but for the order of summation."""
    np.testing.assert_allclose(lab.losses(one_rank), lab.losses(whole), rtol=1e-5)
    found, wanted = load_weights(find_checkpoint(one_rank), "ema"), load_weights(find_checkpoint(whole), "ema")
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=2e-4, msg=name)


def test_a_run_goes_on_with_other_ranks_stages_and_micro_batches(lab, elastic):
    whole = elastic["undisturbed"]
    assert [record["step"] for record in lab.metrics(elastic["folder"])] == list(range(1, LAST + 1))
    np.testing.assert_allclose(lab.losses(elastic["folder"]), lab.losses(whole), rtol=1e-5)
    for kind in ("ema", "raw"):
        found, wanted = (load_weights(find_checkpoint(folder), kind) for folder in (elastic["folder"], whole))
        for name in wanted:
            torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=2e-4, msg=name)


def test_what_has_changed_is_said(elastic):
    said = [re.findall(r"resumed from .* at step (\d) \((.*)\)", text) for text in elastic["texts"]]
    assert said == [
        [],
        [("1", "world_size 2 -> 1, zero_stage 1 -> 3")],
        [("2", "world_size 1 -> 2, zero_stage 3 -> 2")],
        [("3", "zero_stage 2 -> 3")],
        [("4", "world_size 2 -> 1, zero_stage 3 -> 0")],
    ]


@pytest.mark.parametrize(
    ("ranks", "cases"),
    [(1, ((0, "fp32"), (3, "fp32"), (1, "bf16"))), (2, ((3, "fp32"), (2, "fp32"), (1, "bf16")))],
    ids=["one rank", "two ranks"],
)
def test_other_ranks_stages_and_precisions_take_over_weights_and_average_bit_for_bit(lab, runs, whole, ranks, cases):
    """Of a checkpoint of two ranks in stage 1, every element, before a step could hide the difference."""
    folder = runs / f"taken-over-by-{ranks}"
    shutil.copytree(whole, folder)
    saved = {kind: load_weights(find_checkpoint(whole), kind) for kind in ("ema", "raw")}
    assert all(not torch.equal(values, saved["raw"][name]) for name, values in saved["ema"].items())
    keys = ("deepspeed.zero_optimization.stage", "training.precision")
    settings = tuple(tuple(f"{key}={value}" for key, value in zip(keys, case, strict=True)) for case in cases)
    found = run_in_processes(fragments_after_resume, ranks, lab.config, folder, settings)
    for number, (stage, _) in enumerate(cases):
        for kind, wanted in saved.items():
            elements = 0
            for of_rank in found:
                for name, start, values in of_rank[number][kind]:
                    assert torch.equal(values, wanted[name].view(-1)[start : start + len(values)]), (kind, name)
                    elements += len(values)
            assert elements == sum(values.numel() for values in wanted.values()) * (ranks if stage == 0 else 1)


def test_another_precision_and_offload_take_over_the_same_masters(lab, runs, whole):
    """Two steps more whose updates are too small to be seen in fp32: what is saved after them is what was resumed."""
    folder = runs / "precision"
    shutil.copytree(whole, folder)
    offload = ("deepspeed.zero_optimization.stage=2", 'deepspeed.zero_optimization.offload_optimizer={"device": "cpu"}')
    changes = ((13, 1, ("training.precision=bf16",)), (14, 2, ("training.precision=fp32", *offload)))
    texts = []
    for step, ranks, settings in changes:
        still = (f"training.steps={step}", "training.learning_rate=1e-30", "training.lr_schedule=constant", *settings)
        texts.append(lab.pretrain(folder, *still, ranks=ranks)[0].text)
        assert find_checkpoint(folder).name == f"step-{step:08d}"
        found, wanted = (load_weights(find_checkpoint(run), "raw") for run in (folder, whole))
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert "precision fp32 -> bf16" in texts[0]
    assert "precision bf16 -> fp32" in texts[1]
    np.testing.assert_allclose(lab.losses(folder)[-2:], lab.losses(whole)[-1], rtol=0.2)
