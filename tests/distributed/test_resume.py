"""A run that is killed, stopped or damaged ends as if nothing had happened; what cannot go on says why.

One uninterrupted run of two ranks is what all others are compared with.
"""

import json
import os
import re
import runpy
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import run_in_processes

from vmd_scale.checkpoints import find_checkpoint, load_weights, whole_checkpoints
from vmd_scale.config_file import load_config
from vmd_scale.data.prepare import prepare
from vmd_scale.files import sha256_of

LAST = 12
# Bounds at so many T that the evaluation after step 7 takes seconds: a signal sent when step 6 is seen finds the run
# before its end.
LINGER = ("evaluation.every=7", "evaluation.steps=" + ",".join(map(str, range(1, 200))))


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def whole(lab, runs) -> Path:
    """The uninterrupted run, by the launcher that DeepSpeed's users use."""
    deepspeed = Path(sys.executable).with_name("deepspeed")
    command = [str(deepspeed), "--num_gpus", "2", "--master_port", str(lab.free_port())]
    finished = lab.command([*command, *lab.pretrain_arguments(runs / "whole")])
    assert finished.code == 0, finished.text[-3000:]
    return runs / "whole"


@pytest.fixture(scope="module")
def killed(lab, runs, whole) -> dict:
    """SIGKILL to both ranks after step 6, then the same command again."""
    run = lab.start(runs / "killed", *LINGER)
    wait_for_step(lab, runs / "killed", 6)
    run.signal(signal.SIGKILL)
    codes = [rank.code for rank in run.wait()]
    records = lab.metrics(runs / "killed")
    lab.pretrain(runs / "killed")
    return {"folder": runs / "killed", "codes": codes, "records": records}


@pytest.fixture(scope="module")
def stopped(lab, runs, whole) -> dict:
    """SIGTERM to one rank of two after step 6, then the same command again."""
    run = lab.start(runs / "stopped", *LINGER)
    wait_for_step(lab, runs / "stopped", 6)
    run.processes[1].send_signal(signal.SIGTERM)
    finished = run.wait()
    records, checkpoint = lab.metrics(runs / "stopped"), find_checkpoint(runs / "stopped")
    status = json.loads((runs / "stopped" / "status.json").read_text())
    lab.pretrain(runs / "stopped")
    return {
        "folder": runs / "stopped",
        "finished": finished,
        "records": records,
        "checkpoint": checkpoint.name,
        "status": status,
    }


@pytest.fixture(scope="module")
def evaluated(lab, runs, whole) -> Path:
    """The same seed again, by torchrun, with evaluations and one checkpoint kept."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"]
    settings = ("evaluation.every=5", "training.keep_checkpoints=1")
    finished = lab.command([*command, str(lab.free_port()), *lab.pretrain_arguments(runs / "evaluated", *settings)])
    assert finished.code == 0, finished.text[-3000:]
    return runs / "evaluated"


@pytest.fixture(scope="module")
def one_rank(lab, runs) -> Path:
    """One process, started by plain python."""
    finished = lab.command([sys.executable, *lab.pretrain_arguments(runs / "one")])
    assert finished.code == 0, finished.text[-3000:]
    return runs / "one"


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


@pytest.fixture(scope="module")
def damaged(lab, runs, whole) -> dict:
    """A run whose newest checkpoint has a flipped bit and the one before lost its end, asked to stop at once."""
    folder = runs / "damaged"
    shutil.copytree(whole, folder)
    flip_a_bit(folder / "checkpoints" / "step-00000012" / "weights-00001-of-00002.safetensors")
    torn = folder / "checkpoints" / "step-00000008" / "optimizer-00000-of-00002.safetensors"
    torn.write_bytes(torn.read_bytes()[:-100])
    leftover = folder / "checkpoints" / ".staging-step-00000012"  # what a kill in the middle of a save leaves
    leftover.mkdir()
    (leftover / "weights-00000-of-00002.safetensors").write_bytes(b"half")
    (folder / "STOP").touch()
    finished = lab.pretrain(folder, "training.keep_checkpoints=1", expect=75)
    checkpoints = sorted(path.name for path in (folder / "checkpoints").iterdir())
    latest = (folder / "checkpoints" / "latest").read_text().strip()
    newest = load_weights(find_checkpoint(folder), "raw")
    assert not (folder / "STOP").exists()  # obeyed once
    status = json.loads((folder / "status.json").read_text())
    lab.pretrain(folder)
    return {
        "folder": folder,
        "text": finished[0].text,
        "checkpoints": checkpoints,
        "latest": latest,
        "newest": newest,
        "status": status,
    }


def die_in_save(arguments: list[str], place: str) -> None:
    """pretrain.py, killed while it saves step 8: in the middle of a file, before the folder gets its name, before
    `latest` points to it, or while step 4 is thrown away."""
    from vmd_scale.training import checkpoint

    os.environ["LOCAL_WORLD_SIZE"] = str(os.cpu_count())  # one thread, as all other runs
    begin = checkpoint.Checkpointer.begin

    def doomed(self, step, *arguments):
        if step == 8:
            self.finish()
            owner = {"rename": checkpoint.os, "rmtree": checkpoint.shutil}.get(place, checkpoint)
            half = {"save_file": half_of_a_file, "rmtree": half_of_a_folder}
            setattr(owner, place, half.get(place, lambda *_: os._exit(9)))
        return begin(self, step, *arguments)

    checkpoint.Checkpointer.begin = doomed
    sys.argv = arguments
    runpy.run_path(arguments[0], run_name="__main__")


def half_of_a_file(tensors, path, metadata):
    path.write_bytes(b"half of it")
    os._exit(9)


def half_of_a_folder(folder, ignore_errors=False):
    if folder.exists():
        (folder / "manifest.json").unlink()
        os._exit(9)


def wait_for_step(lab, folder: Path, step: int, timeout: float = 90) -> None:
    deadline = time.monotonic() + timeout
    path = folder / "metrics.jsonl"
    while not path.exists() or path.read_text().count("\n") < step:
        assert time.monotonic() < deadline, f"{path} has not come to step {step}"
        time.sleep(0.02)


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


UNIMPORTANT = ("log.txt", "latest", ".lock")


def files_of(folder: Path) -> dict[Path, tuple[int, int]]:
    """Sizes and times of change of a run's files, but for the log, the pointer and the lock."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in UNIMPORTANT)
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def assert_same_run(lab, folder: Path, other: Path) -> None:
    """Metrics of every step and final weights, bit for bit."""
    assert lab.metrics(folder) == lab.metrics(other)  # json keeps every bit of a float
    assert [record["step"] for record in lab.metrics(folder)] == list(range(1, LAST + 1))
    for kind in ("ema", "raw"):
        found, wanted = load_weights(find_checkpoint(folder), kind), load_weights(find_checkpoint(other), kind)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_the_run_learns_something_and_its_records_are_complete(lab, whole):
    records = lab.metrics(whole, timed=True)
    assert np.mean(lab.losses(whole)[-3:]) < np.mean(lab.losses(whole)[:3])
    wanted = {"step", "tokens", "loss", "reconstruction", "kl", "kl_weight", "lr", "grad_norm", "skipped_steps"}
    assert all(
        wanted | {"tokens_per_second", "mfu", "data_wait_fraction", "peak_memory_gib"} == record.keys()
        for record in records
    )
    assert all(0.05 < record["peak_memory_gib"] < 8 for record in records)
    assert [record["tokens"] for record in records] == [256 * (n + 1) for n in range(LAST)]
    assert json.loads((whole / "config.json").read_text())["training"]["steps"] == LAST


def test_a_deterministic_run_is_what_a_cpu_computes_anyway(lab, runs, whole):
    """And draws its samples, which on a GPU would take an operation that has no deterministic form."""
    settings = ("training.deterministic=true", "evaluation.every=12", "evaluation.samples=1", "evaluation.steps=2")
    lab.pretrain(runs / "deterministic", *settings)
    assert_same_run(lab, runs / "deterministic", whole)


def test_a_run_killed_without_warning_goes_on_bit_for_bit(lab, whole, killed):
    assert killed["codes"] == [-signal.SIGKILL] * 2
    assert 6 <= killed["records"][-1]["step"] < LAST  # on the way: what came after step 4 was lost
    assert_same_run(lab, killed["folder"], whole)


def test_sigterm_to_any_rank_writes_a_checkpoint_and_exits_with_75_on_all(lab, stopped):
    assert [rank.code for rank in stopped["finished"]] == [75, 75]
    last = stopped["records"][-1]["step"]
    assert 6 <= last < LAST
    assert stopped["checkpoint"] == f"step-{last:08d}"
    assert f"checkpoint of step {last} written" in stopped["finished"][0].text


def test_a_stopped_run_goes_on_bit_for_bit(lab, whole, stopped):
    assert_same_run(lab, stopped["folder"], whole)


def test_the_same_seed_gives_the_same_run_and_evaluations_change_nothing(lab, whole, evaluated):
    assert_same_run(lab, evaluated, whole)
    records = [json.loads(line) for line in (evaluated / "evaluations.jsonl").read_text().splitlines()]
    assert [(record["step"], record["steps"]) for record in records] == [(5, 1), (5, "inf"), (10, 1), (10, "inf")]
    assert {(record["rows"], record["weights"], record["bound"]) for record in records} == {(9, "ema", "elbo")}
    assert not (whole / "evaluations.jsonl").exists()


def test_another_seed_gives_another_run(lab, runs, whole):
    lab.pretrain(runs / "seed", "training.seed=1", "training.steps=2", ranks=1)
    assert abs(lab.losses(runs / "seed")[0] - lab.losses(whole)[0]) > 1e-4


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


def test_what_has_changed_is_said(elastic):
    said = [re.findall(r"resumed from .* at step (\d) \((.*)\)", text) for text in elastic["texts"]]
    assert said == [
        [],
        [("1", "world_size 2 -> 1, zero_stage 1 -> 3")],
        [("2", "world_size 1 -> 2, zero_stage 3 -> 2")],
        [("3", "zero_stage 2 -> 3")],
        [("4", "world_size 2 -> 1, zero_stage 3 -> 0")],
    ]


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


def test_latest_names_a_whole_checkpoint_and_old_ones_are_thrown_away(whole, evaluated):
    """`evaluated` keeps one, and the best: both its evaluations were better than what was before."""
    for folder, kept, others in ((whole, [4, 8, 12], {"latest"}), (evaluated, [10, 12], {"latest", "best"})):
        names = [path.name for path in whole_checkpoints(folder / "checkpoints")]
        assert names == [f"step-{step:08d}" for step in kept]
        assert (folder / "checkpoints" / "latest").read_text().strip() == names[-1]
        assert {path.name for path in (folder / "checkpoints").iterdir()} == {*names, *others}
    assert (evaluated / "checkpoints" / "best").read_text() == "step-00000010\n"


@pytest.mark.parametrize(
    ("place", "newest", "latest"), [("save_file", 4, 4), ("rename", 4, 4), ("write_atomically", 8, 4), ("rmtree", 8, 8)]
)
def test_a_death_in_the_middle_of_a_save_costs_at_most_that_save(lab, runs, one_rank, place, newest, latest):
    """One is kept: what was thrown away in half, or replaced, leaves nothing behind."""
    folder = runs / f"dies-in-{place}"
    arguments = lab.pretrain_arguments(folder, "training.keep_checkpoints=1")
    with pytest.raises(RuntimeError, match="died without a word"):
        run_in_processes(die_in_save, 1, arguments, place)
    assert (folder / "checkpoints" / "latest").read_text() == f"step-{latest:08d}\n"
    assert find_checkpoint(folder).name == f"step-{newest:08d}"
    finished = lab.pretrain(folder, "training.keep_checkpoints=1", ranks=1)
    assert f"step-{newest:08d} at step {newest}" in finished[0].text
    assert_same_run(lab, folder, one_rank)
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"step-00000012", "latest"}


def test_the_status_tells_a_stop_that_was_asked_for_from_a_signal(damaged, stopped, whole):
    """The first is not for a batch system to undo."""
    assert (damaged["status"]["state"], damaged["status"]["reason"]) == ("stopped", "STOP file")
    assert (stopped["status"]["state"], stopped["status"]["reason"]) == ("stopped", "signal")
    assert stopped["checkpoint"] == f"step-{stopped['status']['step']:08d}"
    assert json.loads((whole / "status.json").read_text())["state"] == "finished"


def test_damaged_checkpoints_are_named_and_passed_over(damaged):
    assert "step-00000012 is damaged (weights-00001-of-00002.safetensors was altered" in damaged["text"]
    assert "step-00000008 is damaged (optimizer-00000-of-00002.safetensors has" in damaged["text"]
    assert "step-00000004 at step 4" in damaged["text"]


def test_a_damaged_checkpoint_never_pushes_out_a_whole_one(damaged):
    """One is kept: the one just written, though the damaged ones have higher numbers. Half a save is cleared away."""
    kept = ["damaged-step-00000008", "damaged-step-00000012", "latest", "step-00000005"]
    assert (damaged["checkpoints"], damaged["latest"]) == (kept, "step-00000005")
    assert damaged["newest"]


def test_after_damage_the_run_is_made_again_bit_for_bit(lab, whole, damaged):
    assert_same_run(lab, damaged["folder"], whole)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["model.width=64"], "model.width is 64, but .*step-00000012 was trained with 32; choose another --output"),
        (["training.seed=3"], "training.seed is 3, but .*step-00000012 was trained with 0"),
    ],
    ids=["width", "seed"],
)
def test_what_cannot_be_resumed_is_refused_in_one_line(lab, runs, whole, settings, message):
    before = files_of(whole)
    (finished,) = lab.pretrain(whole, "training.steps=20", *settings, ranks=1, expect=2)
    (line,) = finished.errors
    assert re.search(message, line)
    assert "Traceback" not in finished.text
    assert files_of(whole) == before


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("rows", lambda text: text + "one row more\n" * 20),
        ("unigram_entropy", lambda text: text.replace("mask", "bask")),
        (None, lambda text: text),
    ],
    ids=["more", "others", "the same in smaller shards"],
)
def test_other_data_under_the_same_name_are_refused(lab, runs, whole, key, change):
    """Another number of rows is another permutation: rows would be repeated and left out."""
    source, shards = runs / f"{key}.txt", runs / f"shards-{key}"
    source.write_text(change(lab.source.read_text()))
    settings = [f"data.source={source}", f"data.shards={shards}", "data.shard_tokens=1000"]
    prepare(load_config(lab.config, settings).data, progress=False)
    assert len(list(shards.glob("train-*.tokens"))) > 1
    before = files_of(whole)
    (finished,) = lab.pretrain(whole, *settings, ranks=1, expect=0 if key is None else 2)
    if key is None:
        assert "nothing to do: 12 steps are done" in finished.text
    else:
        (line,) = finished.errors
        assert re.search(
            f"data.shards '{shards}': {key} of split 'train' is .*, but .*-00000012 was trained with", line
        )
        assert files_of(whole) == before


def test_a_checkpoint_that_does_not_know_its_data_is_resumed(lab, runs, whole):
    """One of a version that did not write that down."""
    folder = runs / "older"
    shutil.copytree(whole, folder)
    checkpoint = find_checkpoint(folder)
    state, manifest = (json.loads((checkpoint / name).read_text()) for name in ("run_state.json", "manifest.json"))
    for key in ("contents", "rollbacks"):
        state.pop(key, None)
    (checkpoint / "run_state.json").write_text(json.dumps(state))
    record = {
        "bytes": (checkpoint / "run_state.json").stat().st_size,
        "sha256": sha256_of(checkpoint / "run_state.json"),
    }
    (checkpoint / "manifest.json").write_text(
        json.dumps({**manifest, "files": {**manifest["files"], "run_state.json": record}})
    )
    lab.pretrain(folder, "training.steps=13")
    assert find_checkpoint(folder).name == "step-00000013"


def test_a_finished_run_has_nothing_to_do(lab, whole):
    before = (whole / "metrics.jsonl").read_bytes()
    finished = lab.pretrain(whole)
    assert "nothing to do: 12 steps are done" in finished[0].text
    assert (whole / "metrics.jsonl").read_bytes() == before


def test_when_every_checkpoint_is_damaged_the_run_does_not_silently_start_anew(lab, runs, whole):
    folder = runs / "all_damaged"
    shutil.copytree(whole, folder)
    for checkpoint in (folder / "checkpoints").glob("step-*"):
        flip_a_bit(checkpoint / "weights-00000-of-00002.safetensors")
    (folder / "checkpoints" / "step-00000012" / "manifest.json").unlink()
    metrics = (folder / "metrics.jsonl").read_bytes()
    for _ in range(2):  # as the jobs of a chain would
        finished = lab.pretrain(folder, "training.steps=20", expect=2)
        assert "all checkpoints in" in finished[0].errors[0]
        assert (folder / "metrics.jsonl").read_bytes() == metrics
        damaged = sorted(path.name for path in (folder / "checkpoints").glob("*step-*"))
        assert damaged == [f"damaged-step-{step:08d}" for step in (4, 8, 12)]
