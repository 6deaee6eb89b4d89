"""The commands of README, docs/ and the programs' own descriptions, as they stand.

Those of the pages are run on the quickstart's model; the others, and what cannot be run here, must be understood.

docs/extending.md has a test of its own (test_extending.py). What is said to have made a page of docs/results was run
when it was made.
"""

import ast
import csv
import json
import lzma
import os
import re
import runpy
import shlex
import sys
import zipfile
from itertools import pairwise
from pathlib import Path

import pytest

from vmd_scale.config_file import load_config

ROOT = Path(__file__).resolve().parents[2]
SH = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PYTHON = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`((?:python|deepspeed|torchrun|srun|sbatch|salloc|scancel|scontrol|pip|make) [^`\n]+)`")
BLOCKS = SH.findall((ROOT / "README.md").read_text())
DOCS = ROOT / "docs"
PAGES = [*sorted(page for page in DOCS.glob("*.md") if page.stem != "extending"), DOCS / "results" / "README.md"]
SMALL = ["model.layers=1", "model.width=32", "model.heads=1", "latent.encoder_width=32"]
SMALL += ["training.steps=20", "training.checkpoint_every=20", "evaluation.every=null"]
FAST = {  # so that it takes seconds; what is added to a command
    "quickstart.py": [part for setting in SMALL for part in ("--set", setting)],
    "pretrain.py": [part for setting in SMALL for part in ("--set", setting)],
    "finetune.py": ["--set", "training.steps=4", "--set", "evaluation.rows=64"],
    "evaluate.py": ["--rows", "32"],
    "evaluate.py of generation": ["--count", "4"],
}
ELSEWHERE = {  # beginnings of commands that are not run here, and why; those of our programs must be understood
    "make quickstart": "the fixture below does what it does",
    "pip install": "a package registry",
    "python -m vmd_scale.config_reference": "it would overwrite the page; tests/unit/test_docs.py compares",
    "python launchers/prepare_data.py --config CONFIG.json --set data.workers=16": "16 processes",
    "python launchers/prepare_data.py --config configs/": "corpora that are to be downloaded",
    "deepspeed launchers/pretrain.py": "LM1B, from a hub, and GPUs",
    "deepspeed --hostfile": "several machines",
    "torchrun --nproc-per-node 8": "LM1B or OpenWebText, from a hub, and eight GPUs",
    "python launchers/pretrain.py --config configs/lm1b.json": "LM1B, from a hub",
    "python launchers/evaluate.py --checkpoint runs/": "a run that took GPUs days",
    "python launchers/finetune.py --from mdlm.safetensors": "110 M parameters; test_initial_weights.py is small",
    "python launchers/slurm/submit.py": "Slurm; tests/slurm submits, and what has --dry-run is run below",
    "LAUNCHER=deepspeed sbatch": "Slurm; tests/slurm",
    "sbatch": "Slurm; tests/slurm",
    "salloc": "Slurm",
    "srun": "Slurm",
    "scancel": "Slurm; tests/slurm",
    "scontrol": "Slurm; tests/slurm",
    "python launchers/reproduce.py": "minutes to hours; test_reproduce.py has it small",
    "python benchmarks/": "minutes; test_benchmarks.py has them small",
}  # fmt: skip
STANDS_FOR = {
    "RUN": "quickstart/run",
    "DIR": "quickstart/shards",
    "TASK": "two_tokens",
    "pairs.jsonl": "data/pairs.jsonl",
    "news.jsonl": "data/news.jsonl",
    "papers.txt": "data/papers.txt",
    "[RUN": "",  # optional
    "...]": "",
}
TOPICS = ("World", "Sports", "Business", "Sci/Tech")


def words_of(block: str) -> list[list[str]]:
    lines = block.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def commands_of(page: Path) -> list[str]:
    """Those of its blocks, and those between backquotes."""
    text = page.read_text()
    inline = [shlex.split(command) for command in INLINE.findall(FENCE.sub("", text))]
    return [shlex.join(words) for words in [*(w for block in SH.findall(text) for w in words_of(block)), *inline]]


def replaced(command: str) -> list[str]:
    """Its words, where a page says RUN and means any; %a is the number of a job in its array."""
    words = [STANDS_FOR.get(word, word) for word in shlex.split(command)]
    return [word.replace("%a", "0") for word in words if word]


def why_not_here(command: str) -> str | None:
    if command.endswith("--dry-run"):
        return None
    return next((why for start, why in ELSEWHERE.items() if command.startswith(start)), None)


def commands_described(program: Path) -> list[str]:
    """Those at the top of its file, each on lines of its own; what comes after three spaces explains them."""
    description = re.sub(r"\\\n\s*", " ", ast.get_docstring(ast.parse(program.read_text())) or "")
    lines = re.findall(r"^    ((?:python|deepspeed|torchrun) .*)$", description, re.MULTILINE)
    return [re.split(" {3,}", line)[0] for line in lines]


PROGRAMS = [
    path
    for folder in ("launchers", "launchers/slurm", "tokenizer", "benchmarks")
    for path in (ROOT / folder).glob("*.py")
]
DESCRIBED = sorted({command for program in PROGRAMS for command in commands_described(program)})
COMMANDS = list(dict.fromkeys(command for page in PAGES for command in commands_of(page)))
OURS = re.compile(r"\b((?:launchers|benchmarks|tokenizer)/[\w/]+\.py)\b")


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
    """Where a user would stand, with the data that the pages speak of."""
    folder = tmp_path_factory.mktemp("commands")
    for name in ("launchers", "configs"):
        (folder / name).symlink_to(ROOT / name)
    data = folder / "data"
    data.mkdir()
    with open(data / "ag_news.csv", "w", newline="") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows(news())
    titles = [(title, TOPICS[int(topic) - 1]) for topic, title, _ in news()]
    for name, key in (("pairs", "response"), ("news", "label")):
        lines = [json.dumps({"prompt": f"{title} ", key: topic}) for title, topic in titles]
        (data / f"{name}.jsonl").write_text("\n".join(lines))
    bodies = "\n".join(body for _, _, body in news())
    (data / "papers.txt").write_text(bodies)
    with zipfile.ZipFile(data / "text8.zip", "w") as archive:
        archive.writestr("text8", " ".join(re.findall("[a-z]+", bodies.lower())))
    return folder


@pytest.fixture(scope="module")
def quickstart(lab, folder):
    """The README's first command, for a model that is of no use."""
    assert (ROOT / "Makefile").read_text().count("quickstart: $(STAMP)\n\t$(BIN)/python launchers/quickstart.py\n") == 1
    return run(lab, folder, ["python", "launchers/quickstart.py"])


def run(lab, folder, words):
    more = FAST.get(Path(words[1]).name + (" of generation" if "generation" in words else ""), [])
    folder = ROOT if words[1] == "launchers/slurm/submit.py" else folder  # it wants that, and writes nothing
    words = [sys.executable if words[0] == "python" else words[0], *words[1:], *more]
    done = lab.command(words, cwd=folder, timeout=900, HF_HUB_OFFLINE="1")
    assert done.code == 0, done.text[-3000:]
    return done.text


def test_from_a_clone_to_a_classifier_and_a_continuation(lab, folder, quickstart):
    make, then = words_of(BLOCKS[0]), words_of(BLOCKS[1])
    assert make == [["make", "quickstart"], ["make", "test"]]
    assert then.pop(0) == ["source", ".venv/bin/activate"]
    said = {}
    for words in then:
        said.setdefault(Path(words[1]).name, []).append(run(lab, folder, words))
    continued, filled = said["sample.py"]
    assert continued.count("the first argument is") > 2
    assert len(re.findall(r"^   the [a-z ]{5} of the list", filled, re.MULTILINE)) == 4
    assert (folder / "quickstart" / "run" / "report.html").exists()
    classified = json.loads((folder / "runs" / "ag_news" / "classification.json").read_text())
    assert {record["split"] for record in classified} == {"validation", "test"}
    assert (folder / "exported" / "ag_news" / "modeling_vmd.py").exists()
    assert "ag_news" in (folder / "report.html").read_text()


@pytest.mark.parametrize(
    "words",
    [words for block in BLOCKS[2:] for words in words_of(block) if OURS.search(" ".join(words))],
    ids=" ".join,
)
def test_commands_that_need_more_than_this_machine_are_at_least_understood(lab, folder, words):
    """Without GPUs, without a network: they may find no data and no run, but every option is there.

    The one that is scaled down, to data that are at hand, runs.
    """
    words = ["python", *words[1:]] if words[0] == "deepspeed" else words
    done = lab.command([sys.executable, *words[1:]], cwd=folder, timeout=100, HF_HUB_OFFLINE="1")
    assert "usage:" not in done.text
    assert "Traceback" not in done.text
    assert not re.search("unknown key|no such configuration|does not exist", done.text), done.text
    assert done.code == 0 or (done.code == 2 and "runs/tiny" not in words)


@pytest.mark.parametrize("command", [command for command in COMMANDS if why_not_here(command) is None], ids=str)
def test_commands_of_the_pages_run(lab, folder, quickstart, command):
    """In the order of the pages: what one writes, another may read."""
    run(lab, folder, replaced(command))


NOT_RUN = [command for command in COMMANDS if why_not_here(command) and OURS.search(command)]


@pytest.mark.parametrize("command", list(dict.fromkeys([*NOT_RUN, *DESCRIBED])), ids=str)
def test_commands_that_are_not_run_are_understood(command, monkeypatch, capsys):
    """Their programs know every option and value, and complain of nothing but one that was added here."""
    words = replaced(command)
    at = next(n for n, word in enumerate(words) if OURS.fullmatch(word))
    monkeypatch.setattr(sys, "argv", [*words[at:], "--no-such-option"])
    monkeypatch.syspath_prepend(str((ROOT / words[at]).parent))
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / words[at]), run_name="__main__")
    assert ended.value.code == 2
    assert "error: unrecognized arguments: --no-such-option\n" in capsys.readouterr().err
    if "--config" in words and (ROOT / words[words.index("--config") + 1]).is_file():
        settings = tuple(value for name, value in pairwise(words) if name == "--set")
        load_config(ROOT / words[words.index("--config") + 1], settings)


def test_every_program_shows_how_it_is_called():
    silent = [path.name for path in PROGRAMS if "ArgumentParser" in path.read_text() and not commands_described(path)]
    assert silent == ["job.py"]  # not meant to be called by hand


def test_every_reason_for_not_running_a_command_is_needed():
    idle = {start for start in ELSEWHERE if not any(command.startswith(start) for command in COMMANDS)}
    assert not idle


@pytest.mark.parametrize("block", PYTHON.findall((DOCS / "export.md").read_text()), ids=["transformers", "torch alone"])
def test_an_exported_folder_is_used_as_its_page_says(lab, folder, quickstart, tmp_path, block):
    if "transformers" in block:
        pytest.importorskip("transformers")
    (export,) = words_of(SH.findall((DOCS / "export.md").read_text())[0])
    exported = folder / export[export.index("--output") + 1]
    if not exported.exists():
        run(lab, folder, export)
    variables = {"PYTHONPATH": str(exported), "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = lab.command([sys.executable, "-c", block], cwd=folder, **variables)
    assert done.code == 0, done.text[-3000:]
