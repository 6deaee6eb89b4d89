"""What is in a folder of shards, for people: statistics and a decoded row of each split."""

import math
from pathlib import Path

import numpy as np

from vmd_scale.data.manifest import Manifest, SplitRecord, read_manifest
from vmd_scale.data.roles import Role
from vmd_scale.data.shards import ShardReader
from vmd_scale.errors import UserError
from vmd_scale.tokenization import Tokenizer, load_tokenizer


def describe(manifest: Manifest) -> str:
    """A few lines of statistics: how it was made, and what each split holds."""
    specials = ", specials around every row" if manifest.row_specials else ""
    lines = [
        f"corpus {manifest.corpus} from {manifest.source}, normalizer {manifest.normalizer}, "
        f"licence {manifest.licence or 'not recorded'}",
        f"tokenizer {manifest.tokenizer}: {manifest.vocab_size} symbols, mask id {manifest.vocab_size}, "
        f"fingerprint {manifest.tokenizer_fingerprint[:12]}",
        f"rows of {manifest.row_length} tokens, {manifest.packing}{specials}, {manifest.dtype}",
    ]
    return "\n".join(lines + [_describe_split(name, record) for name, record in manifest.splits.items()])


def _describe_split(name: str, record: SplitRecord) -> str:
    text = (
        f"{name}: {record.rows:,} rows, {record.counted_tokens:,} counted tokens, {record.documents:,} documents, "
        f"{record.characters:,} characters, unigram entropy {record.unigram_entropy / math.log(2):.3f} bits per token, "
        f"shard files: {len(record.shards)}"
    )
    losses = {
        "empty documents skipped": record.skipped_documents,
        "documents truncated": record.truncated_documents,
        "tokens dropped at the end": record.dropped_tokens,
    }
    return text + "".join(f", {count:,} {what}" for what, count in losses.items() if count)


def inspect(folder: str | Path) -> str:
    """Statistics and the first row of each split, decoded where the tokenizer is at hand."""
    manifest = read_manifest(folder)
    try:
        tokenizer: Tokenizer | None = load_tokenizer(manifest.tokenizer)
    except UserError:
        tokenizer = None
    if tokenizer is not None and tokenizer.fingerprint != manifest.tokenizer_fingerprint:
        tokenizer = None
    lines = [describe(manifest)]
    for split in manifest.splits:
        tokens, roles = ShardReader(folder, split, manifest).read(np.array([0]))
        shown = tokens[0] if roles is None else tokens[0][roles[0] != Role.PADDING]
        if tokenizer is None:
            lines.append(f"{split}[0] (its tokenizer is not at hand): {shown.tolist()}")
        else:
            lines.append(f"{split}[0]: {tokenizer.decode(shown)!r}")
    return "\n".join(lines)
