"""Bad input: exit code 2, one line that names the key or file and what is allowed, and nothing left behind.

Most cases call a launcher's `main` in this process, because importing torch takes seconds; what needs ranks is run for
real.
"""

import hashlib
import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import save_file

from vmd_scale.build import build_model
from vmd_scale.config_file import load_config
from vmd_scale.tokenization import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def launchers():
    """The launchers' `main` by name; they are scripts, not a package."""
    mains = {}
    programs = ("pretrain", "prepare_data", "evaluate", "sample", "export", "finetune", "report")
    for name in (*programs, "compare", "reproduce", "quickstart"):
        spec = importlib.util.spec_from_file_location(f"launcher_{name}", ROOT / "launchers" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        mains[name] = module.main
    return mains


class Desk:
    """A folder with a copy of the prepared corpus, in which a case may break what it likes."""

    def __init__(self, lab, folder: Path) -> None:
        self.folder, self.shards, self.config = folder, folder / "shards", folder / "config.json"
        shutil.copytree(lab.shards, self.shards, ignore=shutil.ignore_patterns(".verified.json"))
        self.values = json.loads(lab.config.read_text())
        self.values["data"]["shards"] = str(self.shards)
        self.write(self.values)

    def write(self, values: object) -> None:
        self.config.write_text(values if isinstance(values, str) else json.dumps(values))

    def files(self) -> dict[Path, bytes]:
        return {path: path.read_bytes() if path.is_file() else b"" for path in sorted(self.folder.rglob("*"))}


@pytest.fixture
def desk(lab, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # pretrain.py without --output would write into ./runs
    return Desk(lab, tmp_path)


@pytest.fixture
def refused(desk, launchers, monkeypatch, capsys):
    """Call a launcher that must refuse; its one line."""

    def call(launcher: str, *arguments: object) -> str:
        before = desk.files()
        monkeypatch.setattr(sys, "argv", [f"{launcher}.py", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_request:
            launchers[launcher]()
        said = capsys.readouterr()
        lines = [line for line in said.err.splitlines() if line.strip() and "tokens/s" not in line]  # progress bars
        assert (exit_request.value.code, said.out) == (2, "")
        assert len(lines) == 1, said.err
        assert lines[0].startswith("error: ")
        assert desk.files() == before
        return lines[0]

    return call


def pretrain(desk, *settings):
    return ["--config", desk.config, *(part for setting in settings for part in ("--set", setting))]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["training.stepz=3"], "unknown key 'training.stepz'; did you mean .*steps'?"),
        (["training.qqqqqq=3"], "unknown key 'training.qqqqqq'; allowed: activation_checkpointing, betas, "),
        (["trainin.steps=3"], "unknown key 'trainin'; did you mean 'training'?"),
        (["training.steps=many"], "training.steps: input should be a whole number, found 'many'"),
        (["training.steps=2.5"], "training.steps: input should be a whole number"),
        (["training.steps=0"], "training.steps: input should be greater than or equal to 1, found 0"),
        (["model.tie_embeddings=1"], "model.tie_embeddings: input should be true or false, found 1"),
        (["training.betas=[0.9]"], "missing key 'training.betas.1'"),
        (["data.packing=loose"], "data.packing: input should be 'wrap', 'pad' or 'document', found 'loose'"),
        (["training.steps"], "--set training.steps: expected KEY=VALUE"),
        (["training.steps.more=1"], "--set training.steps.more=1: steps is a value, not a section"),
        (["training.micro_batch=3"], "training.global_batch (8) must be a multiple of training.micro_batch (3)"),
        (["model.heads=5"], "model.heads (5) must divide model.width (32)"),
        (
            ["diffusion.objective=vmd", "latent.width=0"],
            "diffusion.objective 'vmd' needs a latent, but latent.width is 0",
        ),
        (
            ["diffusion.objective=iw", "latent.width=0"],
            "diffusion.objective 'iw' needs a latent, but latent.width is 0",
        ),
        (
            ["diffusion.objective=iw", "diffusion.free_bits=1"],
            "diffusion.free_bits (1.0) has no meaning with diffusion.objective",
        ),
        (
            ["latent.prior=conditional", "diffusion.block_size=8", "latent.scope=block"],
            "latent.prior 'conditional' needs a latent of scope 'row': found latent.width 8, diffusion.block_size 8",
        ),
        (
            ["diffusion.block_size=5", "latent.scope=block"],
            "diffusion.block_size (5) must divide data.row_length (32)",
        ),
        (
            ["data.packing=document", "diffusion.block_size=8", "latent.scope=block"],
            "diffusion.block_size (8) would cut through the documents of data.packing 'document'",
        ),
        (
            ["data.packing=document", "diffusion.objective=iw", "diffusion.steps=1"],
            "'iw' weighs whole rows: data.packing 'document'",
        ),
        (["latent.scope=block"], "latent.scope 'block' contradicts diffusion.block_size None"),
        (["deepspeed.train_batch_size=16"], "deepspeed.train_batch_size (16) contradicts training.global_batch"),
        (["deepspeed.gradient_clipping=2"], "deepspeed.gradient_clipping (2) contradicts training.gradient_clip"),
        (
            ['deepspeed.bf16={"enabled":true}'],
            "deepspeed.bf16.enabled contradicts training.precision 'fp32'",
        ),
        (
            ['deepspeed.bfloat16={"enabled":true}'],
            "deepspeed.bfloat16 contradicts training.precision; leave it out",
        ),
        (
            ['deepspeed.torch_autocast={"enabled":true,"dtype":"bfloat16"}'],
            "deepspeed.torch_autocast contradicts training.precision; leave it out",
        ),
        (
            ["training.precision=bf16", 'deepspeed.bf16={"bf16_master_weights_and_grads":true}'],
            "deepspeed.bf16.bf16_master_weights_and_grads contradicts training.precision 'bf16': masters, moments",
        ),
        (
            ['deepspeed.data_efficiency={"enabled":true}'],
            "deepspeed.data_efficiency contradicts training.seed, which alone decides what a step is made of",
        ),
        (['deepspeed.amp={"enabled":true}'], "unknown key 'deepspeed.amp'"),
        (["deepspeed.bf16=true"], "deepspeed.bf16 must be an object, found True"),
        (['deepspeed.optimizer={"type":"AdamW"}'], "deepspeed.optimizer contradicts training.learning_rate"),
        (
            ["training.precision=bf16", "deepspeed.zero_optimization.stage=0"],
            "deepspeed.zero_optimization.stage 0 with training.precision bf16 .* use stage 1",
        ),
        (["deepspeed.zero_optimization.stage=7"], "deepspeed.zero_optimization.stage is 7; allowed: 0, 1, 2, 3"),
        (["deepspeed.zero_optimization.stage=two"], "deepspeed.zero_optimization.stage is 'two'; allowed: 0, 1, 2, 3"),
        (
            ["deepspeed.zero_optimization.round_robin_gradients=true"],
            "deepspeed.zero_optimization.round_robin_gradients: checkpoints do not know its layout",
        ),
        (
            ['deepspeed.zero_optimization.offload_optimizer={"device": "nvme"}'],
            "deepspeed.zero_optimization.offload_optimizer.device 'nvme' is not supported; allowed: 'cpu', 'none'",
        ),
        (
            ["deepspeed.zero_optimization.stagee=1"],
            "unknown key 'deepspeed.zero_optimization.stagee'; did you mean 'stage'",
        ),
        (
            ["deepspeed.zero_optimizaton.stage=2"],
            "unknown key 'deepspeed.zero_optimizaton'; did you mean 'zero_optim.*'",
        ),
        (["model.attention=flash"], "model.attention 'flash' needs a GPU and flash-attn"),
        (["data.corpus=textt"], "data.corpus 'textt' is unknown; known: .*; did you mean 'text'?"),
        (["data.tokenizer=./gone"], "data.tokenizer './gone': "),
        (["data.tokenizer=sudoku"], "data.tokenizer 'sudoku' is not the one that the shards in .* were written with"),
        (["data.row_length=64"], "data.row_length is 64, but the shards in .* were written with 32"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_configuration(refused, desk, settings, message):
    line = refused("pretrain", *pretrain(desk, *settings))
    assert re.search(re.escape(message).replace(r"\.\*", ".*"), line), line


def test_configuration_files(refused, desk):
    assert "nothing.json: no such configuration file" in refused("pretrain", "--config", "nothing.json")
    desk.write('{"data": ')
    assert re.search(r"config.json: not a readable JSON file: .*line 1 column 10", refused("pretrain", *pretrain(desk)))
    desk.write("[1, 2]")
    assert "a configuration is a JSON object, found list" in refused("pretrain", *pretrain(desk))
    desk.write({"base": "gone.json"})
    assert "gone.json: no such configuration file" in refused("pretrain", *pretrain(desk))
    (desk.folder / "other.json").write_text('{"base": "config.json"}')
    desk.write({"base": "other.json"})
    line = refused("pretrain", *pretrain(desk))
    assert "'base' goes round in a circle" in line
    assert "other.json" in line
    desk.write({key: value for key, value in desk.values.items() if key != "data"})
    assert "missing key 'data'" in refused("pretrain", *pretrain(desk))


def test_sources(refused, desk):
    """Nothing of a preparation that failed is left: neither the folder of the shards, nor half a shard."""
    shards = f"data.shards={desk.folder / 'new' / 'shards'}"
    for launcher in ("prepare_data", "pretrain"):
        line = refused(launcher, *pretrain(desk, shards, "data.source=null"))
        assert "data.source is missing; corpus 'text' is read from" in line
        line = refused(launcher, *pretrain(desk, shards, "data.source=gone.txt"))
        assert "data.source: no such file: gone.txt" in line
        empty = desk.folder / "empty.txt"
        empty.touch()
        line = refused(launcher, *pretrain(desk, shards, f"data.source={empty}"))
        assert "data.source: split 'train' of corpus 'text' fills no row of 32 tokens: 0 documents" in line
        strange = desk.folder / "strange.txt"
        strange.write_text("plain words\n" * 1000 + "then a résumé\n")
        line = refused(launcher, *pretrain(desk, shards, f"data.source={strange}", "data.normalizer=none"))
        assert re.search("'é'.*data.normalizer|'é'.*alphabet", line), line


def test_shards_that_are_not_what_was_written(refused, desk):
    path = desk.shards / "train-00000.tokens"
    content = path.read_bytes()
    path.write_bytes(content[:-64])
    for call in (("prepare_data", "verify", desk.shards), ("pretrain", *pretrain(desk))):
        line = refused(*call)
        assert f"{path}: truncated or altered: expected {len(content)} bytes, found {len(content) - 64}" in line
    path.unlink()
    assert f"{path}: missing" in refused("pretrain", *pretrain(desk))
    altered = np.frombuffer(content, dtype="<u2").copy()
    altered[40] ^= 1
    path.write_bytes(altered.tobytes())
    assert f"{path}: altered since it was written: sha256" in refused("prepare_data", "verify", desk.shards)
    path.write_bytes(content)
    manifest = json.loads((desk.shards / "manifest.json").read_text())
    (desk.shards / "manifest.json").write_text(json.dumps({**manifest, "vocab_size": 70_000}))
    line = refused("pretrain", *pretrain(desk))
    assert "manifest.json: damaged manifest" in line
    assert "dtype uint16 is too small for a vocabulary of 70000" in line


def test_an_altered_shard_is_found_before_training_by_every_rank(lab, desk):
    """Real ranks: each compares its share of the checksums. The ids stay inside the vocabulary."""
    path = desk.shards / "train-00000.tokens"
    tokens = np.frombuffer(path.read_bytes(), dtype="<u2").copy()
    tokens[40] = (tokens[40] + 1) % 27
    path.write_bytes(tokens.tobytes())
    before = desk.files()
    finished = lab.pretrain(desk.folder / "run", f"data.shards={desk.shards}", ranks=2, expect=2)
    for rank in finished:
        assert len(rank.errors) == 1
        assert f"{path}: altered since it was written" in rank.errors[0]
        assert "Traceback" not in rank.text
    assert desk.files() == before


def test_what_was_verified_once_is_not_hashed_again_until_it_changes(desk, monkeypatch):
    from vmd_scale.data import shards
    from vmd_scale.data.verification import remember, verify_share

    hashed = []
    genuine = shards.sha256_of
    monkeypatch.setattr(shards, "sha256_of", lambda path: hashed.append(path.name) or genuine(path))
    splits = ("train", "validation")
    answers = [verify_share(desk.shards, splits, rank, 2) for rank in range(2)]
    assert [problem for problem, _ in answers] == [None, None]
    assert sorted(hashed) == ["train-00000.tokens", "validation-00000.tokens"]  # each once
    remember(desk.shards, [good for _, good in answers])
    assert verify_share(desk.shards, splits, 0, 1)[0] is None
    assert len(hashed) == 2
    path = desk.shards / "validation-00000.tokens"
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)
    assert "validation-00000.tokens: altered" in verify_share(desk.shards, splits, 0, 1)[0]


def test_a_real_process_says_one_line_and_exits_with_2(lab, desk):
    before = desk.files()
    finished = lab.launch("pretrain", *pretrain(desk, "training.stepz=3"), "--output", desk.folder / "run")
    assert finished.code == 2
    (line,) = finished.text.splitlines()
    assert line.startswith(f"error: {desk.config}: unknown key 'training.stepz'; did you mean ")
    assert desk.files() == before


def test_evaluation_sampling_and_export(refused, desk):
    empty = desk.folder / "nothing"
    line = refused("evaluate", "--checkpoint", empty, "--protocol", "wikitex")
    assert "protocol 'wikitex' does not exist; allowed: rows, text8, " in line
    assert line.endswith(", zero_shot, generation")
    for protocol, options, unused in (
        ("rows", ("--temperature", 0.5, "--source", "ptb=x"), "--temperature, --source"),
        ("generation", ("--k", 64, "--until-error", 0.1), "--k, --until-error"),
        ("zero_shot", ("--split", "test", "--judge", "x"), "--judge, --split"),
    ):
        line = refused("evaluate", "--checkpoint", empty, "--protocol", protocol, *options)
        assert f"--protocol {protocol} has no use for {unused}" in line
    for launcher, more in (("evaluate", ()), ("sample", ()), ("export", ("--output", desk.folder / "out"))):
        assert f"--checkpoint {empty}: no checkpoint there; expected a run folder" in refused(
            launcher, "--checkpoint", empty, *more
        )
    for launcher in ("evaluate", "sample"):
        line = refused(launcher, "--checkpoint", empty, "--steps", "0")
        assert "--steps '0': expected positive whole numbers or 'inf', such as 1,4,inf" in line
    for launcher, option, value, wanted in (
        ("sample", "--count", 0, "must be at least 1"),
        ("sample", "--seed", -1, "must be at least 0"),
        ("evaluate", "--seed", -1, "must be at least 0"),
        ("evaluate", "--rows", -3, "must be at least 2"),
        ("evaluate", "--draws", 0, "must be at least 1"),
        ("evaluate", "--until-error", -1, "must be greater than 0"),
    ):
        line = refused(launcher, "--checkpoint", empty, option, value)
        assert f"{option} {value}: {wanted}" in line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--output", "a-file"], "--output .*a-file/config.json: .*a-file is not a folder"),
        (["--output", "a-file/inside"], "--output .*a-file/inside/config.json: .*a-file is not a folder"),
        (["--output", "shards"], "--output shards: exists and is not an exported model"),
        (["--max-shard-size", "abc"], "--max-shard-size 'abc': expected a size such as 500MB or 5GB"),
        (["--max-shard-size", "0GB"], "--max-shard-size '0GB': expected a size"),
        (["--max-shard-size", "1.2.3GB"], "--max-shard-size '1.2.3GB': expected a size"),
        (["--max-shard-size", "5"], "--max-shard-size '5': expected a size"),
        (["--json", "shards"], "--json .*shards: is a folder, expected a file"),
        (["--public"], "an export without --push has no use for --public"),
    ],
)
def test_export_refuses_before_it_loads_a_model(refused, desk, options, message):
    (desk.folder / "a-file").touch()
    line = refused("export", "--checkpoint", "nothing", *([] if "--output" in options else ["--output", "o"]), *options)
    assert re.search(message, line), line


def fine_tuned(desk, *more, corpus="text", source="new.txt", output="tuned", weights="weights.safetensors"):
    (desk.folder / weights).touch()
    wanted = ["--from", weights, "--corpus", corpus, "--output", output]
    return [*wanted, "--config", desk.config, "--source", source, *more]


def test_fine_tuning(refused, desk):
    line = refused("finetune", "--from", "nowhere", "--corpus", "text", "--output", "tuned")
    assert "--from nowhere: no such file or folder" in line
    (desk.folder / "a-file").touch()
    arguments = fine_tuned(desk, output="a-file")
    assert "a-file is not a folder" in refused("finetune", *arguments)
    line = refused("finetune", *fine_tuned(desk, "--set", "training.stepz=3"))
    assert "unknown key 'training.stepz'; did you mean" in line
    line = refused("finetune", *fine_tuned(desk, source="train=a.jsonl,tests=b.jsonl"))
    assert "expected train=FILE,validation=FILE,test=FILE, found 'tests'" in line
    news = desk.folder / "news.jsonl"
    news.write_text("".join(json.dumps({"prompt": "a", "label": label}) + "\n" for label in ("+1", "-1") * 20))
    line = refused("finetune", *fine_tuned(desk, corpus="labels", source=str(news)))
    assert "labels '+1' and '-1' are the same tokens by data.tokenizer 'text8' and data.normalizer 'text8'" in line


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["model.layers=3"], "training.init_from weights.safetensors: has no denoiser.blocks.2."),
        (
            ["model.width=48", "model.heads=3"],
            "denoiser.blocks.0.attention.out.weight is [32, 32], this model's is [48, 48]",
        ),
        (["data.row_length=64"], "position.weight is [32, 32], this model's is [64, 32]; a row may become shorter"),
        (['training.trainable=["denoiser.haed.*"]'], "training.trainable: no parameter matches 'denoiser.haed.*'"),
        (['training.trainable=["latent"]', "latent.width=0"], "'latent' needs a latent, but latent.width is 0"),
        (['training.lora={"rank": 2, "layers": ["qkv"]}'], "training.lora.layers: no parameter matches 'qkv'"),
        (["training.init_from=nothing.pt"], "training.init_from: no such file or folder: nothing.pt"),
        (["training.init_from=text.pt"], "text.pt: not readable as weights alone"),
        (["training.init_from=half.safetensors"], "half.safetensors: not readable as weights alone"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_first_weights_are_looked_at_before_the_corpus_is_prepared(refused, desk, settings, message):
    """Which may take hours, and would leave shards in a folder that was named by mistake."""
    config = load_config(desk.config)
    weights = {name: value.contiguous() for name, value in build_model(config, 27).state_dict().items()}
    save_file(weights, "weights.safetensors")
    (desk.folder / "half.safetensors").write_bytes((desk.folder / "weights.safetensors").read_bytes()[:5000])
    (desk.folder / "text.pt").write_text("no weights")
    wanted = ["training.init_from=weights.safetensors", "data.shards=run/shards", *settings]
    line = refused("pretrain", *pretrain(desk, *wanted), "--output", "run")
    assert message in line


def test_the_folder_of_another_run_is_left_alone(refused, desk):
    """It would refuse to go on; but only after the corpus was prepared in it."""
    checkpoint = desk.folder / "other" / "checkpoints" / "step-00000004"
    checkpoint.mkdir(parents=True)
    tokenizer = load_tokenizer("text8")
    state = {"tokenizer_fingerprint": tokenizer.fingerprint, "config": load_config(desk.config).model_dump(mode="json")}
    content = json.dumps(state).encode()
    (checkpoint / "run_state.json").write_bytes(content)
    digest = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (checkpoint / "manifest.json").write_text(json.dumps({"step": 4, "files": {"run_state.json": digest}}))
    wanted = pretrain(desk, "training.global_batch=16", "data.shards=other/shards")
    line = refused("pretrain", *wanted, "--output", "other")
    assert "training.global_batch is 16, but other/checkpoints/step-00000004 was trained with 8" in line


def test_names_that_are_none_do_not_train_everything(refused, desk):
    for names in ("", "latent,", " "):
        line = refused("finetune", *fine_tuned(desk, "--train-only", names))
        assert f"--train-only {names!r}: expected names with commas between them" in line


def test_what_would_be_ignored_is_refused(refused, desk):
    for options, message in (
        (("--ranks", 0, "--dry-run"), "--ranks 0: must be at least 1"),
        (("--ranks", 4), "--ranks 4: only with --dry-run"),
    ):
        assert message in refused("pretrain", *pretrain(desk), *options)
    for options, message in (
        ([*pretrain(desk), "--plot", "x.png"], "prepare has no use for --plot"),
        (["inspect", desk.shards, "--force", "--json", "x"], "inspect has no use for --force, --json"),
        (["verify", desk.shards, "--plot", "x.png"], "verify has no use for --plot"),
    ):
        assert message in refused("prepare_data", *options)


def test_comparison_reproduction_and_quickstart(refused, desk):
    assert "nowhere.json: not a readable JSON file" in refused("compare", "nowhere.json")
    (desk.folder / "none.json").write_text("[]")
    assert "none.json: no results" in refused("compare", "none.json")
    (desk.folder / "wrong.json").write_text('[{"protocol": "rows"}]')
    assert "wrong.json: 0.split: field required" in refused("compare", "wrong.json")
    assert "--seeds 0: must be at least 1" in refused("reproduce", "two_tokens", "--seeds", 0)
    line = refused("reproduce", "two_tokens", "--set", "training.stepz=3")
    assert "unknown key 'training.stepz'; did you mean" in line
    assert "unknown key 'training.stepz'" in refused("quickstart", "--set", "training.stepz=3")


def test_report(refused, desk):
    (desk.folder / "run").mkdir()
    shutil.copy(desk.config, desk.folder / "run" / "config.json")
    (desk.folder / "a-file").touch()
    assert "nowhere: not a run folder, there is no such folder" in refused("report", "nowhere")
    assert "--watch 0: must be at least 1" in refused("report", "run", "--watch", 0)
    assert f"--output {desk.shards}: is a folder" in refused("report", "run", "--output", "shards")
    assert "a-file is not a folder" in refused("report", "run", "--output", "a-file/page.html")
    assert "a-file is not a folder" in refused("report", "run", "--png", "a-file")


def test_the_run_folder_is_a_folder(refused, desk):
    (desk.folder / "a-file").touch()
    line = refused("pretrain", *pretrain(desk), "--output", "a-file")
    assert re.search("--output .*/a-file/config.json: .*/a-file is not a folder", line), line
