"""Configuration: inheritance, overrides, round trip, and errors that name the key."""

import json
from pathlib import Path

import pytest

from vmd_scale.config import KLWeight
from vmd_scale.config_file import load_config, parse_config, parse_step_list
from vmd_scale.errors import UserError

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
MINIMAL = {
    "data": {"corpus": "text", "tokenizer": "text8", "row_length": 32, "shards": "s"},
    "training": {"steps": 10, "global_batch": 8, "micro_batch": 4},
}


def write(folder, name, values):
    path = folder / name
    path.write_text(json.dumps(values))
    return path


@pytest.mark.parametrize("path", [p for p in sorted(CONFIGS.glob("*.json")) if p.name != "small.json"], ids=str)
def test_every_published_config_is_valid_and_survives_a_round_trip(path):
    config = load_config(path)
    assert parse_config(json.loads(config.to_json()), "again") == config


def test_what_a_run_writes_down_does_not_depend_on_later_defaults():
    config = parse_config(MINIMAL, "a run")
    written = json.loads(config.resolved().to_json())["latent"]
    assert (written["encoder_layers"], written["encoder_width"]) == (config.encoder_layers, config.encoder_width)
    assert config.resolved().resolved() == config.resolved()


def test_a_section_that_is_null_may_be_set(tmp_path):
    """As in a run's config.json, which names every key."""
    written = json.loads(parse_config(MINIMAL, "test").to_json())
    assert written["training"]["lora"] is None
    lora = load_config(
        write(tmp_path, "c.json", written), ["training.init_from=w", "training.lora.rank=3"]
    ).training.lora
    assert lora.rank == 3


def test_a_config_inherits_key_by_key(tmp_path):
    write(tmp_path, "base.json", {**MINIMAL, "latent": {"width": 8, "injection": "add"}})
    (tmp_path / "sub").mkdir()
    child = write(tmp_path / "sub", "child.json", {"base": "../base.json", "latent": {"width": 4}})
    config = load_config(child)
    assert (config.latent.width, config.latent.injection, config.training.steps) == (4, "add", 10)


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("model.layers=2", "model", "layers", 2),
        ("diffusion.steps=1,4,inf", "diffusion", "steps", (1, 4, "inf")),
        ('diffusion.steps=[2,"inf"]', "diffusion", "steps", (2, "inf")),
        ("diffusion.steps=8", "diffusion", "steps", (8,)),
        ("diffusion.steps=inf", "diffusion", "steps", ("inf",)),
        ("training.learning_rate=1e-3", "training", "learning_rate", 1e-3),
        ("data.source=data/x.txt", "data", "source", "data/x.txt"),
        ('data.source={"train": "a", "test": "b"}', "data", "source", {"train": "a", "test": "b"}),
        ("data.source=0.3", "data", "source", "0.3"),
        ("evaluation.protocols=rows,text8", "evaluation", "protocols", ("rows", "text8")),
        ("deepspeed.zero_optimization.stage=3", "deepspeed", "zero_optimization", {"stage": 3}),
    ],
)
def test_overrides(tmp_path, override, section, key, value):
    found = getattr(load_config(write(tmp_path, "c.json", MINIMAL), [override]), section)
    assert (found[key] if isinstance(found, dict) else getattr(found, key)) == value


@pytest.mark.parametrize(
    "overrides", [[], ["deepspeed.steps_per_print=10"], ["deepspeed.zero_optimization.reduce_bucket_size=1000"]]
)
def test_zero_has_stage_1_where_nothing_else_is_said(tmp_path, overrides):
    assert load_config(write(tmp_path, "c.json", MINIMAL), overrides).zero_stage == 1
    assert load_config(write(tmp_path, "d.json", MINIMAL | {"deepspeed": {}}), overrides).zero_stage == 1


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"lora": {"rank": 2}, "init_from": "x"}, [r"training\.fp8", r"training\.lora"]),
        ({"micro_batch": 1}, [r"training\.micro_batch \(1\)", r"data\.row_length \(24\)", "16"]),
    ],
)
def test_fp8_contradicts_adapters_and_numbers_of_positions_that_it_cannot_multiply(overrides, words):
    values = {**MINIMAL, "data": {**MINIMAL["data"], "row_length": 24}}
    with_fp8 = {**MINIMAL["training"], "fp8": True}
    parse_config({**values, "training": with_fp8}, "good")
    with pytest.raises(UserError, match=".*".join(words)):
        parse_config({**values, "training": {**with_fp8, **overrides}}, "bad")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.micro_batsh=4", ["training.micro_batsh", "training.micro_batch"]),
        ("training.layers=4", ["training.layers", "model.layers"]),
        ("latnet.width=4", ["latnet", "latent"]),
        ("model.layers=two", ["model.layers", "a whole number", "'two'"]),
        ("model.layers=2.5", ["model.layers", "2.5"]),
        ("model.layers=true", ["model.layers", "True"]),
        ("model.mlp=relu", ["model.mlp", "gelu", "swiglu", "relu"]),
        ("model.norm=7", ["model.norm", "layernorm", "rmsnorm", "found 7"]),
        ("training.trainable=7", ["training.trainable: input should be a list, found 7"]),
        ("diffusion.steps=0", ["diffusion.steps", "1", "0"]),
        ("diffusion.steps=²", ["diffusion.steps", "inf", "²"]),
        ("diffusion.steps=1,often", ["diffusion.steps", "inf", "often"]),
        ("training.global_batch=6", ["training.global_batch (6)", "training.micro_batch (4)"]),
        ("model.heads=5", ["model.heads (5)", "model.width (768)"]),
        ("latent.encoder_width=100", ["latent.encoder_width (100)", "64"]),
        ("diffusion.objective=vmd", ["diffusion.objective", "latent.width"]),
        ("diffusion.block_size=5", ["diffusion.block_size (5)", "data.row_length (32)"]),
        ("training.steps", ["KEY=VALUE"]),
        ("training.steps.more=1", ["training.steps.more"]),
        ("training.lora.rnk=2", ["training.lora.rnk", "did you mean 'training.lora.rank'"]),
        ("training.lora.rank=0", ["training.lora.rank: ", "found 0"]),
    ],
)
def test_errors_name_the_key_and_what_is_allowed(tmp_path, override, words):
    with pytest.raises(UserError) as raised:
        load_config(write(tmp_path, "c.json", MINIMAL), [override])
    assert "\n" not in str(raised.value)
    for word in words:
        assert word in str(raised.value)


def test_the_kl_weight_rises_linearly_and_stays():
    weight = KLWeight(start=0.0, end=0.5, warmup_steps=10)
    assert [weight.at(step) for step in (0, 5, 10, 1000)] == [0.0, 0.25, 0.5, 0.5]
    assert KLWeight().at(0) == 1.0


@pytest.mark.parametrize("text", ["", "0", "-1", "1,,4", "4.5", "infinity", "²"])
def test_step_lists_of_the_command_line(text):
    with pytest.raises(UserError, match="--steps"):
        parse_step_list(text, "--steps")


def test_what_is_published_names_no_place_on_this_machine_and_is_a_configuration():
    private = {"source": "/home/me/a", "shards": "/home/me/b"}
    data = {**MINIMAL["data"], **private, "tokenizer": "/home/me/tok", "cache": "/home/me/c"}
    other = {"corpus": "text", "source": {"train": "/home/me/d"}, "shards": "/home/me/e"}
    hub = {"corpus": "text", "source": "hf:some/name@v1.0:raw", "shards": "s3://home/me/f"}
    training = {**MINIMAL["training"], "init_from": "/home/me/g", "trainable": ["*"]}
    config = parse_config({"data": {**data, "mixture": [other, hub]}, "training": training}, "private")
    published = config.publishable()
    assert "home/me" not in json.dumps(published)
    assert published["data"]["mixture"][1]["source"] == "hf:some/name@v1.0:raw"
    assert published["training"]["trainable"] == ["*"]
    for given, shown in (("of/hub-7b.1", "of/hub-7b.1"), ("gpt2:/home/me", "gpt2"), ("runs/mine.model", "mine.model")):
        other = parse_config({"data": {**data, "tokenizer": given}, "training": MINIMAL["training"]}, "private")
        assert other.publishable()["data"]["tokenizer"] == shown
    published["training"]["trainable"] = []
    assert parse_config(published, "published").data.tokenizer == "tok"
