"""reproduce.py from nothing to its table, and called again; the samplers and bounds of what it trained."""

import json

import pytest


@pytest.fixture(scope="module")
def reproduced(lab, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reproduce")
    settings = ["training.steps=20", "training.checkpoint_every=20", "diffusion.kl_weight.warmup_steps=10"]
    arguments = ["four_tokens_d2", "--fast", "--seeds", 1, "--runs", folder / "runs", "--output", folder / "results"]
    arguments += ["--json", folder / "copy.json"]
    arguments += [part for setting in settings for part in ("--set", setting)]
    return folder, arguments, lab.launch("reproduce", *arguments, timeout=300)


def test_the_table_has_every_method_and_number_of_blocks(reproduced):
    folder, _, finished = reproduced
    assert finished.code == 0, finished.text[-3000:]
    rows = json.loads((folder / "results" / "four_tokens_d2.json").read_text())
    assert {(row["method"], row["blocks"]) for row in rows} == {
        (method, blocks) for method in ("mdm", "vmd", "vmd_surrogate") for blocks in (1, 2)
    }
    assert all(row["seeds"] == 1 and row["std"] is None for row in rows)
    named = ["task", "method", "blocks", "steps", "latent", "metric", "mean", "std", "seeds", "published"]
    assert all(set(named) <= set(row) and row["scaled_down"] for row in rows)
    assert json.loads((folder / "copy.json").read_text()) == rows
    published = {row["published"] for row in rows if row["metric"] == "accuracy" and row["steps"] == row["blocks"]}
    assert published == {0.011, 0.8, 0.886}
    assert {row["k"] for row in rows if row["metric"] == "bound_nats"} == {64}
    page = (folder / "results" / "four_tokens_d2.md").read_text()
    assert "reproduce.py four_tokens_d2 --fast --seeds 1" in page
    assert f"| {rows[0]['method']} |" in page


def test_called_again_it_trains_and_measures_nothing(reproduced, lab):
    folder, arguments, _ = reproduced
    before = (folder / "results" / "four_tokens_d2.json").read_text()
    logs = {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("*.log")}
    again = lab.launch("reproduce", *arguments)
    assert again.code == 0, again.text[-3000:]
    assert (folder / "results" / "four_tokens_d2.json").read_text() == before
    assert len(logs) == 6
    assert {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("*.log")} == logs


def test_a_failed_training_is_named(lab, tmp_path):
    arguments = ["two_tokens", "--fast", "--seeds", 1, "--runs", tmp_path / "runs", "--output", tmp_path / "results"]
    finished = lab.launch("reproduce", *arguments, "--set", "model.attention=flash", timeout=300)
    assert finished.code == 2
    assert any("ended with exit code 2: model.attention 'flash' needs a GPU" in line for line in finished.errors)
    assert not (tmp_path / "results").exists()


def test_samplers_and_bounds_of_one_of_its_models(reproduced, lab):
    folder, _, _ = reproduced
    (run,) = (folder / "runs" / "four_tokens_d2").glob("vmd-1-blocks-seed0-*")
    run = ["--checkpoint", run]
    options = ["--paths", "margin", "--temperature", 0.5, "--nucleus", 0.9, "--order-noise", 1, "--remask", 0.3]
    samples = folder / "samples.json"
    drawn = lab.launch("sample", *run, "--steps", "1,4", "--count", 3, *options, "--json", samples)
    assert drawn.code == 0, drawn.text
    first, second = json.loads(samples.read_text())
    assert (first["steps"], second["steps"], first["law"], first["remask"]) == ("1", "4", "margin", 0.3)
    assert all(len(text.split()) == 4 for text in first["texts"] + second["texts"])

    bounds = folder / "bounds.json"
    scored = lab.launch("evaluate", *run, "--paths", "entropy", "--steps", "1,2", "--k", "1,8", "--json", bounds)
    assert scored.code == 0, scored.text
    assert "units active" in scored.text
    results = json.loads(bounds.read_text())
    assert [(r["paths"], r["bound"], r["k"]) for r in results] == [
        ("entropy", bound, k) for bound, k in (("elbo", 1), ("elbo", 1), ("iw", 8), ("iw", 8))
    ]
    wrong = lab.launch("sample", *run, "--nucleus", 0)
    assert wrong.code == 2
    assert "--nucleus 0.0: expected more than 0, at most 1" in wrong.errors[0]
