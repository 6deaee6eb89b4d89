"""An exported folder computes what the trained model computes, where this project does not exist."""

import importlib.metadata
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from packaging.requirements import Requirement
from safetensors.torch import load_file

from vmd_scale.checkpoints import load_trained
from vmd_scale.diffusion.likelihood import Rows, elbo, importance_weighted
from vmd_scale.diffusion.noise import Noise, Stream
from vmd_scale.diffusion.sampler import Sampler, sample
from vmd_scale.errors import UserError
from vmd_scale.export import standalone, standalone_noise
from vmd_scale.export.folder import export
from vmd_scale.export.hub import push

KINDS = {
    "vmd": [],
    "mdm": ["latent.width=0"],
    "iw": [
        "latent.prior=conditional",
        "diffusion.objective=iw",
        "diffusion.importance_samples=2",
        "diffusion.steps=1,2",
    ],
    "block": ["latent.scope=block", "latent.injection=add", "diffusion.block_size=8"],
}

# Runs by `python -I -S`, which sees no package but those in sys.argv[4]: torch and safetensors, and what they need.
STRANGER = """
import sys

folder, inputs, outputs, packages = sys.argv[1:]
sys.path[:0] = [folder, packages]
import torch
from modeling_vmd import bound, generate, load, negative_elbo

torch.set_num_threads(1)
model, x = load(folder), torch.load(inputs)
with torch.no_grad():
    logits = model.logits(x["noisy"], x["z"])
result = {"logits": logits}
result["bounds"] = torch.stack([bound(model, x["clean"], **options) for options in x["bounds"]])
result["drawn"] = generate(model, count=3, steps=4, seed=5)
result["continued"] = generate(model, x["clean"][:2, :8], steps=4, paths="margin")

def mean_loss():  # nats per token, of 20 draws that are the same before and after
    torch.manual_seed(1)
    with torch.no_grad():
        return sum(negative_elbo(model, x["clean"]).mean().item() for _ in range(20)) / 20 / x["clean"].shape[1]

result["before"] = mean_loss()
torch.manual_seed(0)
model.train()
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
for step in range(30):
    negative_elbo(model, x["clean"]).mean().div(x["clean"].shape[1]).backward()
    optimizer.step()
    optimizer.zero_grad()
model.eval()
result["after"] = mean_loss()
prompt = torch.zeros_like(x["clean"], dtype=torch.bool)
prompt[:, 16:] = True
with torch.no_grad():
    result["part"] = negative_elbo(model, x["clean"], prompt)
assert not [name for name in sys.modules if name.split(".")[0] in ("vmd_scale", "deepspeed", "numpy", "tokenizers")]
torch.save(result, outputs)
"""

BOUNDS = [{}, {"steps": 4.0}, {"steps": 2.0, "samples": 3}, {"steps": 4.0, "paths": "top_prob"}]

AUTOMATIC = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("vmd_scale", "launchers"):
            raise ModuleNotFoundError(f"{name} is not installed here", name=name)

sys.meta_path.insert(0, Absent())
folder, inputs, outputs, _ = sys.argv[1:]
import torch
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer

model, x = AutoModel.from_pretrained(folder, trust_remote_code=True).eval(), torch.load(inputs)
with torch.no_grad():
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    prompt = tokenizer("one [MASK]wo", return_tensors="pt")
    assert prompt["input_ids"][0, 4] == model.config.mask_token_id
    result = {
        "continued": model.generate(**prompt, steps=4),
        "logits": model(x["noisy"], latents=x["z"]).logits,
        "bounds": torch.stack([model.bound(x["clean"], **options) for options in x["bounds"]]),
        "drawn": model.generate(count=3, steps=4, seed=5),
    }
half = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16)
assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
labels = x["clean"].clone()
labels[:, :16] = -100
loss = model(x["clean"], labels=labels).loss
loss.backward()
result["loss"] = loss.detach()
result["text"] = tokenizer.decode(x["clean"][0])
result["continued text"] = tokenizer.decode(result["continued"][0])
model.save_pretrained(folder + "-saved")
again = AutoModel.from_pretrained(folder + "-saved", trust_remote_code=True)
assert torch.equal(again.generate(count=3, steps=4, seed=5), result["drawn"])
assert not [name for name in sys.modules if name.startswith("vmd_scale")]
torch.save(result, outputs)
"""


@pytest.fixture(scope="module", params=KINDS)
def exported(request, lab, tmp_path_factory):
    """Train 4 steps, export by the launcher, use the folder as a stranger would."""
    folder = tmp_path_factory.mktemp(request.param)
    lab.pretrain(folder / "run", "training.steps=4", *KINDS[request.param], ranks=1)
    small_shards = ("--encoder", "--max-shard-size", "50KB")
    finished = lab.launch("export", "--checkpoint", folder / "run", "--output", folder / "out", *small_shards)
    assert finished.code == 0, finished.text
    trained = load_trained(folder / "run")
    a = trained.model.architecture
    generator = torch.Generator().manual_seed(0)
    clean = torch.randint(a.vocab_size, (16, a.row_length), generator=generator)
    clean[:, 1::2] = clean[:, :1]  # something to learn
    noisy = clean.masked_fill(torch.rand(clean.shape, generator=generator) < 0.5, a.mask_id)
    z = torch.randn(len(clean), a.groups, a.latent_width, generator=generator) if a.latent_width else None
    torch.save({"clean": clean, "noisy": noisy, "z": z, "bounds": BOUNDS}, folder / "inputs.pt")
    used = run_apart(STRANGER, folder, "-S", packages=torch_and_safetensors(folder / "packages"))
    return {"folder": folder, "trained": trained, "clean": clean, "noisy": noisy, "z": z, **used}


def torch_and_safetensors(folder):
    """A folder that holds these packages and what they require, as links."""
    folder.mkdir()
    wanted, seen = ["torch", "safetensors"], set()
    while wanted:
        name = wanted.pop()
        if name in seen:
            continue
        seen.add(name)
        try:
            package = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:  # for another system
            continue
        needs = [Requirement(line) for line in package.requires or []]
        wanted += [need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
        for top in {file.parts[0] for file in package.files or [] if file.parts[0] != ".."}:
            if not (folder / top).exists():
                (folder / top).symlink_to(package.locate_file(top))
    assert not (folder / "numpy").exists()
    return folder


def run_apart(code, folder, *options, packages=""):
    """What a script that knows the exported folder alone has made of the inputs."""
    paths = [str(folder / name) for name in ("out", "inputs.pt", "outputs.pt")] + [str(packages)]
    home = {**os.environ, "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
    finished = subprocess.run(
        [sys.executable, "-I", *options, "-c", code, *paths],
        cwd=folder,
        env=home,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert finished.returncode == 0, finished.stderr
    return torch.load(folder / "outputs.pt")


def bounds_here(exported):
    """By this project's own code."""
    trained, clean = exported["trained"], exported["clean"]
    rows, noise = Rows(clean, torch.ones_like(clean, dtype=torch.bool), None, torch.arange(len(clean))), Noise(0)
    model, results = trained.model, []
    for wanted in BOUNDS:
        sampler = Sampler(wanted.get("steps", math.inf), law=wanted.get("paths", "balanced"))
        whole_paths = wanted.get("samples", 1) > 1 or sampler.by_confidence
        results.append(
            importance_weighted(model, rows, sampler, noise, wanted.get("samples", 1))
            if whole_paths
            else elbo(model, rows, sampler, noise, len(clean))
        )
    return torch.stack(results)


def test_logits_are_those_of_the_trained_model(exported):
    with torch.no_grad():
        wanted = exported["trained"].model.logits(exported["noisy"], exported["z"])
    assert wanted.std() > 0.01
    torch.testing.assert_close(exported["logits"], wanted, rtol=0, atol=1e-6)


def test_bounds_are_those_of_the_trained_model(exported):
    """With the same noise, not only within the standard error."""
    wanted = bounds_here(exported)
    assert wanted.min() > 32
    torch.testing.assert_close(exported["bounds"], wanted, rtol=0, atol=1e-3)


def test_samples_are_those_of_the_trained_model(exported):
    wanted = sample(exported["trained"].model, Sampler(4), Noise(5), torch.arange(3))
    assert torch.equal(exported["drawn"], wanted)
    assert len(wanted.unique()) > 5
    assert torch.equal(exported["continued"][:, :8], exported["clean"][:2, :8])
    assert exported["continued"].shape == (2, 32)
    assert exported["continued"].max() < exported["trained"].model.architecture.mask_id


@pytest.mark.parametrize("exported", ["vmd", "block"], indirect=True)
def test_automodel_gives_the_same_logits_bounds_and_samples(exported):
    pytest.importorskip("transformers", reason="AutoModel is transformers' (pip install '.[transformers]')")
    found = run_apart(AUTOMATIC, exported["folder"])
    torch.testing.assert_close(found["logits"], exported["logits"], rtol=0, atol=1e-5)
    torch.testing.assert_close(found["bounds"], exported["bounds"], rtol=0, atol=1e-3)
    assert torch.equal(found["drawn"], exported["drawn"])
    assert 0 < found["loss"] < 10
    assert found["text"] == exported["trained"].tokenizer.decode(exported["clean"][0])
    assert re.fullmatch("one [a-z ]wo[a-z ]{25}", found["continued text"])


def test_it_trains_in_a_plain_pytorch_loop(exported):
    assert 2 < exported["before"] < 10  # ln 27 = 3.3, and some KL
    assert 0 < exported["after"] < 0.95 * exported["before"]


def test_a_prompt_is_not_counted(exported):
    """The bound of half a row: less than that of a whole one by an untrained model, and more than nothing."""
    assert exported["part"].shape == (16,)
    assert 0 < exported["part"].mean() < 32 * exported["after"]


def test_the_folder_says_where_it_comes_from(exported):
    folder: Path = exported["folder"] / "out"
    config = json.loads((folder / "config.json").read_text())
    assert (config["vmd_scale"]["step"], config["vmd_scale"]["weights"]) == (4, "ema")
    assert config["vmd_scale"]["tokenizer_fingerprint"] == exported["trained"].tokenizer.fingerprint
    names = {path.name for path in folder.iterdir()}
    assert {"README.md", "model.safetensors.index.json", "modeling_vmd.py", "transformers_vmd.py"} <= names
    assert len(list(folder.glob("model-*.safetensors"))) > 1


@pytest.mark.parametrize("exported", ["vmd"], indirect=True)
def test_the_model_card_shows_what_was_measured_of_these_weights_and_nothing_else(exported, lab):
    folder, results = exported["folder"], exported["folder"] / "results.json"
    run = ["--checkpoint", folder / "run"]
    assert lab.launch("evaluate", *run, "--steps", "4,inf", "--rows", 8, "--json", results).code == 0
    again = lab.launch("export", *run, "--output", folder / "out", "--evaluation", results)
    assert again.code == 0, again.text
    card = (folder / "out" / "README.md").read_text()
    for result in json.loads(results.read_text()):
        assert f"{result['bits_per_token']:.4f}" in card
    of_raw = lab.launch("export", *run, "--output", folder / "out", "--evaluation", results, "--weights", "raw")
    assert of_raw.code == 2
    assert "results of step 4, ema weights" in of_raw.errors[0]
    assert (folder / "out" / "README.md").read_text() == card


@pytest.mark.parametrize("exported", ["vmd"], indirect=True)
def test_what_the_model_card_shows_runs(exported, lab):
    pytest.importorskip("transformers", reason="AutoModel is transformers' (pip install '.[transformers]')")
    folder = exported["folder"] / "out"
    blocks = re.findall(r"^```python\n(.*?)^```$", (folder / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    assert "the first [MASK] of the" in blocks[0]
    for block in blocks:
        environment = {"HF_HOME": str(exported["folder"] / "hf"), "HF_HUB_OFFLINE": "1"}
        code = block.replace("THIS FOLDER", str(folder))
        done = lab.command([sys.executable, "-c", code], cwd=folder, **environment)
        assert done.code == 0, done.text


@pytest.mark.parametrize("exported", ["vmd"], indirect=True)
@torch.no_grad()
def test_raw_weights_are_those_that_were_trained_last(exported, lab, loaded_alone):
    """`--weights raw`: not the average, and the same logits."""
    folder, trained = exported["folder"], load_trained(exported["folder"] / "run", "raw")
    finished = lab.launch(
        "export", "--checkpoint", folder / "run", "--output", folder / "raw", "--encoder", "--weights", "raw"
    )
    assert finished.code == 0, finished.text
    kept = load_file(folder / "raw" / "model.safetensors")
    assert all(torch.equal(kept[name], value) for name, value in trained.model.state_dict().items())
    assert json.loads((folder / "raw" / "config.json").read_text())["vmd_scale"]["weights"] == "raw"
    model = loaded_alone(folder / "raw")
    wanted = trained.model.logits(exported["noisy"], exported["z"])
    torch.testing.assert_close(model.logits(exported["noisy"], exported["z"]), wanted, rtol=0, atol=1e-6)
    assert (wanted - exported["logits"]).abs().max() > 1e-4  # of the average


def test_without_the_encoder_it_samples_and_says_why_it_has_no_bounds(exported, loaded_alone):
    """bf16 and no encoder: the smallest folder. The prior of a conditional latent stays, sampling needs it."""
    trained, folder = exported["trained"], exported["folder"]
    export(trained, folder / "small", dtype="bf16")
    kept = load_file(folder / "small" / "model.safetensors")
    assert {value.dtype for value in kept.values()} == {torch.bfloat16}
    assert set(kept) == {name for name in trained.model.state_dict() if not name.startswith("encoder.")}
    model = loaded_alone(folder / "small", dtype=torch.float32)
    modeling_vmd = sys.modules["modeling_vmd"]
    assert modeling_vmd.generate(model, count=2, steps=2).shape == (2, 32)
    card = (folder / "small" / "README.md").read_text()
    if trained.config.latent.width:
        with pytest.raises(ValueError, match="without the encoder"):
            modeling_vmd.bound(model, exported["clean"])
        assert "has no bounds" in card
        assert "bound(" not in card
    else:
        assert modeling_vmd.bound(model, exported["clean"]).shape == (16,)
        assert "nats = bound(" in card


def test_the_noise_of_an_exported_folder_is_the_trainings(monkeypatch):
    """Bit for bit, also for seeds and steps beyond 32 bits, and for odd numbers of elements."""
    rows = torch.tensor([0, 3, 2**31])
    for seed in (0, 7, 2**40 + 1, 2**63 - 1):
        ours, theirs = Noise(seed), standalone_noise.Noise(seed)
        for stream, step, shape in ((Stream.TIME, 0, (1,)), (Stream.LATENT, 2**33 + 5, (3, 5)), (Stream.PATH, 9, (2,))):
            assert torch.equal(
                ours.uniform(stream, step, np.array(rows), shape), theirs.uniform(stream, step, rows, shape)
            )
            assert torch.equal(ours.normal(stream, step, rows, shape), theirs.normal(stream, step, rows, shape))
    assert {s.name: int(s) for s in Stream} == {s.name: int(s) for s in standalone_noise.Stream}


def test_two_sources_that_define_one_name_cannot_become_one_file(monkeypatch):
    monkeypatch.setattr(standalone, "SOURCES", ("diffusion/paths", "diffusion/sampler", "diffusion/noise"))
    standalone.modelling_source()
    monkeypatch.setattr(standalone, "SOURCES", ("diffusion/noise", "export/standalone_noise"))
    with pytest.raises(RuntimeError, match="both define"):
        standalone.modelling_source()


def test_push_uploads_the_folder_privately_and_a_failure_is_one_sentence(tmp_path, monkeypatch):
    calls = []

    class Hub:
        def create_repo(self, name, private, exist_ok):
            calls.append((name, private))
            return f"https://hub/{name}"

        def upload_folder(self, repo_id, folder_path, commit_message, allow_patterns, delete_patterns):
            calls.append((repo_id, folder_path))
            there = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "spiece.model"]
            there += ["NOTES.md", "adapter_model.safetensors", "onnx/model.safetensors", ".gitattributes"]
            deleted.extend(filter_repo_objects(there, allow_patterns=delete_patterns))
            mine = ["config.json", "model.safetensors", "notes.txt", "results/text8.json", ".git/config"]
            uploaded.extend(filter_repo_objects(mine, allow_patterns=allow_patterns))

    deleted, uploaded = [], []
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    assert push(tmp_path, "me/model") == "https://hub/me/model"
    assert calls == [("me/model", True), ("me/model", tmp_path)]
    assert uploaded == ["config.json", "model.safetensors"]
    assert deleted == [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "spiece.model",
    ]

    def unreachable(self, *arguments, **options):
        raise OSError("no route to host\nand more")

    monkeypatch.setattr(Hub, "create_repo", unreachable)
    with pytest.raises(UserError, match=r"--push me/model: not uploaded \(no route to host\); the folder is whole"):
        push(tmp_path, "me/model")
