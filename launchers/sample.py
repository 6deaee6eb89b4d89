"""Draw samples from a checkpoint with T-step samplers.

    python launchers/sample.py --checkpoint runs/text8 --steps 1,4,16,64 --count 4
    python launchers/sample.py --checkpoint runs/text8 --steps 8 --latent fresh --json samples.json
    python launchers/sample.py --checkpoint runs/text8 --steps 32 --paths margin --temperature 0.8 --nucleus 0.95
    python launchers/sample.py --checkpoint runs/chat --steps 64 --prompt "Write a haiku about rain."
    python launchers/sample.py --checkpoint runs/text8 --steps 8 --prompt "the [MASK][MASK][MASK] sat on the mat"

Sample number n of a seed is always the same sample, whatever it is batched with. Draws are made in float64.
"""

import argparse
from dataclasses import asdict
from pathlib import Path

import torch

from vmd_scale.checkpoints import TrainedModel, load_trained
from vmd_scale.commandline import HelpFormatter, check_at_least
from vmd_scale.config_file import parse_step_list
from vmd_scale.data.corpora import normalizer_name
from vmd_scale.data.normalize import NORMALIZERS
from vmd_scale.diffusion.noise import Noise
from vmd_scale.diffusion.paths import LAWS
from vmd_scale.diffusion.sampler import Sampler, sample
from vmd_scale.errors import UserError, reports_user_errors
from vmd_scale.files import check_writable, write_json
from vmd_scale.model import Architecture
from vmd_scale.precision import PRECISIONS, describe_kernels

HOLE = "[MASK]"


@reports_user_errors
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--checkpoint", required=True, metavar="RUN", help="run folder, or one of its checkpoints")
    parser.add_argument("--steps", default="64", metavar="T,T,...", help="numbers of sampling steps, such as 1,8,inf")
    parser.add_argument("--count", type=int, default=4, help="samples for each number of steps")
    parser.add_argument(
        "--latent", default="fixed", choices=["fixed", "fresh"], help="one z per row, or a new one at every step"
    )
    parser.add_argument("--paths", choices=LAWS, help="law of the revealing order; default: the run's own")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the tokens; 0 takes the most probable one")
    parser.add_argument(
        "--nucleus", type=float, default=1.0, help="top-p: the smallest set of tokens that holds this probability"
    )
    parser.add_argument(
        "--order-noise",
        type=float,
        default=0.0,
        help="Gumbel noise on the confidence (MaskGIT); with --paths top_prob, margin, entropy",
    )
    parser.add_argument(
        "--remask",
        type=float,
        default=0.0,
        help="mask up to this share again after a step (ReMDM); not with --paths bernoulli",
    )
    parser.add_argument(
        "--prompt",
        default="",
        metavar="TEXT",
        help="what the samples begin with, ending at an end token; each [MASK] in it is a token to be drawn",
    )
    parser.add_argument(
        "--weights", default="ema", choices=["ema", "raw"], help="the moving average of the weights, or the last ones"
    )
    parser.add_argument(
        "--precision", default="auto", choices=PRECISIONS, help="auto: bf16 on a GPU, unless the run asked for fp32"
    )
    parser.add_argument("--seed", type=int, default=0, help="of all noise")
    parser.add_argument("--micro-batch", type=int, default=16, help="rows in one forward; does not change the samples")
    parser.add_argument("--compile", action="store_true", help="torch.compile of the blocks: a minute, then faster")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the samples there as well")
    args = parser.parse_args()

    check_at_least(args, count=1, micro_batch=1, seed=0)
    check_writable(args.json, "--json")
    steps = parse_step_list(args.steps, "--steps")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    trained = load_trained(args.checkpoint, args.weights, device, args.precision)
    print(describe_kernels(trained.model, trained.precision, padded=False, sampling=True))
    if args.compile:
        trained.model.compile_blocks()
    prompt, a = prompt_tokens(args.prompt, trained), trained.model.architecture
    if blind_holes(prompt, a):
        print(f"note: drawn block after block ({a.row_length // a.groups} tokens), a hole does not see later blocks\n")
    records = []
    for wanted, name in zip(steps, args.steps.split(","), strict=True):
        sampler = make_sampler(wanted, args, trained.config.diffusion.paths)
        batches = torch.arange(args.count).split(args.micro_batch)
        rows = [
            row
            for some in batches
            for row in sample(trained.model, sampler, Noise(args.seed), some, *given_rows(prompt, some, a)).tolist()
        ]
        texts = [trained.tokenizer.decode(until_end(row, len(prompt), trained.tokenizer.end_id)) for row in rows]
        drawn = {**asdict(sampler), "steps": name, "seed": args.seed, "weights": trained.weights}
        drawn |= {"precision": trained.precision, "step": trained.step}
        if args.prompt:
            drawn["prompt"] = args.prompt
        records.append({**drawn, "texts": texts})
        print(", ".join(f"{'T' if key == 'steps' else key} {value}" for key, value in drawn.items()))
        print("".join(f"  {text}\n" for text in texts))
    if args.json:
        write_json(args.json, records)


def prompt_tokens(text: str, trained: TrainedModel) -> torch.Tensor:
    """int64 [n], encoded as training texts are, after the token that training rows begin with; holes are mask_id."""
    if not text:
        return torch.zeros(0, dtype=torch.int64)
    data, mask_id = trained.config.data, trained.model.architecture.mask_id
    name, ids = normalizer_name(data), []
    pieces = cleaned_around_holes(text, name)
    left = HOLE.join(pieces)
    if text.strip() and not left.strip():
        raise UserError(
            f"--prompt {text!r}: data.normalizer {name!r}, the clean-up of the training texts, leaves nothing"
        )
    if "".join(left.split()) != "".join(text.split()):
        print(f"note: data.normalizer {name!r}, the clean-up of the training texts, leaves of the prompt: {left!r}\n")
    if data.row_specials:
        assert trained.tokenizer.begin_id is not None
        ids.append(trained.tokenizer.begin_id)
    for n, given in enumerate(pieces):
        ids += [mask_id] * (n > 0)
        ids += trained.tokenizer.encode(given).tolist() if given else []
    room = data.row_length - (HOLE not in text)
    if len(ids) > room:
        raise UserError(f"--prompt: {len(ids)} tokens; of the {data.row_length} of a row it may have {room}")
    return torch.tensor(ids)


def cleaned_around_holes(text: str, normalizer: str) -> list[str]:
    """The clean-up of whole texts, of each piece between holes; where it touches a hole, a space stays, or none."""
    given = text.split(HOLE)
    pieces = [NORMALIZERS[normalizer](piece) if piece else "" for piece in given]
    if normalizer == "none":
        return pieces
    for n in range(1, len(given)):
        pieces[n - 1] = pieces[n - 1].rstrip() + " " * given[n - 1][-1:].isspace()
        pieces[n] = " " * given[n][:1].isspace() + pieces[n].lstrip()
    return pieces


def blind_holes(prompt: torch.Tensor, a: Architecture) -> bool:
    """Whether tokens are given in a later block than that of a hole, which is drawn without a look at them."""
    blocks = torch.arange(len(prompt)) // (a.row_length // a.groups)
    holes, given = blocks[prompt == a.mask_id], blocks[prompt != a.mask_id]
    return len(holes) > 0 and len(given) > 0 and bool(holes.min() < given.max())


def given_rows(prompt: torch.Tensor, some: torch.Tensor, a: Architecture) -> tuple[torch.Tensor, ...]:
    """Rows that begin with the prompt, and where they are to be drawn; nothing without a prompt."""
    if not len(prompt):
        return ()
    rows = torch.full((len(some), a.row_length), a.mask_id)
    rows[:, : len(prompt)] = prompt
    return rows, rows == a.mask_id


def until_end(row: list[int], begin: int, end_id: int | None) -> list[int]:
    """A response without the end tokens that fill its row; a sample without a prompt is left whole."""
    return row[: row.index(end_id, begin)] if begin and end_id in row[begin:] else row


def make_sampler(steps: float, args: argparse.Namespace, paths: str) -> Sampler:
    law = args.paths or paths
    try:
        return Sampler(steps, args.latent, law, args.temperature, args.nucleus, args.order_noise, args.remask)
    except ValueError as error:
        raise UserError(f"--{str(error).replace('_', '-', 1)}") from None


if __name__ == "__main__":
    main()
