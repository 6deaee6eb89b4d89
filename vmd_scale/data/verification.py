"""Are the shards what was written? Every checksum is compared before training, the files dealt out to the ranks.

What was found good is remembered in ``.verified.json`` beside the shards, by size and time of change: terabytes are
hashed once, not at every start. ``prepare_data.py verify`` compares always.
"""

import contextlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from vmd_scale.data.manifest import FileRecord, Manifest, read_manifest
from vmd_scale.data.remote import is_remote
from vmd_scale.data.shards import ShardReader
from vmd_scale.errors import RunFailed, UserError
from vmd_scale.files import write_json

VERIFIED = ".verified.json"
Stamps = dict[str, list[str | int]]  # name -> sha256, bytes and time of change (ns) when the checksum was right


def verify_share(folder: str | Path, splits: Sequence[str], rank: int, world_size: int) -> tuple[str | None, Stamps]:
    """What is wrong with this rank's share of the files, or None; and what to remember of those that are good."""
    try:
        manifest = read_manifest(folder)
        if is_remote(folder):  # compared when they are fetched
            return _missing_split(folder, splits, manifest), {}
        readers = [ShardReader(folder, split, manifest, check_sizes=False) for split in splits]
        known, good = _read_stamps(Path(folder)), Stamps()
        for reader in readers:
            for file in reader.files()[rank::world_size]:
                stamp = _stamp(Path(folder), file)
                if known.get(file.name) != stamp:
                    reader.verify([file])
                good[file.name] = stamp
    except (UserError, RunFailed, OSError) as error:
        return str(error), {}
    return None, good


def _missing_split(folder: str | Path, splits: Sequence[str], manifest: Manifest) -> str | None:
    missing = [split for split in splits if split not in manifest.splits]
    return f"data.shards {str(folder)!r}: no {missing[0]!r} split there" if missing else None


def remember(folder: str | Path, shares: Iterable[Mapping[str, list[str | int]]]) -> None:
    """Write what all ranks found good; a folder that may not be written to is hashed again the next time."""
    stamps = {name: stamp for share in shares for name, stamp in share.items()}
    known = _read_stamps(Path(folder))
    if {**known, **stamps} != known:
        with contextlib.suppress(OSError):
            write_json(Path(folder) / VERIFIED, {**known, **stamps})


def _read_stamps(folder: Path) -> Stamps:
    try:
        return dict(json.loads((folder / VERIFIED).read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def _stamp(folder: Path, file: FileRecord) -> list[str | int]:
    try:
        status = (folder / file.name).stat()
    except OSError:
        return []
    return [file.sha256, status.st_size, status.st_mtime_ns]
