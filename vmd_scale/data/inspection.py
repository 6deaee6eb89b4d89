"""What is in a folder of shards, for people: statistics and a decoded row of each split."""

import math
from pathlib import Path

import numpy as np

from vmd_scale.data.manifest import Manifest, SplitRecord, read_manifest
from vmd_scale.data.roles import Role
from vmd_scale.data.shards import ShardReader
from vmd_scale.errors import UserError
from vmd_scale.tokenization import Tokenizer, load_tokenizer

BAR_WIDTH = 40


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
    splits = [_describe_split(name, record, manifest.row_length) for name, record in manifest.splits.items()]
    return "\n".join(lines + splits)


def _describe_split(name: str, record: SplitRecord, row_length: int) -> str:
    text = (
        f"{name}: {record.rows:,} rows, {record.counted_tokens:,} counted tokens, {record.documents:,} documents, "
        f"{record.characters:,} characters, unigram entropy {record.unigram_entropy / math.log(2):.3f} bits per token, "
        f"shard files: {len(record.shards)}"
    )
    if record.counted_tokens < record.rows * row_length:
        text += f", {record.counted_tokens / (record.rows * row_length):.1%} of the positions are counted"
    losses = {
        "empty documents skipped": record.skipped_documents,
        "documents truncated": record.truncated_documents,
        "documents cut into several": record.split_documents,
        "tokens dropped at the end": record.dropped_tokens,
    }
    return text + "".join(f", {count:,} {what}" for what, count in losses.items() if count)


def lengths_chart(record: SplitRecord) -> list[str]:
    """How long the documents are, a bar for each doubling of the length in tokens."""
    most = max(record.document_lengths, default=0)
    lines = []
    for i, count in enumerate(record.document_lengths):
        bar = "#" * math.ceil(BAR_WIDTH * count / most)
        lines.append(f"  {2**i:>10,} .. {2 ** (i + 1) - 1:<10,} {count:>12,} {bar}".rstrip())
    first = next((i for i, count in enumerate(record.document_lengths) if count), 0)
    return lines[first:]


def plot_lengths(manifest: Manifest, path: Path) -> None:
    """The same for all splits as a picture; the suffix of the file names its format."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, record in manifest.splits.items():
        share = np.array(record.document_lengths) / max(1, sum(record.document_lengths))
        axes.stairs(share, 2.0 ** np.arange(len(share) + 1), label=name)
    axes.set_xscale("log", base=2)
    axes.axvline(manifest.row_length, color="grey", linestyle=":", label="row length")
    axes.set(xlabel="tokens in a document", ylabel="share of the documents", title=manifest.corpus)
    axes.legend()
    figure.savefig(path)


def inspect(folder: str | Path) -> str:
    """Statistics, lengths of documents and the first row of each split, decoded where the tokenizer is at hand."""
    manifest = read_manifest(folder)
    try:
        tokenizer: Tokenizer | None = load_tokenizer(manifest.tokenizer)
    except UserError:
        tokenizer = None
    if tokenizer is not None and tokenizer.fingerprint != manifest.tokenizer_fingerprint:
        tokenizer = None
    lines = [describe(manifest)]
    for split, record in manifest.splits.items():
        if record.document_lengths:
            lines += [f"{split}: documents by their length in tokens", *lengths_chart(record)]
        tokens, roles = ShardReader(folder, split, manifest).read(np.array([0]))
        shown = tokens[0] if roles is None else tokens[0][roles[0] != Role.PADDING]
        if tokenizer is None:
            lines.append(f"{split}[0] (its tokenizer is not at hand): {shown.tolist()}")
        else:
            lines.append(f"{split}[0]: {tokenizer.decode(shown)!r}")
    return "\n".join(lines)
