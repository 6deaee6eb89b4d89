"""All ZeRO stages compute the same thing: what a plain PyTorch loop computes on the same global batches."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from ranks import run_in_processes

from vmd_scale.build import build_architecture, build_model, build_objective, masks_of
from vmd_scale.checkpoints import find_checkpoint, load_trained, load_weights
from vmd_scale.config_file import load_config
from vmd_scale.data.loader import evaluation_batches
from vmd_scale.data.order import SampleOrder
from vmd_scale.data.shards import ShardReader
from vmd_scale.errors import UserError
from vmd_scale.export.folder import export
from vmd_scale.tokenization import load_tokenizer
from vmd_scale.training.optim import learning_rate_at
from vmd_scale.training.zero import fragment_values

STEPS, WORLD = 5, 2
STAGES = (0, 1, 2, 3)


def settings(stage, precision="fp32"):
    """Accumulation 2 on two ranks; clipping and weight decay at work; no dropout, which would hide differences."""
    stage3 = {
        "param_persistence_threshold": 2000,  # larger parameters are sharded, smaller ones stay whole: both paths
        "max_live_parameters": 0,  # gathered whenever they are used, as in a model that fills the memory
        "max_reuse_distance": 0,
    }
    within_node = ("deepspeed.zero_optimization.zero_hpz_partition_size=2",)  # ZeRO++: a second copy of the weights
    return (
        *(f"deepspeed.zero_optimization.stage3_{key}={value}" for key, value in stage3.items() if stage == 3),
        *(within_node if (stage, precision) == (3, "bf16") else ()),
        f"training.steps={STEPS}",
        "training.micro_batch=2",
        "training.gradient_clip=0.2",
        "training.checkpoint_every=100",
        "model.dropout=0.0",
        "model.tie_embeddings=true",
        f"training.precision={precision}",
        f"deepspeed.zero_optimization.stage={stage}",
    )


def probe_inputs(config, vocab_size):
    """The training inputs of the first 4 rows as step 1000 would corrupt them: something to compute with a model."""
    reader = ShardReader(config.data.shards, "train")
    (batch,) = evaluation_batches(reader, np.arange(4), 4)
    return build_objective(config, vocab_size).prepare(
        batch.tokens, *masks_of(batch, reader.manifest), step=1000, positions=torch.arange(4), global_batch=4
    )


@torch.no_grad()
def probe(model, x):
    nll, posterior = model(x.clean, x.noisy, x.index, x.encoder_mask, x.epsilon, x.attend, x.ratio)
    return nll.numpy().copy(), posterior.mean.numpy().copy()


def fragments_of(trainer):
    """This rank's part of the fp32 masters: (name, first element) -> values."""
    partitions, fragments = trainer.master.partitions, trainer.master.fragments
    return {(f.name, f.start): fragment_values(f, partitions).detach().numpy().copy() for f in fragments}


def recording(update, trainer, history):
    """`ShardedEMA.update` that also keeps the masters which it averages."""

    def recorded():
        history.append(fragments_of(trainer))
        update()

    return recorded


def train_all_stages(config_path, folder, stages, precision):
    """On each rank: train, look at the averaged weights, evaluate and resume, stage after stage."""
    from vmd_scale.model import head
    from vmd_scale.training.launch import join_world, leave_world
    from vmd_scale.training.loop import Trainer

    head.CHUNK_ELEMENTS = 1000  # the head runs in pieces, as with a large vocabulary: collectives in stage 3
    world = join_world()
    results = {}
    for stage in stages:
        config = load_config(config_path, settings(stage, precision))
        tokenizer = load_tokenizer(config.data.tokenizer)
        run_folder = folder / f"stage{stage}"
        run_folder.mkdir(exist_ok=True)
        world.barrier()
        trainer = Trainer(config, run_folder, world, tokenizer)
        assert trainer.resume() == 0
        history = [fragments_of(trainer)]
        trainer.ema.update = recording(trainer.ema.update, trainer, history)
        assert trainer.train(0) == 0
        trainer.engine.eval()
        x = probe_inputs(config, tokenizer.vocab_size)
        masters = [p.detach().clone() for p in trainer.master.partitions]
        averages = [p.detach().clone() for p in trainer.ema.partitions]
        before = probe(trainer.engine, x)
        with trainer.ema.applied():
            inside = probe(trainer.engine, x)
        after = probe(trainer.engine, x)
        untouched = all(map(torch.equal, masters, trainer.master.partitions)) and all(
            map(torch.equal, averages, trainer.ema.partitions)
        )
        evaluations = Records()
        trainer._evaluate(STEPS, evaluations)
        again = Trainer(config, run_folder, world, tokenizer)
        resumed_at = again.resume()
        again.engine.eval()
        resumed_bits, resumed_updates, history = same_state(trainer, again), again.ema.updates, list(history)
        probed_again = probe(again.engine, x)
        for one in (trainer, again):
            one.engine.train()
            one._step(STEPS, next(one.loader.steps(STEPS, STEPS + 1)), evaluations)
        results[stage] = {
            "history": history,
            "before": before,
            "inside": inside,
            "after": after,
            "untouched": untouched,
            "fragments": [(f.name, f.start, f.size, f.shape) for f in trainer.master.fragments],
            "owned_elements": sum(p.numel() for p in trainer.master.partitions),
            "evaluations": evaluations.records,
            "resumed_at": resumed_at,
            "resumed_updates": resumed_updates,
            "resumed": probed_again,
            "resumed_bits": resumed_bits,
            "step_after_resume_bits": same_state(trainer, again),
        }
    leave_world()
    return results


def same_state(one, other) -> bool:
    """Masters, averages and the optimizer's state of two trainers, bit for bit."""
    moments, others = one.master.optimizer_state(), other.master.optimizer_state()
    assert moments.keys() == others.keys() == {"exp_avg", "exp_avg_sq"}
    pairs = [(one.master.partitions, other.master.partitions), (one.ema.partitions, other.ema.partitions)]
    pairs += [(moments[name], others[name]) for name in moments]
    same = all(torch.equal(a, b) for ours, theirs in pairs for a, b in zip(ours, theirs, strict=True))
    return same and one.master.optimizer_updates() == other.master.optimizer_updates() > 0


class Records:
    """Stands for `Telemetry` where only the results matter."""

    def __init__(self):
        self.records = []

    def evaluation(self, record):
        self.records.append(record)

    def latent(self, record):
        """What the latent carries is checked elsewhere."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("zero")


@pytest.fixture(scope="module")
def ranks(lab, folder):
    return run_in_processes(train_all_stages, WORLD, lab.config, folder, STAGES, "fp32", timeout=240)


@pytest.fixture(scope="module")
def bf16_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("bf16")


@pytest.fixture(scope="module")
def bf16_ranks(lab, bf16_folder):
    return run_in_processes(train_all_stages, WORLD, lab.config, bf16_folder, STAGES[1:], "bf16", timeout=240)


@pytest.fixture(scope="module")
def reference(lab):
    """Losses, weights and their average of a loop that knows neither ranks nor DeepSpeed."""
    torch.set_num_threads(1)
    config = load_config(lab.config, settings(0))
    training, vocab_size = config.training, load_tokenizer(config.data.tokenizer).vocab_size
    model, objective = build_model(config, vocab_size), build_objective(config, vocab_size)
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": training.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=training.betas)
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    reader = ShardReader(config.data.shards, "train")
    order = SampleOrder(reader.rows, training.seed)
    rows_of_step = np.arange(training.global_batch)
    losses, norms = [], []
    for step in range(STEPS):
        (batch,) = evaluation_batches(reader, order.row_numbers(step * training.global_batch + rows_of_step), 8)
        x = objective.prepare(
            batch.tokens, *masks_of(batch, reader.manifest), step, torch.from_numpy(rows_of_step), training.global_batch
        )
        loss = objective(model, x, config.diffusion.kl_weight.at(step))
        per_token = loss.total / x.maskable.sum()
        per_token.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), training.gradient_clip)))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, training)
        optimizer.step()
        optimizer.zero_grad()
        decay = min(training.ema_decay, (1 + step) / (10 + step))
        for name, p in model.named_parameters():
            average[name] = decay * average[name] + (1 - decay) * p.detach()
        losses.append(float(per_token.detach()))
    raw = {name: p.detach().clone() for name, p in model.named_parameters()}
    return {"config": config, "losses": losses, "norms": norms, "raw": raw, "ema": average}


def test_the_reference_clips_so_that_clipping_is_tested_too(reference):
    assert min(reference["norms"]) > reference["config"].training.gradient_clip


@pytest.mark.parametrize("stage", STAGES)
def test_losses_and_gradient_norms_are_those_of_a_plain_loop(ranks, reference, folder, stage):
    records = [json.loads(line) for line in (folder / f"stage{stage}" / "metrics.jsonl").read_text().splitlines()]
    np.testing.assert_allclose([r["loss"] for r in records], reference["losses"], rtol=1e-5)
    np.testing.assert_allclose([r["grad_norm"] for r in records], reference["norms"], rtol=1e-4)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", ["ema", "raw"])
def test_weights_put_together_from_all_ranks_are_those_of_a_plain_loop(ranks, reference, folder, stage, kind):
    newest = find_checkpoint(folder / f"stage{stage}")
    assert find_checkpoint(folder / f"stage{stage}" / "checkpoints" / "latest") == newest
    found = load_weights(newest, kind)
    assert found.keys() == reference[kind].keys()
    for name, wanted in reference[kind].items():
        torch.testing.assert_close(found[name], wanted, rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", ["ema", "raw"])
def test_an_export_of_any_stage_computes_what_the_weights_of_a_plain_loop_do(
    ranks, reference, folder, stage, kind, tmp_path, loaded_alone
):
    trained = load_trained(str(folder / f"stage{stage}"), kind)
    exported = loaded_alone(export(trained, tmp_path / "exported", encoder=True))
    trained.model.load_state_dict(reference[kind])
    x = probe_inputs(trained.config, trained.tokenizer.vocab_size)
    assert x.epsilon is not None
    with torch.no_grad():
        torch.testing.assert_close(
            exported.logits(x.noisy, x.epsilon), trained.model.logits(x.noisy, x.epsilon), rtol=0, atol=1e-4
        )


def test_weights_of_another_network_are_an_error_in_words(ranks, folder, monkeypatch):
    def build_wider(config, vocab_size):
        return replace(build_architecture(config, vocab_size), mlp_ratio=3.0)

    monkeypatch.setattr("vmd_scale.checkpoints.build_architecture", build_wider)
    with pytest.raises(UserError, match=r"step-00000005: its weights do not fit the network .* size mismatch for den"):
        load_trained(folder / "stage0")


@pytest.mark.parametrize("stage", STAGES)
def test_the_sharded_average_is_the_average_of_the_whole_weights(ranks, reference, folder, stage):
    """Of the very weights that the run had after each step: Adam blows up rounding where a gradient is almost zero."""
    average = {}
    for update in range(-1, STEPS):  # -1: the initial weights
        whole = {name: np.zeros(p.numel(), dtype=np.float32) for name, p in reference["raw"].items()}
        for rank in ranks:
            for (name, start), values in rank[stage]["history"][update + 1].items():
                whole[name][start : start + len(values)] = values
        decay = min(reference["config"].training.ema_decay, (1 + update) / (10 + update))
        average = {name: decay * average[name] + (1 - decay) * w if average else w for name, w in whole.items()}
    found = load_weights(find_checkpoint(folder / f"stage{stage}"), "ema")
    for name, wanted in average.items():
        np.testing.assert_allclose(found[name].flatten().numpy(), wanted, rtol=0, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("stage", STAGES)
def test_fragments_of_all_ranks_cover_each_parameter_exactly_once(ranks, reference, stage):
    """In stage 0, those of each rank do."""
    shapes = {name: tuple(p.shape) for name, p in reference["raw"].items()}
    covered = {name: np.zeros(int(np.prod(shape)), dtype=int) for name, shape in shapes.items()}
    for rank in ranks:
        for name, start, size, shape in rank[stage]["fragments"]:
            assert shape == shapes[name]
            covered[name][start : start + size] += 1
    times = len(ranks) if stage == 0 else 1
    assert all((count == times).all() for count in covered.values())


def test_from_stage_1_on_a_rank_keeps_half_of_the_masters(ranks):
    whole = ranks[0][0]["owned_elements"]
    for stage in (1, 2, 3):
        owned = [rank[stage]["owned_elements"] for rank in ranks]
        assert sum(owned) < 1.05 * whole  # padding
        assert max(owned) < 0.55 * whole


@pytest.mark.parametrize("stage", STAGES)
def test_inside_applied_the_model_computes_with_the_averaged_weights_and_outside_with_its_own(
    ranks, reference, folder, stage
):
    config = reference["config"]
    vocab_size = load_tokenizer(config.data.tokenizer).vocab_size
    x = probe_inputs(config, vocab_size)
    model = build_model(config, vocab_size).eval()
    wanted = {}
    for kind in ("ema", "raw"):
        model.load_state_dict(load_weights(find_checkpoint(folder / f"stage{stage}"), kind))
        wanted[kind] = probe(model, x)
    assert np.abs(wanted["ema"][0] - wanted["raw"][0]).max() > 1e-3  # or there would be nothing to tell apart
    for rank in ranks:
        for part in range(2):  # likelihoods, posterior means
            np.testing.assert_allclose(rank[stage]["before"][part], wanted["raw"][part], atol=2e-6)
            np.testing.assert_allclose(rank[stage]["inside"][part], wanted["ema"][part], atol=2e-6)
            np.testing.assert_array_equal(rank[stage]["after"][part], rank[stage]["before"][part])
        assert rank[stage]["untouched"]


@pytest.mark.parametrize("stage", STAGES)
def test_an_evaluation_in_training_is_one_of_the_saved_averaged_weights_and_the_same_on_every_rank(
    ranks, reference, folder, stage
):
    """9 rows on 2 ranks in micro-batches of 2: one rank has a batch more than the other."""
    from vmd_scale.evaluation.perplexity import Request, evaluate

    config = reference["config"]
    model = build_model(config, load_tokenizer(config.data.tokenizer).vocab_size).eval()
    model.load_state_dict(load_weights(find_checkpoint(folder / f"stage{stage}"), "ema"))
    request = Request(protocol="rows", split="validation", steps=(1.0, float("inf")), rows=9, micro_batch=9)
    wanted = evaluate(model, ShardReader(config.data.shards, "validation"), request, "ema", STEPS)
    assert [record["steps"] for record in ranks[0][stage]["evaluations"]] == [1, "inf"]
    assert ranks[0][stage]["evaluations"] == ranks[1][stage]["evaluations"]
    for record, result in zip(ranks[0][stage]["evaluations"], wanted, strict=True):
        assert record["nats_per_token"] == pytest.approx(result.nats_per_token, rel=1e-5)
        assert (record["tokens"], record["rows"]) == (result.tokens, 9)


@pytest.mark.parametrize("stage", STAGES)
def test_a_checkpoint_brings_back_masters_and_averages_bit_for_bit(ranks, stage):
    for rank in ranks:
        assert (rank[stage]["resumed_at"], rank[stage]["resumed_updates"]) == (STEPS, STEPS)
        assert rank[stage]["resumed_bits"]
        assert rank[stage]["step_after_resume_bits"]
        np.testing.assert_array_equal(rank[stage]["resumed"][0], rank[stage]["before"][0])


@pytest.mark.parametrize("stage", STAGES[1:])
def test_bf16_trains_on_fp32_masters_which_average_and_come_back_bit_for_bit(bf16_ranks, reference, bf16_folder, stage):
    """The losses are those of fp32 to the precision of bf16; nothing of the master weights is rounded."""
    run = bf16_folder / f"stage{stage}"
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    np.testing.assert_allclose([r["loss"] for r in records], reference["losses"], rtol=2e-2)
    for rank in bf16_ranks:
        assert rank[stage]["untouched"]
        assert rank[stage]["resumed_bits"]
        assert rank[stage]["step_after_resume_bits"]
        np.testing.assert_array_equal(rank[stage]["after"][0], rank[stage]["before"][0])
        assert np.abs(rank[stage]["inside"][0] - rank[stage]["before"][0]).max() > 1e-3
    masters = load_weights(find_checkpoint(run), "raw")
    assert masters.keys() == reference["raw"].keys()
    for name, wanted in reference["raw"].items():
        torch.testing.assert_close(masters[name], wanted, rtol=0, atol=2e-2, msg=name)
    assert any(not torch.equal(values.bfloat16().float(), values) for values in masters.values())
