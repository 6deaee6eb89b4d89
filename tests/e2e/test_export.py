"""An exported folder computes what the trained model computes, where this project does not exist."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vmd_scale.checkpoints import load_trained

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

# Runs by `python -I`: no PYTHONPATH, no current folder; and whoever asks for the project gets an error.
STRANGER = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("vmd_scale", "deepspeed", "launchers"):
            raise ImportError(f"{name} is not installed here")

sys.meta_path.insert(0, Absent())
folder, inputs, outputs = sys.argv[1:]
sys.path.insert(0, folder)
import torch
from modeling_vmd import load, negative_elbo

torch.set_num_threads(1)
model, x = load(folder), torch.load(inputs)
with torch.no_grad():
    logits = model.logits(x["noisy"], x["z"])

def bound():  # nats per token, of 20 draws that are the same before and after
    torch.manual_seed(1)
    with torch.no_grad():
        return sum(negative_elbo(model, x["clean"]).mean().item() for _ in range(20)) / 20 / x["clean"].shape[1]

before = bound()
torch.manual_seed(0)
model.train()
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
for step in range(30):
    negative_elbo(model, x["clean"]).mean().div(x["clean"].shape[1]).backward()
    optimizer.step()
    optimizer.zero_grad()
model.eval()
after = bound()
prompt = torch.zeros_like(x["clean"], dtype=torch.bool)
prompt[:, 16:] = True
with torch.no_grad():
    part = negative_elbo(model, x["clean"], prompt)
assert not [name for name in sys.modules if name.startswith(("vmd_scale", "deepspeed"))]
torch.save({"logits": logits, "before": before, "after": after, "part": part}, outputs)
"""


@pytest.fixture(scope="module", params=KINDS)
def exported(request, lab, tmp_path_factory):
    """Train 4 steps, export by the launcher, use the folder as a stranger would."""
    folder = tmp_path_factory.mktemp(request.param)
    lab.pretrain(folder / "run", "training.steps=4", *KINDS[request.param], ranks=1)
    finished = lab.launch("export", "--checkpoint", folder / "run", "--output", folder / "out")
    assert finished.code == 0, finished.text
    trained = load_trained(folder / "run")
    a = trained.model.architecture
    generator = torch.Generator().manual_seed(0)
    clean = torch.randint(a.vocab_size, (16, a.row_length), generator=generator)
    clean[:, 1::2] = clean[:, :1]  # something to learn
    noisy = clean.masked_fill(torch.rand(clean.shape, generator=generator) < 0.5, a.mask_id)
    z = torch.randn(len(clean), a.groups, a.latent_width, generator=generator) if a.latent_width else None
    torch.save({"clean": clean, "noisy": noisy, "z": z}, folder / "inputs.pt")
    paths = [str(folder / name) for name in ("out", "inputs.pt", "outputs.pt")]
    stranger = subprocess.run(
        [sys.executable, "-I", "-c", STRANGER, *paths], cwd=folder, capture_output=True, text=True, timeout=120
    )
    assert stranger.returncode == 0, stranger.stderr
    return {"folder": folder, "trained": trained, "noisy": noisy, "z": z, **torch.load(folder / "outputs.pt")}


def test_logits_are_those_of_the_trained_model(exported):
    with torch.no_grad():
        wanted = exported["trained"].model.logits(exported["noisy"], exported["z"])
    assert wanted.std() > 0.01
    torch.testing.assert_close(exported["logits"], wanted, rtol=0, atol=1e-6)


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
    assert {"README.md", "model.safetensors", "modeling_vmd.py"} <= {path.name for path in folder.iterdir()}


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
