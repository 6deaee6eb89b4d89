"""The report page: whole, self-contained, escaped, and made from whatever a run folder holds so far."""

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from example_results import example_result

from vmd_scale.checkpoints import TrainedModel
from vmd_scale.config import load_config
from vmd_scale.errors import UserError
from vmd_scale.evaluation.generation import GenerationResult
from vmd_scale.evaluation.perplexity import Result
from vmd_scale.export.card import results_of
from vmd_scale.report import read_run, write_report

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
NASTY = "<script>alert('z')</script> & co"


def metrics(step):
    keys = ("tokens", "loss", "reconstruction", "kl", "lr", "grad_norm", "tokens_per_second", "mfu")
    return {"step": step, **dict.fromkeys(keys, 1.5), "kl_weight": 1.0, "data_wait_fraction": 0.0, "skipped_steps": 0}


def result(steps, **changes):
    values = {"steps": steps, "nats_per_token": 2.0, "bits_per_token": 2.885, "perplexity": 7.389}
    return example_result(**{**values, **changes}).to_dict()


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


def test_a_damaged_evaluation_is_named(run):
    (run / "evaluation.json").write_text(json.dumps([result(0)]))
    with pytest.raises(UserError, match=r"evaluation\.json.*steps 0"):
        write_report(run)


def drawn(**changes):
    values = {"protocol": "generation", "judge": "gpt2", "steps": "data", "latent": "none", "paths": "none"}
    values |= {"samples": 2, "tokens": 64, "generative_perplexity": 9.0, "standard_error": 0.1, "seed": 0}
    values |= {"unigram_entropy": 2.0, "unigram_entropy_error": 0.1, "distinct": {}, "weights": "ema", "step": 20}
    return GenerationResult(**{**values, "row_length": 32, **changes}).to_dict()


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
