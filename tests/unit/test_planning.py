"""Plans on paper against what PyTorch counts; the learning rate; where a rank finds its master."""

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vmd_scale.build import build_architecture, build_model, build_objective
from vmd_scale.config import parse_config
from vmd_scale.planning.legacy import denoiser_passes, masked_share, plan, training_flops_per_token
from vmd_scale.training.launch import first_host
from vmd_scale.training.optim import learning_rate_at

VOCABULARY = 600


def config_of(**changes):
    values = {
        "data": {"corpus": "text", "tokenizer": "text8", "row_length": 128, "shards": "s"},
        "model": {"layers": 2, "width": 128, "heads": 2, "attention": "reference"},
        "latent": {"width": 8},
        "diffusion": {"objective": "nelbo", "steps": ["inf"]},
        "training": {"steps": 100, "global_batch": 8, "micro_batch": 8, "learning_rate": 1.0, "warmup_steps": 10},
    }
    for section, keys in changes.items():
        values[section] = {**values.get(section, {}), **keys}
    return parse_config(values, "test")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"latent": {"width": 0}},
        {"diffusion": {"steps": [1, 4]}},
        {"model": {"layers": 4, "mlp": "swiglu"}},
        {"latent": {"prior": "conditional"}},
        {"diffusion": {"objective": "iw", "steps": [1, 4], "importance_samples": 3}},
    ],
    ids=["vmd", "mdm", "small T", "deeper", "conditional prior", "importance weighted"],
)
def test_flops_per_token_are_what_a_training_step_computes(changes):
    config = config_of(**changes)
    model, objective = build_model(config, VOCABULARY), build_objective(config, VOCABULARY)
    clean = torch.randint(0, VOCABULARY, (8, 128))
    x = objective.prepare(clean, torch.ones_like(clean, dtype=torch.bool), None, 0, torch.arange(8), 8)
    counter = FlopCounterMode(display=False)
    with counter:
        objective(model, x, 1.0).total.backward()
    share = len(x.index) / clean.numel()  # what was masked in this batch, instead of its mean
    passes = 1 if x.owner is None else 3 * len(x.owner) / 8
    expected = training_flops_per_token(build_architecture(config, VOCABULARY), share, passes) * clean.numel()
    assert denoiser_passes(config) == pytest.approx(passes, rel=0.2)
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.05)
    assert masked_share(config) == pytest.approx(share, abs=0.1)


def test_a_plan_counts_every_parameter_once():
    config = config_of()
    cost = plan(config, build_architecture(config, VOCABULARY), world_size=4, precision="bf16")
    assert cost.denoiser_parameters + cost.encoder_parameters == sum(
        p.numel() for p in build_model(config, VOCABULARY).parameters()
    )


def test_zero_divides_what_it_says():
    def parts(stage):
        config = config_of(deepspeed={"zero_optimization": {"stage": stage}})
        cost = plan(config, build_architecture(config, VOCABULARY), world_size=4, precision="bf16")
        return cost.weights_bytes, cost.gradients_bytes, cost.optimizer_bytes, cost.ema_bytes

    weights, gradients, optimizer, ema = parts(1)
    assert parts(2) == (weights, gradients / 4, optimizer, ema)
    assert parts(3) == (weights / 4, gradients / 4, optimizer, ema)


@pytest.mark.parametrize(("schedule", "last"), [("constant", 1.0), ("cosine", 0.1), ("linear", 0.1)])
def test_the_learning_rate_is_a_pure_function_of_the_step(schedule, last):
    training = config_of(training={"lr_schedule": schedule, "final_lr_ratio": 0.1}).training
    rates = [learning_rate_at(step, training) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[10] == pytest.approx(1.0)
    assert rates[100] == pytest.approx(last)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("node1", "node1"), ("gpu[007-010,12],x1", "gpu007"), ("a-b[3,5]", "a-b3"), ("n1,n2", "n1")],
)
def test_first_host_of_a_slurm_node_list(nodes, first):
    assert first_host(nodes) == first
