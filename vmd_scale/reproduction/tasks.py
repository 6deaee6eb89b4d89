"""The reference tasks of the VMD and VADD papers, with their published figures (arXiv 2510.23606, 2505.17384).

A method is named by what it is: `mdm` has no latent; `mdm_few_steps` neither, and is trained for few steps only;
`vmd_surrogate` is the latent trained with the papers' objective;
`vmd` is the latent with this project's own recipe, which the task's configuration holds.
"""

import math

from vmd_scale.config import Config, DataConfig
from vmd_scale.data.corpora.four_tokens import four_tokens_distribution
from vmd_scale.data.corpora.two_tokens import two_tokens_distribution
from vmd_scale.reproduction import measures
from vmd_scale.reproduction.figures import against_steps, kl_against_p
from vmd_scale.reproduction.task import Goal, Method, Published, Sizes, Task

MDM = ("latent.width=0", "diffusion.objective=nelbo", "diffusion.steps=inf")
# Where objective iw takes eight samples of every row, the others get more rows; what each costs stands in the page.
LARGER_BATCH = ("training.global_batch=256", "training.micro_batch=256")
WITH_SURROGATE = (
    Method("mdm", (*MDM, *LARGER_BATCH)),
    Method("vmd_surrogate", ("diffusion.objective=vmd", "latent.width=16", *LARGER_BATCH)),
    Method("vmd"),
)

LISTED_NOTE = (
    "accuracy: share of the samples that occur in the data. kl: KL(data, samples) in nats, with 1/2 added to every "
    "count (its bias is about (rows of the data) / (2 x samples); samples are 20,000, with --fast 5,000). bound_nats: "
    "importance-weighted bound on the cross-entropy of the data, exact over the data; it falls below the truth by "
    "sampling error only."
)
TOKENS_NOTE = (
    "argmax takes the most probable token given z, as the published sampler seems to; drawn samples from the "
    "distribution, which is the sampler that the bound is about."
)


def _in_blocks(size: int) -> tuple[str, ...]:
    return (f"diffusion.block_size={size}", "latent.scope=block")


def _entropy(nats: float) -> tuple[Goal, ...]:
    """Bounds close to the entropy of the data, and never below it."""
    truth = (Goal("bound_nats", steps, at_least=nats, slack=3, method=m) for m in ("vmd", "mdm") for steps in (1, 2, 4))
    return (Goal("bound_nats", 1, at_most=nats + 0.15), *truth)


def _four_tokens(source: str, title: str, published: tuple[Published, ...], goals: tuple[Goal, ...]) -> Task:
    two_blocks = tuple(Method(m.name, (*m.overrides, *_in_blocks(2))) for m in WITH_SURROGATE)
    return Task(
        name=f"four_tokens_{source}",
        title=title,
        config=f"four_tokens_{source}.json",
        one_source=True,
        methods=WITH_SURROGATE + two_blocks,
        measure=measures.listed(lambda variant: four_tokens_distribution(source)),
        sizes=Sizes(samples=20_000, rows=400, importance_samples=64),
        fast=("training.steps=300", "training.checkpoint_every=300", "diffusion.kl_weight.warmup_steps=100"),
        fast_sizes=Sizes(samples=5_000, rows=200, importance_samples=64),
        published=published,
        goals=goals,
        notes=(LISTED_NOTE, TOKENS_NOTE),
    )


def _vmd(value: float, metric: str, steps: int, blocks: int) -> tuple[Published, ...]:
    """The papers do not say how tokens are taken: their figure stands beside both ways."""
    return tuple(Published(value, method, metric, steps, blocks) for method in ("vmd", "vmd_surrogate"))


TWO_TOKENS = Task(
    name="two_tokens",
    title="Two tokens: (k, k+1 mod 10) with correlation p (uniform: p = 1), or with weighted k",
    config="two_tokens.json",
    variants=("0.0", "0.25", "0.5", "0.75", "uniform", "weighted"),
    methods=WITH_SURROGATE,
    measure=measures.listed(two_tokens_distribution),
    sizes=Sizes(samples=20_000, rows=400, importance_samples=64),
    fast=("training.steps=200", "training.checkpoint_every=200", "diffusion.kl_weight.warmup_steps=100"),
    fast_sizes=Sizes(samples=5_000, rows=200, importance_samples=64),
    goals=tuple(Goal("kl", 1, at_most=0.02, variant=p) for p in ("0.0", "0.25", "0.5", "0.75", "uniform")),
    notes=(
        LISTED_NOTE,
        TOKENS_NOTE,
        "With p < 1 every pair of tokens occurs in the data: accuracy is 1 whatever is drawn, and argmax tokens, which "
        "leave most pairs out, are far from the data by construction.",
        "The papers show the sweep over p as a figure only.",
    ),
    plot=kl_against_p,
)

FOUR_TOKENS_D1 = _four_tokens(
    "d1",
    "D1: four tokens (k, k+1, k+2, k+3 mod 10), entropy ln 10 = 2.303 nats",
    (
        Published(0.001, "mdm", "accuracy", steps=1),
        Published(0.101, "mdm", "accuracy", steps=2, blocks=2),
        *_vmd(0.873, "accuracy", 1, 1),
        *_vmd(0.165, "kl", 1, 1),
        *_vmd(0.942, "accuracy", 2, 2),
        *_vmd(0.068, "kl", 2, 2),
    ),
    (
        Goal("accuracy", 1, at_least=0.99),
        Goal("kl", 1, at_most=0.02),
        Goal("accuracy", 1, at_least=0.88, tokens="drawn"),
        *_entropy(math.log(10)),
    ),
)

FOUR_TOKENS_D2 = _four_tokens(
    "d2",
    "D2: four tokens (k, k+1, l, l+1 mod 10), entropy ln 100 = 4.605 nats",
    (
        Published(0.011, "mdm", "accuracy", steps=1),
        Published(0.011, "mdm", "accuracy", steps=2, blocks=2),
        *_vmd(0.800, "accuracy", 1, 1),
        *_vmd(0.268, "kl", 1, 1),
        *_vmd(0.475, "kl", 4, 1),
        *_vmd(0.886, "accuracy", 2, 2),
        *_vmd(0.148, "kl", 2, 2),
    ),
    (
        Goal("accuracy", 1, at_least=0.96),
        Goal("accuracy", 1, at_least=0.80, tokens="drawn"),
        Goal("kl", 1, at_most=0.08),
        Goal("kl", 4, at_most=0.05),
        *_entropy(math.log(100)),
    ),
)

TOY2D = Task(
    name="toy2d",
    title="Two-dimensional toys on a grid of 50 x 50 cells",
    config="toy2d.json",
    variants=("checkerboard", "swiss_roll", "circles"),
    methods=WITH_SURROGATE,
    measure=measures.toy2d,
    sizes=Sizes(samples=100_000),
    fast=("training.steps=300", "training.checkpoint_every=300", "diffusion.kl_weight.warmup_steps=100"),
    fast_sizes=Sizes(samples=20_000),
    published=tuple(
        Published(value, method, "js", steps, variant=variant, tokens="drawn")
        for variant, method, steps, value in (
            ("checkerboard", "mdm", 1, 1.395),
            ("checkerboard", "mdm", 5, 0.211),
            ("swiss_roll", "mdm", 1, 2.619),
            ("circles", "mdm", 1, 2.273),
            *(
                (shape, method, steps, value)
                for method in ("vmd", "vmd_surrogate")
                for shape, steps, value in (
                    ("checkerboard", 1, 0.062),
                    ("checkerboard", 5, 0.048),
                    ("swiss_roll", 1, 0.086),
                    ("circles", 1, 0.161),
                )
            ),
        )
    ),
    goals=(
        *(
            Goal("js", steps, at_most=published, variant=shape)
            for shape, steps, published in (
                ("checkerboard", 1, 0.062),
                ("checkerboard", 5, 0.048),
                ("swiss_roll", 1, 0.086),
                ("circles", 1, 0.161),
            )
        ),
        *(
            Goal("js", steps, better_than="mdm", variant=shape, tokens="drawn", law=law)
            for shape in ("checkerboard", "swiss_roll", "circles")
            for steps, law in ((1, "balanced"), (5, "bernoulli"), (5, "balanced"))
        ),
    ),
    notes=(
        "js: Jensen-Shannon divergence between the histogram of the samples and the exact distribution, in nats; it "
        "cannot exceed ln 2 = 0.693. js_of_exact_draws is that of as many draws from the distribution itself: about "
        "what a perfect sampler would score.",
        "The published figures (VADD's) of MDM exceed ln 2, and 1 bit: what is called JS divergence there must be "
        "something else, on shapes whose constants are not published. Only the order of methods can be compared.",
        "A row has two tokens, so that five steps of law balanced are one token a step, for both methods; with "
        "bernoulli, both fall into the same step in one row of five.",
    ),
)


def _sudoku_levels(config: Config, sizes: Sizes) -> dict[str, DataConfig]:
    """A level with fewer clues than training saw."""
    easier = config.data.source == FAST_SUDOKU
    clues = "29-37" if easier else "24-28"
    changed = {
        "source": f"generate:{20 * sizes.rows}:{clues}",
        "shards": f"{config.data.shards}-{clues}-clues-{sizes.rows}",
    }
    return {f"{clues} clues": config.data.model_copy(update=changed)}


FAST_SUDOKU = "generate:20000:44-52"
SUDOKU = Task(
    name="sudoku",
    title="Sudoku: share of puzzles of which every cell is right",
    config="sudoku.json",
    methods=(
        # As many parameters as vmd has with its encoder and its prior.
        Method("mdm", (*MDM, "model.layers=4", "model.mlp_ratio=6.4375"), fast=("model.mlp_ratio=8.5625",)),
        Method("vmd_surrogate"),
        Method("vmd", ("latent.prior=conditional", "diffusion.objective=nelbo", "diffusion.steps=1,5,10,20,inf")),
    ),
    measure=measures.solved,
    fast_changes_data=True,
    sizes=Sizes(rows=1000),
    fast=(
        f"data.source={FAST_SUDOKU}",
        "model.width=96",
        "model.heads=4",
        "latent.encoder_width=96",
        "training.steps=2000",
        "training.global_batch=64",
        "training.micro_batch=64",
        "training.learning_rate=2e-3",
        "training.lr_schedule=cosine",
        "training.warmup_steps=200",
        "training.ema_decay=0.99",
        "training.checkpoint_every=1000",
        "diffusion.kl_weight.warmup_steps=1000",
        "evaluation.every=null",
    ),
    fast_sizes=Sizes(rows=200),
    published=tuple(
        Published(value, method, "accuracy", steps, law=law, split="validation")
        for methods, law, values in (
            (("mdm",), "top_prob", (0.106, 0.147, 0.204)),
            (("mdm",), "margin", (0.362, 0.784, 0.911)),
            (("vmd", "vmd_surrogate"), "top_prob", (0.677, 0.764, 0.809)),
            (("vmd", "vmd_surrogate"), "margin", (0.969, 0.990, 0.997)),
        )
        for method in methods
        for steps, value in zip((5, 10, 20), values, strict=True)
    ),
    goals=tuple(
        Goal("accuracy", steps, better_than="mdm", method=method, law=law, tokens="argmax")
        for method in ("vmd", "vmd_surrogate")
        for law in ("top_prob", "margin")
        for steps in (5, 10, 20)
    ),
    notes=(
        TOKENS_NOTE,
        "mdm has as many parameters as vmd has with its encoder and its conditional prior, and so more than "
        "vmd_surrogate. Published are models of 6 million parameters, about as many as the denoiser of vmd has at full "
        "size without those two, on other puzzles: what the methods do compares, not the figures.",
    ),
    other_data=_sudoku_levels,
)

SMALL = (
    "model.layers=3",
    "model.width=96",
    "model.heads=4",
    "model.dropout=0.0",
    "latent.width=32",
    "latent.encoder_width=96",
    "training.learning_rate=2e-3",
    "training.warmup_steps=100",
    "training.lr_schedule=cosine",
    "training.ema_decay=0.99",
    "evaluation.every=null",
)


def _image_task(name: str, title: str, mdm: float, vadd: float, fast: tuple[str, ...]) -> Task:
    return Task(
        name=name,
        title=title,
        config=f"{name}.json",
        methods=(Method("mdm", MDM), Method("vmd_surrogate", ("diffusion.objective=vmd",)), Method("vmd")),
        measure=measures.bounds("bits_per_dim", "test", (1, 4, 16, 64, math.inf), surrogate=True),
        sizes=Sizes(rows=10_000),
        fast=fast,
        fast_sizes=Sizes(rows=256),
        published=(
            Published(mdm, "mdm", "bits_per_dim", "inf"),
            Published(vadd, "vmd_surrogate", "bits_per_dim_vmd_surrogate", "inf"),
        ),
        goals=tuple(
            Goal("bits_per_dim", steps, better_than="mdm", method=method)
            for method in ("vmd_surrogate", "vmd")
            for steps in (1, 4, 16, 64, "inf")
        ),
        notes=("bits_per_dim is a valid bound; VADD's published figure is the surrogate, which bounds nothing.",),
        plot=against_steps("bits_per_dim", "bits per dimension (upper bound)"),
    )


MNIST = _image_task(
    "mnist",
    "Binarized MNIST, bits per dimension",
    0.075,
    0.063,
    (
        *SMALL,
        "training.steps=600",
        "training.global_batch=16",
        "training.micro_batch=16",
        "training.checkpoint_every=600",
        "diffusion.kl_weight.warmup_steps=300",
    ),
)
CIFAR10 = _image_task(
    "cifar10",
    "CIFAR-10 as 3,072 tokens of 256 symbols, bits per dimension",
    2.80,
    2.74,
    (
        *SMALL,
        "training.steps=200",
        "training.global_batch=4",
        "training.micro_batch=4",
        "training.checkpoint_every=200",
        "diffusion.kl_weight.warmup_steps=100",
    ),
)


def _trained_for(steps: str, block_size: int | None = None) -> tuple[Method, ...]:
    """MDM as published, MDM trained for the same few steps as VMD, and VMD."""
    blocks = _in_blocks(block_size) if block_size else ()
    few = ("diffusion.objective=nelbo", f"diffusion.steps={steps}", *blocks)
    return (
        Method("mdm", (*MDM, *blocks)),
        Method("mdm_few_steps", ("latent.width=0", *few)),
        Method("vmd", few),
    )


TEXT8 = Task(
    name="text8",
    title="text8 characters: perplexity per character against the number of steps",
    config="text8.json",
    methods=(
        *_trained_for("1,2,4,8,16"),
        *_trained_for("1,1,2", 8),
        *_trained_for("1", 4),
        Method("vmd_surrogate", ("diffusion.objective=vmd", *_in_blocks(4))),
    ),
    measure=measures.bounds(
        "perplexity", "validation", (1, 2, 4, 8, 16, 64, math.inf), surrogate=True, tight=(1, 2, 4, 8, 16)
    ),
    fast_changes_data=True,
    sizes=Sizes(rows=4096, importance_samples=16),
    fast=(
        *SMALL,
        "data.row_length=64",
        "training.steps=1500",
        "training.global_batch=32",
        "training.micro_batch=32",
        "training.checkpoint_every=500",
        "diffusion.kl_weight.warmup_steps=750",
    ),
    fast_sizes=Sizes(rows=256, importance_samples=16),
    published=(
        Published(3.498, "mdm", "perplexity", "inf"),
        Published(2.873, "mdm", "perplexity", "inf", 64),
        Published(3.126, "mdm", "perplexity", "inf", 32),
        Published(2.858, "vmd_surrogate", "perplexity_vmd_surrogate", "inf", 64),
    ),
    goals=tuple(
        Goal("perplexity", steps, better_than=other, blocks=blocks)
        for other in ("mdm", "mdm_few_steps")
        # 64 or 256 characters in blocks of 8 and of 4: for one and two steps a block, and for one.
        for blocks, few in ((1, (1, 2, 4, 8, 16)), (8, (8, 16)), (16, (16,)), (32, (32, 64)), (64, (64,)))
        for steps in few
    ),
    notes=(
        "Every perplexity of ours is a valid bound on the T-step sampler: an ELBO by one random step (K = 1), or the "
        "importance-weighted bound. The published ones are of weak, short runs on rows of 256 characters; VMD's are "
        "the surrogate. vmd and mdm_few_steps are trained for few steps: for 1 to 16 of a whole row, 1 or 2 of a "
        "block of eight, 1 of a block of four. The bounds of all models are of the same rows and the same paths.",
    ),
    plot=against_steps("perplexity", "perplexity per character (upper bound)"),
)

TASKS = {task.name: task for task in (TWO_TOKENS, FOUR_TOKENS_D1, FOUR_TOKENS_D2, TOY2D, SUDOKU, MNIST, CIFAR10, TEXT8)}
