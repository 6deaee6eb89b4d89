"""Adapters and frozen weights under every ZeRO stage: the same losses, checkpoints that hold everything, resumes."""

from pathlib import Path

import pytest
import torch
from ranks import run_in_processes
from safetensors import safe_open

from vmd_scale.checkpoints import find_checkpoint, load_trained, load_weights, whole_checkpoints
from vmd_scale.config_file import load_config

STAGES = (0, 1, 2, 3)
LORA = 'training.lora={"rank": 4, "layers": ["*.attention.qkv", "denoiser.blocks.*.mlp.up"]}'


def settings(stage: int, source: Path, steps: int = 4) -> list[str]:
    return [
        f"training.steps={steps}",
        "training.checkpoint_every=2",
        "training.lr_schedule=constant",
        "training.micro_batch=2",
        f"training.init_from={source}",
        LORA,
        'training.trainable=["denoiser.norm.weight", "encoder.out.*"]',
        "model.dropout=0.0",
        f"deepspeed.zero_optimization.stage={stage}",
        *(["deepspeed.zero_optimization.stage3_param_persistence_threshold=2000"] if stage == 3 else []),
    ]


def in_bf16(stage: int, source: Path, steps: int) -> list[str]:
    """A learning rate that moves no fp32 weight: what is different from the source afterwards was rounded."""
    tiny = ["training.global_batch=2", "training.micro_batch=1", "training.learning_rate=1e-30"]
    return [*settings(stage, source, steps), "training.checkpoint_every=1", "training.precision=bf16", *tiny]


def tune(config_path, folder, source):
    """On each rank: from the same weights in every stage; and in stage 3 for two steps, the other two in stage 1."""
    from vmd_scale.tokenization import load_tokenizer
    from vmd_scale.training.launch import join_world, leave_world
    from vmd_scale.training.start import pretrain

    world = join_world()
    runs = [(f"stage{stage}", settings(stage, source)) for stage in STAGES]
    # the second part must not need what init_from names
    runs += [("moved", settings(3, source, steps=2)), ("moved", settings(1, Path("gone")))]
    runs += [(f"bf16-stage{stage}", in_bf16(stage, source, 1)) for stage in STAGES[1:]]
    runs += [("bf16-stage2", in_bf16(3, Path("gone"), 2))]  # goes on in another stage
    for name, wanted in runs:
        config = load_config(config_path, wanted)
        assert pretrain(config, folder / name, world, load_tokenizer(config.data.tokenizer)) == 0
    leave_world()


@pytest.fixture(scope="module")
def runs(lab, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("frozen")
    lab.pretrain(folder / "source", "training.steps=2", ranks=1)
    run_in_processes(tune, 2, lab.config, folder, folder / "source", timeout=300)
    return folder


def test_all_stages_compute_the_same(runs, lab):
    alone = lab.losses(runs / "stage0")
    assert len(alone) == 4
    for stage in STAGES[1:]:
        assert lab.losses(runs / f"stage{stage}") == pytest.approx(alone, rel=1e-5)


def test_it_resumes_in_another_stage_from_the_checkpoint_alone(runs, lab):
    assert lab.losses(runs / "moved") == pytest.approx(lab.losses(runs / "stage0"), rel=1e-5)


@pytest.mark.parametrize("run", [*(f"stage{stage}" for stage in STAGES), "moved"])
def test_a_checkpoint_holds_what_was_frozen_bit_for_bit_and_once(runs, run):
    source = load_weights(find_checkpoint(runs / "source"), "ema")
    checkpoint = find_checkpoint(runs / run)
    tuned = load_weights(checkpoint, "raw")
    changed = {name for name, value in source.items() if not torch.equal(tuned[name], value)}
    assert changed == {"denoiser.norm.weight", "encoder.out.weight", "encoder.out.bias"}
    adapters = {name for name in tuned if name not in source}
    assert len(adapters) == 2 * (2 + 1 + 2)
    assert all(tuned[name].abs().max() > 0 for name in adapters)
    elements: dict[str, int] = {}
    for path in checkpoint.glob("weights-*"):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a mapping
                if key.startswith("frozen/"):
                    name = key.split("/")[1]
                    elements[name] = elements.get(name, 0) + file.get_slice(key).get_shape()[0]
    assert elements == {name: value.numel() for name, value in source.items() if name not in changed}


@pytest.mark.parametrize("kind", ["raw", "ema"])
@pytest.mark.parametrize("stage", STAGES[1:])
def test_in_bf16_nothing_of_the_weights_that_a_run_starts_from_is_rounded(runs, stage, kind):
    """Neither masters nor their average nor what is frozen, also after a resume; though the forward pass is in bf16."""
    source = load_weights(find_checkpoint(runs / "source"), "ema")
    assert any(not torch.equal(value, value.bfloat16().float()) for value in source.values())
    for checkpoint in whole_checkpoints(runs / f"bf16-stage{stage}" / "checkpoints"):
        tuned = load_weights(checkpoint, kind)
        assert [name for name, value in source.items() if not torch.equal(tuned[name], value)] == []


@torch.no_grad()
def test_evaluation_and_export_read_a_plain_model_with_the_adapters_merged(runs):
    adapted = load_weights(find_checkpoint(runs / "stage3"), "ema")
    model = load_trained(runs / "stage3").model
    name = "denoiser.blocks.0.attention.qkv"
    low_rank = 2.0 * adapted[f"{name}.lora_b"] @ adapted[f"{name}.lora_a"]  # alpha is 2 x rank
    merged = dict(model.named_parameters())[f"{name}.weight"]
    assert low_rank.abs().max() > 1e-4
    torch.testing.assert_close(merged, adapted[f"{name}.weight"] + low_rank)
    assert not [name for name in model.state_dict() if "lora" in name]
