"""CIFAR-10, binary version: 32 x 32 pixels of three colors, 3,072 tokens of 256 symbols.

A record is a label and three planes of 1,024 bytes; a row is pixel after pixel, line by line, each red, green, blue.
"""

import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from vmd_scale.config import DataConfig
from vmd_scale.data.corpora.files import open_bytes
from vmd_scale.data.corpora.images import image_range
from vmd_scale.data.corpora.registry import Document, corpus
from vmd_scale.data.corpora.sources import local_source
from vmd_scale.data.corpora.symbol_rows import as_documents, check_tokenizer
from vmd_scale.errors import UserError

RECORD = 3073
CLASSES = 10
ARCHIVE = "cifar-10-binary.tar.gz"
FOLDER = "cifar-10-batches-bin"
TRAINING = [f"data_batch_{n}.bin" for n in range(1, 6)]
TEST = ["test_batch.bin"]


@corpus("cifar10")
def cifar10(config: DataConfig, split: str) -> Iterator[Document]:
    """data.source is the archive, or a folder with it or its files; the last 5,000 training images are validation."""
    check_tokenizer(config, 256)
    path = Path(local_source(config, split).path)
    names = TEST if split == "test" else TRAINING
    images = np.concatenate(_batches(path, names))
    chosen = image_range(config, split, len(images), 10_000 * len(names), path)
    return as_documents(images[chosen.start : chosen.stop])


def _batches(path: Path, names: list[str]) -> list[np.ndarray]:
    for folder in (path, path / FOLDER):
        if (folder / names[0]).is_file():
            return [_images(folder / name) for name in names]
    archive = path / ARCHIVE if path.is_dir() else path
    if archive.is_file():
        return _batches_of_archive(archive, names)
    raise UserError(f"data.source {str(path)!r}: expected {ARCHIVE}, or a folder with it or with {', '.join(names)}")


def _batches_of_archive(path: Path, names: list[str]) -> list[np.ndarray]:
    found: dict[str, np.ndarray] = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                name = Path(member.name).name
                content = archive.extractfile(member) if name in names and member.isfile() else None
                if content is not None:
                    found[name] = _records(content.read(), f"{path}, {name}")
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: not a readable tar archive: {error}") from None
    if missing := [name for name in names if name not in found]:
        raise UserError(f"{path}: the archive lacks {', '.join(missing)}; expected the binary version, {ARCHIVE}")
    return [found[name] for name in names]


def _images(path: Path) -> np.ndarray:
    with open_bytes(path) as file:
        return _records(file.read(), str(path))


def _records(content: bytes, where: str) -> np.ndarray:
    """Images of a batch, uint8 [n, 3072]; `where` is named in errors."""
    if not content or len(content) % RECORD:
        raise UserError(f"{where}: damaged: expected records of {RECORD:,} bytes, found {len(content):,} bytes")
    records = np.frombuffer(content, dtype=np.uint8).reshape(-1, RECORD)
    if (largest := records[:, 0].max()) >= CLASSES:
        raise UserError(f"{where}: damaged: labels are 0..{CLASSES - 1}, found {largest}")
    return records[:, 1:].reshape(-1, 3, 1024).swapaxes(1, 2).reshape(-1, RECORD - 1)
