"""Reading text out of files: plain, .xz, .gz, .zst, .zip; lines, JSON lines, CSV and Parquet; errors say where."""

import csv
import gzip
import io
import json
import lzma
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

from vmd_scale.errors import UserError

COMPRESSED = (".xz", ".gz", ".zst", ".zip")
RECORD_SUFFIXES = (".txt", ".jsonl", ".json", ".csv", ".parquet")
LONGEST_FIELD = 1 << 28  # characters, of CSV


@contextmanager
def open_bytes(path: Path) -> Iterator[IO[bytes]]:
    """The decompressed bytes of a file; a .zip must hold one file.

    Raises:
        UserError: the file is missing, unreadable or a damaged archive; also while the caller reads from it.
    """
    try:
        if path.suffix == ".xz":
            with lzma.open(path) as file:
                yield file
        elif path.suffix == ".gz":
            with gzip.open(path) as unzipped:
                yield cast(IO[bytes], unzipped)
        elif path.suffix == ".zst":
            import pyarrow

            with pyarrow.input_stream(path, compression="zstd") as unpacked:
                yield cast(IO[bytes], io.BufferedReader(unpacked))
        elif path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                members = [name for name in archive.namelist() if not name.endswith("/")]
                if len(members) != 1:
                    raise UserError(f"{path}: expected one file in the archive, found {len(members)}")
                with archive.open(members[0]) as file:
                    yield file
        else:
            with open(path, "rb") as plain:
                yield plain
    except FileNotFoundError:
        raise UserError(f"data.source: no such file: {path}") from None
    except (OSError, EOFError, lzma.LZMAError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None


def decode(raw: bytes, path: Path, offset: int) -> str:
    """UTF-8 text; `offset` is where `raw` starts in the (decompressed) file."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not UTF-8 at byte {offset + error.start} (0x{raw[error.start]:02x}); convert the file to UTF-8"
        ) from None


def lines(path: Path) -> Iterator[str]:
    """Lines of a UTF-8 file without their ends."""
    offset = 0
    with open_bytes(path) as file:
        for raw in file:
            yield decode(raw, path, offset).rstrip("\r\n")
            offset += len(raw)


def records(path: Path, column: str = "text") -> Iterator[str]:
    """Texts of a file: lines of .txt, the `column` of each line of .jsonl or of each row of .csv and .parquet."""
    kind = content_suffix(path)
    if kind == ".parquet":
        return _parquet_texts(path, column)
    if kind == ".csv":
        return _csv_texts(path, column)
    return _json_texts(path, column) if kind in (".jsonl", ".json") else lines(path)


def content_suffix(path: Path) -> str:
    """``.jsonl`` of ``a.jsonl.xz``."""
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


def files_of(path: Path, also: Sequence[str] = ()) -> list[Path]:
    """The file itself, or the text files of a folder, by name. `UserError` when there is none.

    Where no file of a folder has the suffix of a text file, those without any are taken to be text.

    Args:
        also: further suffixes of text files.
    """
    if path.is_dir():
        inside = sorted(p for p in path.iterdir() if p.is_file() and not p.name.startswith("."))
        found = [p for p in inside if content_suffix(p) in (*RECORD_SUFFIXES, *also)]
        found = found or [p for p in inside if not content_suffix(p)]
        if not found:
            kinds = ", ".join((*also, *RECORD_SUFFIXES))
            raise UserError(f"data.source: no {kinds} files in {path} (also {', '.join(COMPRESSED)})")
        return found
    if not path.exists():
        raise UserError(f"data.source: no such file: {path}")
    return [path]


def json_lines(path: Path) -> Iterator[tuple[int, object]]:
    """Number of a line, from 1, and what it holds; empty lines are passed over. `UserError` where it is not JSON."""
    for number, line in enumerate(lines(path), start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}: not JSON: {error}") from None


def csv_records(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Number of a record, from 1, and its fields. `UserError` for what is no CSV, or a field without end."""
    number = 0
    csv.field_size_limit(LONGEST_FIELD)
    try:  # strict: else a quote that is never closed makes the rest of the file one field
        for number, fields in enumerate(csv.reader((line + "\n" for line in lines(path)), strict=True), start=1):
            yield number, fields
    except csv.Error as error:
        raise UserError(f"{path}, after record {number}: {error}") from None


def _csv_texts(path: Path, column: str) -> Iterator[str]:
    """The first record names the columns."""
    header: list[str] | None = None
    for number, fields in csv_records(path):
        if not fields:  # an empty line
            continue
        if header is None:
            header = fields
            if column not in header:
                raise UserError(
                    f'{path}: its first line names no column "{column}"; columns: {", ".join(header)} '
                    "(data.text_column)"
                )
            continue
        if len(fields) != len(header):
            raise UserError(f"{path}, record {number}: {len(fields)} fields, the first line has {len(header)}")
        yield fields[header.index(column)]


def _json_texts(path: Path, column: str) -> Iterator[str]:
    for number, record in json_lines(path):
        text = record.get(column) if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise UserError(f'{path}, line {number}: expected an object with a string "{column}" (data.text_column)')
        if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
            raise UserError(f"{path}, line {number}: half of a surrogate pair, which is no character")
        yield text


def _parquet_texts(path: Path, column: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if column not in file.schema_arrow.names:
                raise UserError(
                    f'{path}: no column "{column}"; columns: {", ".join(file.schema_arrow.names)} (data.text_column)'
                )
            kind = file.schema_arrow.field(column).type
            if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                raise UserError(f'{path}: column "{column}" is {kind}, expected string (data.text_column)')
            for batch in file.iter_batches(batch_size=1024, columns=[column]):
                yield from (text or "" for text in batch.column(0).to_pylist())
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as Parquet: {error}") from None
