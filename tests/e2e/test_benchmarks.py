"""The scripts in benchmarks/ run, tiny. What they measure is for a quiet machine, and for a GPU."""

import importlib.util
import json
import lzma
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*command, timeout=300, first_on_path=None, expected=0, cwd=ROOT):
    path = os.pathsep.join(map(str, filter(None, (first_on_path, ROOT))))
    environment = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == expected, (done.stdout + done.stderr)[-3000:]
    return done.stdout


def test_gpu_check_tries_every_part_where_little_is_installed(tmp_path):
    """As on a bare machine with a GPU, which has torch and numpy alone; parts that need more are skipped."""
    parts = ("environment", "ceilings", "throughput 110M", "attention", "head", "where the time goes", "throughput 1B")
    parts += ("110M without compile", "110M by kernel", "110M in fp8", "synchronisation", "sampling", "checkpointing")
    parts += ("trainer 110M", "resume")
    file, bare = tmp_path / "check.json", tmp_path / "bare"
    for package in ("pydantic", "deepspeed", "tqdm"):
        (bare / package).mkdir(parents=True)
        (bare / package / "__init__.py").write_text(f"raise ImportError('no {package} here')")
    run("benchmarks/gpu_check.py", "--cpu", "--output", file, "--only", *parts, first_on_path=bare, expected=1)
    found = json.loads(file.read_text())
    assert set(found) == set(parts)
    failed = {name: part["failed"] for name, part in found.items() if "failed" in part}
    assert set(failed) == {"trainer 110M", "resume"}, failed  # these packages can be found, and not be imported
    assert [name for name, part in found.items() if "skipped" in part] == ["synchronisation", "110M in fp8"]
    assert sum(found["where the time goes"]["share"].values()) > 0.99
    assert {"mdm", "vmd"} <= set(found["throughput 110M"])


def test_gpu_check_runs_every_test_that_needs_a_gpu():
    script = (ROOT / "benchmarks" / "gpu_check.py").read_text()
    tests = [path for path in (ROOT / "tests" / "unit").glob("test_*.py") if 'reason="needs a GPU"' in path.read_text()]
    assert len(tests) > 5
    assert [path.name for path in tests if f'"{path.name}"' not in script] == []


def test_gpu_check_trains_and_resumes(tmp_path):
    file, trainers = tmp_path / "check.json", ("trainer 110M", "trainer 110M, Muon", "configs/ladder/110m.json")
    said = run("benchmarks/gpu_check.py", "--cpu", "--output", file, "--only", *trainers, "resume")
    found = json.loads(file.read_text())
    for name in trainers:
        assert found[name]["tokens_per_second"] > 0
        assert found[name]["peak_memory_gib"] > found[name]["predicted_memory_gib"] > 0  # of the process, of tensors
    assert re.search(r"VMD step, 110 M: MFU +- +0\.45 +-\n", said)  # it did not run
    assert re.search(r"the same in pretrain\.py +0\.\d+ +0\.45 +(met|missed)\n", said)
    assert found["resume"]["ok"]
    assert len(found["resume"]["whole"]) == 6


def test_gpu_check_outlives_parts_that_crash_or_never_end(tmp_path):
    script = """
import os, sys, time
sys.path.insert(0, "benchmarks")
import gpu_check

def process():
    return {"pid": os.getpid()}

class Check(gpu_check.Check):
    def parts(self):
        wanted = {"first": process, "error": lambda: 1 / 0, "second": process}
        wanted |= {"crash": lambda: os._exit(3), "endless": lambda: time.sleep(600), "good": lambda: {"found": 1}}
        return {name: (run, -19 if name == "endless" else 60) for name, run in wanted.items()}

gpu_check.Check = Check
if __name__ == "__main__":
    gpu_check.main()
"""
    (tmp_path / "check.py").write_text(script)
    file = tmp_path / "check.json"
    done = run(tmp_path / "check.py", "--cpu", "--output", file, expected=1)
    found = json.loads(file.read_text())
    assert "ZeroDivisionError" in found["error"]["failed"]
    assert found["first"]["pid"] != found["second"]["pid"]  # an error may have broken what all of a process share
    assert found["crash"]["failed"] == "exit code 3"
    assert found["endless"]["failed"] == "did not end in time"
    assert found["good"]["found"] == 1
    assert "crash" in done


def test_gpu_check_begins_nothing_that_it_could_not_end(tmp_path):
    file = tmp_path / "check.json"
    run("benchmarks/gpu_check.py", "--cpu", "--output", file, "--seconds", "3", "--only", "environment", "sampling")
    found = json.loads(file.read_text())
    assert "packages" in found["environment"]
    assert "needed" in found["sampling"]["skipped"]


SMALL = ("model.layers=1", "model.width=32", "model.heads=2", "latent.width=8", "data.row_length=32")
SETTINGS = [part for setting in SMALL for part in ("--set", setting)]
SHORT = ["--set", "training.steps=2", "--set", "evaluation.rows=4"]
SMOKE = {
    "attention": (["--lengths", "32", "--rows", "1", "--heads", "1", "--width", "8", "--rounds", "1"], "length 32"),
    "sampling": (["--steps", "2", "--batches", "1", "--vocab", "27", "--rounds", "1", "--no-compile"], "sampling"),
    "train_step": (
        ["--rows", "1", "--rounds", "1", "--vocab", "300", "27"],
        "overhead of DeepSpeed, loop and telemetry",
    ),
    "memory": (["--zero", "0", *SETTINGS], "memory"),
    "checkpoint": (["--saves", "1", *SETTINGS], "checkpoint"),
    "encoder": (["--encoder", "1x16", "--seeds", "1", *SETTINGS, *SHORT], "encoders"),
}


@pytest.mark.parametrize("name", SMOKE)
def test_a_benchmark_writes_what_it_found_and_a_page_beside(name, tmp_path):
    arguments, part = SMOKE[name]
    file = tmp_path / "found.json"
    run(ROOT / "benchmarks" / f"{name}.py", *arguments, "--json", file, cwd=tmp_path)
    assert json.loads(file.read_text())[part]
    assert f"benchmarks/{name}.py" in (tmp_path / "found.md").read_text()


def test_a_case_has_enough_rounds_and_no_more_than_its_time(monkeypatch):
    """Two cases of 10 seconds each, by a clock that they move themselves."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import comparing

    now = [0.0]
    monkeypatch.setattr(comparing.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(comparing.Clock, "now", staticmethod(lambda: now[0]))

    def takes(seconds):
        return lambda: now.__setitem__(0, now[0] + seconds)

    def rounds(**limits):
        return len(comparing.in_turns({"a": takes(10), "b": takes(10)}, warmup=0, **limits)["a"])

    assert [rounds(repeats=9, seconds=s) for s in (None, 1, 119, 1000)] == [9, 5, 6, 9]
    assert rounds(repeats=2, seconds=1000) == 2
    times = {"a": [2.0, 1.0, 1.0, 1.0, 8.0], "b": [1.0] * 5}
    assert comparing.quartiles(times, "a", "b") == (1, 2)
    assert comparing.quartiles({"a": [3.0], "b": [1.0]}, "a", "b") == (3, 3)


def test_kernels_are_told_apart_by_what_they_are_for(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from kernel_times import kind_of

    assert {name: kind_of(name) for name in NAMES_OF_KERNELS} == NAMES_OF_KERNELS


NAMES_OF_KERNELS = {
    "triton_red_fused__to_copy_amax_exp_gather_sub_sum_0": "compiled element-wise",
    "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x64x128": "attention",
    "cudnn_generated_fort_native_sdpa_sm90_bprop": "attention",
    "nvjet_tst_192x192_64x4_2x1_v_bz_coopB_TNT": "matrix products",
    "void at::native::(anonymous namespace)::compute_grad_weight<c10::BFloat16, int>": "embedding and gather",
    "void at::native::multi_tensor_apply_kernel<...FusedAdamMathFunctor...>": "optimizer",
    "Memcpy DtoD (Device -> Device)": "copies",
    "void at::native::vectorized_elementwise_kernel<4, at::native::sigmoid>": "other element-wise",
}


def test_a_peers_attention_is_ours_where_flash_attn_is_missing(monkeypatch):
    """The stand-in for flash-attn, as MDLM calls it, against attention by its formula."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import peers
    import torch

    from vmd_scale.model.attention import apply_rotary, attention, rotary_table

    for name in ("flash_attn", "flash_attn.layers", "flash_attn.layers.rotary", "flash_attn.flash_attn_interface"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    before = set(sys.modules)
    peers.stand_in_for_flash_attn()
    try:
        flash = importlib.import_module("flash_attn")
        rows, length, heads, width = 3, 8, 2, 4
        qkv = torch.randn(rows, length, 3, heads, width, generator=torch.Generator().manual_seed(0))
        cos, sin = rotary_table(torch.arange(length), width)
        turned = flash.layers.rotary.apply_rotary_emb_qkv_(qkv.clone(), cos[:, 0], sin[:, 0])
        q, k = (apply_rotary(x, (cos, sin)) for x in qkv.unbind(2)[:2])
        torch.testing.assert_close(turned, torch.stack((q, k, qkv[:, :, 2]), 2))
        ends = torch.arange(0, (rows + 1) * length, length, dtype=torch.int32)
        kernel = flash.flash_attn_interface.flash_attn_varlen_qkvpacked_func
        found = kernel(turned.flatten(0, 1), ends, length, 0.0, causal=False).unflatten(0, (rows, length))
        torch.testing.assert_close(found, attention(q, k, qkv[:, :, 2], None, "reference"))
    finally:
        for name in set(sys.modules) - before:
            del sys.modules[name]


def test_peers_are_named_by_their_clones(tmp_path):
    """One that is none ends it at once; without any, ours alone are measured."""
    run("benchmarks/peers.py", "--mdlm", tmp_path, expected=2)
    tiny = ("--layers", 1, "--width", 32, "--heads", 2, "--length", 32, "--rows", 2, "--vocab", 50, "--draw", 1)
    file = tmp_path / "peers.json"
    run("benchmarks/peers.py", *tiny, "--rounds", 1, "--steps", 2, "--no-compile", "--json", file)
    found = json.loads(file.read_text())
    assert set(found["training step"]) == set(found["sampling"]) == {"our VMD", "our MDM"}


SOLUTION = "864371259325849761971265843436192587198657432257483916689734125713528694542916378"


@pytest.fixture(scope="module")
def little_data(tmp_path_factory):
    """What benchmarks/finetune.py reads, made up: news, documents, and puzzles that are one another's renamings."""
    choice = random.Random(0)
    folder = tmp_path_factory.mktemp("data")

    def write(name, lines):
        (folder / name).parent.mkdir(exist_ok=True)
        with lzma.open(folder / name, "wt", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)

    def words(count):
        return " ".join("".join(choice.choices("aeionrstlm", k=choice.randint(2, 7))) for _ in range(count))

    def puzzle():
        solution = SOLUTION.translate(str.maketrans("123456789", "".join(choice.sample("123456789", 9))))
        return "".join(digit if choice.random() < 0.6 else "0" for digit in solution) + f",{solution}"

    for corpus in ("wiki/wiki2019_docs.jsonl.xz", "openwebtext/openwebtext_1000docs.jsonl.xz"):
        write(corpus, (json.dumps({"text": words(400)}) for _ in range(60)))
    write("zero_shot/ag_news_test.csv.xz", (f'"{n % 4 + 1}","{words(2)}","{words(3)}"' for n in range(5640)))
    write("sudoku/kids.csv.xz", (puzzle() for _ in range(100)))
    write("sudoku/expert.csv.xz", (puzzle() for _ in range(2140)))
    return folder


@pytest.mark.parametrize(("task", "starts"), [("ag_news", ["adapters"]), ("sudoku", ["scratch", "latent alone"])])
def test_finetune_goes_all_the_way(task, starts, little_data, tmp_path):
    """Two steps of each run, from one number of labels."""
    script = f"""
import sys
from pathlib import Path
sys.path.insert(0, "benchmarks")
import finetune

finetune.RUNS, finetune.LABELLED, finetune.RATES = Path({str(tmp_path)!r}), (200,), (1e-3,)
finetune.STARTS = {{name: finetune.STARTS[name] for name in {starts!r} if name in finetune.STARTS}}
finetune.main()
"""
    (tmp_path / "little.py").write_text(script)
    file = tmp_path / "found.json"
    run(tmp_path / "little.py", task, "--data", little_data, "--scale", "0.001", "--json", file, timeout=900)
    rows = json.loads(file.read_text())["rows"]
    if task == "ag_news":
        assert [(row["labelled"], row["start"], row["rows"]) for row in rows] == [(200, "adapters", 40)]
    else:
        wanted = [(start, steps) for start in ("pretrained alone", *starts) for steps in (2, 10)]
        assert [(row["start"], row["steps"]) for row in rows] == wanted
        assert all(0.05 < row["cells right"] < 0.5 for row in rows)


def test_chaos_breaks_a_run_finds_it_unharmed_and_counts_what_was_made_again(lab, tmp_path):
    """One rank, stopped once and then killed, with damage to the manifest of its newest checkpoint."""
    file = tmp_path / "chaos.json"
    small = ("--config", lab.config, "--sizes", "1", "--steps", "100", "--events", "2")
    small += ("--kinds", "SIGTERM,lost end (manifest)")
    run("benchmarks/chaos.py", "--folder", tmp_path / "chaos", "--json", file, *small)
    found = json.loads(file.read_text())["chaos"]
    assert (found["same"], found["rows_equal"], found["largest_difference_of_weights"]) == (True, True, 0)
    assert (found["events"], found["at_start_up"]) == ({"SIGTERM": 1, "lost end (manifest)": 1}, 0)
    starts = [int(line) for line in (tmp_path / "chaos" / "disturbed-1" / "starts.txt").read_text().split()]
    assert len(starts) == 3
    assert starts[1] > 0  # the stop has cost nothing; the damage, the steps since the checkpoint before
    assert 0 < found["steps_lost"] == found["most_steps_lost_at_once"] <= 100 - starts[2]


@pytest.fixture(scope="module")
def chaos():
    spec = importlib.util.spec_from_file_location("chaos", ROOT / "benchmarks" / "chaos.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["chaos"] = module  # its dataclasses look there
    sys.path.insert(0, str(ROOT / "benchmarks"))
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(ROOT / "benchmarks"))
    del sys.modules["chaos"]


def test_chaos_deals_every_kind_of_event_before_any_a_second_time(chaos):
    deck = chaos.Deck(list(chaos.KINDS), random.Random(0))
    early = [deck.deal(lambda kind: "(manifest)" not in kind) for _ in range(3)]
    later = [deck.deal(lambda kind: True) for _ in range(2 * len(chaos.KINDS) - 3)]
    dealt = early + later
    assert sorted(dealt[: len(chaos.KINDS)]) == sorted(dealt[len(chaos.KINDS) :]) == sorted(chaos.KINDS)


def test_chaos_counts_from_the_step_that_was_really_resumed(chaos):
    """The next start counts, be it killed before it has made a step; what a damaged checkpoint held is lost too."""
    tally = chaos.Tally()
    for first, reached in ((0, 37), (20, 45), (30, 30), (30, 50)):
        tally.started_from(first)
        tally.reached = max(tally.reached, reached)
    assert tally.steps_lost == [0, 17, 15, 0]


@pytest.mark.parametrize(
    ("event", "trains", "codes", "said"),
    [
        ("kill -9 of all", False, [0, 1], "before the kill -9 of all, ranks ended with exit codes"),
        ("SIGTERM", True, [75, 1], "after the SIGTERM, ranks ended with exit codes"),
        ("SIGUSR1", True, [0, 75], "after the SIGUSR1"),
    ],
)
def test_chaos_takes_no_crash_for_an_event_that_was_survived(chaos, monkeypatch, tmp_path, event, trains, codes, said):
    class Ranks:
        first_step, alive = (0, trains) if trains else (None, False)

        def __init__(self, *_):
            self.processes = []

        def wait(self, timeout):
            return codes

    monkeypatch.setattr(chaos, "Ranks", Ranks)
    monkeypatch.setattr(chaos, "stop", lambda *_: codes)
    monkeypatch.setattr(chaos, "last_step", lambda _: 100)
    tally = chaos.Tally()
    with pytest.raises(SystemExit, match=said):
        chaos.disturb(chaos.Start(tmp_path, tmp_path, 1000, 2), event, random.Random(0), tally)
    assert not tally.events


@pytest.mark.parametrize("of_manifest", [False, True])
@pytest.mark.parametrize("how", ["flipped bit", "lost end", "missing file"])
def test_chaos_really_damages_what_it_says(chaos, tmp_path, how, of_manifest):
    from vmd_scale.files import sha256_of

    checkpoint = tmp_path / "checkpoints" / "step-00000010"
    for number in range(10 if how == "flipped bit" else 1):  # some bits of a manifest mean nothing
        checkpoint.mkdir(parents=True, exist_ok=True)
        (checkpoint / "weights").write_bytes(b"weights")
        record = {"bytes": 7, "sha256": sha256_of(checkpoint / "weights")}
        (checkpoint / "manifest.json").write_text(json.dumps({"step": 10, "files": {"weights": record}}))
        before = (checkpoint / "manifest.json").read_bytes()
        assert chaos.sound(tmp_path) == [checkpoint]
        chaos.damage(checkpoint, how, random.Random(number), of_manifest)
        assert not chaos.sound(tmp_path)
        manifest = checkpoint / "manifest.json"
        assert (manifest.exists() and manifest.read_bytes() == before) != of_manifest


def test_data_is_measured_and_what_is_not_installed_is_named(tmp_path):
    file, documents = tmp_path / "data.json", tmp_path / "docs.txt"
    documents.write_text("\n".join(f"document {'abc'[n % 3] * 5} of a small collection of text" for n in range(9000)))
    tiny = ("--megabytes", "0.1", "0.4", "--repeats", "1", "--folder", tmp_path / "scratch", "--json", file)
    run("benchmarks/data.py", documents, *tiny)
    found = json.loads(file.read_text())
    assert {"prepare", "read", "order", "wait", "date", "command", "hardware"} <= set(found)
    assert [(case["workers"], case["tokens"] > 0) for case in found["prepare"]] == [(1, True), (2, True)] * 2
    speeds = found["read"]["rows_per_second"]
    assert speeds["ours"] > 0
    assert speeds["datasets"] > 0
    if importlib.util.find_spec("streaming") is None:
        assert speeds["mosaicml_streaming"] == "left out: not installed"
    assert [case["rows"] for case in found["order"]] == [10**6, 10**9, 10**12]
    assert 0 <= found["wait"]["data_wait_share_of_a_step"] <= 1
    # Another input in the same folder is not taken for this one.
    documents.write_text("other text of no length in particular\n" * 7000)
    run("benchmarks/data.py", documents, *tiny, "--only", "read")
    assert json.loads(file.read_text())["read"]["rows"] != found["read"]["rows"]


def test_protocols_are_counted_and_estimators_compared(tmp_path):
    """On text of the test's own; other parts of the file are kept."""
    words, choice = ["mask", "latent", "noise", "of", "the", "model"], random.Random(0).choice
    for name in ("text8/text8.prefix.xz", "wiki/wiki2019_text8style.txt.xz"):
        path = tmp_path / name
        path.parent.mkdir()
        path.write_bytes(lzma.compress(" ".join(choice(words) for _ in range(2000)).encode()))
    file = tmp_path / "protocols.json"
    to = ("--data", tmp_path, "--json", file)
    run("benchmarks/protocols.py", "counts", *to, "--only", "text8", "text8_mdlm")
    tiny = ("--folder", tmp_path / "runs", "--steps", "2", "--replicates", "2")
    run("benchmarks/protocols.py", "estimators", *to, *tiny)
    found = json.loads(file.read_text())
    assert [record["protocol"] for record in found["counts"]] == ["text8", "text8_mdlm"]
    assert all(record["caveat"] for record in found["counts"])
    assert [bound["steps"] for bound in found["estimators"]["bounds"]] == [1, 4, 16, 64, "inf"]
    assert len(found["estimators"]["errors"]["ways"]) == 4
    assert set(found["made"]) == {"counts", "estimators"}
    page = file.with_suffix(".md").read_text()
    for made in found["made"].values():
        assert f"Made on {made['date']} by `{made['command']}` on {made['hardware']}." in page
