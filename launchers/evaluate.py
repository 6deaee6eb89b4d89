"""Evaluate a checkpoint: valid bounds on the likelihood of its T-step samplers, with standard errors.

    python launchers/evaluate.py --checkpoint runs/text8 --protocol text8 --steps 1,4,16,inf
    python launchers/evaluate.py --checkpoint runs/text8 --steps 1,4 --k 16 --rows 512 --json bounds.json

Every number is an upper bound (in expectation) on the negative log-likelihood of the sampler that it names: T steps (in
each block, for block diffusion), latent fixed or fresh, law of the paths. K = 1 is the ELBO by one random step; K > 1
the importance-weighted bound over whole paths, which costs K x T forwards. Orders by confidence (--paths top_prob,
margin, entropy) are replayed step by step, T forwards for each K; without a latent that is the exact likelihood.
--surrogate adds the training surrogate of the VMD and VADD papers, which bounds nothing.
"""

import argparse
from pathlib import Path

import torch

from vmd_scale.checkpoints import load_trained
from vmd_scale.config import parse_counts, parse_step_list
from vmd_scale.data.manifest import check_tokenizer
from vmd_scale.data.shards import ShardReader
from vmd_scale.diffusion.paths import LAWS
from vmd_scale.errors import UserError, reports_user_errors
from vmd_scale.evaluation.latent import latent_usage
from vmd_scale.evaluation.perplexity import Request, evaluate, table
from vmd_scale.evaluation.protocols import PROTOCOLS, get_protocol
from vmd_scale.files import write_json


@reports_user_errors
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, metavar="RUN", help="run folder, or one of its checkpoints")
    parser.add_argument("--protocol", default="rows", metavar="NAME", help=f"one of {', '.join(PROTOCOLS)}")
    parser.add_argument("--split", default="validation", choices=["train", "validation", "test"])
    parser.add_argument("--steps", default="inf", metavar="T,T,...", help="numbers of sampling steps, such as 1,4,inf")
    parser.add_argument(
        "--latent", default="fixed", choices=["fixed", "fresh"], help="one z a row, or a new one a step"
    )
    parser.add_argument("--paths", choices=LAWS, help="law of the revealing order; default: the run's own")
    parser.add_argument("--k", default="1", metavar="K,K,...", help="importance samples; more is tighter and dearer")
    parser.add_argument("--draws", type=int, default=1, help="independent estimates per row, averaged")
    parser.add_argument("--rows", type=int, help="score a fixed random choice of so many rows; default: all")
    parser.add_argument("--weights", default="ema", choices=["ema", "raw"])
    parser.add_argument("--shards", metavar="DIR", help="the prepared data; default: what the run was trained on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--micro-batch", type=int, default=64, help="rows in one forward")
    parser.add_argument("--surrogate", action="store_true", help="print the surrogate of the papers as well")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there: a list of objects")
    args = parser.parse_args()

    protocol, steps = get_protocol(args.protocol), parse_step_list(args.steps, "--steps")
    samples = parse_counts(args.k, "--k")
    trained = load_trained(args.checkpoint, args.weights, "cuda" if torch.cuda.is_available() else "cpu")
    request = Request(
        protocol=protocol.name,
        split=args.split,
        steps=steps,
        latent=args.latent,
        samples=samples,
        draws=args.draws,
        rows=args.rows,
        paths=args.paths or trained.config.diffusion.paths,
        seed=args.seed,
        micro_batch=args.micro_batch,
        surrogate=args.surrogate,
    )
    reader = ShardReader(args.shards or trained.config.data.shards, args.split)
    protocol.check(reader.manifest)
    check_tokenizer(reader.manifest, reader.folder, trained.tokenizer)
    if reader.row_length != trained.config.data.row_length:
        raise UserError(
            f"--shards {reader.folder}: rows of {reader.row_length}, the model was trained on "
            f"{trained.config.data.row_length}"
        )
    results = evaluate(trained.model, reader, request, trained.weights, trained.step)
    print(f"{trained.checkpoint}, {trained.weights} weights, protocol {protocol.name}: {protocol.description}")
    print(table(results))
    if trained.config.latent.width:
        objective = trained.config.diffusion.objective
        used = latent_usage(trained.model, reader, trained.step, objective, micro_batch=args.micro_batch)
        by_ratio = ", ".join(f"{kl:.3f} at {ratio}" for ratio, kl in used.kl_by_mask_ratio.items())
        print(f"latent: {used.active_units} of {used.latent_width} units active; KL in nats, by mask ratio: {by_ratio}")
    if args.surrogate:
        print(f"vmd_surrogate {results[0].vmd_surrogate:.4f} nats/token (NOT a bound)")
    if args.json:
        write_json(args.json, [result.to_dict() for result in results])


if __name__ == "__main__":
    main()
