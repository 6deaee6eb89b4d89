"""What the protocols count on real files, and what their estimates are worth.

    python benchmarks/protocols.py counts --data DIR           documents, rows and counted tokens of every protocol
    python benchmarks/protocols.py reference --data DIR        ids of GPT-2 and BERT by the reference tokenizers
    python benchmarks/protocols.py estimators --data DIR       standard errors at equal cost; a model on real text8

DIR is a folder with the files of FILES and tokenizers/ (GPT-2's and BERT's). Each command writes its part of
docs/results/protocols.json and the page beside it. `counts` trains the tokenizer of lm1b_d3pm on LM1B_SAMPLE.
`reference` needs transformers 4, whose GPT2Tokenizer and BertTokenizer are the authors' own code in Python; what it
finds is kept in tests/unit/reference_ids.json, which the tests compare with. `estimators` trains a small model first
(minutes on two cores), in runs/protocols.
"""

import argparse
import hashlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vmd_scale.checkpoints import TrainedModel, find_checkpoint, load_trained
from vmd_scale.config import DataConfig
from vmd_scale.data.corpora import raw_documents
from vmd_scale.data.prepare import prepare
from vmd_scale.data.shards import ShardReader
from vmd_scale.diffusion.compat import MDLM_EPSILON, compat_estimate, estimate_at
from vmd_scale.diffusion.likelihood import Rows, elbo
from vmd_scale.diffusion.noise import Noise, Stream
from vmd_scale.diffusion.sampler import Sampler
from vmd_scale.errors import UserError, reports_user_errors
from vmd_scale.evaluation.perplexity import Request, chosen_rows, evaluate
from vmd_scale.evaluation.protocols import get_protocol
from vmd_scale.files import check_writable, write_atomically, write_json
from vmd_scale.provenance import provenance

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results" / "protocols.json"
REFERENCE = ROOT / "tests" / "unit" / "reference_ids.json"

FILES = {  # corpus -> split, file
    "lm1b": ("test", "lm1b/news.en.heldout-00000-of-00050"),
    "ptb": ("validation", "zero_shot/ptb.valid.txt"),
    "wikitext": ("validation", "zero_shot/wikitext2.valid.tokens.xz"),
    "lambada": ("test", "zero_shot/lambada_test.jsonl.xz"),
    "ag_news": ("test", "zero_shot/ag_news_test.csv.xz"),
    "openwebtext": ("validation", "openwebtext/openwebtext_1000docs.jsonl.xz"),
    "text8": ("test", "text8/text8.prefix.xz"),
}
LM1B_SAMPLE = "lm1b/dev_sample.tokens.xz"
GPT2 = {"tokenizer": "gpt2", "row_length": 1024}
BERT = {"tokenizer": "bert", "row_length": 128, "row_specials": True}
COUNTED = {  # protocol -> corpus, how its rows are made
    "text8": ("text8", {"tokenizer": "text8", "row_length": 256}),
    "text8_mdlm": ("text8", {"tokenizer": "text8_mdlm", "row_length": 256, "row_specials": True}),
    "lm1b_packed": ("lm1b", BERT),
    "lm1b_unpacked": ("lm1b", {**BERT, "packing": "pad"}),
    "lm1b_unpacked_mdlm": ("lm1b", {**BERT, "packing": "pad"}),
    "lm1b_d3pm": ("lm1b", {"tokenizer": "sentencepiece", "row_length": 128, "normalizer": "none"}),
    "owt_mdlm": ("openwebtext", {**GPT2, "row_specials": True}),
    "owt_bd3": ("openwebtext", GPT2),
    **{
        f"zero_shot/{c}": (c, {**GPT2, "row_specials": True}) for c in ("ptb", "wikitext", "lm1b", "lambada", "ag_news")
    },
}
TRAINED_ON = "wiki/wiki2019_text8style.txt.xz"
REPLICATE_ROWS, MDLM_BATCH = 128, 64


def config_of(corpus: str, data: Path, **more: Any) -> DataConfig:
    """The data section for one of FILES."""
    split, file = FILES[corpus]
    if more["tokenizer"] in ("gpt2", "bert"):
        more["tokenizer"] = f"{more['tokenizer']}:{data / 'tokenizers'}"
    return DataConfig(corpus=corpus, source={split: str(data / file)}, **{"shards": "none", **more})


def counts(data: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """What each of these protocols makes of its file."""
    found = []
    for name in names:
        found.append(count(name, data))
        print(json.dumps(found[-1]), flush=True)
    return found


def count(name: str, data: Path) -> dict[str, Any]:
    """What one protocol makes of its file."""
    corpus, how = COUNTED[name]
    protocol, split = get_protocol(name), FILES[corpus][0]
    with tempfile.TemporaryDirectory() as folder:
        if how["tokenizer"] == "sentencepiece":
            how = {**how, "tokenizer": str(sentencepiece_model(data, Path(folder)))}
        manifest = prepare(config_of(corpus, data, **how, shards=f"{folder}/shards"), progress=False)
        protocol.check(manifest)
    record = manifest.splits[split]
    given = record.rows if protocol.first_given else 0
    return {
        "protocol": name,
        "file": FILES[corpus][1],
        "split": split,
        "documents": record.documents,
        "characters": record.characters,
        "rows": record.rows,
        "counted_tokens": record.counted_tokens - given,
        "dropped_tokens": record.dropped_tokens,
        "truncated_documents": record.truncated_documents,
        "unigram_bits_per_token": record.unigram_entropy / math.log(2),
        "caveat": protocol.caveat(manifest, split),
    }


def sentencepiece_model(data: Path, folder: Path) -> Path:
    """A tokenizer of 8,192 symbols: D3PM's own is not published."""
    model = folder / "lm1b.model"
    command = [sys.executable, str(ROOT / "tokenizer" / "train_sentencepiece.py"), "--vocab-size", "8192"]
    run([*command, "--input", str(data / LM1B_SAMPLE), "--output", str(model)])
    return model


def run(command: list[str]) -> None:
    """Raises `UserError` where it fails."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    if subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}).returncode:
        raise UserError(f"failed: {' '.join(command)}")


def texts_of(corpus: str, data: Path) -> Iterator[str]:
    """As they stand in the file: what a normaliser does is no matter of the tokenizer."""
    config = config_of(corpus, data, **GPT2)
    return (document.text for document in raw_documents(config, FILES[corpus][0]))


def reference(data: Path) -> dict[str, Any]:
    """Checksums of all ids: int32, little-endian, -1 after each document."""
    try:
        import transformers
    except ImportError:
        raise UserError("reference needs transformers 4: pip install 'transformers<5'") from None
    folder = data / "tokenizers"
    readers = {
        "gpt2": transformers.GPT2Tokenizer(str(folder / "gpt2_encoder.json"), str(folder / "gpt2_vocab.bpe")),
        "bert": transformers.BertTokenizer(str(folder / "bert_base_uncased_vocab.txt"), do_lower_case=True),
    }
    fast = [name for name, tokenizer in readers.items() if tokenizer.is_fast]
    if fast:
        raise UserError(f"transformers {transformers.__version__}: {', '.join(fast)} is not the reference in Python")
    found: dict[str, Any] = {}
    for name, tokenizer in readers.items():
        tokenizer.model_max_length = 10**9
        for corpus in FILES:
            if corpus == "text8":
                continue  # one document
            digest, documents, tokens = hashlib.sha256(), 0, 0
            for text in texts_of(corpus, data):
                ids = tokenizer.encode(text, add_special_tokens=False)
                digest.update(np.array([*ids, -1], dtype="<i4").tobytes())
                documents, tokens = documents + 1, tokens + len(ids)
            one = {"documents": documents, "tokens": tokens, "sha256": digest.hexdigest()}
            found.setdefault(name, {})[corpus] = one
            print(name, corpus, json.dumps(one), flush=True)
    result = {"reference": f"transformers {transformers.__version__}, GPT2Tokenizer and BertTokenizer", "ids": found}
    write_json(REFERENCE, result)
    return result


def estimators(data: Path, steps: int, replicates: int, scratch: Path) -> dict[str, Any]:
    """Train on text in text8's alphabet, evaluate on real text8, compare estimators of the same quantity."""
    trained = train_small(data, steps, scratch)
    folder = scratch / "text8"
    prepare(config_of("text8", data, tokenizer="text8", row_length=256, shards=str(folder)), progress=False)
    reader = ShardReader(folder, "test")
    bounds = []
    for protocol, values in (("text8", (1.0, 4.0, 16.0, 64.0, math.inf)),):
        request = Request(protocol, "test", values, rows=512, micro_batch=32)
        bounds += [r.to_dict() for r in evaluate(trained.model, reader, request, trained.weights, trained.step)]
    return {"trained_steps": trained.step, "bounds": bounds, "errors": standard_errors(trained, reader, replicates)}


def train_small(data: Path, steps: int, scratch: Path) -> TrainedModel:
    output = scratch / f"model-{steps}"
    settings = {
        "data.corpus": "text8",
        "data.source": data / TRAINED_ON,
        "data.row_length": 256,
        "data.shards": scratch / "wiki",
        "model.layers": 4,
        "model.width": 192,
        "model.heads": 6,
        "latent.width": 0,
        "diffusion.steps": "inf",
        "training.steps": steps,
        "training.checkpoint_every": steps,
        "evaluation.every": "null",
    }
    overrides = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    launcher = [sys.executable, str(ROOT / "launchers" / "pretrain.py")]
    command = [*launcher, "--config", str(ROOT / "configs" / "quickstart.json"), "--output", str(output), *overrides]
    run(command)
    return load_trained(find_checkpoint(output), "ema", "cuda" if torch.cuda.is_available() else "cpu")


def standard_errors(trained: TrainedModel, reader: ShardReader, replicates: int) -> dict[str, Any]:
    """Of the mean over the same rows, one state a row: the standard deviation over fresh noise, nats per token."""
    tokens = torch.from_numpy(reader.read(chosen_rows(reader.rows, REPLICATE_ROWS))[0])
    everything = torch.ones_like(tokens, dtype=torch.bool)
    rows = Rows(tokens, everything, None, torch.arange(len(tokens)))
    model, total = trained.model, len(tokens)

    def mdlm(noise: Noise) -> torch.Tensor:
        """MDLM's evaluation: t on a grid over each batch, jittered within its cells, in [0.001, 1]."""
        jitter = noise.uniform(Stream.TIME, 0, rows.numbers, (1,)).squeeze(-1)
        places = (rows.numbers % MDLM_BATCH).double()
        u = (jitter / MDLM_BATCH + places / MDLM_BATCH) % 1
        t = (MDLM_EPSILON + (1 - MDLM_EPSILON) * u).unsqueeze(-1)
        return estimate_at(model, rows, everything, t, 1 - MDLM_EPSILON, noise, 0)

    plain = {law: Sampler(math.inf, law=law) for law in ("balanced", "bernoulli")}
    ways = {
        "balanced, t stratified over all rows (ours)": lambda noise: elbo(model, rows, plain["balanced"], noise, total),
        "bernoulli, t stratified over all rows": lambda noise: elbo(model, rows, plain["bernoulli"], noise, total),
        "mdlm_compat, t stratified over all rows": lambda noise: compat_estimate(
            model, rows, everything, "mdlm_compat", noise, total
        ),
        f"MDLM: t on a jittered grid over batches of {MDLM_BATCH}": mdlm,
    }
    found = {}
    for name, estimate in ways.items():
        means = [float(estimate(Noise(seed)).sum()) / tokens.numel() for seed in range(replicates)]
        found[name] = {"mean": statistics.fmean(means), "standard_error": statistics.stdev(means)}
        print(name, json.dumps(found[name]), flush=True)
    return {"rows": total, "replicates": replicates, "ways": found}


def page(results: dict[str, Any]) -> str:
    """docs/results/protocols.md."""
    lines = ["# Protocols on real files", ""]
    for part, lines_of in (("counts", _count_lines), ("reference", _reference_lines), ("estimators", _estimator_lines)):
        if part in results:
            lines += [*lines_of(results[part]), ""]
            if made := results["made"].get(part):
                lines += [f"Made on {made['date']} by `{made['command']}` on {made['hardware']}.", ""]
    return "\n".join(lines).rstrip() + "\n"


def _count_lines(found: list[dict[str, Any]]) -> list[str]:
    keys = ("documents", "rows", "counted_tokens", "dropped_tokens")
    return [
        "## What they count",
        "",
        "| protocol | file | documents | rows | counted tokens | dropped at the end |",
        "| --- | --- | --- | --- | --- | --- |",
        *(f"| {r['protocol']} | {Path(r['file']).name} | {' | '.join(f'{r[key]:,}' for key in keys)} |" for r in found),
        "",
        f"The tokenizer of lm1b_d3pm was trained on {Path(LM1B_SAMPLE).name} for this; another one counts otherwise.",
        "",
        "What the evaluation says of files that are not the published set:",
        "",
        *(f"* {r['protocol']}: {r['caveat']}" for r in found if r["caveat"]),
    ]


def _reference_lines(found: dict[str, Any]) -> list[str]:
    lines = [
        "## Ids",
        "",
        f"GPT-2 and BERT ids of these files by {found['reference']}; the tests",
        "compare ours with their checksums.",
        "",
        "| tokenizer | corpus | documents | tokens | sha256 |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, corpora in found["ids"].items():
        for corpus, one in corpora.items():
            row = (name, corpus, f"{one['documents']:,}", f"{one['tokens']:,}", one["sha256"][:16])
            lines.append(f"| {' | '.join(row)} |")
    return lines


def _estimator_lines(found: dict[str, Any]) -> list[str]:
    errors, bounds = found["errors"], found["bounds"]
    lines = [
        "## A model trained on other Wikipedia text, on the beginning of the real text8",
        "",
        f"A small model without a latent, {found['trained_steps']:,} steps. Bounds of T-step samplers, "
        f"{bounds[0]['rows']} rows; {bounds[0]['caveat']}.",
        "",
        "| T | bits per character | +- |",
        "| --- | --- | --- |",
    ]
    for r in bounds:
        lines.append(f"| {r['steps']} | {r['bits_per_token']:.4f} | {r['standard_error'] / math.log(2):.4f} |")
    lines += [
        "",
        "## Estimators at equal cost",
        "",
        f"One state a row, {errors['rows']} rows; standard deviation of the mean over {errors['replicates']} draws of "
        "the noise, nats per token. The last column is how many forwards as many the way would need to be as sure as "
        "the first.",
        "",
        "| way | mean | standard error | forwards |",
        "| --- | --- | --- | --- |",
    ]
    first = next(iter(errors["ways"].values()))["standard_error"]
    for name, one in errors["ways"].items():
        ratio = (one["standard_error"] / first) ** 2
        lines.append(f"| {name} | {one['mean']:.4f} | {one['standard_error']:.4f} | {ratio:.2f} |")
    return lines


@reports_user_errors
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["counts", "reference", "estimators"])
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--only", nargs="+", default=list(COUNTED), metavar="PROTOCOL", help="of counts")
    parser.add_argument("--steps", type=int, default=1500, help="of training, for estimators")
    parser.add_argument("--replicates", type=int, default=100, help="draws of the noise, for estimators")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "protocols", help="scratch space of estimators")
    parser.add_argument("--json", type=Path, default=RESULTS, metavar="FILE", help="the page is written beside it")
    args = parser.parse_args()
    check_writable(args.json, "--json")
    if unknown := [name for name in args.only if name not in COUNTED]:
        raise UserError(f"--only {unknown[0]}: allowed: {', '.join(COUNTED)}")
    results = json.loads(args.json.read_text()) if args.json.is_file() else {}
    if args.part == "counts":
        known = {r["protocol"]: r for r in [*results.get("counts", []), *counts(args.data, args.only)]}
        results["counts"] = [known[name] for name in COUNTED if name in known]
    elif args.part == "estimators":
        results["estimators"] = estimators(args.data, args.steps, args.replicates, args.folder.resolve())
    else:
        results["reference"] = reference(args.data)
    results.setdefault("made", {})[args.part] = provenance()
    write_json(args.json, results)
    write_atomically(args.json.with_suffix(".md"), page(results))
    print(f"{args.json}: written")


if __name__ == "__main__":
    main()
