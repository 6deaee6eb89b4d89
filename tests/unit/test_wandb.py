"""A run never depends on wandb: missing, offline, or failing at any call."""

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from vmd_scale.config_file import load_config
from vmd_scale.training import wandb_log
from vmd_scale.training.telemetry import Telemetry

ROOT = Path(__file__).resolve().parents[2]

RECORD = {"step": 1, "loss": 2.0, "kl": 0.0, "tokens_per_second": 1.0, "mfu": 0.1, "grad_norm": None}
RECORD |= {"peak_memory_gib": 0.5}
LATENT = {
    "step": 1,
    "kl_by_mask_ratio": {"1.0": 0.5},
    "active_units": 3,
    "kl_histograms": {"1.0": {"counts": [1, 2], "edges": [0.0, 0.5, 1.0]}},
}


class Stub:
    """What the log uses of wandb. `broken` names calls that raise, `modes` the modes in which init works."""

    def __init__(self, broken=(), modes=("online", "offline"), logged_in=True):
        self.broken, self.modes, self.started, self.logged, self.calls = broken, modes, [], [], 0
        self.torn_down, self.logged_in = True, logged_in
        self.finished = self.login_timeout = None

    def login(self, timeout, verify):
        self.login_timeout = timeout
        return self.logged_in

    def init(self, **options):
        self.started.append(options)
        assert self.torn_down  # else wandb's service says, after a failed attempt, that the id is in use
        self.torn_down = False
        if options["mode"] not in self.modes:
            raise RuntimeError("could not connect\nand more")
        return self

    def Settings(self, **options):
        return options

    def Table(self, columns, data):
        return SimpleNamespace(columns=columns, data=data)

    def Histogram(self, np_histogram):
        return SimpleNamespace(pair=np_histogram)

    def teardown(self):
        self.torn_down = True

    def define_metric(self, *names, **options):
        pass

    def log(self, values, **options):
        self.calls += 1
        assert not options  # wandb's own step would refuse what a resumed run makes again
        if "log" in self.broken:
            raise OSError("no space left")
        self.logged.append(values)

    def finish(self, exit_code):
        self.torn_down = True
        self.finished = exit_code
        if "finish" in self.broken:
            raise OSError("gone")


@pytest.fixture
def config(tmp_path):
    return load_config(ROOT / "configs" / "quickstart.json", ["telemetry.wandb=online"])


def use(telemetry):
    telemetry.log(RECORD)
    telemetry.latent(LATENT)
    telemetry.samples({"step": 1, "steps": 4, "texts": ["a", "b"]})
    telemetry.event("rolled back", 1, rolled_back_from=3)
    telemetry.close()


def lines(folder):
    return sum(len(path.read_text().splitlines()) for path in folder.glob("*.jsonl"))


def test_one_run_is_one_curve_across_resumes(tmp_path, config, monkeypatch):
    stub = Stub()
    monkeypatch.setitem(sys.modules, "wandb", stub)
    for first in (0, 1):
        use(Telemetry(tmp_path, config, True, first))
    first, second = stub.started
    assert first["id"] == second["id"]
    assert first["resume"] == "allow"
    for name in ("init_timeout", "finish_timeout"):  # other ranks wait meanwhile
        assert 0 < first["settings"][name] <= 120
    assert 0 < stub.login_timeout <= 60
    assert Telemetry(tmp_path / "other", config, False, 0)._wandb is None  # only rank 0 has one
    (tmp_path / "other").mkdir()
    Telemetry(tmp_path / "other", config, True, 0).close()
    assert stub.started[-1]["id"] != first["id"]


def test_config_code_samples_and_histograms_are_sent(tmp_path, config, monkeypatch):
    stub = Stub()
    monkeypatch.setitem(sys.modules, "wandb", stub)
    use(Telemetry(tmp_path, config, True, 0))
    sent = stub.started[0]["config"]
    assert sent["model"]["width"] == config.model.width
    assert sent["code"]["torch"].startswith("2.")
    assert sent["data"]["shards"] != config.data.shards
    metrics, latent, samples, event = stub.logged
    assert (metrics["loss"], "grad_norm" in metrics) == (2.0, False)
    assert latent["latent/kl histogram, mask ratio 1.0"].pair[1].tolist() == [0.0, 0.5, 1.0]
    assert event == {"step": 1, "event/rolled back": 1}
    assert samples["samples"].data == [[1, "4", "a"], [1, "4", "b"]]
    assert all(values["step"] == 1 for values in stub.logged)
    assert stub.finished == 0


def test_the_keys_are_those_that_are_documented(tmp_path, config, monkeypatch):
    stub = Stub()
    monkeypatch.setitem(sys.modules, "wandb", stub)
    telemetry = Telemetry(tmp_path, config, True, 0)
    telemetry.evaluation({"step": 1, "protocol": "rows", "steps": "inf", "bits_per_token": 2.0})
    use(telemetry)
    section = (ROOT / "docs" / "metrics.md").read_text().split("## wandb\n")[1]
    cells = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    names = [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]
    patterns = [re.sub("PROTOCOL|STEPS|NAME|R(?=$)", ".+", re.escape(name)) for name in names]
    sent = {key for values in stub.logged for key in values} - {*RECORD}
    for key in sent:
        assert [pattern for pattern in patterns if re.fullmatch(pattern, key)], key
    assert len(sent) == len(names)


@pytest.mark.parametrize(
    ("options", "modes", "calls"),
    [
        ({"modes": ("offline",)}, ["online", "offline"], 9),
        ({"modes": ()}, ["online", "offline"], 0),
        ({"logged_in": False}, ["offline"], 9),
        ({"broken": ("log", "finish")}, ["online"], 3),
    ],
    ids=["no network", "nothing works", "nobody is logged in", "every call fails"],
)
def test_whatever_fails_the_run_goes_on_and_keeps_its_own_record(
    tmp_path, config, monkeypatch, options, modes, calls, caplog
):
    stub = Stub(**options)
    monkeypatch.setitem(sys.modules, "wandb", stub)
    telemetry = Telemetry(tmp_path, config, True, 0)
    for _ in range(5):
        telemetry.log(RECORD)
    use(telemetry)
    assert [options["mode"] for options in stub.started] == modes
    assert lines(tmp_path) == 5 + 4
    assert stub.calls == calls  # always, never, or until it was given up
    assert [record for record in caplog.records if record.levelname == "WARNING"]


def test_without_the_package_it_is_one_warning(tmp_path, config, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it is an ImportError
    use(Telemetry(tmp_path, config, True, 0))
    assert "wandb is not installed; going on without" in caplog.text
    assert lines(tmp_path) == 4


def test_the_real_one_takes_all_of_it_and_its_sync_joins_the_starts(tmp_path, monkeypatch, caplog):
    """Each offline start leaves a folder; `wandb sync` sends those of one id one after the other, as one run."""
    wandb = pytest.importorskip("wandb", reason="pip install -c constraints.txt -e '.[wandb]'")
    for name, value in {"WANDB_ERROR_REPORTING": "false", "HOME": str(tmp_path / "home")}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    run = tmp_path / "run"
    run.mkdir()
    for first, mode in enumerate(("online", "offline")):  # nobody is logged in
        use(Telemetry(run, load_config(ROOT / "configs" / "quickstart.json", [f"telemetry.wandb={mode}"]), True, first))
    wandb.teardown()
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"][1:]
    started = sorted((run / "wandb").glob("offline-run-*"))
    assert len(started) == 2
    (identifier,) = {path.name for folder in started for path in folder.glob("*.wandb")}  # one run, two starts
    assert identifier == f"run-{(run / 'wandb_id').read_text().strip()}.wandb"
    documented = re.search(r"`(wandb sync .*?)`", (ROOT / "docs" / "operations.md").read_text())[1]
    assert warning.endswith(f": {documented.replace('RUN', str(run))}")
    found = subprocess.run(
        f"{sys.executable} -m {documented.replace('RUN', str(run))} --dry-run",
        shell=True, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert all(folder.name in found.stdout + found.stderr for folder in started)


def test_the_commit_is_that_of_this_project_and_no_one_elses(tmp_path, monkeypatch):
    """Installed into an environment inside somebody's checkout, it has none."""
    for arguments in ("init -q", "-c user.name=n -c user.email=e commit -q --allow-empty -m m"):
        subprocess.run(["git", "-C", tmp_path, *arguments.split()], check=True)
    for place, known in (("site-packages/vmd_scale/training", False), ("vmd_scale/training", True)):
        monkeypatch.setattr(wandb_log, "__file__", str(tmp_path / place / "wandb_log.py"))
        assert bool(wandb_log.code_version()["commit"]) == known
