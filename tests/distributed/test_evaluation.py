"""evaluate.py alone and on ranks that are real processes: each row and each sample exactly once, whoever has it.

What needs no ranks calls the launcher's `main` in this process, because importing torch takes seconds.
"""

import importlib.util
import io
import json
import os
import shutil
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from ranks import run_in_processes

from vmd_scale.config_file import load_config
from vmd_scale.data.prepare import prepare

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def run(lab, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    lab.pretrain(folder, "training.steps=4", ranks=1)
    return folder


def main_of(launcher: str, arguments: tuple[object, ...]) -> tuple[int, str, str]:
    """A launcher's `main` in this process: its exit code, and what it wrote to stdout and stderr."""
    spec = importlib.util.spec_from_file_location(f"launcher_{launcher}", ROOT / "launchers" / f"{launcher}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    before, sys.argv = sys.argv, [f"{launcher}.py", *map(str, arguments)]
    out, errors, code = io.StringIO(), io.StringIO(), 0
    try:
        with redirect_stdout(out), redirect_stderr(errors):
            module.main()
    except SystemExit as exit_request:
        code = exit_request.code
    finally:
        sys.argv = before
    return code, out.getvalue(), errors.getvalue()


def evaluate_on_this_rank(cases: list[tuple[object, ...]], ports: list[int]) -> list[tuple[int, str, str]]:
    """In a process that has RANK and its siblings: all cases, one after the other, each in a world of its own."""
    answers = []
    for case, port in zip(cases, ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        answers.append(main_of("evaluate", case))
    return answers


@pytest.fixture
def call():
    """A launcher in this process: its exit code, and what it printed."""

    def call(launcher: str, *arguments: object) -> tuple[int, str]:
        code, out, errors = main_of(launcher, arguments)
        return code, out + errors

    return call


@pytest.fixture
def evaluated(call, run, tmp_path):
    """The results of evaluate.py, and what it printed."""

    def evaluated(*arguments: object) -> tuple[list[dict], str]:
        code, text = call("evaluate", "--checkpoint", run, "--json", tmp_path / "results.json", *arguments)
        assert code == 0, text
        return json.loads((tmp_path / "results.json").read_text()), text

    return evaluated


def without_rounding(result: dict) -> dict:
    return {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in result.items()}


CASES = [
    ("--steps", "1,inf", "--k", "1,2", "--micro-batch", 5),  # 39 rows: no rank has as many as the other
    ("--split", "train", "--until-error", 0.02, "--micro-batch", 16),
    ("--protocol", "generation", "--steps", "1,4", "--count", 7, "--micro-batch", 3),
]


def test_two_ranks_find_what_one_finds_and_fail_together(lab, run, evaluated, tmp_path):
    missing = tmp_path / "nothing.txt"
    here = ("--checkpoint", run)
    cases = [(*here, "--json", tmp_path / f"{n}.json", *case) for n, case in enumerate(CASES)]
    cases.append((*here, "--protocol", "zero_shot", "--source", f"ptb={missing}", "--shards", tmp_path / "sets"))
    altered = tmp_path / "altered" / "validation-00000.tokens"
    shutil.copytree(json.loads((run / "config.json").read_text())["data"]["shards"], altered.parent)
    altered.write_bytes(bytes([altered.read_bytes()[0] ^ 1]) + altered.read_bytes()[1:])  # still of the vocabulary
    cases.append((*here, "--shards", altered.parent))
    first, second = run_in_processes(evaluate_on_this_rank, 2, cases, [lab.free_port() for _ in cases], timeout=200)
    for n, case in enumerate(CASES):
        alone, text = evaluated(*case)
        together = json.loads((tmp_path / f"{n}.json").read_text())
        assert list(map(without_rounding, together)) == list(map(without_rounding, alone))
        assert first[n][:2] == (0, text)
        assert second[n][:2] == (0, "")  # one rank speaks
    for rank in (first, second):
        assert [rank[n][0] for n in (-2, -1)] == [2, 2]
        assert "ptb needs shards with data.vocab_size 50257, these have 27" in rank[-2][2]  # before any is prepared
        assert rank[-1][2].startswith(f"error: {altered}: altered since it was written")


def test_rows_are_scored_until_the_error_is_small_enough(evaluated):
    (loose,), _ = evaluated("--split", "train", "--until-error", 0.05)
    (tight,), _ = evaluated("--split", "train", "--until-error", 0.02, "--micro-batch", 7)
    (all_rows,), text = evaluated("--split", "train", "--until-error", 1e-6)
    bits = [r["standard_error"] * r["bits_per_token"] / r["nats_per_token"] for r in (loose, tight)]
    assert bits[0] <= 0.05
    assert bits[1] <= 0.02
    assert 128 <= loose["rows"] < tight["rows"] < all_rows["rows"]
    assert "--until-error: not reached" in text
    (plain,), _ = evaluated("--split", "train")
    assert all_rows["rows"] == plain["rows"]
    assert all_rows["tokens"] == plain["tokens"] == plain["rows"] * 32
    # The noise of a row is that of its place in the order, so that all rows in another order are another estimate.
    assert abs(all_rows["nats_per_token"] - plain["nats_per_token"]) < 4 * plain["standard_error"]


def test_every_result_carries_its_fine_print(evaluated):
    (result,), _ = evaluated("--steps", 4, "--k", 2, "--seed", 7, "--weights", "raw", "--latent", "fresh")
    wanted = {"protocol": "rows", "split": "validation", "tokens": 39 * 32, "rows": 39, "interval": "full", "steps": 4}
    wanted |= {"latent": "fresh", "k": 2, "weights": "raw", "seed": 7, "bound": "iw", "paths": "balanced", "step": 4}
    assert {key: result[key] for key in wanted} == wanted
    assert result["data"].startswith("text, normalizer text8, tokenizer ")
    assert result["precision"] == "fp32"  # of a CPU
    (compat,), _ = evaluated("--interval", "mdlm_compat")
    assert (compat["bound"], compat["interval"], compat["paths"]) == ("compat", "mdlm_compat", "bernoulli")


def test_in_bf16(call, run, evaluated, tmp_path):
    (exact,), _ = evaluated("--steps", 4)
    (rough,), text = evaluated("--steps", 4, "--precision", "bf16")
    assert rough["precision"] == "bf16"
    assert "precision bf16, attention: denoiser by PyTorch SDPA, encoder by PyTorch SDPA" in text
    assert 0 < abs(rough["nats_per_token"] / exact["nats_per_token"] - 1) < 0.01
    (real, drawn), text = evaluated("--protocol", "generation", "--steps", 4, "--count", 4, "--precision", "bf16")
    assert {real["precision"], drawn["precision"]} == {"bf16"}
    assert "precision bf16, attention: denoiser by PyTorch SDPA\n" in text
    samples = tmp_path / "samples.json"
    code, text = call("sample", "--checkpoint", run, "--steps", 4, "--precision", "bf16", "--json", samples)
    assert code == 0, text
    assert json.loads(samples.read_text())[0]["precision"] == "bf16"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--interval", "mdlm_compat", "--steps", "4"), "--interval mdlm_compat is an estimate of the published code"),
        (("--interval", "mdlm_compat", "--k", "4"), "change --k"),
        (("--protocol", "lm1b_packed"), "protocol lm1b_packed needs shards with data.corpus 'lm1b', these have 'text'"),
        (("--protocol", "generation", "--judge", "ngram:0"), "--judge ngram:0: expected"),
        (("--protocol", "generation", "--judge", "nowhere"), "--judge"),
        (("--protocol", "generation", "--count", "1"), "--count 1: must be at least 2"),
        (("--protocol", "zero_shot"), "needs --source SET=FILE"),
        (("--until-error", "0"), "--until-error 0: must be greater than 0"),
        (("--micro-batch", "0"), "--micro-batch 0: must be at least 1"),
        (("--seed", "-1"), "--seed -1: must be at least 0"),
    ],
)
def test_wrong_options(call, run, arguments, message):
    code, text = call("evaluate", "--checkpoint", run, *arguments)
    assert code == 2, text
    assert text.count("error: ") == 1
    assert message in text


def test_shards_of_another_tokenizer_or_with_other_rows(call, run, lab, tmp_path):
    data = load_config(lab.config).data
    for name, change, message in (
        ("tokenizer", {"tokenizer": "text8_mdlm"}, "data.tokenizer 'text8' is not the one that the shards"),
        ("rows", {"row_length": 16}, "rows of 16, the model was trained on 32"),
    ):
        prepare(data.model_copy(update={**change, "shards": str(tmp_path / name)}), ["validation"], progress=False)
        for protocol in ("rows", "generation"):
            code, text = call("evaluate", "--checkpoint", run, "--shards", tmp_path / name, "--protocol", protocol)
            assert code == 2, text
            assert text.count("error: ") == 1
            assert message in text


def test_results_are_compared_where_they_compare(call, evaluated, tmp_path):
    bounds, compat = tmp_path / "bounds.json", tmp_path / "results.json"
    evaluated("--steps", "1,4")
    compat.rename(bounds)
    evaluated("--interval", "mdlm_compat")
    code, text = call("compare", bounds, compat)
    assert code == 2
    assert "error: these results cannot be compared: interval differs, 'full' and 'mdlm_compat'" in text
    code, text = call("compare", bounds, compat, "--note", "to see what the tail is worth")
    assert code == 0
    assert text.splitlines()[-1] == "note: to see what the tail is worth"
    assert call("compare", bounds)[0] == 0
    assert call("compare", tmp_path / "none.json")[0] == 2
