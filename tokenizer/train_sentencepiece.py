"""Train a SentencePiece tokenizer on plain text files, one sentence a line.

    python tokenizer/train_sentencepiece.py --input a.txt b.txt --vocab-size 8192 --output tokenizer/assets/mine.model

Then set ``"tokenizer": "mine"`` (found under tokenizer/assets) or the path of the .model in a configuration.

The same text gives the same file, byte for byte, on every machine. The number of --threads decides the order of
floating-point sums, and with it the last bits: leave it alone where files should be equal.
"""

import argparse
import io
import random
from pathlib import Path

import sentencepiece

from vmd_scale.commandline import HelpFormatter
from vmd_scale.data.corpora.files import lines
from vmd_scale.errors import UserError, reports_user_errors
from vmd_scale.files import write_atomically

THREADS = 16
DEFAULT_LENGTH = 4192  # SentencePiece's, in bytes; longer lines would be left out


def train(inputs: list[Path], vocab_size: int, output: Path, threads: int, sentences: int, seed: int = 0) -> None:
    """Write `output`, a unigram model with begin, end and pad tokens and byte fallback.

    Args:
        inputs: UTF-8 text, also compressed (.xz, .gz, .zip).
        sentences: drawn from the input at random, at most; `seed` decides which.

    Raises:
        UserError: an input that is missing or damaged, an output that is not NAME.model, or too little text for the
            vocabulary.
    """
    for path in inputs:
        if not path.is_file():
            raise UserError(f"--input {path}: no such file")
    if output.suffix != ".model":
        raise UserError(f"--output {output}: expected a name that ends in .model")
    if sentences < 1:
        raise UserError(f"--sentences {sentences}: must be at least 1")
    model, drawn = io.BytesIO(), _drawn(inputs, sentences, seed)
    try:
        # Through an iterator and a writer: the names of the files would become part of the model.
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(drawn),
            max_sentence_length=max([DEFAULT_LENGTH, *(len(line.encode()) for line in drawn)]),
            model_writer=model,
            vocab_size=vocab_size,
            num_threads=threads,
            byte_fallback=True,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            minloglevel=1,
        )
    except (RuntimeError, OSError) as error:
        raise UserError(f"--vocab-size {vocab_size}: SentencePiece refused: {error}") from None
    write_atomically(output, model.getvalue())


def _drawn(inputs: list[Path], most: int, seed: int) -> list[str]:
    """At most so many lines, each as likely as another (Vitter's algorithm R).

    SentencePiece could draw them itself, but not twice the same.
    """
    generator, kept, seen = random.Random(seed), [], 0
    for path in inputs:
        for line in lines(path):
            if not line.strip():
                continue
            place = seen if seen < most else generator.randrange(seen + 1)
            if place < most:
                kept[place : place + 1] = [line]
            seen += 1
    return kept


@reports_user_errors
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--input", nargs="+", type=Path, required=True, metavar="FILE", help="text, a sentence a line")
    parser.add_argument("--vocab-size", type=int, default=8192, help="symbols, the special ones included")
    parser.add_argument("--output", type=Path, required=True, metavar="NAME.model", help="where the model goes")
    parser.add_argument(
        "--threads", type=int, default=THREADS, help="the last bits of the scores depend on their number"
    )
    parser.add_argument("--sentences", type=int, default=2_000_000, help="sentences drawn from the input, at most")
    parser.add_argument("--seed", type=int, default=0, help="of that draw")
    args = parser.parse_args()
    train(args.input, args.vocab_size, args.output, args.threads, args.sentences, args.seed)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
