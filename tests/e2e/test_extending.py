"""docs/extending.md is run as it stands: its files are written, its programs and commands called, in their order."""

import re
import sys
from pathlib import Path

import pytest

from vmd_scale.checkpoints import find_checkpoint, load_weights

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "extending.md"
POEM = "an old silent pond\na frog jumps into the pond\nsplash silence again {}\n\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("extending")
    (folder / "launchers").symlink_to(ROOT / "launchers")
    (folder / "haiku.txt").write_text("".join(POEM.format("on and " * (n % 7)) for n in range(200)))
    return folder


def run(lab, folder: Path, command: list[str]) -> str:
    command = [sys.executable if word == "python" else word for word in command]
    finished = lab.command(command, cwd=folder)
    assert finished.code == 0, finished.text[-3000:]
    return finished.text


def test_every_example_runs(lab, folder):
    said = {}
    for language, content in re.findall(r"^```(\w+[^\n]*)\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL):
        if language.startswith("json "):
            (folder / language.split()[1]).write_text(content)
        elif language == "python":
            name = content.splitlines()[0].removeprefix("# ")
            (folder / name).write_text(content)
            if "print(" in content:
                said[name] = run(lab, folder, ["python", name])
        else:
            assert language == "sh"
            for line in content.splitlines():
                said[line] = run(lab, folder, line.split())
    assert "nats a row, at most; samples (2, 16)" in said["convolutions.py"]
    assert "nats for 64 tokens" in said["unweighted.py"]
    assert "haiku" in said["python launchers/prepare_data.py inspect haiku-shards"]
    runs = ("haiku-run", "haiku-bpe-run", "haiku-convolutions", "haiku-unweighted")
    for name in runs:
        assert (folder / name / "checkpoints" / "latest").read_text() == "step-00000004\n"
    losses = {lab.losses(folder / name)[-1] for name in runs}
    assert len(losses) == len(runs)  # what is new was trained, not what there was
    weights = load_weights(find_checkpoint(folder / "haiku-convolutions"), "ema")
    assert "denoiser.blocks.2.mix.weight" in weights
    assert "bits/token" in said["python launchers/evaluate.py --checkpoint haiku-unweighted --steps 4"]
