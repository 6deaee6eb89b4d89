"""The README's commands, as they stand: from a clone to a classifier and a continuation."""

import csv
import json
import lzma
import os
import re
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```sh\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
FAST = {  # so that it takes seconds; what is added to a command of the README
    "quickstart.py": [
        "model.layers=1",
        "model.width=32",
        "model.heads=1",
        "latent.encoder_width=32",
        "training.steps=20",
        "training.checkpoint_every=20",
        "evaluation.every=null",
    ],
    "finetune.py": ["training.steps=4", "evaluation.rows=64"],
}
TOPICS = ("World", "Sports", "Business", "Sci/Tech")


def commands(block: str) -> list[list[str]]:
    lines = block.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def news() -> list[list[str]]:
    """AG News where it is at hand, else what looks like it."""
    folder = Path(os.environ.get("VMD_SHARED_DATA", ROOT.parent / "shared" / "data"))
    path = folder / "zero_shot" / "ag_news_test.csv.xz"
    if path.exists():
        with lzma.open(path, "rt", encoding="utf-8", newline="") as file:
            return list(csv.reader(file))[:600]
    return [[str(n % 4 + 1), f"{TOPICS[n % 4]} today", f"number {n} of many news"] for n in range(600)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("readme")
    for name in ("launchers", "configs"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "data").mkdir()
    with open(folder / "data" / "ag_news.csv", "w", newline="") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows(news())
    return folder


def run(lab, folder, words, timeout=400):
    settings = [part for setting in FAST.get(Path(words[1]).name, []) for part in ("--set", setting)]
    words = [sys.executable if words[0] == "python" else words[0], *words[1:], *settings]
    return lab.command(words, cwd=folder, timeout=timeout)


def test_from_a_clone_to_a_classifier_and_a_continuation(lab, folder):
    make, then = commands(BLOCKS[0]), commands(BLOCKS[1])
    assert make == [["make", "quickstart"], ["make", "test"]]
    assert "quickstart: $(STAMP)\n\t$(BIN)/python launchers/quickstart.py\n" in (ROOT / "Makefile").read_text()
    assert then.pop(0) == ["source", ".venv/bin/activate"]
    said = {}
    for words in [["python", "launchers/quickstart.py"], *then]:
        done = run(lab, folder, words)
        assert done.code == 0, done.text[-3000:]
        said.setdefault(Path(words[1]).name, []).append(done.text)
    continued, filled = said["sample.py"]
    assert continued.count("the first argument is") > 2
    assert len(re.findall(r"^   the[a-z ]{5} of the list", filled, re.MULTILINE)) == 4
    assert (folder / "quickstart" / "run" / "report.html").exists()
    classified = json.loads((folder / "runs" / "ag_news" / "classification.json").read_text())
    assert {record["split"] for record in classified} == {"validation", "test"}
    assert (folder / "exported" / "ag_news" / "modeling_vmd.py").exists()
    assert "ag_news" in (folder / "report.html").read_text()


@pytest.mark.parametrize("words", [words for block in BLOCKS[2:] for words in commands(block)], ids=" ".join)
def test_commands_that_need_more_than_this_machine_are_at_least_understood(lab, folder, words):
    """Without GPUs, without a network: they may find no data and no run, but every option is there."""
    words = ["python", *words[1:]] if words[0] == "deepspeed" else words
    done = lab.command([sys.executable, *words[1:]], cwd=folder, timeout=100, HF_HUB_OFFLINE="1")
    assert "usage:" not in done.text
    assert "Traceback" not in done.text
    assert done.code in (0, 2)
