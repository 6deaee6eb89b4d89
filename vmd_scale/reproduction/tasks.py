"""The reference tasks of the VMD and VADD papers, with their published figures (arXiv 2510.23606, 2505.17384).

A method is named by what it is: `mdm` has no latent; `vmd_surrogate` is the latent trained with the papers' objective;
`vmd` is the same model with this project's own recipe, which the task's configuration holds.
"""

import math
from pathlib import Path

from vmd_scale.checkpoints import TrainedModel
from vmd_scale.config import DataConfig
from vmd_scale.data.prepare import prepare
from vmd_scale.data.shards import ShardReader
from vmd_scale.reproduction import measures
from vmd_scale.reproduction.figures import against_steps, kl_against_p
from vmd_scale.reproduction.task import Measurement, Method, Published, Sizes, Task

MDM = ("latent.width=0", "diffusion.objective=nelbo", "diffusion.steps=inf")
# One sample where objective iw has eight, of more rows: about as much work a step.
LARGER_BATCH = ("training.global_batch=256", "training.micro_batch=256")
SURROGATE = ("diffusion.objective=vmd", "latent.width=16", *LARGER_BATCH)

LISTED_NOTE = (
    "accuracy: share of the samples that occur in the data. kl: KL(data, samples) in nats, with 1/2 added to every "
    "count. bound_nats_iw64: importance-weighted bound (K = 64) on the cross-entropy of the data, exact over the data; "
    "it can be below the true value by chance only, within its standard error."
)
TOKENS_NOTE = (
    "argmax takes the most probable token given z, as the published sampler seems to; drawn samples from the "
    "distribution, which is the sampler that the bound is about."
)


def _in_blocks(size: int) -> tuple[str, ...]:
    return (f"diffusion.block_size={size}", "latent.scope=block")


def _published_four_tokens(figures: dict[int, tuple[float, float, float]]) -> Published:
    """From {blocks: (accuracy of MDM, accuracy of VMD, KL of VMD)} in one step a block."""
    found: dict[tuple[str, str, int, int | str, str, str], float] = {}
    for blocks, (mdm, vmd, kl) in figures.items():
        found["", "mdm", blocks, blocks, "", "accuracy"] = mdm
        for name in ("vmd", "vmd_surrogate"):
            found["", name, blocks, blocks, "", "accuracy"] = vmd
            found["", name, blocks, blocks, "", "kl"] = kl
    return found


def _four_tokens(name: str, source: str, title: str, figures: dict[int, tuple[float, float, float]]) -> Task:
    one_block = (Method("mdm", (*MDM, *LARGER_BATCH)), Method("vmd_surrogate", SURROGATE), Method("vmd", ()))
    two_blocks = tuple(Method(m.name, (*m.overrides, *_in_blocks(2))) for m in one_block)
    return Task(
        name=name,
        title=title,
        config=f"{name}.json",
        variants=("",),
        methods=one_block + two_blocks,
        measure=lambda trained, variant, sizes: measures.four_tokens(trained, source, sizes),
        sizes=Sizes(samples=20_000, importance_samples=64, rows=400),
        fast=("training.steps=300", "training.checkpoint_every=300"),
        fast_sizes=Sizes(samples=5_000, importance_samples=64, rows=200),
        published=_published_four_tokens(figures),
        notes=(LISTED_NOTE, TOKENS_NOTE),
    )


def _sudoku(trained: TrainedModel, variant: str, sizes: Sizes) -> list[Measurement]:
    """Validation puzzles like those of training, and a level with fewer clues that training never saw."""
    data = trained.config.data
    known = Path(data.shards)
    harder = data.model_dump() | {
        "source": f"generate:{20 * sizes.rows}:24-28",
        "shards": str(known.with_name(f"{known.name}-24-28-clues")),
    }
    prepare(DataConfig(**harder), splits=["validation"])
    readers = (
        ("validation", ShardReader(known, "validation")),
        ("24-28 clues", ShardReader(harder["shards"], "validation")),
    )
    return measures.solved(trained, readers, (5, 10, 20), sizes)


def _published_sudoku() -> Published:
    figures = {
        ("mdm", "top_prob"): (0.106, 0.147, 0.204),
        ("mdm", "margin"): (0.362, 0.784, 0.911),
        ("vmd", "top_prob"): (0.677, 0.764, 0.809),
        ("vmd", "margin"): (0.969, 0.990, 0.997),
    }
    return {
        ("", method, 1, steps, law, "accuracy"): value
        for (method, law), values in figures.items()
        for steps, value in zip((5, 10, 20), values, strict=True)
    }


def _images(trained: TrainedModel, variant: str, sizes: Sizes) -> list[Measurement]:
    return measures.bounds(trained, (1, 4, 16, 64, math.inf), sizes, "test", "bits_per_dim", surrogate=True)


def _image_task(name: str, title: str, mdm: float, vadd: float, fast: tuple[str, ...]) -> Task:
    return Task(
        name=name,
        title=title,
        config=f"{name}.json",
        variants=("",),
        methods=(Method("mdm", MDM), Method("vmd", ())),
        measure=_images,
        sizes=Sizes(samples=0, importance_samples=1, rows=10_000),
        fast=fast,
        fast_sizes=Sizes(samples=0, importance_samples=1, rows=500),
        published={
            ("", "mdm", 1, "inf", "", "bits_per_dim"): mdm,
            ("", "vmd", 1, "inf", "", "bits_per_dim_vmd_surrogate"): vadd,
        },
        notes=("bits_per_dim is a valid bound; VADD's published figure is the surrogate, which bounds nothing.",),
        plot=against_steps("bits_per_dim", "bits per dimension (upper bound)"),
    )


def _text8(trained: TrainedModel, variant: str, sizes: Sizes) -> list[Measurement]:
    return measures.bounds(trained, (1, 2, 4, 8, 16, 64, math.inf), sizes, "validation", "perplexity")


SMALL_TEXT = (
    "data.row_length=64",
    "model.layers=4",
    "model.width=128",
    "model.heads=4",
    "model.dropout=0.0",
    "latent.width=32",
    "training.global_batch=64",
    "training.micro_batch=64",
    "training.learning_rate=2e-3",
    "training.warmup_steps=100",
    "training.lr_schedule=cosine",
    "training.steps=2000",
    "training.checkpoint_every=1000",
    "training.ema_decay=0.99",
    "diffusion.kl_weight.warmup_steps=1000",
    "evaluation.every=null",
)

TASKS = {
    task.name: task
    for task in (
        Task(
            name="two_tokens",
            title="Two tokens: (k, k+1 mod 10) with correlation p (uniform: p = 1), or with weighted k",
            config="two_tokens.json",
            variants=("0.0", "0.25", "0.5", "0.75", "uniform", "weighted"),
            methods=(Method("mdm", MDM), Method("vmd", ())),
            measure=measures.two_tokens,
            sizes=Sizes(samples=20_000, importance_samples=64, rows=400),
            fast=("training.steps=200", "training.checkpoint_every=200"),
            fast_sizes=Sizes(samples=5_000, importance_samples=64, rows=200),
            notes=(LISTED_NOTE, TOKENS_NOTE, "The papers show the sweep over p as a figure only."),
            plot=kl_against_p,
        ),
        _four_tokens(
            "four_tokens_d1",
            "d1",
            "D1: four tokens (k, k+1, k+2, k+3 mod 10), entropy ln 10 = 2.303 nats",
            {1: (0.001, 0.873, 0.165), 2: (0.101, 0.942, 0.068)},
        ),
        _four_tokens(
            "four_tokens_d2",
            "d2",
            "D2: four tokens (k, k+1, l, l+1 mod 10), entropy ln 100 = 4.605 nats",
            {1: (0.011, 0.800, 0.268), 2: (0.011, 0.886, 0.148)},
        ),
        Task(
            name="toy2d",
            title="Two-dimensional toys on a grid of 50 x 50 cells",
            config="toy2d.json",
            variants=("checkerboard", "swiss_roll", "circles"),
            methods=(Method("mdm", MDM), Method("vmd", ())),
            measure=measures.toy2d,
            sizes=Sizes(samples=200_000, importance_samples=1, rows=0),
            fast=("training.steps=300", "training.checkpoint_every=300"),
            fast_sizes=Sizes(samples=20_000, importance_samples=1, rows=0),
            published={
                ("checkerboard", "mdm", 1, 1, "", "js"): 1.395,
                ("checkerboard", "mdm", 1, 5, "", "js"): 0.211,
                ("checkerboard", "vmd", 1, 1, "", "js"): 0.062,
                ("checkerboard", "vmd", 1, 5, "", "js"): 0.048,
                ("swiss_roll", "mdm", 1, 1, "", "js"): 2.619,
                ("swiss_roll", "vmd", 1, 1, "", "js"): 0.086,
                ("circles", "mdm", 1, 1, "", "js"): 2.273,
                ("circles", "vmd", 1, 1, "", "js"): 0.161,
            },
            notes=(
                "js: Jensen-Shannon divergence between the histogram of the samples and the exact distribution, in "
                "nats; it cannot exceed ln 2 = 0.693.",
                "The published figures of MDM exceed ln 2 (and 1 bit), so that what is called JS divergence there must "
                "be something else; beside them ours can be compared in order only.",
            ),
        ),
        Task(
            name="sudoku",
            title="Sudoku: share of puzzles of which every cell is right",
            config="sudoku.json",
            variants=("",),
            methods=(Method("mdm", MDM), Method("vmd", ())),
            measure=_sudoku,
            sizes=Sizes(samples=0, importance_samples=1, rows=1000),
            fast=(
                "data.source=generate:20000",
                "data.shards=runs/reproduce/sudoku-shards-20000",
                "model.width=96",
                "model.heads=4",
                "training.steps=3000",
                "training.global_batch=64",
                "training.micro_batch=64",
                "training.learning_rate=2e-3",
                "training.lr_schedule=cosine",
                "training.warmup_steps=200",
                "training.ema_decay=0.99",
                "diffusion.kl_weight.warmup_steps=1500",
                "evaluation.every=null",
            ),
            fast_sizes=Sizes(samples=0, importance_samples=1, rows=500),
            published=_published_sudoku(),
            notes=(TOKENS_NOTE,),
        ),
        _image_task("mnist", "Binarized MNIST, bits per dimension", 0.075, 0.063, SMALL_TEXT),
        _image_task("cifar10", "CIFAR-10 as 3,072 tokens of 256 symbols, bits per dimension", 2.80, 2.74, SMALL_TEXT),
        Task(
            name="text8",
            title="text8 characters: perplexity per character against the number of steps",
            config="text8.json",
            variants=("",),
            methods=(
                Method("mdm", MDM),
                Method("vmd", ()),
                *(
                    Method(name, (*overrides, *_in_blocks(size)))
                    for size in (8, 4)
                    for name, overrides in (("mdm", MDM), ("vmd", ()))
                ),
            ),
            measure=_text8,
            sizes=Sizes(samples=0, importance_samples=1, rows=4096),
            fast=SMALL_TEXT,
            fast_sizes=Sizes(samples=0, importance_samples=1, rows=512),
            plot=against_steps("perplexity", "perplexity per character (upper bound)"),
        ),
    )
}
