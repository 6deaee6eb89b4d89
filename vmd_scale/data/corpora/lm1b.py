"""The One Billion Word benchmark: the layout of its own archive, or sentences one a line."""

import logging
from collections.abc import Iterator
from pathlib import Path

from vmd_scale.config import DataConfig
from vmd_scale.data.corpora.files import lines
from vmd_scale.data.corpora.registry import Document, corpus
from vmd_scale.data.corpora.sources import source_of, split_records, text_splits
from vmd_scale.errors import UserError

log = logging.getLogger(__name__)

TRAINING = "training-monolingual.tokenized.shuffled"
HELDOUT = "heldout-monolingual.tokenized.shuffled"
TEST_SHARD = "heldout-00000-of-00050"  # what published perplexities are measured on


@corpus("lm1b", normalizer="lm1b", licence="statmt.org news crawl, for research", splits=text_splits)
def lm1b(config: DataConfig, split: str) -> Iterator[Document]:
    """A document is a sentence. Folder: training shards train, held-out shard 0 is test, the others validation."""
    source = source_of(config, split)
    if not source.on_hub and not source.is_split:
        folder = _benchmark_folder(Path(source.path))
        if folder is not None:
            return (Document(line) for shard in _shards(folder, split) for line in lines(shard))
        log.warning("data.source %s lacks the layout of the LM1B archive: not the published splits", source.path)
    # a file may have any name (news.en.heldout-00000-of-00050), so that its suffix says nothing
    if not source.on_hub and Path(source.path).is_file() and source.is_split:
        return map(Document, lines(Path(source.path)))
    return map(Document, split_records(config, split, config.validation_documents))


def _benchmark_folder(path: Path) -> Path | None:
    """The folder with the benchmark's two: `path` or the one folder in it, as the archive unpacks."""
    candidates = [path, *sorted(path.iterdir())] if path.is_dir() else []
    return next((c for c in candidates if (c / TRAINING).is_dir() or (c / HELDOUT).is_dir()), None)


def _shards(folder: Path, split: str) -> list[Path]:
    if split == "train":
        shards = sorted((folder / TRAINING).glob("news.en-*"))
    else:
        heldout = sorted((folder / HELDOUT).glob("news.en.heldout-*"))
        shards = [shard for shard in heldout if (TEST_SHARD in shard.name) == (split == "test")]
    if not shards:
        wanted = TRAINING if split == "train" else HELDOUT
        raise UserError(f"data.source: no shards of split {split!r} in {folder / wanted}")
    return shards
