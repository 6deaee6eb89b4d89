"""Binarised MNIST: 28 x 28 pixels a row, line by line; 1 where a pixel is brighter than one half."""

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

PIXELS = 28 * 28
IMAGES_MAGIC = 0x0803  # unsigned bytes, three dimensions
HEADER = 16
FILES = {"train": ("train-images-idx3-ubyte", 60_000), "test": ("t10k-images-idx3-ubyte", 10_000)}


@corpus("mnist", licence="CC BY-SA 3.0")
def mnist(config: DataConfig, split: str) -> Iterator[Document]:
    """data.source is the folder of the IDX files; the last 5,000 training images are validation."""
    check_tokenizer(config, 2)
    name, published = FILES["test" if split == "test" else "train"]
    path = _file(Path(local_source(config, split).path), name)
    images = read_idx_images(path)
    chosen = image_range(config, split, len(images), published, path)
    return as_documents(images[chosen.start : chosen.stop] > 127)


def read_idx_images(path: Path) -> np.ndarray:
    """Images of an IDX file, plain or .gz: uint8 [n, 784].

    Raises:
        UserError: unreadable, not a file of 28 x 28 images, or shorter or longer than its header says.
    """
    with open_bytes(path) as file:
        content = file.read()
    magic, images, height, width = np.frombuffer(content[:HEADER].ljust(HEADER, b"\0"), dtype=">u4").tolist()
    if magic != IMAGES_MAGIC or (height, width) != (28, 28):
        raise UserError(
            f"{path}: not an IDX file of 28 x 28 images: expected magic number 0x{IMAGES_MAGIC:08x}, found "
            f"0x{magic:08x} and {height} x {width}"
        )
    expected = HEADER + images * PIXELS
    if len(content) != expected:
        raise UserError(f"{path}: damaged: {images:,} images are {expected:,} bytes, found {len(content):,}")
    return np.frombuffer(content, dtype=np.uint8, offset=HEADER).reshape(images, PIXELS)


def _file(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise UserError(f"data.source {str(folder)!r}: expected a folder with {name} or {name}.gz")
