"""Named corpora: ``documents(config, split)`` streams one split of one of them."""

from collections.abc import Iterator
from dataclasses import replace

from vmd_scale.config import DataConfig
from vmd_scale.data.corpora import (  # noqa: F401  they register themselves
    cifar10,
    four_tokens,
    lm1b,
    mnist,
    prompts,
    python_docs,
    sudoku,
    text,
    text8,
    toy2d,
    two_tokens,
    zero_shot,
)
from vmd_scale.data.corpora.registry import CORPORA, SPLITS, Corpus, Document, corpus, find_corpus
from vmd_scale.data.normalize import NORMALIZERS
from vmd_scale.errors import UserError

__all__ = [
    "CORPORA",
    "SPLITS",
    "Corpus",
    "Document",
    "available_splits",
    "corpus",
    "documents",
    "find_corpus",
    "normalizer_name",
    "raw_documents",
]


def available_splits(config: DataConfig) -> tuple[str, ...]:
    """The splits that this corpus has with this source, in the order train, validation, test."""
    return find_corpus(config).splits(config)


def normalizer_name(config: DataConfig) -> str:
    """data.normalizer, or what the corpus is published with."""
    return config.normalizer or find_corpus(config).normalizer


def raw_documents(config: DataConfig, split: str) -> Iterator[Document]:
    """Documents of a split before normalization, empty ones included.

    Raises:
        UserError: unknown corpus, a split that it does not have, and whatever is wrong with data.source.
    """
    found = find_corpus(config)
    splits = found.splits(config)
    if split not in splits:
        raise UserError(f"data.corpus {found.name!r} has no {split!r} split here; it has: {', '.join(splits)}")
    return found.read(config, split)


def documents(config: DataConfig, split: str) -> Iterator[Document]:
    """Documents of a split, normalized, without the empty ones. Raises what `raw_documents` does."""
    normalize = NORMALIZERS[normalizer_name(config)]
    for document in raw_documents(config, split):
        if document.tokens is not None:
            yield document
        elif document.prompt is not None:
            yield replace(document, prompt=normalize(document.prompt), text=normalize(document.text))
        elif text := normalize(document.text):
            yield replace(document, text=text)
