"""What the model will see: rows of the training split, decoded, clean and masked. For ``--preview``."""

import numpy as np
import torch

from vmd_scale.build import masks_of
from vmd_scale.config import Config
from vmd_scale.data.loader import evaluation_batches
from vmd_scale.data.mixture import training_rows
from vmd_scale.diffusion.corruption import corrupt
from vmd_scale.diffusion.noise import Noise, Stream
from vmd_scale.tokenization import Tokenizer

RATIOS = (0.25, 0.5, 1.0)


def preview(config: Config, tokenizer: Tokenizer, rows: int = 3) -> str:
    """The first rows of the run's sample order as text, then masked at several ratios by the run's path law."""
    reader, order = training_rows(config.data, config.training.seed)
    numbers = order.row_numbers(np.arange(min(rows, reader.rows), dtype=np.int64))
    noise, length, groups = Noise(config.training.seed), config.data.row_length, config.groups
    lines = [f"{reader.rows:,} rows of {length} tokens, vocabulary {tokenizer.vocab_size:,} and the mask symbol"]
    for batch in evaluation_batches(reader, numbers, micro_batch=1):
        maskable, attend = masks_of(batch, reader.manifest)
        real = torch.ones_like(maskable) if attend is None else attend != 0
        lines.append(f"\nrow {batch.rows[0]}: {int(real.sum())} tokens, {int(maskable.sum())} of them counted")
        lines.append(f"  clean  | {_text(tokenizer, batch.tokens[real])}")
        u_path = noise.uniform(Stream.PATH, 0, batch.rows, (groups, length // groups))
        for ratio in RATIOS:
            steps = torch.full((1, groups), 4.0, dtype=torch.float64)
            at = torch.full((1, groups), ratio - 0.125, dtype=torch.float64)  # the middle of step k = 4 ratio
            c = corrupt(batch.tokens, maskable, steps, at, u_path, config.diffusion.paths, tokenizer.vocab_size)
            lines.append(f"  t={ratio:<4} | {_text(tokenizer, c.noisy[real])}")
    return "\n".join(lines)


def _text(tokenizer: Tokenizer, ids: torch.Tensor) -> str:
    return tokenizer.decode(ids.tolist()).replace("\n", "\\n")
