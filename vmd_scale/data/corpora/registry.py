"""The registry of named corpora, and what a corpus hands out: documents.

A new corpus is one generator with a decorator, in a file of this folder that ``__init__`` imports, or in a module of
the user's own: ``"corpus": "my_module:haiku"``.

    @corpus("haiku", normalizer="none", licence="public domain")
    def haiku(config: DataConfig, split: str) -> Iterator[Document]:
        for number, line in enumerate(lines(Path(local_source(config, split).path))):
            if in_twentieth(number, split):
                yield Document(line)
"""

import difflib
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from vmd_scale.config import DataConfig
from vmd_scale.errors import UserError

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Document:
    """Text, or ready tokens (int64 [n]) of which some are `given` (bool [n]): those are a row by themselves.

    With a `prompt`, `text` is the response to it: a row of its own, whose prompt is given. If the response is one of
    `choices`, only as many positions are counted as the longest of them has; else the row is filled to its end.

    `last` is false for a piece of a document whose next piece follows: a text too long to be handled at once.
    """

    text: str = ""
    tokens: np.ndarray | None = None
    given: np.ndarray | None = None
    last: bool = True
    prompt: str | None = None
    choices: tuple[str, ...] = ()


DocumentSource = Callable[[DataConfig, str], Iterator[Document]]


@dataclass(frozen=True)
class Corpus:
    """A named corpus; `read` yields the documents of a split as they are, `normalizer` is what it is published with.

    `origin` says where a corpus without a data.source comes from; `remark` why data.source is not the corpus of that
    name, where it can tell.
    """

    name: str
    read: DocumentSource
    normalizer: str
    licence: str | None
    origin: str | None
    splits: Callable[[DataConfig], tuple[str, ...]]
    remark: Callable[[DataConfig], str | None]


CORPORA: dict[str, Corpus] = {}


def mapped_splits(config: DataConfig, otherwise: tuple[str, ...] = SPLITS) -> tuple[str, ...]:
    """The splits of a ``{split: file}`` mapping in data.source; `otherwise` for a single source."""
    if isinstance(config.source, dict):
        return tuple(split for split in SPLITS if split in config.source)
    return otherwise


def corpus(
    name: str,
    *,
    normalizer: str = "none",
    licence: str | None = None,
    origin: str | None = None,
    splits: Callable[[DataConfig], tuple[str, ...]] = mapped_splits,
    remark: Callable[[DataConfig], str | None] = lambda config: None,
) -> Callable[[DocumentSource], DocumentSource]:
    """Register the decorated ``(config, split) -> documents`` under `name`."""

    def register(read: DocumentSource) -> DocumentSource:
        CORPORA[name] = Corpus(name, read, normalizer, licence, origin, splits, remark)
        return read

    return register


def find_corpus(config: DataConfig) -> Corpus:
    """The corpus of data.corpus: one of ours, or MODULE:NAME, registered by a module in reach of Python or here.

    Raises:
        UserError: an unknown name, or a module that cannot be imported or does not register it.
    """
    module, colon, name = config.corpus.rpartition(":")
    if colon:
        _import(module, config)
    if name not in CORPORA:
        nearest = difflib.get_close_matches(name, CORPORA, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise UserError(f"data.corpus {config.corpus!r} is unknown; known: {', '.join(sorted(CORPORA))}{hint}")
    return CORPORA[name]


def _import(module: str, config: DataConfig) -> None:
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        importlib.import_module(module)
    except Exception as error:  # whatever is wrong with the user's module
        raise UserError(f"data.corpus {config.corpus!r}: {module} cannot be imported: {error!r}") from error


def in_twentieth(number: int, split: str) -> bool:
    """The split of corpora that come without one: of every 20 documents 18 train, then validation, then test."""
    return {18: "validation", 19: "test"}.get(number % 20, "train") == split
