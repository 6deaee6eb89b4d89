"""From a corpus to a folder of shards: documents -> ids -> rows -> files -> manifest.

The manifest is written last. A preparation that was killed leaves ``manifest.partial.json`` with the splits that it had
finished, and the finished shards of the split in progress with ``SPLIT.progress``; the next one continues from there.
The files depend neither on that nor on data.workers.
"""

import fcntl
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
from tqdm import tqdm

from vmd_scale.config import DataConfig
from vmd_scale.data.corpora import SPLITS, available_splits, find_corpus, normalizer_name, raw_documents
from vmd_scale.data.encode import SourceChanged, encoded_documents
from vmd_scale.data.manifest import (
    MANIFEST,
    PARTIAL,
    Manifest,
    SplitRecord,
    check_compatible,
    documents_per_row,
    parse_manifest,
    read_manifest,
    token_dtype,
)
from vmd_scale.data.packing import check_packing
from vmd_scale.data.remote import is_remote
from vmd_scale.data.shards import ShardReader
from vmd_scale.data.split import SplitPreparation, progress_file, remove_files
from vmd_scale.errors import RunFailed, UserError
from vmd_scale.tokenization import Tokenizer, load_tokenizer

log = logging.getLogger(__name__)

LOCK = ".lock"


def prepare(
    config: DataConfig,
    splits: Sequence[str] | None = None,
    progress: bool = True,
    force: bool = False,
    enough: Sequence[str] | None = None,
) -> Manifest:
    """Write the shards of `splits` (null: all that the corpus has) into data.shards; what is there already is kept.

    Args:
        progress: show a bar on stderr.
        force: throw away what the folder holds and start again.
        enough: in a finished folder that has these splits, nothing is missing. By default `splits`. The corpus itself
            is not asked then: it may be out of reach where there is no network.

    Raises:
        UserError: anything wrong with the configuration or the source; a folder that holds shards made with other
            settings; another process that is writing there.
        RunFailed: a worker process was killed, or a source is out of reach. Finished shards are kept for the next call.
    """
    find_corpus(config)  # or an error: a name that does not exist is not merely another than that of the shards
    tokenizer = load_tokenizer(config.tokenizer)
    check_packing(config, tokenizer)
    if is_remote(config.shards):
        return _prepared_remotely(config, tokenizer, splits, force)
    folder = Path(config.shards)
    if not force and (folder / MANIFEST).is_file() and not (folder / PARTIAL).is_file():
        finished = _started(folder, config, tokenizer)
        needed = enough or splits or _wanted_splits(config, splits)
        if all(split in finished.splits for split in needed):  # reading needs no lock: several runs may start at once
            log.info("%s: nothing to do, %s already prepared", folder, ", ".join(needed))
            return finished
    wanted = _wanted_splits(config, splits)
    with _made_and_locked(folder):
        if force:
            for split in wanted:
                next(raw_documents(config, split), None)  # a source that is not there must not cost the old shards
            _remove_all(folder)
        manifest = _started(folder, config, tokenizer)
        todo = [split for split in wanted if split not in manifest.splits]
        if not todo and not (folder / PARTIAL).is_file():  # another process was faster
            return manifest
        for split in todo:
            try:
                record = _prepare_split(config, split, tokenizer, manifest, progress)
            except (UserError, RunFailed, OSError):
                if not progress_file(folder, split).exists():  # else the next preparation continues from there
                    remove_files(folder, split)
                raise
            manifest = manifest.model_copy(update={"splits": {**manifest.splits, split: record}})
            manifest.write(folder / PARTIAL)
        manifest.write(folder / MANIFEST)
        for split in manifest.splits:
            progress_file(folder, split).unlink(missing_ok=True)
        (folder / PARTIAL).unlink(missing_ok=True)
    return manifest


def prepare_all(
    data: DataConfig,
    splits: Sequence[str] | None = None,
    progress: bool = True,
    force: bool = False,
    enough: Sequence[str] | None = None,
) -> dict[str, Manifest]:
    """`prepare` the corpus and those of its mixture, of which only the training split is used. Manifests by folder."""
    first, *more = data.corpora()
    manifests = {first.shards: prepare(first, splits, progress, force, enough)}
    return manifests | {each.shards: prepare(each, ["train"], progress, force) for each in more}


def _prepared_remotely(config: DataConfig, tokenizer: Tokenizer, splits: Sequence[str] | None, force: bool) -> Manifest:
    manifest = read_manifest(config.shards)
    check_compatible(manifest, config, tokenizer)
    missing = [split for split in splits or () if split not in manifest.splits]
    if missing or force:
        what = f"no {missing[0]!r} split there" if missing else "--force"
        raise UserError(
            f"data.shards {config.shards!r}: {what}, and remote shards are only read; prepare them in a local folder "
            "and copy it"
        )
    return manifest


def _wanted_splits(config: DataConfig, splits: Sequence[str] | None) -> tuple[str, ...]:
    available = available_splits(config)
    unknown = [split for split in splits or () if split not in available]
    if unknown:
        raise UserError(
            f"splits: corpus {config.corpus!r} has no {', '.join(map(repr, unknown))} here; "
            f"it has: {', '.join(available)}"
        )
    return tuple(split for split in available if not splits or split in splits)


@contextmanager
def _made_and_locked(folder: Path) -> Iterator[None]:
    """The folder is there, and ours alone; if it was made for input that turns out to be bad, it goes again.

    The kernel lets go of the lock when its holder dies, however it dies. What the file system refuses (no room, no
    permission) is an error that names the folder.
    """
    try:
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / LOCK, "w") as file:
            _lock(file, folder)
            try:
                yield
            except UserError:
                if made and all(path.name == LOCK for path in folder.iterdir()):
                    (folder / LOCK).unlink(missing_ok=True)
                    for path in made:
                        path.rmdir()
                raise
    except OSError as error:
        raise UserError(f"data.shards {str(folder)!r}: {error}") from None


def _lock(file: IO[str], folder: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"data.shards {str(folder)!r}: another process is preparing shards there") from None


def _started(folder: Path, config: DataConfig, tokenizer: Tokenizer) -> Manifest:
    """The manifest to continue with: the finished or the partial one of the folder, or one without splits."""
    for name in (PARTIAL, MANIFEST):
        if (folder / name).is_file():
            manifest = parse_manifest((folder / name).read_bytes(), folder / name)
            check_compatible(manifest, config, tokenizer)
            for split in manifest.splits:
                ShardReader(folder, split, manifest)  # all files there, with their sizes
            return manifest
    corpus = find_corpus(config)
    source = dict(config.source) if isinstance(config.source, dict) else config.source
    return Manifest(
        tokenizer=tokenizer.name,
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        dtype="uint16" if token_dtype(tokenizer.vocab_size) == np.uint16 else "uint32",
        row_length=config.row_length,
        packing=config.packing,
        documents_per_row=documents_per_row(config),
        row_specials=config.row_specials,
        corpus=config.corpus,
        source=corpus.origin if source is None else source,
        text_column=config.text_column,
        normalizer=normalizer_name(config),
        validation_documents=config.validation_documents,
        licence=corpus.licence,
        remark=corpus.remark(config),
        splits={},
    )


def _remove_all(folder: Path) -> None:
    """Everything that a preparation writes; nothing else that may be there."""
    (folder / MANIFEST).unlink(missing_ok=True)  # first: without it the rest is not taken for finished
    (folder / PARTIAL).unlink(missing_ok=True)
    for split in SPLITS:
        remove_files(folder, split)


def _prepare_split(
    config: DataConfig, split: str, tokenizer: Tokenizer, manifest: Manifest, progress: bool
) -> SplitRecord:
    """The files are those of an undisturbed preparation, wherever one that was killed had come to."""
    settings = manifest.model_copy(update={"splits": {}})
    preparation = SplitPreparation(config, split, tokenizer, settings)
    preparation.go_on()
    try:
        return _encode_into(preparation, config, split, tokenizer, progress)
    except SourceChanged:
        log.warning("%s: data.source has changed since the preparation was interrupted, the split starts anew", split)
        remove_files(Path(config.shards), split)
        return _encode_into(SplitPreparation(config, split, tokenizer, settings), config, split, tokenizer, progress)


def _encode_into(
    preparation: SplitPreparation, config: DataConfig, split: str, tokenizer: Tokenizer, progress: bool
) -> SplitRecord:
    seconds = 0.1 if sys.stderr.isatty() else 60.0  # a file keeps every state of the bar
    rows, started = preparation.rows, time.perf_counter()
    with tqdm(
        desc=f"prepare {split}",
        unit=" tokens",
        unit_scale=True,
        disable=not progress,
        mininterval=seconds,
        initial=rows * config.row_length,
    ) as bar:
        for documents in encoded_documents(config, split, tokenizer, preparation.text):
            preparation.add(documents)
            bar.update(preparation.rows * config.row_length - bar.n)
    record = preparation.finish()
    seconds, tokens = time.perf_counter() - started, (record.rows - rows) * config.row_length
    log.info("%s: %s tokens in %.1f s, %s tokens/s", split, f"{tokens:,}", seconds, f"{tokens / seconds:,.0f}")
    return record
