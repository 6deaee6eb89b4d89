"""One split on its way from documents to shards, and how a killed preparation of it continues.

When a shard is finished, ``SPLIT.progress`` says how far the corpus was read and holds what was read but is in no
finished shard. It is an .npz file: a record in JSON, and arrays.
"""

import io
import logging
import re
import zipfile
from collections.abc import Container, Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vmd_scale.config import DataConfig
from vmd_scale.data.encode import TextCounts, unigram_entropy
from vmd_scale.data.manifest import FileRecord, Manifest, Record, Shard, SplitRecord, check_compatible, token_dtype
from vmd_scale.data.packing import PACKERS, EncodedDocument, PackedRows, Packer, PackingCounts, kind_of_packer
from vmd_scale.data.roles import is_counted
from vmd_scale.data.shards import SplitWriter
from vmd_scale.errors import UserError
from vmd_scale.files import sha256_of, write_atomically
from vmd_scale.tokenization import Tokenizer

log = logging.getLogger(__name__)

HELD = "held by the packer: "  # before the names of its arrays


class Progress(Record):
    """The JSON of a progress file. `settings` is the manifest that the split will go into, without splits."""

    version: Literal[1] = 1  # of this file, the arrays that packers hold included
    settings: Manifest
    rows_per_shard: int
    shards: tuple[Shard, ...]
    packer: str
    text: TextCounts
    packing: PackingCounts


def progress_file(folder: Path, split: str) -> Path:
    return folder / f"{split}.progress"


def remove_files(folder: Path, split: str, but: Container[str] = ()) -> None:
    """Delete the files of a split, finished or not, but for those of these names; nothing else that may be there."""
    ours = re.compile(rf"{split}-\d{{5,}}\.(tokens|roles)(\.tmp)?|{split}\.progress|\.{split}\.progress\.\d+\.tmp")
    for path in folder.iterdir():
        if ours.fullmatch(path.name) and path.name not in but:
            path.unlink()


def _files_of(shards: Iterable[Shard]) -> list[FileRecord]:
    return [file for shard in shards for file in (shard.tokens, shard.roles) if file is not None]


class SplitPreparation:
    """Takes the encoded documents of a split and writes its shards.

    Args:
        settings: the manifest that the split will go into, without splits.
    """

    def __init__(self, config: DataConfig, split: str, tokenizer: Tokenizer, settings: Manifest) -> None:
        self.text, self.rows = TextCounts(), 0
        self._config, self._split, self._tokenizer, self._settings = config, split, tokenizer, settings
        self._folder = Path(config.shards)
        self._packing, self._kind = PackingCounts(), ""
        self._packer: Packer | None = None  # the first document tells which
        self._frequencies = np.zeros(tokenizer.vocab_size, dtype=np.int64)
        self._rows_per_shard = max(1, config.shard_tokens // config.row_length)
        self._writer = self._make_writer()

    def _make_writer(self, finished: tuple[Shard, ...] = ()) -> SplitWriter:
        dtype = token_dtype(self._tokenizer.vocab_size)
        arguments = (self._folder, self._split, dtype, self._config.row_length, self._rows_per_shard)
        return SplitWriter(*arguments, finished)

    def add(self, documents: Iterable[EncodedDocument]) -> None:
        """The next documents, when `text` has been brought up to date with them."""
        for document in documents:
            if self._packer is None:
                self._kind = kind_of_packer(document, self._config)
                self._packer = PACKERS[self._kind](self._config, self._tokenizer, self._packing)
            self._packer.add(document)
        rows = None if self._packer is None else self._packer.take()
        if rows is not None:
            shards = len(self._writer.finished)
            self._append(rows)
            if len(self._writer.finished) > shards:
                self._save(rows)

    def finish(self) -> SplitRecord:
        """Close the last shard. `UserError` when all documents together fill no row."""
        rows = None if self._packer is None else self._packer.take(last=True)
        if rows is not None:
            self._append(rows)
        shards, text, packing = self._writer.close(), self.text, self._packing
        if not self.rows:
            raise UserError(
                f"data.source: split {self._split!r} of corpus {self._config.corpus!r} fills no row of "
                f"{self._config.row_length} tokens: {text.documents} documents, {text.skipped_documents} empty ones, "
                f"{packing.dropped_tokens} tokens"
            )
        return SplitRecord(
            rows=self.rows,
            counted_tokens=int(self._frequencies.sum()),
            documents=text.documents,
            skipped_documents=text.skipped_documents,
            truncated_documents=packing.truncated_documents,
            split_documents=packing.split_documents,
            dropped_tokens=packing.dropped_tokens,
            document_lengths=tuple(text.lengths),
            characters=text.characters,
            utf8_bytes=text.utf8_bytes,
            unigram_entropy=unigram_entropy(self._frequencies),
            shards=shards,
        )

    def _append(self, rows: PackedRows) -> None:
        self._writer.append(rows.tokens, rows.roles)
        counted = rows.tokens if rows.roles is None else rows.tokens[is_counted(rows.roles)]
        self._frequencies += np.bincount(counted.ravel(), minlength=self._tokenizer.vocab_size)
        self.rows += len(rows.tokens)

    def _save(self, last: PackedRows) -> None:
        """`last`: the rows that were just appended; those that are not written yet are among them."""
        assert self._packer is not None
        begin = len(last.tokens) - self._writer.rows_in_open
        progress = Progress(
            settings=self._settings,
            rows_per_shard=self._rows_per_shard,
            shards=self._writer.finished,
            packer=self._kind,
            text=self.text,
            packing=self._packing,
        )
        arrays: dict[str, Any] = {HELD + name: array for name, array in self._packer.held().items()}
        arrays |= {"tokens": last.tokens[begin:], "frequencies": self._frequencies}
        arrays |= {} if last.roles is None else {"roles": last.roles[begin:]}
        file = io.BytesIO()
        np.savez(file, record=np.frombuffer(progress.model_dump_json().encode(), dtype=np.uint8), **arrays)
        write_atomically(progress_file(self._folder, self._split), file.getvalue())

    def go_on(self) -> None:
        """Take up what a killed preparation has left, when all of it is as it was written; else remove it.

        Raises:
            UserError: it was made with other settings; names the key.
        """
        progress, arrays = self._left_over()
        if progress is None:
            remove_files(self._folder, self._split)
            return
        files = {file.name for file in _files_of(progress.shards)}
        remove_files(self._folder, self._split, but={*files, progress_file(self._folder, self._split).name})
        self.text, self._packing, self._kind = progress.text, progress.packing, progress.packer
        self._packer = PACKERS[self._kind](self._config, self._tokenizer, self._packing)
        self._packer.hold({name.removeprefix(HELD): arrays[name] for name in arrays if name.startswith(HELD)})
        self._writer = self._make_writer(progress.shards)
        self._writer.append(arrays["tokens"], arrays.get("roles"))
        self._frequencies = arrays["frequencies"]
        self.rows = sum(shard.rows for shard in progress.shards) + len(arrays["tokens"])
        log.info("%s: goes on after %s documents, %d shards", self._split, f"{self.text.read:,}", len(progress.shards))

    def _left_over(self) -> tuple[Progress | None, dict[str, np.ndarray]]:
        path = progress_file(self._folder, self._split)
        if not path.is_file():
            return None, {}
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = dict(file)
            progress = Progress.model_validate_json(arrays.pop("record").tobytes())
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:  # pydantic's are ValueErrors
            log.warning("%s: damaged, the split starts anew: %s", path, error)
            return None, {}
        self._check_settings(progress)
        altered = [file.name for file in _files_of(progress.shards) if not self._is_whole(file)]
        if progress.settings != self._settings:
            log.warning("%s: made of another data.source or by another version, the split starts anew", path)
        elif altered:
            log.warning("%s: missing or altered, the split starts anew", self._folder / altered[0])
        else:
            return progress, arrays
        return None, {}

    def _check_settings(self, progress: Progress) -> None:
        check_compatible(progress.settings, self._config, self._tokenizer)
        if progress.rows_per_shard != self._rows_per_shard:
            raise UserError(
                f"data.shard_tokens {self._config.shard_tokens} makes shards of {self._rows_per_shard} rows, but those "
                f"in {self._config.shards!r}, whose preparation was interrupted, have {progress.rows_per_shard}; "
                "prepare into another folder (data.shards), or again with --force"
            )

    def _is_whole(self, file: FileRecord) -> bool:
        path = self._folder / file.name
        return path.is_file() and sha256_of(path) == file.sha256
