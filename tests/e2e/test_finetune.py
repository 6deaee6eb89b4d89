"""finetune.py: labels in full, prompts by adapters on an exported folder, and a latent for a plain model."""

import json
import os
import random
import shutil
import subprocess
import sys
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file

from vmd_scale.checkpoints import find_checkpoint, load_trained, load_weights
from vmd_scale.config_file import parse_config
from vmd_scale.export.adapter import export_adapter
from vmd_scale.finetuning import finetuning_config

WORDS = ["mask", "model", "token", "noise", "row"]
LABELS = {"one": " yes", "two": " no"}
FAST = ("--set", "training.micro_batch=16", "--set", "training.global_batch=16", "--set", "telemetry.log_every=20")


def news(count, seed):
    choice = random.Random(seed).choice
    for _ in range(count):
        key = choice(list(LABELS))
        yield {"prompt": f" {choice(WORDS)} {key} {choice(WORDS)}", "label": LABELS[key]}


@pytest.fixture(scope="module")
def pretrained(lab, tmp_path_factory):
    """A plain model and its export."""
    folder = tmp_path_factory.mktemp("finetune")
    lab.pretrain(folder / "plain", "training.steps=4", "latent.width=0", "model.dropout=0", ranks=1)
    exported = lab.launch("export", "--checkpoint", folder / "plain", "--output", folder / "exported")
    assert exported.code == 0, exported.text
    return folder


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_labels_are_learned_and_their_accuracy_is_reported(lab, pretrained):
    train, test = (write(pretrained / f"{n}.jsonl", news(n, seed=n)) for n in (400, 60))
    run = pretrained / "labels"
    source = ("--corpus", "labels", "--source", f"train={train},validation={test},test={test}", "--output", run)
    steps = ("--set", "training.steps=120", "--set", "training.learning_rate=5e-3")
    finished = lab.launch("finetune", "--from", pretrained / "plain", *source, *FAST, *steps)
    assert finished.code == 0, finished.text
    results = json.loads((run / "classification.json").read_text())
    assert [r["split"] for r in results] == ["validation", "test"]
    assert results[1]["accuracy"] > 0.9
    assert results[1]["label_nll"] < 0.4
    assert f"{results[1]['accuracy']:.4f}" in finished.text
    exported = lab.launch("export", "--checkpoint", run, "--output", pretrained / "exported labels")
    assert exported.code == 0, exported.text
    card = (pretrained / "exported labels" / "README.md").read_text()
    assert f"| test | 60 | 2 | {results[1]['accuracy']:.4f} |" in card
    assert "Training started from the weights of `plain`." in card
    of_raw = lab.launch("export", "--checkpoint", run, "--output", pretrained / "raw labels", "--weights", "raw")
    assert of_raw.code == 0, of_raw.text
    assert "Nothing was evaluated" in (pretrained / "raw labels" / "README.md").read_text()


def test_labels_without_an_average_are_scored_by_the_weights_themselves(lab, pretrained):
    source = write(pretrained / "few.jsonl", news(60, seed=2))
    options = ("--corpus", "labels", "--source", source, "--output", pretrained / "raw", *FAST)
    more = ("--set", "training.ema_decay=0", "--set", "training.steps=2", "--set", "training.warmup_steps=1")
    finished = lab.launch("finetune", "--from", pretrained / "plain", *options, *more)
    assert finished.code == 0, finished.text
    assert [r["split"] for r in json.loads((pretrained / "raw" / "classification.json").read_text())]


def test_data_settings_are_those_of_the_weights(tmp_path):
    """Capitals must not be an error because text8, unlike other texts, comes cleaned up."""
    data = {"corpus": "text8", "tokenizer": "text8", "row_length": 32, "packing": "document", "shards": "old"}
    kept = {"documents_per_row": 3, "cache": "fast", "cache_gib": 7.0, "workers": 2}
    sizes = {"model": {"layers": 1, "width": 8, "heads": 1}, "training": {"global_batch": 1, "micro_batch": 1}}
    sizes["training"]["steps"] = 1

    def tuned(new_corpus, **changes):
        base = parse_config({"data": {**data, **kept, **changes}, **sizes}, "test")
        return finetuning_config("weights.pt", new_corpus, "pairs.jsonl", tmp_path, base=base).data

    for corpus in ("prompts", "text"):
        found = tuned(corpus)
        assert {key: getattr(found, key) for key in kept} == kept
        assert (found.normalizer, found.shards) == ("text8", str(tmp_path / "shards"))
    assert tuned("text8").normalizer is None  # published so
    lm1b = {"corpus": "lm1b", "tokenizer": "bert-base-uncased"}
    assert tuned("prompts", **lm1b).normalizer is None  # lm1b's own detokenization is nothing for others
    assert tuned("prompts", **lm1b, normalizer="ptb").normalizer == "ptb"


def test_responses_are_learned_by_adapters_on_an_exported_folder_and_drawn_from_a_prompt(lab, pretrained):
    pairs = [{"prompt": record["prompt"], "response": record["label"]} for record in news(200, seed=1)]
    run, source = pretrained / "chat", write(pretrained / "pairs.jsonl", pairs)
    options = ("--corpus", "prompts", "--source", source, "--output", run, "--lora", 4, *FAST)
    for steps in (2, 6):  # the second call goes on from the first
        finished = lab.launch(
            "finetune", "--from", pretrained / "exported", *options, "--set", f"training.steps={steps}"
        )
        assert finished.code == 0, finished.text
    assert "resumed from" in finished.text
    assert [record["step"] for record in lab.metrics(run)] == [2, 6]
    before, after = (load_weights(find_checkpoint(pretrained / name), "ema") for name in ("plain", "chat"))
    assert all((after[name] == value).all() for name, value in before.items())
    drawn = lab.launch(
        "sample", "--checkpoint", run, "--prompt", " mask one row", "--steps", 2, "--count", 2, "--json", run / "s.json"
    )
    assert drawn.code == 0, drawn.text
    (record,) = json.loads((run / "s.json").read_text())
    assert len(record["texts"]) == 2
    assert all(text.startswith(" mask one row") and len(text) == 32 for text in record["texts"])


ADAPTED = """
import sys


from peft import PeftModel
import torch
from transformers import AutoModel

base, adapter, merged = sys.argv[1:]
rows = torch.randint(28, (4, 32), generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    wanted = AutoModel.from_pretrained(merged, trust_remote_code=True)(rows).logits
    plain = AutoModel.from_pretrained(base, trust_remote_code=True)
    before = plain(rows).logits
    model = PeftModel.from_pretrained(plain, adapter)
    torch.testing.assert_close(model(rows).logits, wanted, rtol=0, atol=1e-5)
    assert (before - wanted).abs().max() > 1e-4
    assert model.generate(count=2, steps=2).shape == (2, 32)
    torch.testing.assert_close(model.merge_and_unload()(rows).logits, wanted, rtol=0, atol=1e-5)
"""


@pytest.fixture(scope="module")
def adapter(lab, pretrained):
    """Adapters of four steps, exported alone and merged."""
    source = write(
        pretrained / "adapted.jsonl", [{"prompt": n["prompt"], "response": n["label"]} for n in news(200, 3)]
    )
    run, steps = pretrained / "adapted", ("--set", "training.steps=4", "--set", "training.learning_rate=1e-2")
    start = ("--from", pretrained / "plain", "--corpus", "prompts", "--source", source)
    calls = [
        ("finetune", *start, "--output", run, "--lora", 4, *FAST, *steps),
        ("export", "--checkpoint", run, "--output", pretrained / "adapter", "--adapter", "--json", run / "files.json"),
        ("export", "--checkpoint", run, "--output", pretrained / "adapter", "--adapter"),  # again, in its place
        ("export", "--checkpoint", run, "--output", pretrained / "merged"),
    ]
    for call in calls:
        finished = lab.launch(*call)
        assert finished.code == 0, finished.text
    return pretrained / "adapter"


def test_adapters_are_exported_alone(pretrained, adapter):
    """What they add to the weights of the base is what merging adds."""
    description = json.loads((adapter / "adapter_config.json").read_text())
    assert (description["r"], description["lora_alpha"]) == (4, 8)
    tensors = load_file(adapter / "adapter_model.safetensors")
    base, merged = (load_file(pretrained / n / "model.safetensors") for n in ("exported", "merged"))
    names = description["target_modules"]
    assert {f"base_model.model.{name}.lora_{side}.weight" for name in names for side in "AB"} == set(tensors)
    for name in names:
        a, b = (tensors[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
        torch.testing.assert_close(base[f"{name}.weight"] + 2 * b @ a, merged[f"{name}.weight"])
    assert {name for name in base if not base[name].equal(merged[name])} == {f"{name}.weight" for name in names}
    files = json.loads((pretrained / "adapted" / "files.json").read_text())["files"]
    assert set(files) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}


def test_adapters_that_were_half_written_load_nowhere_and_are_written_again(pretrained, adapter, tmp_path, monkeypatch):
    """Their scale is in the description: beside that of an earlier export, new weights would be wrong."""
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    with monkeypatch.context() as broken:
        broken.setattr("vmd_scale.export.adapter.write_json", Mock(side_effect=OSError("no space")))
        with pytest.raises(OSError, match="no space"):
            export_adapter(pretrained / "adapted", folder)
    assert not (folder / "adapter_config.json").exists()
    export_adapter(pretrained / "adapted", folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        path.name: path.read_bytes() for path in adapter.iterdir()
    }
    assert "`plain`" in (folder / "README.md").read_text()  # what they were trained on


def test_peft_loads_them_on_top_of_an_exported_base(pretrained, adapter):
    pytest.importorskip("peft", reason="needs peft (pip install '.[peft]')")
    folders = [str(pretrained / name) for name in ("exported", "adapter", "merged")]
    home = {**os.environ, "HF_HOME": str(pretrained / "hf"), "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run([sys.executable, "-c", ADAPTED, *folders], env=home, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("run", "options", "message"),
    [
        ("plain", (), "has none (training.lora)"),
        ("adapted", ("--encoder", "--dtype", "bf16"), "--adapter has no use for --encoder, --dtype"),
        ("adapted", ("--output", "exported"), "exists and holds no exported adapters"),
    ],
)
def test_what_has_no_adapters_to_export(lab, pretrained, adapter, run, options, message):
    options = [pretrained / word if word == "exported" else word for word in options]
    call = ("--checkpoint", pretrained / run, "--output", pretrained / "nothing", "--adapter", *options)
    finished = lab.launch("export", *call)
    assert finished.code == 2, finished.text
    assert message in finished.errors[0]
    assert not (pretrained / "nothing").exists()


def test_a_plain_model_gets_a_latent_and_only_that_is_trained(lab, pretrained):
    run = pretrained / "vmd"
    finished = lab.launch(
        "finetune", "--from", pretrained / "plain", "--corpus", "text", "--source", lab.source, "--output", run,
        "--train-only", "latent", "--set", "latent.width=4", "--set", "training.steps=3", *FAST,
    )  # fmt: skip
    assert finished.code == 0, finished.text
    before, after = (load_weights(find_checkpoint(pretrained / name), "raw") for name in ("plain", "vmd"))
    plain = load_weights(find_checkpoint(pretrained / "plain"), "ema")
    assert set(before) < set(after)
    assert all((after[name] == value).all() for name, value in plain.items())
    assert after["denoiser.blocks.0.modulation.weight"].abs().max() > 0
    assert load_trained(run).model.architecture.latent_width == 4


def test_what_cannot_be_started_from_is_named(lab, pretrained):
    (pretrained / "weights.pt").write_bytes(b"")
    for weights, message in (
        ("nowhere", "--from nowhere: no such file or folder"),
        (pretrained / "weights.pt", "contains no description of its network; give one with --config FILE"),
    ):
        options = ("--corpus", "text", "--source", lab.source, "--output", pretrained / "none")
        finished = lab.launch("finetune", "--from", weights, *options)
        assert finished.code == 2
        assert message in finished.errors[0]
    assert not (pretrained / "none").exists()
