"""What data cost: preparing shards, reading rows at random, the global order, and how long training waits for them.

    python benchmarks/data.py wiki_docs.jsonl.xz --tokenizer gpt2:FOLDER       all of it, a table
    python benchmarks/data.py wiki_docs.jsonl.xz --only read --json out.json   one part

The file is text in any form that data.source takes (.jsonl with "text", .txt, also compressed). Both sides of every
comparison are measured in turns in the same run, now one first, now the other, and medians are taken. Reading is
compared with `datasets` (Arrow) and with MosaicML Streaming (pip install mosaicml-streaming), where that is installed.
"""

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from comparing import Report, table

from vmd_scale.build import build_objective, masks_of
from vmd_scale.config import Config, DataConfig
from vmd_scale.config_file import parse_config
from vmd_scale.data.corpora.files import records
from vmd_scale.data.loader import TrainLoader
from vmd_scale.data.order import SampleOrder
from vmd_scale.data.prepare import prepare
from vmd_scale.data.shards import ShardReader
from vmd_scale.tokenization import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
Side = TypeVar("Side")
PARTS = ("prepare", "read", "order", "wait")
ROW_LENGTH, SHARD_TOKENS, BATCH = 1024, 1 << 20, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("documents", type=Path)
    parser.add_argument("--tokenizer", default="text8", help="as data.tokenizer")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--folder", type=Path, default=Path("runs/data-benchmark"), help="scratch space")
    parser.add_argument("--megabytes", nargs="+", type=float, default=[6, 60], help="of text to prepare, ascending")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each measurement")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    report = Report(__doc__, args.json, repeats=args.repeats)
    args.folder = folder_for(args)
    sizes = [int(megabytes * 1e6) for megabytes in args.megabytes]
    texts = {size: text_of(args.documents, size, args.folder) for size in sizes}
    largest = texts[max(sizes)]
    if "prepare" in args.only:
        report.add("prepare", cases := measure_preparation(texts, args), prepare_table(cases))
    shards = shards_of(largest, args)
    if "read" in args.only:
        report.add("read", found := measure_reading(shards, args), read_table(found))
    if "order" in args.only:
        report.add("order", cases := measure_order(args.repeats), order_table(cases))
    if "wait" in args.only:
        report.add(
            "wait", found := measure_waiting(largest, shards, args), table(("training", found["on"]), found.items())
        )


def folder_for(args: argparse.Namespace) -> Path:
    """Of this input with this tokenizer: what another one has left is not taken for it."""
    status = args.documents.stat()
    known_by = f"{args.documents.resolve()} {status.st_size} {status.st_mtime_ns} {args.tokenizer}"
    folder = args.folder / hashlib.sha256(known_by.encode()).hexdigest()[:12]
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def text_of(documents: Path, size: int, folder: Path) -> Path:
    """The first documents of the file, about `size` bytes of JSON lines."""
    path = folder / f"text-{size}.jsonl"
    if not path.exists():
        with open(path.with_suffix(".tmp"), "w", encoding="utf-8") as file:
            for text in records(documents):
                if file.tell() >= size:
                    break
                file.write(json.dumps({"text": text}) + "\n")
        path.with_suffix(".tmp").rename(path)
    return path


def data_config(source: Path, shards: Path, args: argparse.Namespace, workers: int = 1) -> DataConfig:
    return DataConfig(
        corpus="text",
        source={"train": str(source)},
        tokenizer=args.tokenizer,
        normalizer="text8" if args.tokenizer == "text8" else "none",
        row_length=ROW_LENGTH,
        shard_tokens=SHARD_TOKENS,
        shards=str(shards),
        workers=workers,
    )


# Preparation


def preparation(data: DataConfig, folder: Path) -> dict[str, float]:
    """The whole command as a user runs it, start-up included; peaks of it and of its largest worker."""
    config, manifest = folder / "prepare.json", folder / "manifest.json"
    config.write_text(training_config(data, 1, 1).to_json())
    command = [sys.executable, str(ROOT / "launchers" / "prepare_data.py"), "--config", str(config)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAYON_NUM_THREADS": "1"}
    started = time.perf_counter()
    process = subprocess.Popen(
        [*command, "--json", str(manifest)], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    own = worker = 0.0
    while process.poll() is None:
        own = max(own, peak_mib(process.pid))
        worker = max([worker, *(peak_mib(child) for child in children(process.pid))])
        time.sleep(0.05)
    seconds = time.perf_counter() - started
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    rows = json.loads(manifest.read_text())["splits"]["train"]["rows"]
    return {"tokens": rows * data.row_length, "seconds": seconds, "own_mib": own, "worker_mib": worker}


def peak_mib(process: int) -> float:
    """Largest resident size so far. Not of getrusage: it begins with what the parent had before exec."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):  # it has ended
        return 0.0


def children(process: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except OSError:
        return []


def measure_preparation(texts: Mapping[int, Path], args: argparse.Namespace) -> list[dict[str, Any]]:
    cases = [(size, workers) for size in texts for workers in (1, 2)]
    found: dict[tuple[int, int], list[dict[str, float]]] = {case: [] for case in cases}
    for turn in range(args.repeats):
        for size, workers in in_turn(cases, turn):
            shards = args.folder / "prepared"
            shutil.rmtree(shards, ignore_errors=True)
            data = data_config(texts[size], shards, args, workers)
            found[size, workers].append(preparation(data, args.folder))
    return [
        {
            "text_bytes": texts[size].stat().st_size,
            "workers": workers,
            "tokens": int(runs[0]["tokens"]),
            "tokens_per_second": statistics.median(run["tokens"] / run["seconds"] for run in runs),
            "peak_mib": statistics.median(run["own_mib"] for run in runs),
            "peak_mib_of_a_worker": statistics.median(run["worker_mib"] for run in runs) if workers > 1 else None,
        }
        for (size, workers), runs in found.items()
    ]


def in_turn(sides: Iterable[Side], turn: int) -> list[Side]:
    """Backwards every second time: who comes first finds the caches cold."""
    return list(sides)[:: 1 if turn % 2 == 0 else -1]


def shards_of(text: Path, args: argparse.Namespace) -> Path:
    shards = args.folder / "shards"
    prepare(data_config(text, shards, args, workers=2))
    return shards


# Reading at random: each side gives the same rows as an int64 tensor [BATCH, ROW_LENGTH]

Read = Callable[[np.ndarray], torch.Tensor]


def ours(shards: Path, folder: Path) -> Read:
    reader = ShardReader(shards, "train")
    return lambda rows: torch.from_numpy(reader.read(rows)[0])


def arrow(shards: Path, folder: Path) -> Read:
    import datasets

    path = folder / "arrow"
    if not path.exists():
        features = datasets.Features({"ids": datasets.Sequence(datasets.Value("uint16"), length=ROW_LENGTH)})
        made = datasets.Dataset.from_generator(
            records_of, features=features, cache_dir=str(folder / "arrow-cache"), gen_kwargs={"shards": str(shards)}
        )
        made.save_to_disk(path)
    dataset = datasets.load_from_disk(path).with_format("numpy")
    return lambda rows: torch.from_numpy(dataset[rows]["ids"].astype(np.int64))


def mosaic(shards: Path, folder: Path) -> Read:
    from streaming import LocalDataset, MDSWriter

    path = folder / "mosaic"
    if not path.exists():
        columns = {"ids": f"ndarray:uint16:{ROW_LENGTH}"}
        with MDSWriter(out=str(path), columns=columns, size_limit=2 * SHARD_TOKENS) as writer:
            for row in rows_of(shards):
                writer.write({"ids": row})
    dataset = LocalDataset(str(path))
    return lambda rows: torch.from_numpy(np.stack([dataset[int(row)]["ids"] for row in rows]).astype(np.int64))


def records_of(shards: str) -> Iterator[dict[str, np.ndarray]]:
    yield from ({"ids": row} for row in rows_of(Path(shards)))


def rows_of(shards: Path) -> Iterator[np.ndarray]:
    reader = ShardReader(shards, "train")
    for start in range(0, reader.rows, 256):
        yield from reader.read(np.arange(start, min(start + 256, reader.rows)))[0].astype(np.uint16)


def measure_reading(shards: Path, args: argparse.Namespace) -> dict[str, Any]:
    sides: dict[str, Read] = {"ours": ours(shards, args.folder), "datasets": arrow(shards, args.folder)}
    if importlib.util.find_spec("streaming") is not None:
        sides["mosaicml_streaming"] = mosaic(shards, args.folder)
    rows, generator = ShardReader(shards, "train").rows, np.random.default_rng(0)
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(3 * args.repeats + 1):
        batches = [generator.integers(0, rows, BATCH) for _ in range(40)]
        wanted = None
        for name, read in in_turn(sides.items(), turn):
            started = time.perf_counter()
            for batch in batches:
                last = read(batch)
            if turn:  # the first is to warm up
                speeds[name].append(len(batches) * BATCH / (time.perf_counter() - started))
            wanted = last if wanted is None else wanted
            assert last.dtype == torch.int64
            assert torch.equal(last, wanted), f"{name} read other rows"
    result: dict[str, Any] = {name: statistics.median(values) for name, values in speeds.items()}
    result["times_the_faster_of_the_others"] = result["ours"] / max(v for name, v in result.items() if name != "ours")
    result.setdefault("mosaicml_streaming", "left out: not installed")
    versions = {name: importlib.metadata.version(name.replace("_", "-")) for name in sides if name != "ours"}
    return {"rows": rows, "row_length": ROW_LENGTH, "batch": BATCH, "rows_per_second": result, "versions": versions}


# The global order


def measure_order(repeats: int) -> list[dict[str, Any]]:
    results = []
    for rows in (10**6, 10**9, 10**12):
        order = SampleOrder(rows, 0)
        record: dict[str, Any] = {"rows": rows}
        for asked in (512, 100_000):
            times = []
            for turn in range(7 * repeats):
                positions = np.arange(turn * asked, (turn + 1) * asked)
                started = time.perf_counter()
                order.row_numbers(positions)
                times.append((time.perf_counter() - started) / asked * 1e6)
            record[f"microseconds_per_row_by_{asked}"] = statistics.median(times)
        tracemalloc.start()
        SampleOrder(rows, 0).row_numbers(np.arange(512))
        record["peak_bytes_for_512"] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        results.append(record)
    return results


# Waiting


def training_config(data: DataConfig, batch: int, steps: int) -> Config:
    values = {
        "data": data.model_dump(mode="json"),
        "model": {"layers": 4, "width": 256, "heads": 4},
        "latent": {"width": 32, "encoder_layers": 1},
        "training": {"steps": steps, "global_batch": batch, "micro_batch": batch},
        "telemetry": {"log_every": 1},
    }
    return parse_config(values, "benchmark")


def measure_waiting(text: Path, shards: Path, args: argparse.Namespace) -> dict[str, Any]:
    """How fast the loader can be, everything random about a batch included; and its share of a step of training."""
    data = data_config(text, shards, args)
    config = training_config(data, BATCH, 1)
    reader = ShardReader(shards, "train")
    objective = build_objective(config, load_tokenizer(args.tokenizer).vocab_size)

    def make(step: int, batch: Any) -> object:
        return objective.prepare(batch.tokens, *masks_of(batch, reader.manifest), step, batch.positions, BATCH)

    loader = TrainLoader(reader, SampleOrder(reader.rows, 0), BATCH, BATCH, 0, 1, make)
    times = []
    for turn in range(3 * args.repeats):
        started = time.perf_counter()
        for _ in loader.steps(10 * turn, 10 * turn + 10):
            pass
        times.append((time.perf_counter() - started) / 10)
    run = args.folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    path = args.folder / "config.json"
    on_gpu = torch.cuda.is_available()
    path.write_text(training_config(data, BATCH if on_gpu else 4, 100 if on_gpu else 8).to_json())
    command = [sys.executable, str(ROOT / "launchers" / "pretrain.py"), "--config", str(path), "--output", str(run)]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        "loader_tokens_per_second": BATCH * ROW_LENGTH / statistics.median(times),
        "training_tokens_per_second": statistics.median(record["tokens_per_second"] for record in records[2:]),
        "data_wait_share_of_a_step": statistics.median(record["data_wait_fraction"] for record in records[2:]),
        "on": torch.cuda.get_device_name() if on_gpu else "cpu",
    }


def prepare_table(cases: list[dict[str, Any]]) -> str:
    columns = ("workers", "tokens_per_second", "peak_mib", "peak_mib_of_a_worker")
    rows = [(f"{case['text_bytes'] / 1e6:.3g} MB", *(case[name] for name in columns)) for case in cases]
    return table(("preparation of", "workers", "tokens/s", "peak MiB", "of a worker"), rows)


def read_table(found: dict[str, Any]) -> str:
    speeds, versions = found["rows_per_second"], found["versions"]
    rows = [(f"{name} {versions.get(name, '')}".rstrip(), speed) for name, speed in speeds.items()]
    return table((f"random batches of {found['batch']} x {found['row_length']} tokens", "rows/s"), rows)


def order_table(cases: list[dict[str, Any]]) -> str:
    head = ("rows in the order", "us a row by 512", "by 100,000", "peak bytes for 512")
    return table(head, [(f"{rows:,}", *values) for rows, *values in (case.values() for case in cases)])


if __name__ == "__main__":
    main()
