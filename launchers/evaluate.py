"""Evaluate a checkpoint: valid bounds on the likelihood of its T-step samplers, with standard errors.

    python launchers/evaluate.py --checkpoint runs/text8 --protocol text8 --split test --steps 1,4,16,inf
    python launchers/evaluate.py --checkpoint runs/text8 --steps 1,4 --k 16 --rows 512 --json bounds.json
    torchrun --nproc-per-node 8 launchers/evaluate.py --checkpoint runs/lm1b --protocol lm1b_packed --until-error 0.01
    python launchers/evaluate.py --checkpoint runs/openwebtext --protocol zero_shot \\
        --source ptb=ptb.valid.txt --source lambada=lambada_test.jsonl
    python launchers/evaluate.py --checkpoint runs/text8 --protocol generation --steps 1,4,16 --judge ngram

Every number is an upper bound (in expectation) on the negative log-likelihood of the sampler that it names: T steps (in
each block, for block diffusion), latent fixed or fresh, law of the paths. K = 1 is the ELBO by one random step; K > 1
the importance-weighted bound over whole paths, which costs K x T forwards. Orders by confidence (--paths top_prob,
margin, entropy) are replayed step by step, T forwards for each K; without a latent that is the exact likelihood.
--surrogate adds the training surrogate of the VMD and VADD papers, --interval mdlm_compat computes MDLM's own estimate:
both bound nothing. Protocol generation draws samples and asks a judge: a folder of any causal Hugging Face model, or an
n-gram model of the run's own corpus.
"""

import argparse
import math
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vmd_scale.checkpoints import TrainedModel, checkpoint_id, find_checkpoint, load_trained, run_folder_of
from vmd_scale.commandline import HelpFormatter, check_at_least, refuse_unused
from vmd_scale.config_file import parse_counts, parse_step_list
from vmd_scale.data.manifest import check_tokenizer
from vmd_scale.data.shards import ShardReader, shard_cache
from vmd_scale.diffusion.compat import INTERVALS
from vmd_scale.diffusion.paths import LAWS
from vmd_scale.diffusion.sampler import Sampler
from vmd_scale.errors import UserError, reports_user_errors
from vmd_scale.evaluation.generation import evaluate_generation, generation_table
from vmd_scale.evaluation.judges import NGramJudge, load_judge, parse_judge
from vmd_scale.evaluation.latent import latent_usage
from vmd_scale.evaluation.perplexity import Request, Result, evaluate
from vmd_scale.evaluation.protocols import PROTOCOLS, ZERO_SHOT, get_protocol
from vmd_scale.evaluation.published import generative_figures
from vmd_scale.evaluation.ranks import Ranks
from vmd_scale.evaluation.tables import beside_published, table
from vmd_scale.evaluation.zero_shot import parse_sources, prepare_set
from vmd_scale.files import check_writable, write_json
from vmd_scale.precision import PRECISIONS, describe_kernels
from vmd_scale.tokenization import kept_tokenizer
from vmd_scale.training.launch import World, joined_world, world_size_from_environment
from vmd_scale.training.start import patient_group, verify_together

NAMES = [*(name for name in PROTOCOLS if "/" not in name), "zero_shot", "generation"]
OF_BOUNDS = ("k", "draws", "rows", "until_error", "interval", "surrogate")
OF_GENERATION = ("judge", "count", "temperature", "nucleus")


@reports_user_errors
def main() -> None:
    args = parse_arguments()
    parse_step_list(args.steps, "--steps")
    parse_counts(args.k, "--k")
    check_writable(args.json, "--json")
    sources = parse_sources(args.source) if args.protocol == "zero_shot" else {}
    if args.protocol == "generation":
        parse_judge(args.judge)
    with joined_world() if world_size_from_environment() > 1 else nullcontext() as world:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu") if world is None else world.device
        ranks = Ranks() if world is None else Ranks(world.rank, world.size, world.host_group)
        find = partial(find_checkpoint, args.checkpoint)
        checkpoint = find() if world is None else world.from_main(find)  # of a run that may be going on
        trained = load_trained(checkpoint, args.weights, device, args.precision)
        if args.compile:
            trained.model.compile_blocks()
        say = print if ranks.rank == 0 else lambda *_: None
        say(f"{trained.checkpoint}, {trained.weights} weights")
        generates, padded = args.protocol == "generation", trained.config.data.packing == "pad"
        say(describe_kernels(trained.model, trained.precision, padded and not generates, generates))
        if generates:
            results = generate(args, trained, ranks, say)
        elif args.protocol == "zero_shot":
            prepared_in = Path(args.shards or run_folder_of(trained.checkpoint) / "zero_shot")
            requests = [make_request(args, trained, f"zero_shot/{name}", ZERO_SHOT[name].split) for name in sources]
            prepare_zero_shot(sources, trained, prepared_in, world)
            results = []
            for name, request in zip(sources, requests, strict=True):
                verify_together(str(prepared_in / name), [request.split], world)
                results += score(trained, ShardReader(prepared_in / name, request.split), request, ranks, say)
        else:
            request = make_request(args, trained, args.protocol, args.split)
            shards = args.shards or trained.config.data.shards
            verify_together(shards, [args.split], world)
            reader = ShardReader(shards, args.split, cache=shard_cache(trained.config.data))
            results = score(trained, reader, request, ranks, say)
            if trained.config.latent.width:
                objective = trained.config.diffusion.objective
                used = latent_usage(trained.model, reader, trained.step, objective, micro_batch=args.micro_batch)
                say(f"latent: {used.describe()}")
        if args.json and ranks.rank == 0:
            write_json(args.json, results)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--checkpoint", required=True, metavar="RUN", help="run folder, or one of its checkpoints")
    parser.add_argument("--protocol", default="rows", metavar="NAME", help=f"one of {', '.join(NAMES)}")
    parser.add_argument("--split", default="validation", choices=["train", "validation", "test"], help="of the shards")
    parser.add_argument("--steps", default="inf", metavar="T,T,...", help="numbers of sampling steps, such as 1,4,inf")
    parser.add_argument(
        "--latent", default="fixed", choices=["fixed", "fresh"], help="one z per row, or a new one at every step"
    )
    parser.add_argument("--paths", choices=LAWS, help="law of the revealing order; default: the run's own")
    parser.add_argument(
        "--weights", default="ema", choices=["ema", "raw"], help="the moving average of the weights, or the last ones"
    )
    parser.add_argument(
        "--precision", default="auto", choices=PRECISIONS, help="auto: bf16 on a GPU, unless the run asked for fp32"
    )
    parser.add_argument("--shards", metavar="DIR", help="the prepared data; default: what the run was trained on")
    parser.add_argument("--seed", type=int, default=0, help="of all noise")
    parser.add_argument("--micro-batch", type=int, default=64, help="rows in one forward")
    parser.add_argument("--compile", action="store_true", help="torch.compile of the blocks: a minute, then faster")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there: a list of objects")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    bounds = parser.add_argument_group("bounds")
    bounds.add_argument(
        "--k", default="1", metavar="K,K,...", help="importance samples; more give a tighter bound, at a higher cost"
    )
    bounds.add_argument("--draws", type=int, default=1, help="independent estimates per row, averaged")
    bounds.add_argument("--rows", type=int, help="score a fixed random choice of so many rows; default: all")
    bounds.add_argument(
        "--until-error", type=float, metavar="BITS", help="as many rows as this standard error needs, in bits per token"
    )
    bounds.add_argument(
        "--interval", default="full", choices=INTERVALS, help="of t; mdlm_compat is MDLM's estimate, no bound"
    )
    bounds.add_argument("--surrogate", action="store_true", help="print the surrogate of the papers as well")
    bounds.add_argument(
        "--source",
        action="append",
        default=[],
        metavar="SET=FILE",
        help=f"for zero_shot, a file or hf:NAME of {', '.join(ZERO_SHOT)}",
    )
    generation = parser.add_argument_group("generation")
    generation.add_argument(
        "--judge", default="ngram", metavar="DIR", help="folder of a causal model, ngram or ngram:ORDER"
    )
    generation.add_argument("--count", type=int, default=64, help="samples for each number of steps")
    generation.add_argument(
        "--temperature", type=float, default=1.0, help="of the tokens; 0 takes the most probable one"
    )
    generation.add_argument(
        "--nucleus", type=float, default=1.0, help="top-p: the smallest set of tokens that holds this probability"
    )
    args = parser.parse_args()
    if args.protocol not in NAMES:
        raise UserError(f"--protocol {args.protocol!r} does not exist; allowed: {', '.join(NAMES)}")
    unused: tuple[str, ...] = OF_BOUNDS if args.protocol == "generation" else OF_GENERATION
    unused += ("split",) if args.protocol == "zero_shot" else ("source",)
    refuse_unused(args, parser, unused, f"--protocol {args.protocol}")
    check_at_least(args, rows=2, draws=1, count=2, micro_batch=1, seed=0)
    if args.until_error is not None and not args.until_error > 0:
        raise UserError(f"--until-error {args.until_error:g}: must be greater than 0")
    return args


def make_request(args: argparse.Namespace, trained: TrainedModel, protocol: str, split: str) -> Request:
    compat = args.interval != "full" or get_protocol(protocol).pads_attended
    return Request(
        protocol=protocol,
        split=split,
        steps=parse_step_list(args.steps, "--steps"),
        latent=args.latent,
        samples=parse_counts(args.k, "--k"),
        draws=args.draws,
        rows=args.rows,
        paths=args.paths or ("bernoulli" if compat else trained.config.diffusion.paths),
        seed=args.seed,
        micro_batch=args.micro_batch,
        surrogate=args.surrogate,
        interval=args.interval,
        until_error=None if args.until_error is None else args.until_error * math.log(2),
    )


def prepare_zero_shot(sources: dict[str, str], trained: TrainedModel, folder: Path, world: World | None) -> None:
    """Rank 0 prepares, the others wait; what is wrong is an error on all of them."""

    kept = kept_tokenizer(trained.config.data.tokenizer, run_folder_of(trained.checkpoint))
    data = trained.config.data.model_copy(update={"tokenizer": kept})
    known = {"row_length": data.row_length, "row_specials": data.row_specials}
    for name in sources:
        get_protocol(f"zero_shot/{name}").check_keys(known | {"vocab_size": trained.tokenizer.vocab_size})

    def prepare() -> None:
        for name, source in sources.items():
            prepare_set(name, source, data, folder)

    if world is None:
        prepare()
    else:
        with patient_group() as group:
            world.on_main(prepare, group)


def score(trained: TrainedModel, reader: ShardReader, request: Request, ranks: Ranks, say: Any) -> list[dict[str, Any]]:
    """Bounds on one split, printed and returned as plain values."""
    check_reader(reader, trained)
    found: list[Result] = evaluate(trained.model, reader, request, trained.weights, trained.step, ranks)
    results = [replace(result, checkpoint=checkpoint_id(trained.checkpoint)) for result in found]
    say(f"\nprotocol {request.protocol}: {get_protocol(request.protocol).description}")
    say(table(results))
    wanted = request.until_error
    if wanted is not None and any(result.standard_error > wanted for result in results):
        say("--until-error: not reached; more --draws take away the noise of the estimate, more rows that of the text")
    if request.surrogate:
        value, error = results[0].vmd_surrogate, results[0].vmd_surrogate_error
        say(f"vmd_surrogate {value:.4f} +- {error:.4f} nats/token (NOT a bound)")
    if published := beside_published(results):
        say(published)
    return [result.to_dict() for result in results]


def generate(args: argparse.Namespace, trained: TrainedModel, ranks: Ranks, say: Any) -> list[dict[str, Any]]:
    """Figures of samples, printed and returned as plain values."""
    law = args.paths or trained.config.diffusion.paths
    try:
        plain = Sampler(1, args.latent, law, args.temperature, args.nucleus)
    except ValueError as error:
        raise UserError(f"--{error}") from None
    samplers = [replace(plain, steps=steps) for steps in parse_step_list(args.steps, "--steps")]
    shards = args.shards or trained.config.data.shards
    cache = shard_cache(trained.config.data)
    reader = ShardReader(shards, args.split, cache=cache)
    check_reader(reader, trained)
    judge = load_judge(args.judge, shards, trained.tokenizer, next(trained.model.parameters()).device, cache)
    results = evaluate_generation(trained, samplers, judge, reader, args.count, args.seed, args.micro_batch, ranks)
    say(generation_table(results))
    if not isinstance(judge, NGramJudge) and PROTOCOLS["lm1b_packed"].fits(reader.manifest):
        say(generative_figures())
    return [replace(result, checkpoint=checkpoint_id(trained.checkpoint)).to_dict() for result in results]


def check_reader(reader: ShardReader, trained: TrainedModel) -> None:
    check_tokenizer(reader.manifest, reader.folder, trained.tokenizer)
    if reader.row_length != trained.config.data.row_length:
        raise UserError(
            f"--shards {reader.folder}: rows of {reader.row_length}, the model was trained on "
            f"{trained.config.data.row_length}"
        )


if __name__ == "__main__":
    main()
