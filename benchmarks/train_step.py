"""A training step: our VMD against our MDM, with and without what makes it fast, the price of DeepSpeed and the loop.

    python benchmarks/train_step.py --json train_step.json
    python benchmarks/train_step.py --only vmd --vocab 27 --rounds 9 --encoder 1x128 --encoder 1x256

Both sides take turns in one run; ratios are medians over rounds. Steps are bare PyTorch (forward, backward, clipping,
AdamW, EMA) but in `overhead`, where the same step goes through DeepSpeed (ZeRO-0; on a GPU ZeRO-1), our loop and its
telemetry. `techniques` changes one thing at a time of a VMD step; `speed` is that of the changed step against the step
as it is, and `peak_mib` is what it takes beside weights and optimizer. On a GPU the step as it is has compiled blocks.
"""

import argparse
import importlib.util
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from comparing import Clock, Report, in_turns, medians, ratio, seconds_of, table, wait_for_device
from torch.nn import functional as F
from workload import VOCAB, BareStep, shape

from vmd_scale.model import head
from vmd_scale.model.head import masked_nll, weighted_nll
from vmd_scale.planning.peaks import peak_bytes

SHAPE = {"layers": 4, "width": 256, "heads": 4, "length": 256}
QUICKSTART = Path(__file__).resolve().parents[1] / "configs" / "quickstart.json"


def vmd_against_mdm(vocab: int, rows: int, rounds: int, encoders: list[str], device: torch.device) -> dict[str, Any]:
    """Tokens/s with the default encoder, and with others: LAYERSxWIDTH."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    networks = {"mdm": shape(**SHAPE, vocab=vocab, latent=False), "vmd": shape(**SHAPE, vocab=vocab, latent=True)}
    for encoder in encoders:
        layers, width = map(int, encoder.split("x"))
        changes = {"encoder_layers": layers, "encoder_width": width}
        networks[f"vmd, encoder {encoder}"] = shape(**SHAPE, vocab=vocab, latent=True, **changes)
    steps = {name: BareStep(a, rows, device, dtype, compiled=device.type == "cuda") for name, a in networks.items()}
    times = in_turns(steps, rounds)
    tokens = rows * SHAPE["length"]
    return {
        name: {
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "of_mdm": ratio(times, "mdm", name),
            "parameters": sum(p.numel() for p in steps[name].parameters),
        }
        for name, seconds in medians(times).items()
    }


def techniques(vocab: int, rows: int, rounds: int, device: torch.device) -> dict[str, Any]:
    """A VMD step as it is, and with one thing changed at a time."""
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    a = shape(**SHAPE, vocab=vocab, latent=True)
    as_large = replace(a, encoder_layers=a.layers, encoder_width=a.width)
    compiled = "blocks not compiled" if on_gpu else "blocks compiled"
    steps = {
        "as it is": BareStep(a, rows, device, dtype, compiled=on_gpu),
        "attention by its formula": BareStep(replace(a, attention="reference"), rows, device, dtype, compiled=on_gpu),
        "encoder as large as the denoiser": BareStep(as_large, rows, device, dtype, compiled=on_gpu),
        "AdamW not fused": BareStep(a, rows, device, dtype, compiled=on_gpu, fused=False),
        compiled: BareStep(a, rows, device, dtype, compiled=not on_gpu),
    }
    for kind in ("selective", "full"):
        step = steps[f"checkpointing: {kind}"] = BareStep(a, rows, device, dtype, compiled=on_gpu)
        step.model.checkpoint_activations(kind)
    return beside(steps, "as it is", "speed", rounds, device)


def beside(
    cases: Mapping[str, Callable[[], object]], first: str, column: str, rounds: int, device: torch.device
) -> dict[str, Any]:
    """Seconds of each case, its speed against the `first` one in a column of that name, and its peak memory."""
    times = in_turns(cases, rounds)
    return {
        name: {
            "seconds": seconds,
            column: ratio(times, first, name),
            "peak_mib": peak_bytes(cases[name], device) / 2**20,
        }
        for name, seconds in medians(times).items()
    }


def head_only_where_masked(
    vocab: int,
    rows: int,
    rounds: int,
    device: torch.device,
    length: int = SHAPE["length"],
    width: int = SHAPE["width"],
) -> dict[str, Any]:
    """Loss and gradient of hidden states and head, half of the positions masked: three ways to them.

    On a GPU two more: the fused way without filling up the vocabulary, and Liger's where it is installed, which does
    not weigh positions.
    """
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, length, width, generator=generator).to(device, dtype).requires_grad_()
    matrix = torch.randn(vocab, width, generator=generator).mul(0.02).to(device, dtype).requires_grad_()
    targets = torch.randint(vocab, (rows, length), generator=generator).to(device)
    masked = (torch.rand(rows, length, generator=generator) < 0.5).to(device)
    index, weight = masked.flatten().nonzero().squeeze(-1), torch.ones(rows, 1, device=device)

    def full() -> torch.Tensor:
        logits = (hidden @ matrix.T).float()
        nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        return (nll.view_as(targets) * masked).sum()

    def recomputed() -> torch.Tensor:
        return masked_nll(hidden, targets, index, lambda h: (h @ matrix.T).float(), vocab).sum()

    def fused() -> torch.Tensor:
        return weighted_nll(hidden, targets, index, matrix, weight, compiled=on_gpu)

    def not_filled_up() -> torch.Tensor:
        with patch.dict(head.VOCAB_MULTIPLE, {device.type: 1}):
            return fused()

    def with_gradient(loss: Callable[[], torch.Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(loss(), (hidden, matrix))

    ways = {"full logits": full, "gathered, recomputed": recomputed, "gathered, fused": fused}
    if on_gpu:
        ways["gathered, fused, symbols not filled up"] = not_filled_up
    if on_gpu and importlib.util.find_spec("liger_kernel") is not None:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        ways["gathered, Liger"] = lambda: liger(matrix, hidden.flatten(0, 1)[index], targets.flatten()[index])
    cases = {name: with_gradient(way) for name, way in ways.items()}
    return beside(cases, "full logits", "speedup", rounds, device)


def overhead(rows: int, rounds: int, folder: Path) -> dict[str, Any]:
    """What an iteration of the loop takes beside a bare step on the very same batches, step by step in turns."""
    from vmd_scale.build import build_architecture, build_model
    from vmd_scale.config_file import load_config
    from vmd_scale.data.prepare import prepare
    from vmd_scale.tokenization import load_tokenizer
    from vmd_scale.training.launch import join_world, leave_world
    from vmd_scale.training.loop import Trainer

    warmup = 3
    settings = {
        "data.row_length": SHAPE["length"],
        "data.shards": folder / "shards",
        "model.layers": SHAPE["layers"],
        "model.width": SHAPE["width"],
        "model.heads": SHAPE["heads"],
        "diffusion.objective": "vmd",
        "training.steps": rounds + warmup,
        "training.global_batch": rows,
        "training.micro_batch": rows,
        "training.checkpoint_every": 10**6,
        "evaluation.every": "null",
        "telemetry.log_every": 5,
        "deepspeed.zero_optimization.stage": 1 if torch.cuda.is_available() else 0,  # in bf16 there is no 0
    }
    config = load_config(QUICKSTART, [f"{key}={value}" for key, value in settings.items()])
    tokenizer = load_tokenizer(config.data.tokenizer)
    shutil.rmtree(folder / "run", ignore_errors=True)
    prepare(config.data)
    world = join_world()
    try:
        trainer = Trainer(config, folder / "run", world, tokenizer)
        model = build_model(config, tokenizer.vocab_size)
        on_gpu = world.device.type == "cuda"
        dtype = torch.bfloat16 if on_gpu else torch.float32
        architecture = build_architecture(config, tokenizer.vocab_size)
        bare = BareStep(architecture, rows, world.device, dtype, compiled=on_gpu, model=model)
        times: dict[str, list[float]] = {"loop": [], "bare": [], "preparing a batch": []}
        original = trainer.loader.steps

        def beside_bare_steps(first: int, last: int) -> Iterator[Any]:
            """The loop's iteration is what happens until it asks for the next batch."""
            for batches in list(original(first, last)):
                times["preparing a batch"].append(seconds_of(bare.prepare))
                times["bare"].append(seconds_of(lambda batches=batches: bare.step(batches[0])))
                started = Clock.now()
                yield batches
                wait_for_device()
                times["loop"].append(Clock.now() - started)

        trainer.loader.steps = beside_bare_steps
        trainer.train(0)
    finally:
        leave_world()
    kept = {name: values[warmup : rounds + warmup - 1] for name, values in times.items()}  # the last one saves
    return {**{f"{n}_seconds": s for n, s in medians(kept).items()}, "loop_of_bare": ratio(kept, "loop", "bare")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["vmd", "techniques", "head", "overhead"], help="one part instead of all")
    parser.add_argument("--vocab", type=int, nargs="+", default=[VOCAB, 27])
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--encoder", action="append", default=[], metavar="LAYERSxWIDTH", help="beside the default")
    parser.add_argument("--folder", type=Path, default=Path("runs/train-step-benchmark"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--processor-time", action="store_true", help="instead of the wall clock: for a busy CPU")
    args = parser.parse_args()
    if args.processor_time:
        Clock.count_processor_time()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pages = Report(__doc__, args.json, processor_time=args.processor_time, shape=SHAPE, rows=args.rows)

    def report(name: str, part: dict[str, Any]) -> None:
        if all(isinstance(value, dict) for value in part.values()):
            columns = list(next(iter(part.values())))
            text = table(("", *columns), [(case, *values.values()) for case, values in part.items()])
        else:
            text = table(("", ""), list(part.items()))
        pages.add(name, part, f"{name}\n{text}")

    for vocab in args.vocab:
        if args.only in (None, "vmd"):
            part = vmd_against_mdm(vocab, args.rows, args.rounds, args.encoder, device)
            report(f"VMD against MDM, vocabulary {vocab}", part)
    if args.only in (None, "techniques"):
        vocab = min(args.vocab)
        report(f"techniques, vocabulary {vocab}", techniques(vocab, args.rows, args.rounds, device))
    if args.only in (None, "head"):
        vocab = max(args.vocab)
        report(f"head, vocabulary {vocab}", head_only_where_masked(vocab, args.rows, args.rounds, device))
    if args.only in (None, "overhead"):
        report("overhead of DeepSpeed, loop and telemetry", overhead(args.rows, 3 * args.rounds, args.folder))


if __name__ == "__main__":
    main()
