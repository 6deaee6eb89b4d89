"""A run folder stands alone: it keeps its tokenizer, and says what docs/metrics.md says that it says."""

import json
import math
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

from vmd_scale.build import build_model
from vmd_scale.checkpoints import load_trained
from vmd_scale.config_file import parse_config
from vmd_scale.data.manifest import read_manifest
from vmd_scale.data.shards import ShardReader
from vmd_scale.errors import UserError
from vmd_scale.finetuning import finetuning_config
from vmd_scale.initial_weights import fit
from vmd_scale.tokenization import KEPT, keep_tokenizer, load_tokenizer
from vmd_scale.training.validation import draw_samples

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "metrics.md").read_text()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """The files of a tokenizer that no name stands for."""
    folder = tmp_path_factory.mktemp("files")
    keep_tokenizer(load_tokenizer("text8"), folder)
    return folder / KEPT


@pytest.fixture(scope="module")
def run(lab, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    settings = ("training.steps=4", "evaluation.every=4", "evaluation.samples=2", f"data.tokenizer={tokenizer}")
    lab.pretrain(folder, *settings, ranks=1)
    return folder


@pytest.fixture
def moved(tokenizer, tmp_path):
    tokenizer.rename(tmp_path / "elsewhere")
    yield
    (tmp_path / "elsewhere").rename(tokenizer)


def records(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def documented(file):
    """Keys in the first column of the table below a file's heading."""
    section = PAGE.split(f"## {file}\n")[1].split("\n## ")[0]
    cells = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    return [key for cell in cells for key in re.findall(r"`([^`]+)`", cell)]


def test_a_run_needs_nothing_of_where_its_tokenizer_was(lab, run, moved, tmp_path):
    assert load_trained(run).tokenizer.fingerprint == load_tokenizer("text8").fingerprint
    drawn = lab.command(
        [sys.executable, str(ROOT / "launchers/sample.py"), "--checkpoint", str(run), "--steps", "2", "--count", "1"],
        cwd=tmp_path,
        PYTHONPATH=str(ROOT),
    )
    assert drawn.code == 0, drawn.text
    tuned = finetuning_config(str(run), "text", "new.txt", tmp_path / "tuned")
    assert load_tokenizer(tuned.data.tokenizer).fingerprint == load_tokenizer("text8").fingerprint
    assert tuned.evaluation.samples == 2  # else a run on prompts would show none


def test_a_run_resumes_with_a_tokenizer_that_was_moved(lab, run, moved, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    lab.pretrain(folder, "training.steps=5", f"data.tokenizer={folder / KEPT}", ranks=1)
    assert [record["step"] for record in lab.metrics(folder)] == [1, 2, 3, 4, 5]


def test_samples_do_not_depend_on_the_micro_batch_and_are_drawn_in_it(run, monkeypatch):
    trained, forwards = load_trained(run), []
    reader = ShardReader(trained.config.data.shards, "validation")
    forward = trained.model.denoiser.forward
    monkeypatch.setattr(
        trained.model.denoiser, "forward", lambda x, *a, **k: forwards.append(len(x)) or forward(x, *a, **k)
    )

    def drawn(micro_batch):
        training = trained.config.training.model_copy(update={"micro_batch": micro_batch})
        config = trained.config.model_copy(update={"training": training})
        found = draw_samples(trained.model, config, trained.tokenizer, reader, 4)["texts"]
        sizes = set(forwards)
        forwards.clear()
        return found, sizes

    (alone, of_one), (together, of_two) = drawn(1), drawn(8)
    assert alone == together
    assert (of_one, of_two) == ({1}, {2})


def test_a_dry_run_needs_no_files_of_a_known_tokenizer(lab, tmp_path):
    command = [sys.executable, str(ROOT / "launchers/pretrain.py"), "--dry-run"]
    command += ["--config", str(ROOT / "configs/lm1b.json"), "--set", "deepspeed.zero_optimization.stage=0"]
    done = lab.command(command, cwd=tmp_path, PYTHONPATH=str(ROOT), HF_HUB_OFFLINE="1")
    assert done.code == 0, done.text
    assert "memory per rank" in done.text


def test_a_run_of_before_keeps_no_tokenizer(run, tokenizer, tmp_path):
    (run / KEPT).rename(tmp_path / "kept")
    try:
        assert load_trained(run).tokenizer.vocab_size == 27
        tokenizer.rename(tmp_path / "elsewhere")
        with pytest.raises(UserError, match=rf"data\.tokenizer '{tokenizer}'"):
            load_trained(run)
        (tmp_path / "elsewhere").rename(tokenizer)
    finally:
        (tmp_path / "kept").rename(run / KEPT)


def test_another_tokenizer_in_the_folder_is_refused(run, tmp_path):
    (run / KEPT).rename(tmp_path / "kept")
    try:
        keep_tokenizer(load_tokenizer("sudoku"), run)
        with pytest.raises(UserError, match="not the same tokenizer"):
            load_trained(run)
        for file in (run / KEPT).iterdir():
            file.unlink()
        (run / KEPT).rmdir()
    finally:
        (tmp_path / "kept").rename(run / KEPT)


def test_a_prompt_of_which_nothing_is_left_is_no_prompt(lab, run):
    """Its samples would be unconditional, and be said to continue it."""
    wanted = ("--checkpoint", run, "--steps", 2, "--count", 1, "--prompt")
    lost = lab.launch("sample", *wanted, "你好")
    assert lost.code == 2
    assert lost.errors == [
        "error: --prompt '你好': data.normalizer 'text8', the clean-up of the training texts, leaves nothing"
    ]
    in_part = lab.launch("sample", *wanted, "Ask 你好!")
    assert in_part.code == 0, in_part.text
    assert "leaves of the prompt: ' ask'" in in_part.text
    assert "leaves" not in lab.launch("sample", *wanted, "ask the model").text


def test_first_weights_that_are_a_run_are_compared_without_reading_them(run, monkeypatch):
    monkeypatch.setattr("vmd_scale.checkpoints.sha256_of", None)
    values = json.loads((run / "config.json").read_text())
    with torch.device("meta"):
        same = build_model(parse_config(values, "same"), 27)
        deeper = build_model(parse_config(values, "deeper", ["model.layers=3"]), 27)
    assert {name: value.shape for name, value in fit(same, str(run)).filled.items()} == {
        name: value.shape for name, value in same.state_dict().items()
    }
    with pytest.raises(UserError, match=r"has no denoiser\.blocks\.2\."):
        fit(deeper, str(run))


def test_the_unigram_entropy_is_recorded(run, lab):
    """For the line in the picture of bounds."""
    entropy = read_manifest(lab.shards).splits["validation"].unigram_entropy
    facts = json.loads((run / "facts.json").read_text())
    assert facts["unigram_bits_per_token"] == pytest.approx(entropy / math.log(2))


@pytest.mark.parametrize("file", ["metrics.jsonl", "evaluations.jsonl", "latent.jsonl", "samples.jsonl"])
def test_what_is_written_is_documented_key_by_key(run, file):
    keys = documented(file)
    assert len(keys) == len(set(keys))
    written = {key for record in records(run / file) for key in record}
    assert written
    assert set(keys) - {"caveat"} == written - {"caveat"}


def test_events_are_documented():
    source = (ROOT / "vmd_scale" / "training" / "loop.py").read_text()
    assert set(documented("events.jsonl")) == set(re.findall(r'telemetry\.event\("([^"]+)"', source))
    for key in re.findall(r'telemetry\.event\("[^"]+", [^,)]+, (\w+)=', source):
        assert f"`{key}`" in PAGE.split("## events.jsonl")[1]
