"""The configuration of a fine-tuning run, from weights that tell their own network."""

import json
from pathlib import Path

import pytest
import torch

from vmd_scale.build import build_model
from vmd_scale.checkpoints import TrainedModel, load_trained, load_weights
from vmd_scale.config_file import load_config, parse_config
from vmd_scale.data.loader import accumulation_steps
from vmd_scale.errors import UserError
from vmd_scale.export.folder import export
from vmd_scale.finetuning import finetuning_config
from vmd_scale.initial_weights import initialize_from
from vmd_scale.tokenization import load_tokenizer
from vmd_scale.training.engine import deepspeed_config
from vmd_scale.weight_sources import settled

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def config_of(**sections):
    values = {
        "data": {"corpus": "text", "tokenizer": "text8", "row_length": 8, "shards": "old"},
        "model": {"layers": 1, "width": 16, "heads": 2},
        "latent": {"width": 3, "encoder_layers": 1},
        "training": {"steps": 1, "global_batch": 1, "micro_batch": 1, "precision": "fp32"},
    }
    return parse_config({**values, **{name: values.get(name, {}) | given for name, given in sections.items()}}, "test")


def exported(folder, encoder, **sections):
    config, tokenizer = config_of(**sections), load_tokenizer("text8")
    torch.manual_seed(0)
    model = build_model(config, tokenizer.vocab_size)
    return str(export(TrainedModel(model, config, tokenizer, 4, "ema", folder / "step-4"), folder, encoder=encoder))


def tune(weights, tmp_path, *overrides, **options):
    return finetuning_config(weights, "text", "new.txt", tmp_path / "run", overrides=overrides, **options)


def test_a_folder_without_its_encoder_is_refused_before_anything_starts(tmp_path):
    bare, whole = exported(tmp_path / "bare", encoder=False), exported(tmp_path / "whole", encoder=True)
    with pytest.raises(UserError, match=r"--from .*bare: .*without its encoder.*export it again with --encoder"):
        tune(bare, tmp_path)
    assert tune(bare, tmp_path, "latent.width=0").latent.width == 0
    assert tune(whole, tmp_path).latent.width == 3
    plain = exported(tmp_path / "plain", encoder=False, latent={"width": 0})
    assert tune(plain, tmp_path, "latent.width=3").latent.width == 3  # a plain model gets a latent


def test_a_shard_of_an_export_that_is_gone_is_an_error(tmp_path):
    """Also one that holds nothing but parts that could start fresh."""
    config, tokenizer = config_of(), load_tokenizer("text8")
    model = build_model(config, tokenizer.vocab_size)
    trained = TrainedModel(model, config, tokenizer, 4, "ema", tmp_path / "step-4")
    folder = export(trained, tmp_path / "out", encoder=True, max_shard_size="4KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 3
    initialize_from(build_model(config, tokenizer.vocab_size), str(folder))
    for shard in shards:
        shard.rename(tmp_path / "aside")
        with pytest.raises(UserError, match=rf"{shard.name}: not readable"):
            initialize_from(build_model(config, tokenizer.vocab_size), str(folder))
        (tmp_path / "aside").rename(shard)


def test_labels_are_learned_as_they_are_scored(tmp_path):
    """In one step, with z from the prior: the posterior has nothing to gain by telling the label."""
    given = {"objective": "vmd", "steps": [1, 4], "kl_weight": {"end": 0.5, "warmup_steps": 9}, "free_bits": 0.1}
    base = config_of(diffusion=given)
    labels = finetuning_config("w.pt", "labels", "new.jsonl", tmp_path / "run", base=base).diffusion
    assert (labels.objective, labels.steps, labels.free_bits) == ("nelbo", (1,), 0)
    assert {labels.kl_weight.at(step) for step in (0, 5, 100)} == {20}
    text = tune("w.pt", tmp_path, base=base).diffusion
    assert (text.objective, text.steps, text.free_bits) == ("vmd", (1, 4), 0.1)
    assert {text.kl_weight.at(step) for step in (0, 5, 100)} == {0.5}


def test_the_engine_is_that_of_the_weights(tmp_path):
    """What was needed to fit into memory once is needed again; a smaller micro-batch stays one."""
    base = load_config(CONFIGS / "ladder" / "8b.json")
    tuned = tune("w.pt", tmp_path, base=base).training
    assert (tuned.activation_checkpointing, tuned.micro_batch) == ("selective", 4)
    assert tune("w.pt", tmp_path, base=base).zero_stage == 3
    old = config_of(
        training={"micro_batch": 64, "global_batch": 64, "seed": 7, "compile": False},
        deepspeed={"zero_optimization": {"stage": 2}, "train_batch_size": 64, "gradient_accumulation_steps": 1},
    )
    tuned = tune("w.pt", tmp_path, base=old)
    deepspeed_config(tuned, 1, "fp32")  # the old batch contradicts nothing
    assert (tuned.training.micro_batch, tuned.training.seed, tuned.training.compile) == (8, 7, False)
    assert tuned.zero_stage == 2


@pytest.mark.parametrize(
    ("ranks", "overrides", "micro_batch"),
    [
        (1, (), 8),
        (8, (), 4),
        (32, (), 1),
        (8, ("training.global_batch=24",), 3),
        (5, ("training.global_batch=30",), 6),
        (8, ("training.micro_batch=2",), 2),
    ],
)
def test_the_micro_batch_fits_the_number_of_ranks(tmp_path, ranks, overrides, micro_batch):
    """The same command works in front of one GPU and of eight."""
    old = config_of(training={"micro_batch": 64, "global_batch": 64})
    tuned = tune("w.pt", tmp_path, *overrides, base=old, ranks=ranks)
    assert tuned.training.micro_batch == micro_batch
    assert accumulation_steps(tuned.training.global_batch, tuned.training.micro_batch, ranks) >= 1


def test_best_and_latest_of_a_run_are_weights_too(tmp_path):
    """Each is a file with the name of a checkpoint; which one that is must be settled once, for all ranks."""
    checkpoints = tmp_path / "run" / "checkpoints"
    for step, width in ((1, 16), (2, 32)):
        (checkpoints / f"step-{step:08}").mkdir(parents=True)
        (checkpoints / f"step-{step:08}" / "manifest.json").write_text("{torn")
        state = {"config": config_of(model={"width": width}).model_dump(mode="json")}
        (checkpoints / f"step-{step:08}" / "run_state.json").write_text(json.dumps(state))
    for name, step in (("best", 1), ("latest", 2)):
        (checkpoints / name).write_text(f"step-{step:08}\n")
        assert settled(str(checkpoints / name)) == str(checkpoints / f"step-{step:08}")
        assert tune(str(checkpoints / name), tmp_path).model.width == 16 * step
    assert settled(str(tmp_path / "run")) == str(checkpoints / "step-00000002")
    assert settled("weights.pt") == "weights.pt"
    for load in (load_trained, lambda path: load_weights(path, "ema")):
        with pytest.raises(UserError, match=r"manifest\.json: not a readable JSON file"):
            load(checkpoints / "step-00000001")
