"""text8: one stream of characters, split 90/5/5."""

import hashlib
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
BEGINNING = 1_000_000  # bytes of the published file, by which it is known
SHA256_OF_BEGINNING = "a29a713419313a2c4f0f38d3907938156a7c088a69c7c30542410124651ab5b2"
PIECE = 1 << 20  # characters handed on at once


def _file(config: DataConfig, split: str) -> Path:
    path = Path(local_source(config, split).path)
    if path.is_dir():
        found = [path / name for name in FILE_NAMES if (path / name).is_file()]
        if not found:
            raise UserError(f"data.source: none of {', '.join(FILE_NAMES)} in {path}")
        path = found[0]
    return path


def _remark(config: DataConfig) -> str | None:
    """Other text over the same alphabet is another corpus. Of {split: file} only the training file can be told."""
    if isinstance(config.source, dict) and "train" not in config.source:
        return None
    with open_bytes(_file(config, "train")) as file:
        beginning = hashlib.sha256(file.read(BEGINNING)).hexdigest()
    return None if beginning == SHA256_OF_BEGINNING else "the text is not text8's"


@corpus("text8", licence="Wikipedia 2006, GFDL and CC BY-SA", remark=_remark)
def text8(config: DataConfig, split: str) -> Iterator[Document]:
    """One document a split, in pieces; a piece starts at a space, where every tokenizer may be cut."""
    path = _file(config, split)
    with open_bytes(path) as file:
        text = decode(file.read(), path, 0).rstrip("\r\n")
    if not text:
        raise UserError(f"data.source: {path} is empty")
    if isinstance(config.source, str):
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
