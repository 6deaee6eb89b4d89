"""Train a SentencePiece tokenizer on plain text files, one sentence a line.

    python tokenizer/train_sentencepiece.py --input a.txt b.txt --vocab-size 8192 --output tokenizer/assets/mine.model

Then set ``"tokenizer": "mine"`` (found under tokenizer/assets) or the path of the .model in a configuration.
"""

import argparse
import os
import tempfile
from pathlib import Path

import sentencepiece

from vmd_scale.errors import UserError, reports_user_errors


def train(inputs: list[Path], vocab_size: int, output: Path, threads: int, sentences: int) -> None:
    """Write `output`, a unigram model with begin, end and pad tokens and byte fallback.

    Raises:
        UserError: an input that is missing, an output that is not NAME.model, or too little text for the vocabulary.
    """
    for path in inputs:
        if not path.is_file():
            raise UserError(f"--input {path}: no such file")
    if output.suffix != ".model":
        raise UserError(f"--output {output}: expected a name that ends in .model")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:
        prefix = Path(folder) / "new"
        try:
            sentencepiece.SentencePieceTrainer.train(
                input=[str(path) for path in inputs],
                model_prefix=str(prefix),
                vocab_size=vocab_size,
                num_threads=threads,
                input_sentence_size=sentences,
                shuffle_input_sentence=True,
                byte_fallback=True,
                unk_id=0,
                bos_id=1,
                eos_id=2,
                pad_id=3,
                minloglevel=1,
            )
        except (RuntimeError, OSError) as error:
            raise UserError(f"--vocab-size {vocab_size}: SentencePiece refused: {error}") from None
        os.replace(prefix.with_suffix(".model"), output)


@reports_user_errors
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", type=Path, required=True, metavar="FILE", help="text, a sentence a line")
    parser.add_argument("--vocab-size", type=int, default=8192, help="symbols, the special ones included")
    parser.add_argument("--output", type=Path, required=True, metavar="NAME.model", help="where the model goes")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--sentences", type=int, default=2_000_000, help="sentences drawn from the input, at most")
    args = parser.parse_args()
    train(args.input, args.vocab_size, args.output, args.threads, args.sentences)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
