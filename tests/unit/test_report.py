"""The report page: whole, self-contained, escaped, and made from whatever a run folder holds so far."""

import json
import os
import runpy
import shutil
import socket
import time
import warnings
from html.parser import HTMLParser
from pathlib import Path

import pytest
from example_results import example_result
from matplotlib.figure import Figure

from vmd_scale.checkpoints import TrainedModel, checkpoint_id
from vmd_scale.config_file import load_config
from vmd_scale.errors import UserError
from vmd_scale.evaluation.classification import Accuracy
from vmd_scale.evaluation.generation import GenerationResult
from vmd_scale.evaluation.latent import LatentUsage
from vmd_scale.evaluation.perplexity import Result
from vmd_scale.export.card import results_of
from vmd_scale.report import plot_bound_against_steps, read_run, write_report
from vmd_scale.report.figures import _latent_panels, _validation_panel, bound_panel, draw_png
from vmd_scale.report.run import distinctly_named
from vmd_scale.training.lock import RunLock
from vmd_scale.training.status import SILENCE, has_died, read_status

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
NASTY = "<script>alert('z')</script> & co"


def metrics(step):
    keys = ("tokens", "loss", "reconstruction", "kl", "lr", "grad_norm", "tokens_per_second", "mfu")
    return {"step": step, **dict.fromkeys(keys, 1.5), "kl_weight": 1.0, "data_wait_fraction": 0.0, "skipped_steps": 0}


def result(steps, **changes):
    values = {"steps": steps, "nats_per_token": 2.0, "bits_per_token": 2.885, "perplexity": 7.389}
    return example_result(**{**values, **changes}).to_dict()


@pytest.fixture(autouse=True)
def coarse_pictures(monkeypatch):
    monkeypatch.setattr("vmd_scale.report.figures.DPI", 30)


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text(load_config(CONFIGS / "quickstart.json").to_json())
    lines = [json.dumps(metrics(step)) for step in (10, 20)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 30, "lo')  # the run is writing this line
    return folder


def finish(run):
    results = [result(steps) for steps in (1, 4, "inf")] + [result(4, k=16, bound="iw", vmd_surrogate=1.25)]
    (run / "evaluation.json").write_text(json.dumps(results))
    (run / "samples.json").write_text(json.dumps([{"steps": "4", "latent": "fixed", "seed": 0, "texts": [NASTY]}]))
    (run / "facts.json").write_text(json.dumps({"unigram_bits_per_token": 4.11}))


class Page(HTMLParser):
    """What the page shows: its text, its pictures, and whatever it would fetch from elsewhere."""

    def __init__(self, path):
        super().__init__()
        self.text, self.pictures, self.tags, self.outside = "", [], [], []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        attributes = dict(attrs)
        self.pictures += [attributes.get("alt")] if tag == "img" else []
        links = [attributes.get("src"), attributes.get("href")]
        self.outside += [link for link in links if link and not link.startswith("data:")]

    def handle_data(self, data):
        self.text += data


def test_a_finished_run_shows_everything_and_fetches_nothing(run, tmp_path):
    finish(run)
    page = Page(write_report(run, png=tmp_path / "png"))
    assert set(page.pictures) == {
        "Bound against sampling steps", "Loss", "KL of the latent", "Learning rate and gradient norm", "Throughput"
    }  # fmt: skip
    assert len(list((tmp_path / "png").glob("*.png"))) == len(page.pictures)
    assert page.outside == []
    assert NASTY in page.text
    assert "script" not in page.tags
    for shown in ("2.8850", "7.3890", "4.1100 bits per character", "1.2500", "not a bound", "∞"):
        assert shown in page.text, shown


def test_an_unfinished_run_has_a_page_and_says_what_is_missing(run):
    page = Page(write_report(run))
    assert "not finished" in page.text
    assert "No bound is computed yet" in page.text
    assert "No samples are drawn yet" in page.text
    assert "Loss" in page.pictures


def test_bounds_of_training_stand_in_for_a_final_evaluation(run):
    (run / "evaluations.jsonl").write_text("".join(json.dumps(result(4, step=s)) + "\n" for s in (10, 20)))
    page = Page(write_report(run))
    assert "Validation bound during training" in page.pictures
    assert "last ones that training made" in page.text


def test_nothing_logged_yet(run):
    (run / "metrics.jsonl").unlink()
    page = Page(write_report(run))
    assert page.pictures == []
    assert "Nothing is logged yet" in page.text


def test_the_torn_last_line_is_left_out_and_a_torn_line_before_it_is_an_error(run):
    assert [record["step"] for record in read_run(run).metrics] == [10, 20]
    (run / "metrics.jsonl").write_text('{"step": 10, "lo\n' + json.dumps(metrics(20)) + "\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 1"):
        read_run(run)


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_not_a_run(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="not a run folder"):
        write_report(tmp_path / name)
    assert not (tmp_path / name / "report.html").exists()


def test_an_exported_model_is_not_a_run(tmp_path):
    """It has a config.json too, of which a run knows no key."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vmd", "vmd_scale": {"config": {}}}))
    with pytest.raises(UserError, match="an exported model, not a run") as refusal:
        write_report(tmp_path)
    assert len(str(refusal.value)) < 300


def test_the_accuracy_on_labels_is_shown(run):
    page = Page(write_report(run))
    assert "Labels" not in page.text
    found = [Accuracy(split, 1234, 4, 0.875, 0.0125, 0.4321, 16) for split in ("validation", "test")]
    (run / "classification.json").write_text(json.dumps([accuracy.to_dict() for accuracy in found]))
    page = Page(write_report(run))
    for shown in ("Labels", "validation", "test", "1,234", "0.8750", "0.0125", "0.4321"):
        assert shown in page.text, shown


@pytest.mark.parametrize(("active", "top"), [(0, 1.05), (8, 8.4)])
def test_active_units_are_whole_numbers(active, top):
    """Also where the latent has collapsed: an axis of hundredths would look like use."""
    limits = []
    usage = [LatentUsage(step, 9, {"1.0": 0.0}, active, 16) for step in (10, 20)]

    def draw(figure):
        _latent_panels(figure, usage)
        limits.extend(figure.axes[1].get_ylim())
        assert all(float(tick).is_integer() for tick in figure.axes[1].get_yticks())

    draw_png(draw)
    assert limits == pytest.approx([0, top])


def test_a_damaged_evaluation_is_named(run):
    (run / "evaluation.json").write_text(json.dumps([result(0)]))
    with pytest.raises(UserError, match=r"evaluation\.json.*steps 0"):
        write_report(run)


def drawn(**changes):
    values = {"protocol": "generation", "judge": "gpt2", "steps": "data", "latent": "none", "paths": "none"}
    values |= {"samples": 2, "tokens": 64, "generative_perplexity": 9.0, "standard_error": 0.1, "seed": 0}
    values |= {"unigram_entropy": 2.0, "unigram_entropy_error": 0.1, "distinct": {}, "weights": "ema", "step": 20}
    return GenerationResult(**{**values, "row_length": 32, "split": "validation", "data": "text", **changes}).to_dict()


def test_figures_of_samples_beside_the_bounds_are_passed_over(run, tmp_path):
    """evaluate.py may have written them: by the report, and by the card of an exported model."""
    bound = Result(**result(4))
    for records, wanted in (([drawn()], []), ([drawn(), bound.to_dict(), drawn(steps=4)], [bound])):
        (run / "evaluation.json").write_text(json.dumps(records))
        assert read_run(run).final == wanted
        write_report(run)
        trained = TrainedModel(None, None, None, 20, "ema", run / "checkpoints" / "step-20")
        assert results_of(trained, None) == wanted
    (tmp_path / "drawn.json").write_text(json.dumps([drawn()]))
    with pytest.raises(UserError, match=r"--evaluation .*drawn\.json holds no bounds"):
        results_of(trained, tmp_path / "drawn.json")


def test_a_card_shows_results_of_its_own_checkpoint_alone(tmp_path):
    """Two runs of a million steps each: the step and the kind of weights tell nothing."""
    trained = []
    for name in ("mdm", "vmd"):
        checkpoint = tmp_path / name / "checkpoints" / "step-20"
        checkpoint.mkdir(parents=True)
        (checkpoint / "manifest.json").write_text(json.dumps({"step": 20, "files": {"weights": {"sha256": name}}}))
        trained.append(TrainedModel(None, None, None, 20, "ema", checkpoint))
    mdm, vmd = trained
    mine = [Result(**result(steps, checkpoint=checkpoint_id(vmd.checkpoint))) for steps in (4, "inf")]
    (tmp_path / "results.json").write_text(json.dumps([r.to_dict() for r in mine]))
    assert results_of(vmd, tmp_path / "results.json") == mine
    with pytest.raises(UserError, match=r"results\.json holds results of another checkpoint of the same step"):
        results_of(mdm, tmp_path / "results.json")
    (tmp_path / "older.json").write_text(json.dumps([result(4)]))
    with pytest.raises(UserError, match="a checkpoint that it does not name"):
        results_of(vmd, tmp_path / "older.json")
    for run in ("mdm", "vmd"):  # a copy of the other's results in a run folder is passed over
        shutil.copy(tmp_path / "results.json", tmp_path / run / "evaluation.json")
    (tmp_path / "vmd" / "evaluations.jsonl").write_text(json.dumps(result(8)) + "\n")  # of training itself
    assert (results_of(mdm, None), results_of(vmd, None)) == ([], [Result(**result(8)), *mine])


def add_events(run):
    events = [
        {"event": "resumed", "step": 10, "time": 1.79e9, "world_size": 2},
        {"event": "skipped", "step": 12, "time": 1.79e9, "rows": list(range(30))},
        {"event": "rolled back", "step": 10, "time": 1.79e9, "rolled_back_from": 20},
        {"event": "<b>", "step": 20, "time": "soon"},
    ]
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))


def test_events_status_and_stalls_are_told(run):
    add_events(run)
    slow = [{**metrics(step), "tokens_per_second": 0.5 if step == 40 else 2.0} for step in range(10, 100, 10)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in slow))
    (run / "status.json").write_text(json.dumps({"state": "failed", "step": 90, "reason": "no <finite> gradient"}))
    page = Page(write_report(run))
    for shown in ("resumed: 1, skipped: 1, rolled back: 1", "rolled back from 20", "and 22 more", "2026-09-21", "<b>"):
        assert shown in page.text, shown
    assert "failed: no <finite> gradient" in page.text
    assert "less than half of that at 1 of 9 logged steps: 40." in page.text
    assert "b" not in page.tags


def test_a_run_that_failed_before_it_logged_anything_says_why(run):
    """Ten skipped steps are the end of a run, by default, and every fiftieth is logged."""
    (run / "metrics.jsonl").unlink()
    (run / "status.json").write_text(json.dumps({"state": "failed", "step": 0, "reason": "10 steps in a <row>"}))
    page = Page(write_report(run))
    assert "Nothing is logged yet" in page.text
    assert "failed: 10 steps in a <row>" in page.text
    assert "row" not in page.tags


@pytest.mark.parametrize(("count", "loss"), [(2, "NaN"), (200, "Infinity"), (2, "null")])
def test_a_run_that_diverged_from_the_start_has_a_page(run, count, loss):
    record = {**metrics(0), **dict.fromkeys(("loss", "reconstruction", "kl", "mfu", "data_wait_fraction"), "?")}
    lines = [json.dumps({**record, "step": step}).replace('"?"', loss) for step in range(1, count + 1)]
    (run / "metrics.jsonl").write_text("\n".join(lines))
    other = run.with_name("other")
    shutil.copytree(run, other)
    page = Page(write_report([run, other]))
    assert page.pictures.count("Loss") == 2
    assert "Loss, all runs" in page.pictures
    assert "last logged loss ? nats" in page.text


def test_watching_ends_when_the_last_run_has_ended_or_died(run, tmp_path):
    """After kill -9 the record says for ever that the run goes on."""
    goes_on = runpy.run_path(str(CONFIGS.parent / "launchers" / "report.py"))["goes_on"]
    other, lock = tmp_path / "other", RunLock(run)
    shutil.copytree(run, other)
    assert not goes_on([run, other])  # nothing is recorded
    for folder, state in ((run, "running"), (other, "finished")):
        (folder / "status.json").write_text(json.dumps({"state": state, "step": 0}))
    lock.acquire()
    assert goes_on([run, other])
    assert not goes_on([other])
    lock.release()
    assert not goes_on([run, other])


def running(run, host):
    (run / "status.json").write_text(json.dumps({"state": "running", "step": 0}))
    (run / ".lock").write_text(f"process 7 on {host}, Slurm job 3\n")
    return has_died(run, read_status(run)), "processes are gone" in Page(write_report(run)).text


def test_a_run_whose_processes_are_gone_is_not_running(run):
    """After kill -9 nobody writes another record; but the operating system lets go of the lock."""
    here, long_ago = socket.gethostname(), time.time() - 2 * SILENCE
    assert running(run, here) == (True, True)
    lock = RunLock(run)
    lock.acquire()
    assert running(run, here) == (False, False)
    lock.release()
    # elsewhere the lock of that node may not be seen: then silence tells
    assert running(run, "elsewhere") == (False, False)
    for path in (*run.glob("*.jsonl"), run / "status.json"):  # the page itself is new each time
        os.utime(path, (long_ago, long_ago))
    assert has_died(run, read_status(run))
    (run / ".lock").unlink()
    assert has_died(run, read_status(run))
    os.utime(run / "metrics.jsonl")
    assert not has_died(run, read_status(run))
    (run / "status.json").write_text(json.dumps({"state": "finished", "step": 20}))
    assert not has_died(run, read_status(run))


def test_samples_of_training_stand_in_for_drawn_ones(run):
    drawn = [
        {"step": s, "steps": 4, "latent": "fixed", "law": "balanced", "seed": 0, "texts": [f"at {s}"]} for s in (5, 9)
    ]
    (run / "samples.jsonl").write_text("".join(json.dumps(record) + "\n" for record in drawn))
    page = Page(write_report(run))
    assert "at 9" in page.text
    assert "at 5" not in page.text


def test_several_runs_stand_side_by_side(run, tmp_path):
    """Their differing settings, one picture for all of them, and each by itself; the baseline is called one."""
    finish(run)
    add_events(run)
    other = tmp_path / "elsewhere" / "run"
    shutil.copytree(run, other)
    config = json.loads((other / "config.json").read_text())
    config["latent"]["width"], config["training"]["seed"] = 0, 77
    config["diffusion"]["steps"] = ["inf"]
    (other / "config.json").write_text(json.dumps(config))
    (other / "metrics.jsonl").unlink()  # it has not logged anything yet
    page = Page(write_report([run, other], tmp_path / "page.html", tmp_path / "png", refresh=30))
    assert "Bound against sampling steps, all runs" in page.pictures
    assert page.pictures.count("Bound against sampling steps") == 2
    for shown in ("latent.width", "training.seed", "77", "elsewhere/run (MDM)", f"{tmp_path.name}/run alone"):
        assert shown in page.text, shown
    assert "model.layers" not in page.text.split("Together")[0]  # the same in both
    assert page.outside == []
    assert '<meta http-equiv="refresh" content="30">' in (tmp_path / "page.html").read_text()
    assert (tmp_path / "png" / "all_bounds.png").exists()
    assert not (other / "report.html").exists()


def test_each_protocol_has_its_own_curves(run):
    found = [example_result(protocol=name, steps=4, step=step) for step in (1, 2) for name in ("rows", "text8")]
    for results, names in ((found, {"T = 4, rows", "T = 4, text8"}), (found[::2], {"T = 4"})):
        axes = Figure().subplots()
        _validation_panel(axes, results, "token")
        assert set(axes.get_legend_handles_labels()[1]) == names


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["s/x", "s/y"], ["x", "y"]),
        (["a/s0/run", "b/s0/run", "c/run"], ["a/s0/run", "b/s0/run", "c/run"]),
        (["x/a/run", "runs/a/run", "b/other"], ["x/a/run", "runs/a/run", "other"]),
    ],
)
def test_every_run_has_a_name_of_its_own(run, folders, names, tmp_path):
    """As short as possible, and nothing is lost of any run where folders are called the same."""
    finish(run)
    paths = [tmp_path / name for name in folders]
    for path in paths:
        shutil.copytree(run, path)
    assert [found.name for found in distinctly_named([read_run(path) for path in paths], paths)] == names


def test_one_run_twice_is_an_error(run):
    with pytest.raises(UserError, match="the same run twice"):
        write_report([run, run.parent / "." / "run"])


def test_runs_may_be_called_anything(run, tmp_path):
    """No mathematics is read into dollars, and matplotlib would leave an underscore's curve out of the legend."""
    finish(run)
    names = ["$\\frac$", "5_$ and $", "_hidden", "<b>&amp;", "a\\$b", "-" * 200]
    for name in names:
        shutil.copytree(run, tmp_path / "runs" / name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a glyph that is missing
        page = Page(write_report([tmp_path / "runs" / name for name in names], tmp_path / "page.html"))
    assert all(name in page.text for name in names)
    assert "b" not in page.tags


def test_no_table_can_widen_a_narrow_screen(run, tmp_path):
    """Each scrolls by itself, whatever long word it holds; that of the settings breaks words."""
    finish(run)
    add_events(run)
    shutil.copytree(run, tmp_path / "other")
    html = write_report([run, tmp_path / "other"]).read_text()
    assert html.count("<table") == html.count('<div class="scroll"><table') > 6
    assert ".scroll { overflow-x: auto" in html
    assert html.count('class="settings"') == 2


@pytest.mark.parametrize("names", [("_a", "_b"), ("a", "_b"), ("$x$", "a")])
def test_the_legend_names_every_curve(names, tmp_path):
    results = {name: [Result(**result(steps)) for steps in (1, 4)] for name in names}
    labels = []

    def draw(figure):
        bound_panel(figure.subplots(), results, "token")
        labels.extend(text.get_text().lstrip("\u200b") for text in figure.axes[0].get_legend().get_texts())

    draw_png(draw)
    assert labels == [f"{name} fixed z, ELBO" for name in names]
    plot_bound_against_steps(tmp_path / "picture.png", results)


@pytest.mark.parametrize(
    ("settings", "shown"),
    [
        ({}, "nelbo (valid bound)"),
        ({"diffusion": {"free_bits": 0.5}}, "nelbo (no bound: the KL is not counted whole)"),
        ({"diffusion": {"kl_weight": {"end": 0.5}}}, "nelbo (no bound: the KL is not counted whole)"),
        ({"training": {"optimizer": "muon"}}, "Muon for matrices, learning rate 0.02; AdamW for all else; betas"),
        ({"training": {"init_from": "w", "lora": {"rank": 3}}}, "w; trained: adapters of rank 3"),
        ({"latent": {"prior": "conditional"}}, "prior conditional"),
    ],
)
def test_the_settings_say_what_was_trained(run, settings, shown):
    config = json.loads((run / "config.json").read_text())
    for section, values in settings.items():
        config[section] |= values
    (run / "config.json").write_text(json.dumps(config))
    assert shown in Page(write_report(run)).text


def test_runs_whose_bounds_do_not_compare_are_drawn_with_a_warning(run, tmp_path):
    other = shutil.copytree(run, tmp_path / "other")
    for folder, protocol in ((run, "lm1b_packed"), (other, "lm1b_unpacked")):
        (folder / "evaluation.json").write_text(json.dumps([result(4, protocol=protocol)]))
    assert "They do not compare: protocol differ." in Page(write_report([run, other], tmp_path / "page.html")).text
