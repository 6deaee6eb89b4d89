"""The losses of tiny runs are what they were: whatever changes them changed the mathematics, the data or the noise.

They are reproduced bit for bit where torch and the CPU's instructions are those of golden/losses.json, else to 1e-4.
After a change that was meant to change them:

    python tests/e2e/test_golden.py --write
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).parent / "golden" / "losses.json"
STEPS = 8

# One thread and one set of instructions, on whatever CPU: the order of every summation is fixed.
PINNED = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_CBWR": "COMPATIBLE",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "LOCAL_WORLD_SIZE": str(os.cpu_count()),
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
}

TEXT = "".join(f"row {n} of {n * n} tells what {n * 7919 % 1000} noisy words say about {n % 13}\n" for n in range(200))

COMMON = {
    "data": {"corpus": "text", "tokenizer": "text8", "normalizer": "text8", "row_length": 32},
    "model": {"layers": 2, "width": 32, "heads": 2, "dropout": 0.1},
    "training": {
        "steps": STEPS,
        "global_batch": 8,
        "micro_batch": 4,
        "learning_rate": 2e-3,
        "warmup_steps": 2,
        "precision": "fp32",
        "seed": 7,
    },
    "telemetry": {"log_every": 1},
}
RUNS = {
    "vmd": {
        "latent": {"width": 8, "encoder_layers": 1, "encoder_width": 32},
        "diffusion": {"objective": "vmd", "paths": "bernoulli", "kl_weight": {"start": 0.0, "warmup_steps": STEPS}},
    },
    "iw": {
        "latent": {"width": 8, "encoder_layers": 1, "encoder_width": 32, "prior": "conditional"},
        "diffusion": {"objective": "iw", "steps": [1, 2], "importance_samples": 2},
    },
    "mdm": {"latent": {"width": 0}, "diffusion": {"objective": "nelbo", "steps": ["inf"]}},
}


def compute(folder: Path) -> dict[str, list[float]]:
    """The losses of all runs, each trained by pretrain.py in a process of its own."""
    source = folder / "corpus.txt"
    source.write_text(TEXT)
    losses = {}
    for name, sections in RUNS.items():
        config = {**COMMON, **sections}
        config["data"] = {**COMMON["data"], "source": str(source), "shards": str(folder / "shards")}
        (folder / f"{name}.json").write_text(json.dumps(config))
        command = ["launchers/pretrain.py", "--config", str(folder / f"{name}.json"), "--output", str(folder / name)]
        environment = {**os.environ, **PINNED}
        environment.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))
        finished = subprocess.run(
            [sys.executable, *command], cwd=ROOT, env=environment, timeout=120, capture_output=True, text=True
        )
        assert finished.returncode == 0, finished.stderr[-3000:]
        records = map(json.loads, (folder / name / "metrics.jsonl").read_text().splitlines())
        losses[name] = [record["loss"] for record in records]
    return losses


def circumstances() -> dict[str, str]:
    """What decides whether bits can be compared: the version of torch, and the instructions as they were pinned."""
    report = "import torch; print(torch.backends.cpu.get_cpu_capability())"
    environment = {**os.environ, **PINNED}
    command = [sys.executable, "-c", report]
    found = subprocess.run(command, env=environment, timeout=60, capture_output=True, text=True, check=True)
    return {"torch": torch.__version__, "cpu_capability": found.stdout.strip()}


@pytest.fixture(scope="module")
def losses(tmp_path_factory):
    return compute(tmp_path_factory.mktemp("golden"))


@pytest.mark.parametrize("name", RUNS)
def test_losses_are_reproduced(losses, name):
    golden = json.loads(GOLDEN.read_text())
    wanted = golden["losses"][name]
    assert len(losses[name]) == STEPS
    if circumstances() == golden["circumstances"]:
        assert losses[name] == wanted
    else:
        np.testing.assert_allclose(losses[name], wanted, rtol=1e-4)


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        found = {"circumstances": circumstances(), "losses": compute(Path(folder))}
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps(found, indent=2) + "\n")
    print(f"{GOLDEN}: written")
