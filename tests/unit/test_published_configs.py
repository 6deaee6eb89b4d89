"""Every configuration file loads, is what its name says, and can be planned on the machines that it is meant for."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vmd_scale.build import build_architecture
from vmd_scale.config_file import load_config
from vmd_scale.data.corpora import normalizer_name
from vmd_scale.data.loader import accumulation_steps
from vmd_scale.errors import UserError
from vmd_scale.evaluation.protocols import PROTOCOLS
from vmd_scale.model import VMD
from vmd_scale.planning.memory import memory_of
from vmd_scale.training.engine import check_deepspeed_keys, deepspeed_config

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
FILES = sorted(path for path in CONFIGS.rglob("*.json") if path.name != "small.json")  # which has no data
VOCABULARIES = {"gpt2": 50257, "bert-base-uncased": 30522, "text8": 27, "sudoku": 9}
LADDER = {"110m": (110e6, 8), "350m": (350e6, 8), "1b": (1e9, 16), "3b": (3e9, 64), "8b": (8e9, 64)}  # ranks of 80 GB


def architecture_of(config):
    name = config.data.tokenizer
    size = int(name.split(":")[1]) if name.startswith("symbols:") else VOCABULARIES[name]
    return build_architecture(config, size)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_it_loads_and_can_be_planned(path):
    config = load_config(path)
    fits_eight = config.training.global_batch % (8 * config.training.micro_batch) == 0
    ranks = LADDER.get(path.stem, (0, 8 if fits_eight else 1))[1]
    precision = "bf16" if config.zero_stage else "fp32"
    check_deepspeed_keys(config)
    deepspeed_config(config, ranks, precision)
    memory = memory_of(config, architecture_of(config), ranks, precision, on_gpu=True).total
    assert 0 < memory < 72e9, f"{memory / 1e9:.0f} GB a rank"


@pytest.mark.parametrize("name", LADDER)
def test_the_ladder_has_the_sizes_of_its_names(name):
    """Without token embeddings and head, as scaling laws count."""
    config = load_config(CONFIGS / "ladder" / f"{name}.json")
    wanted, ranks = LADDER[name]
    with torch.device("meta"):
        model = VMD(replace(architecture_of(config), attention="sdpa"))
    ours = sum(
        p.numel() for n, p in model.named_parameters() if not n.endswith(("embedding.weight", "denoiser.head.weight"))
    )
    assert ours == pytest.approx(wanted, rel=0.06)
    assert accumulation_steps(config.training.global_batch, config.training.micro_batch, ranks) >= 1
    stages = {"110m": 1, "350m": 1, "1b": 1, "3b": 1, "8b": 3}
    assert config.zero_stage == stages[name]


@pytest.mark.parametrize("data", ["text8", "lm1b", "openwebtext"])
def test_baselines_differ_from_each_other_in_the_method_alone(data):
    """MDLM, BD3-LM and the variational ones: data, training and engine are the same, so that numbers compare."""
    ours = load_config(CONFIGS / f"{data}.json")
    mdm, blocks = (load_config(CONFIGS / f"{data}_{name}.json") for name in ("mdm", "bd3"))
    for other in (mdm, blocks):
        assert (other.data, other.model, other.training) == (ours.data, ours.model, ours.training)
        assert (other.latent.width, other.diffusion.objective) == (0, "nelbo")
    assert (mdm.diffusion.block_size, mdm.diffusion.steps) == (None, ("inf",))
    assert blocks.diffusion.block_size in (4, 16)
    assert ours.diffusion.objective == "vmd"


@pytest.mark.parametrize(
    ("ranks", "way_out"), [(16, "training.micro_batch=32 fits"), (7, "take a number of ranks that")]
)
def test_a_batch_that_does_not_fit_the_ranks_names_a_way_out(ranks, way_out):
    config = load_config(CONFIGS / "lm1b.json")
    with pytest.raises(UserError, match=rf"training\.global_batch \(512\) .* = {64 * ranks}; {way_out}"):
        accumulation_steps(config.training.global_batch, config.training.micro_batch, ranks)


def test_runs_on_text_show_what_they_write():
    """At every evaluation, as many rows as a table of samples holds; of pixels there is nothing to read."""
    for name in ("text8", "lm1b_bd3", "openwebtext", "ladder/8b", "quickstart"):
        evaluation = load_config(CONFIGS / f"{name}.json").evaluation
        assert (evaluation.samples, evaluation.every is not None) == (4, True)
    assert load_config(CONFIGS / "cifar10.json").evaluation.samples == 0


@pytest.mark.parametrize(
    ("name", "protocol"),
    [
        ("text8", "text8"),
        ("lm1b", "lm1b_packed"),
        ("lm1b_unpacked", "lm1b_unpacked"),
        ("openwebtext", "owt_mdlm"),
    ],
)
@pytest.mark.parametrize("method", ["", "_mdm", "_vadd"])
def test_published_settings(name, protocol, method):
    """ "Small", as MDLM and those after it train it; and rows that the protocol of the published figure takes."""
    config = load_config(CONFIGS / f"{name}{method}.json")
    model, training, data = config.model, config.training, config.data
    assert (model.layers, model.width, model.heads, model.dropout) == (12, 768, 12, 0.1)
    assert architecture_of(config).condition_width == 128
    assert (training.learning_rate, training.betas, training.weight_decay) == (3e-4, (0.9, 0.999), 0.0)
    assert (training.lr_schedule, training.warmup_steps, training.gradient_clip) == ("constant", 2500, 1.0)
    assert (training.global_batch, training.steps, training.ema_decay) == (512, 1_000_000, 0.9999)
    assert training.precision == "auto"  # bf16 on GPUs, with the head's logits in fp32
    assert data.row_length == {"text8": 256, "openwebtext": 1024}.get(name, 128)
    if config.latent.width:
        weight = config.diffusion.kl_weight
        assert (config.latent.width, weight.start, weight.end, weight.warmup_steps) == (512, 0.0, 1.0, 100_000)
    found = {**data.model_dump(), "normalizer": normalizer_name(data), "vocab_size": VOCABULARIES[data.tokenizer]}
    wanted = PROTOCOLS[protocol].requires
    assert {key: found[key] for key in wanted} == wanted


def test_methods_on_sentences_differ_in_the_method_alone():
    ours, mdm, vadd = (load_config(CONFIGS / f"lm1b_unpacked{method}.json") for method in ("", "_mdm", "_vadd"))
    for other in (mdm, vadd):
        assert (other.data, other.model, other.training) == (ours.data, ours.model, ours.training)
    assert (mdm.latent.width, mdm.diffusion.objective, mdm.diffusion.steps) == (0, "nelbo", ("inf",))


def test_variational_baselines():
    for data in ("text8", "lm1b", "lm1b_unpacked", "openwebtext"):
        vadd = load_config(CONFIGS / f"{data}_vadd.json")  # one latent of 512 a row, an encoder like the denoiser
        assert (vadd.latent.width, vadd.latent.scope, vadd.diffusion.objective) == (512, "row", "vmd")
        assert (vadd.encoder_layers, vadd.encoder_width) == (vadd.model.layers, vadd.model.width)
    vmd = load_config(CONFIGS / "text8_vmd.json")
    assert (vmd.latent.scope, vmd.diffusion.block_size, vmd.diffusion.objective) == ("block", 4, "vmd")


def test_a_network_that_holds_mdlms_weights():
    model = load_config(CONFIGS / "openwebtext_mdlm_weights.json").model
    assert (model.biases, model.time_conditioning, model.norm, model.mlp) == (True, True, "layernorm", "gelu")
    assert (model.layers, model.width, model.heads) == (12, 768, 12)
