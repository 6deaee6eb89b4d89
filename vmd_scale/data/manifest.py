"""``manifest.json``: what a folder of shards holds, how it was made, and whether it fits a configuration."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vmd_scale.config import DataConfig
from vmd_scale.data.remote import is_remote, read_remote
from vmd_scale.errors import UserError
from vmd_scale.files import write_atomically
from vmd_scale.tokenization import Tokenizer

FORMAT_VERSION = 2  # 1 had no packing `document` and no lengths of documents
MANIFEST = "manifest.json"
PARTIAL = "manifest.partial.json"


class Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileRecord(Record):
    name: str
    bytes: int = Field(ge=0)
    sha256: str


class Shard(Record):
    """Rows of one token file, and the roles beside it where the split has any."""

    rows: int = Field(ge=1)
    tokens: FileRecord
    roles: FileRecord | None = None


class SplitRecord(Record):
    rows: int = Field(ge=1)
    counted_tokens: int = Field(ge=0, description="positions that may be masked: no padding, nothing given")
    documents: int = Field(ge=0, description="documents that went in")
    skipped_documents: int = Field(ge=0, description="empty ones, left out")
    truncated_documents: int = Field(ge=0, description="cut off at the row's end (pad)")
    split_documents: int = Field(default=0, ge=0, description="longer than a row, cut into several (document)")
    dropped_tokens: int = Field(ge=0, description="the remainder that filled no row (wrap)")
    document_lengths: tuple[int, ...] = Field(
        default=(), description="how many documents have 2^i .. 2^(i+1) - 1 tokens, for i = 0, 1, ..."
    )
    characters: int = Field(ge=0, description="of the normalized text that went in")
    utf8_bytes: int = Field(ge=0, description="of the normalized text that went in")
    unigram_entropy: float = Field(ge=0, description="nats per counted token: what a model without context can reach")
    shards: tuple[Shard, ...]


class Manifest(Record):
    format_version: int = FORMAT_VERSION
    tokenizer: str
    tokenizer_fingerprint: str
    vocab_size: int = Field(ge=1, description="without the mask symbol, whose id it is")
    dtype: Literal["uint16", "uint32"]
    row_length: int = Field(ge=2)
    packing: Literal["wrap", "pad", "document"]
    documents_per_row: int | None = Field(default=None, ge=1, description="at most; of packing document")
    row_specials: bool
    corpus: str
    source: str | dict[Literal["train", "validation", "test"], str] | None
    text_column: str | None = None
    normalizer: str
    validation_documents: int | None
    licence: str | None
    remark: str | None = Field(default=None, description="why this is not the corpus of that name, if it is not")
    splits: dict[str, SplitRecord]

    @model_validator(mode="after")
    def _fits_its_dtype(self) -> "Manifest":
        if self.dtype != token_dtype(self.vocab_size).name and self.dtype != "uint32":
            raise ValueError(f"dtype {self.dtype} is too small for a vocabulary of {self.vocab_size} and the mask")
        return self

    def described(self, split: str) -> str:
        """What must be the same in two folders for figures of a split to compare: how rows were made, and of what."""
        specials = ", row specials" if self.row_specials else ""
        content = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in self.content(split).items())
        return (
            f"{self.corpus}, normalizer {self.normalizer}, tokenizer {self.tokenizer_fingerprint[:12]} of "
            f"{self.vocab_size}, {self.packing} {self.row_length}{specials}, {content}"
        )

    def content(self, split: str) -> dict[str, float]:
        """What tells the rows of a split from those of other data, however they were cut into shards."""
        record = self.splits[split]
        counts = {"rows": record.rows, "counted_tokens": record.counted_tokens, "characters": record.characters}
        return {**counts, "unigram_entropy": round(record.unigram_entropy, 9)}  # its last bits are the machine's

    def attended_positions(self, split: str) -> float:
        """The least number of positions that one attends to, where attention stays in documents (packing document).

        The mean over all positions, padding apart. Squared lengths of documents add up to the least where all are
        equally long, which is all that is known of them.
        """
        record = self.splits[split]
        documents: float = max(1, record.documents)
        if record.split_documents:  # into no more than they fill rows, and one
            documents += record.counted_tokens / self.row_length
        return record.counted_tokens**2 / documents / (record.rows * self.row_length)

    @property
    def numpy_dtype(self) -> np.dtype:
        """The dtype on disk, little-endian everywhere."""
        return np.dtype(self.dtype).newbyteorder("<")

    def write(self, path: Path) -> None:
        write_atomically(path, (json.dumps(self.model_dump(mode="json"), indent=2) + "\n").encode())


def documents_per_row(config: DataConfig) -> int | None:
    return config.documents_per_row if config.packing == "document" else None


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest type that holds every id and the mask."""
    return np.dtype(np.uint16 if vocab_size + 1 <= 1 << 16 else np.uint32)


def read_manifest(folder: str | Path) -> Manifest:
    """The manifest of a prepared folder.

    Raises:
        UserError: not prepared (names the command), preparation unfinished, newer format, or damaged.
        RunFailed: a remote folder that cannot be reached.
    """
    if is_remote(folder):
        raw = read_remote(f"{str(folder).rstrip('/')}/{MANIFEST}")
        if raw is None:
            raise UserError(f"data.shards {str(folder)!r}: no {MANIFEST} there; copy a prepared folder of shards to it")
        return parse_manifest(raw, f"{folder}/{MANIFEST}")
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        state = "preparation was not finished" if (folder / PARTIAL).is_file() else "no prepared shards"
        raise UserError(
            f"data.shards {str(folder)!r}: {state} (no {MANIFEST}); run: "
            f"python launchers/prepare_data.py --config CONFIG.json --set data.shards={folder}"
        )
    return parse_manifest((folder / MANIFEST).read_bytes(), folder / MANIFEST)


def manifests_of(data: DataConfig) -> list[Manifest]:
    """The manifest of each corpus. Raises what `read_manifest` does."""
    return [read_manifest(each.shards) for each in data.corpora()]


def contents_of(manifests: Sequence[Manifest]) -> list[dict[str, dict[str, float]]]:
    """What a run is made of, by corpus and split: all are trained on, the first is validated on as well."""
    found = [{"train": manifest.content("train")} for manifest in manifests]
    if "validation" in manifests[0].splits:
        found[0]["validation"] = manifests[0].content("validation")
    return found


def unigram_bits_per_token(contents: Sequence[dict[str, dict[str, float]]]) -> float:
    """What a model without context could reach, on the split that bounds are computed on where there is one.

    Args:
        contents: see `contents_of`.
    """
    splits = contents[0]
    return splits.get("validation", splits["train"])["unigram_entropy"] / math.log(2)


def parse_manifest(raw: bytes, path: Path | str) -> Manifest:
    """One manifest from its bytes; errors as in `read_manifest`, naming `path`."""
    try:
        values = json.loads(raw)
        version = values["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged, not a manifest: {error!r}") from None
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise UserError(
            f"{path}: format version {version}, this program reads up to {FORMAT_VERSION}; "
            "update the program or prepare the shards again"
        )
    try:
        return Manifest.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{path}: damaged manifest: {where + ': ' if where else ''}{first['msg']}") from None


def check_tokenizer(manifest: Manifest, shards: str | Path, tokenizer: Tokenizer) -> None:
    """`UserError` when the shards were written with another tokenizer."""
    if manifest.tokenizer_fingerprint != tokenizer.fingerprint or manifest.vocab_size != tokenizer.vocab_size:
        raise UserError(
            f"data.tokenizer {tokenizer.name!r} is not the one that the shards in {str(shards)!r} were written with: "
            f"{manifest.tokenizer!r}, {manifest.vocab_size} symbols, "
            f"fingerprint {manifest.tokenizer_fingerprint[:12]}; "
            f"found {tokenizer.vocab_size} symbols, fingerprint {tokenizer.fingerprint[:12]}"
        )


def check_compatible(manifest: Manifest, config: DataConfig, tokenizer: Tokenizer) -> None:
    """`UserError` naming the key when the shards were written with other settings than the configuration's.

    ``data.source: null`` takes the shards as they are, wherever they came from.
    """
    from vmd_scale.data.corpora import normalizer_name

    check_tokenizer(manifest, config.shards, tokenizer)
    wanted: Mapping[str, Any] = {
        "corpus": config.corpus,
        "row_length": config.row_length,
        "packing": config.packing,
        "documents_per_row": documents_per_row(config),
        "row_specials": config.row_specials,
        "normalizer": normalizer_name(config),
        "text_column": config.text_column,
        "validation_documents": config.validation_documents,
        "source": manifest.source if config.source is None else config.source,
    }
    for key, value in wanted.items():
        found = getattr(manifest, key)
        if found != value:
            raise UserError(
                f"data.{key} is {value!r}, but the shards in {config.shards!r} were written with {found!r}; "
                "prepare into another folder (data.shards), or again with --force"
            )
