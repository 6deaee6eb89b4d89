"""text8: one stream of characters, split 90/5/5."""

import logging
from collections.abc import Iterator
from pathlib import Path

from vmd_scale.config import DataConfig
from vmd_scale.data.corpora.files import decode, open_bytes
from vmd_scale.data.corpora.registry import Document, corpus
from vmd_scale.data.corpora.sources import local_source
from vmd_scale.errors import UserError

log = logging.getLogger(__name__)

PUBLISHED_LENGTH = 100_000_000
FILE_NAMES = ("text8", "text8.zip", "text8.xz", "text8.gz")
PIECE = 1 << 20  # characters handed on at once


@corpus("text8", licence="Wikipedia 2006, GFDL and CC BY-SA")
def text8(config: DataConfig, split: str) -> Iterator[Document]:
    """One document a split, in pieces; a piece starts at a space, where every tokenizer may be cut."""
    source = local_source(config, split)
    path = Path(source.path)
    if path.is_dir():
        found = [path / name for name in FILE_NAMES if (path / name).is_file()]
        if not found:
            raise UserError(f"data.source: none of {', '.join(FILE_NAMES)} in {path}")
        path = found[0]
    with open_bytes(path) as file:
        text = decode(file.read(), path, 0).rstrip("\r\n")
    if not text:
        raise UserError(f"data.source: {path} is empty")
    if not source.is_split:
        if len(text) != PUBLISHED_LENGTH:
            log.warning("%s has %d characters, not 100,000,000: do not report its figures as text8's", path, len(text))
        borders = [0, len(text) * 90 // 100, len(text) * 95 // 100, len(text)]
        number = ("train", "validation", "test").index(split)
        text = text[borders[number] : borders[number + 1]]
    return _pieces(text)


def _pieces(text: str) -> Iterator[Document]:
    start = 0
    while start < len(text):
        end = text.find(" ", start + PIECE)
        end = len(text) if end < 0 else end
        yield Document(text[start:end], last=end == len(text))
        start = end
