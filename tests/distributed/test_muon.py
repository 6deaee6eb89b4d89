"""Muon in DeepSpeed is the published one; with it, runs resume and average as with AdamW."""

import math

import numpy as np
import pytest
import torch
from ranks import run_in_processes

from vmd_scale.build import build_model, build_objective, masks_of
from vmd_scale.config_file import load_config
from vmd_scale.data.loader import evaluation_batches
from vmd_scale.data.order import SampleOrder
from vmd_scale.data.shards import ShardReader
from vmd_scale.errors import UserError
from vmd_scale.planning.memory import memory_of
from vmd_scale.tokenization import load_tokenizer
from vmd_scale.training.engine import deepspeed_config
from vmd_scale.training.fragments import held
from vmd_scale.training.optim import learning_rate_at
from vmd_scale.training.zero import fragment_values

STEPS = 6
KINDS = (("fp32", 0), ("bf16", 1))


def settings(precision, stage):
    """Accumulation 2 on two ranks; clipping and weight decay at work; no dropout, which would hide differences."""
    return (
        "training.optimizer=muon",
        f"training.steps={STEPS}",
        "training.micro_batch=2",
        "training.gradient_clip=0.2",
        "training.checkpoint_every=3",
        "training.keep_checkpoints=5",
        "model.dropout=0.0",
        f"training.precision={precision}",
        f"deepspeed.zero_optimization.stage={stage}",
    )


def trainer_of(config_path, run_folder, world, precision, stage):
    from vmd_scale.training.loop import Trainer

    config = load_config(config_path, settings(precision, stage))
    run_folder.mkdir(exist_ok=True)
    world.barrier()
    return Trainer(config, run_folder, world, load_tokenizer(config.data.tokenizer))


def everything_of(trainer):
    """This rank's elements of masters, average and optimizer state: (kind, name, first element) -> values."""
    master = trainer.master
    kinds = {"master": master.partitions, "ema": trainer.ema.partitions, **master.optimizer_state()}
    return {
        (kind, f.name, f.start): fragment_values(f, parts).detach().numpy().copy()
        for kind, parts in kinds.items()
        for f in held(master.fragments, parts)
    }


def train_and_resume(config_path, folder):
    """On each rank: a whole run, and the same from its checkpoint in the middle."""
    from vmd_scale.training.launch import join_world, leave_world

    world, found = join_world(), {}
    for precision, stage in KINDS:
        run_folder = folder / precision
        whole = trainer_of(config_path, run_folder, world, precision, stage)
        assert whole.resume() == 0
        assert whole.train(0) == 0
        again = trainer_of(config_path, run_folder, world, precision, stage)
        step = again._restore(run_folder / "checkpoints" / "step-00000003")
        assert again.train(step) == 0
        found[precision] = everything_of(whole), everything_of(again), step
    leave_world()
    return found


def load_alone(config_path, folder):
    """On one rank: the checkpoints of two, and a step from there."""
    from vmd_scale.training.launch import join_world, leave_world

    world, found = join_world(), {}
    for precision, stage in KINDS:
        trainer = trainer_of(config_path, folder / precision, world, precision, stage)
        assert trainer.resume() == STEPS
        loaded = everything_of(trainer)
        trainer.engine.train()
        sums = trainer._step(STEPS, next(trainer.loader.steps(STEPS, STEPS + 1)), None)
        found[precision] = loaded, bool(sums.isfinite().all())
    leave_world()
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("muon")


@pytest.fixture(scope="module")
def ranks(lab, folder):
    return run_in_processes(train_and_resume, 2, lab.config, folder, timeout=240)


def orthogonalized(update):
    """Five steps of Newton-Schulz with Keller Jordan's coefficients, and his scale for tall matrices."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = update / (update.norm() + 1e-7)
    x = x.T if len(update) > update.shape[1] else x
    for _ in range(5):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    x = x.T if len(update) > update.shape[1] else x
    return x * math.sqrt(max(1.0, len(update) / update.shape[1]))


@pytest.fixture(scope="module")
def reference(lab):
    """Losses and weights of a plain loop with Nesterov momentum, orthogonalized after clipping."""
    torch.set_num_threads(1)
    config = load_config(lab.config, settings("fp32", 0))
    training, vocab_size = config.training, load_tokenizer(config.data.tokenizer).vocab_size
    model, objective = build_model(config, vocab_size), build_objective(config, vocab_size)
    inside = {n: p for n, p in model.named_parameters() if ".blocks." in n and p.dim() == 2 and "modulation" not in n}
    rest = [p for n, p in model.named_parameters() if n not in inside]
    groups = [
        {"params": [p for p in rest if p.dim() >= 2], "weight_decay": training.weight_decay},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, betas=training.betas)
    momentum = {name: torch.zeros_like(p) for name, p in inside.items()}
    reader, rows, losses = ShardReader(config.data.shards, "train"), np.arange(training.global_batch), []
    order = SampleOrder(reader.rows, training.seed)
    for step in range(STEPS):
        (batch,) = evaluation_batches(reader, order.row_numbers(step * training.global_batch + rows), 8)
        masks = masks_of(batch, reader.manifest)
        x = objective.prepare(batch.tokens, *masks, step, torch.from_numpy(rows), training.global_batch)
        loss = objective(model, x, config.diffusion.kl_weight.at(step)).total / x.maskable.sum()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), training.gradient_clip)
        assert norm > training.gradient_clip
        rate = learning_rate_at(step, training)
        for group in adam.param_groups:
            group["lr"] = rate
        adam.step()
        with torch.no_grad():
            for name, p in inside.items():
                momentum[name] += (1 - training.muon_momentum) * (p.grad - momentum[name])
                update = p.grad + training.muon_momentum * (momentum[name] - p.grad)
                of_muon = rate / training.learning_rate * training.muon_learning_rate
                p *= 1 - of_muon * training.weight_decay
                p -= of_muon * orthogonalized(update)
        model.zero_grad()
        losses.append(loss.item())
    weights = {name: p.detach().numpy() for name, p in model.named_parameters()}
    return losses, weights, set(inside)


def test_it_is_the_published_optimizer(ranks, reference, folder, lab):
    losses, weights, _ = reference
    np.testing.assert_allclose(lab.losses(folder / "fp32")[:STEPS], losses, rtol=1e-4)
    assert losses[-1] < losses[0]
    for (kind, name, _), found in ranks[0]["fp32"][0].items():
        if kind == "master":
            np.testing.assert_allclose(found, weights[name].ravel(), rtol=0, atol=2e-4, err_msg=name)
    np.testing.assert_allclose(lab.losses(folder / "bf16")[:STEPS], losses, rtol=0.03)


def test_matrices_of_the_blocks_have_one_moment_and_all_else_two(ranks, reference):
    for precision, _ in KINDS:
        kinds = {}
        for rank in ranks:
            for kind, name, _ in rank[precision][0]:
                kinds.setdefault(name, set()).add(kind)
        for name, of_it in kinds.items():
            moments = {"momentum_buffer"} if name in reference[2] else {"exp_avg", "exp_avg_sq"}
            assert of_it == {"master", "ema"} | moments


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_run_is_the_undisturbed_one_bit_for_bit(ranks, precision):
    for rank in ranks:
        whole, again, step = rank[precision]
        assert step == 3
        assert whole.keys() == again.keys()
        for key, values in whole.items():
            assert np.array_equal(values, again[key]), key


def test_one_rank_goes_on_where_two_have_stopped(ranks, lab, folder):
    (alone,) = run_in_processes(load_alone, 1, lab.config, folder, timeout=120)
    for precision, _ in KINDS:
        loaded, finite = alone[precision]
        assert finite
        whole = {key[:2]: np.full(values.size, np.nan, np.float32) for key, values in loaded.items()}
        for rank in ranks:
            for (kind, name, start), values in rank[precision][1].items():
                whole[kind, name][start : start + values.size] = values
        for (kind, name, _), values in loaded.items():
            assert np.array_equal(values, whole[kind, name]), (kind, name)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (("bf16", 2), "stage 1, found 2"),
        (("bf16", 3), "stage 1, found 3"),
        (("fp32", 1), "stage 0, found 1"),
        (("fp32", 3), "stage 0, found 3"),
        (("bf16", 1, 'deepspeed.zero_optimization.offload_optimizer={"device": "cpu"}'), "offload_optimizer"),
        (("bf16", 1, "deepspeed.data_types.grad_accum_dtype=bf16"), "grad_accum_dtype"),
    ],
)
def test_what_deepspeed_does_otherwise_is_refused(lab, change, named):
    precision, stage, *more = change
    config = load_config(lab.config, (*settings(precision, stage), *more))
    with pytest.raises(UserError, match=named):
        deepspeed_config(config, 1, precision)


def test_low_rank_adapters_are_refused(lab):
    with pytest.raises(UserError, match="lora"):
        load_config(lab.config, (*settings("fp32", 0), "training.lora.rank=4", "training.init_from=somewhere"))


def test_the_plan_knows_that_there_is_one_moment_less(lab):
    from vmd_scale.build import build_architecture

    def optimizer_bytes(kind):
        config = load_config(lab.config, (*settings("bf16", 1), f"training.optimizer={kind}"))
        return memory_of(config, build_architecture(config, 27), 2, "bf16", False).optimizer

    config = load_config(lab.config, settings("bf16", 1))
    matrices = sum(p.numel() for p in build_model(config, 27).hidden_matrices)
    assert optimizer_bytes("adamw") - optimizer_bytes("muon") == 4 * matrices / 2
