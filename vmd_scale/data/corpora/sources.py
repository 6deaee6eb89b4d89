"""What data.source points at, and how a stream of records becomes splits when the source has none of its own."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from vmd_scale.config import DataConfig
from vmd_scale.data.corpora.files import files_of, records
from vmd_scale.data.corpora.registry import SPLITS, in_twentieth, mapped_splits
from vmd_scale.data.remote import persistently
from vmd_scale.errors import RunFailed, UserError, first_line

Answer = TypeVar("Answer")

HUB = "hf:"


@dataclass(frozen=True)
class Source:
    """One source. `is_split`: the user gave it for this very split, so that all of it belongs there."""

    path: str
    is_split: bool

    @property
    def on_hub(self) -> bool:
        return self.path.startswith(HUB)


def source_of(config: DataConfig, split: str) -> Source:
    """The source of a split. `UserError` naming data.source when there is none, or none for this split."""
    if config.source is None:
        raise UserError(
            f"data.source is missing; corpus {config.corpus!r} is read from a local file or folder "
            f"or, where it is text, from 'hf:NAME'"
        )
    if isinstance(config.source, str):
        return Source(config.source, is_split=False)
    if split not in config.source:
        raise UserError(f"data.source has no {split!r}; it has: {', '.join(config.source)}")
    return Source(config.source[split], is_split=True)


def local_source(config: DataConfig, split: str) -> Source:
    """`source_of` for corpora that are files. `UserError` when it is missing or is 'hf:...'."""
    source = source_of(config, split)
    if source.on_hub:
        raise UserError(f"data.source {source.path!r}: corpus {config.corpus!r} is read from local files only")
    if not Path(source.path).exists():
        raise UserError(f"data.source: no such file or folder: {source.path}")
    return source


def text_splits(config: DataConfig) -> tuple[str, ...]:
    """Splits of a corpus of text records, see `split_records`."""
    if isinstance(config.source, str) and config.source.startswith(HUB):
        own = set(_hub_splits(config.source))
        if "train" in own and "validation" not in own:
            own |= {"validation"} if config.validation_documents else {"validation", "test"}
        return tuple(split for split in SPLITS if split in own)
    return mapped_splits(config, ("train", "validation") if config.validation_documents else SPLITS)


def split_records(
    config: DataConfig, split: str, validation_documents: int | None, column: str | None = None
) -> Iterator[str]:
    """Texts of one split; `column` is where records have them if data.text_column does not say.

    A ``{split: source}`` mapping and the hub's own splits are taken as they are. Else the last
    `validation_documents` records are validation and there is no test split, or, when that is None, of every 20
    records one is validation and one test (only validation where the hub has its own test split).
    """
    source, column = source_of(config, split), config.text_column or column or "text"
    if not source.on_hub:
        files = files_of(Path(source.path))
        if source.is_split:
            return _chained(files, column)
        if validation_documents is None:
            return _twentieths(_chained(files, column), (split,))
        count = sum(1 for _ in _chained(files, column))
        return _before_or_after(lambda: _chained(files, column), count, split, validation_documents, config)
    own = _hub_splits(source.path)
    if split in own and (source.is_split or "validation" in own or split == "test"):
        return _hub_texts(source.path, split, column)
    if source.is_split and len(own) == 1:
        return _hub_texts(source.path, own[0], column)
    if "train" not in own:
        raise UserError(f"data.source {source.path!r} has no {split!r} split; it has: {', '.join(own)}")
    if validation_documents is not None:
        count = _hub_count(source.path, "train", column)
        return _before_or_after(
            lambda: _hub_texts(source.path, "train", column), count, split, validation_documents, config
        )
    wanted = ("train", "test") if split == "train" and "test" in own else (split,)
    return _twentieths(_hub_texts(source.path, "train", column), wanted)


def _chained(files: Sequence[Path], column: str) -> Iterator[str]:
    for file in files:
        yield from records(file, column)


def _twentieths(texts: Iterator[str], splits: Sequence[str]) -> Iterator[str]:
    # Empty records go along but have no number: a file with every other line empty would lose a whole split.
    number = 0
    for text in texts:
        if any(in_twentieth(number, split) for split in splits):
            yield text
        number += bool(text.strip())


def _before_or_after(
    read: Callable[[], Iterator[str]], count: int, split: str, validation_documents: int, config: DataConfig
) -> Iterator[str]:
    if count <= validation_documents:
        raise UserError(
            f"data.validation_documents is {validation_documents:,}, but corpus {config.corpus!r} has only {count:,} "
            "documents; it must leave some for training"
        )
    border = count - validation_documents
    return islice(read(), border, None) if split == "validation" else islice(read(), border)


def _hub_arguments(source: str) -> tuple[list[str], dict[str, str]]:
    """``hf:NAME``, ``@REVISION`` and ``:CONFIGURATION`` as what `datasets` takes by position and by name.

    Raises:
        UserError: a part is empty.
    """
    found = re.fullmatch(rf"{HUB}([^@:]+)(?:@([^:]+))?(?::(.+))?", source)
    if found is None:
        raise UserError(f"data.source {source!r}: expected hf:NAME, hf:NAME@REVISION, and :CONFIGURATION after either")
    name, revision, configuration = found.groups()
    return [name, configuration] if configuration else [name], {"revision": revision} if revision else {}


def _hub_splits(source: str) -> tuple[str, ...]:
    import datasets

    names, revision = _hub_arguments(source)
    return tuple(_from_hub(source, lambda: datasets.get_dataset_split_names(*names, **revision)))


def _hub_count(source: str, split: str, column: str) -> int:
    import datasets

    names, revision = _hub_arguments(source)
    info = _from_hub(source, lambda: datasets.load_dataset_builder(*names, **revision).info.splits)
    count = info[split].num_examples if info else None
    return count or sum(1 for _ in _hub_texts(source, split, column))


def _hub_texts(source: str, split: str, column: str) -> Iterator[str]:
    import datasets

    names, revision = _hub_arguments(source)
    stream: Iterator[Any] | None = None
    read = 0

    def following() -> Any:
        """The next record, or None. A stream that broke is opened again, and read past what it has given."""
        nonlocal stream
        try:
            if stream is None:
                opened = datasets.load_dataset(*names, **revision, split=split, streaming=True)
                stream = islice(opened, read, None)
            return next(stream, None)
        except Exception:
            stream = None
            raise

    while (record := _from_hub(source, following)) is not None:
        read += 1
        if not isinstance(record.get(column), str):
            raise UserError(
                f'data.source {source!r}: records have no string "{column}" (data.text_column); '
                f"columns: {', '.join(record)}"
            )
        yield record[column]


def _from_hub(source: str, fetch: Callable[[], Answer]) -> Answer:
    """What `fetch` gives, which is tried again as all that is remote; an error says what to do instead."""
    hint = "download it where there is a network and give the local file or folder"
    try:
        return persistently(f"data.source {source!r}", fetch)
    except FileNotFoundError as error:  # no data set of that name, or revision of it, or it is not for everybody
        raise UserError(f"data.source {source!r}: {first_line(error)}; or {hint}") from None
    except UserError as error:
        raise UserError(f"{first_line(error)}; or {hint}") from None
    except RunFailed as error:
        raise RunFailed(f"{first_line(error)}; call again to go on, or {hint}") from None
