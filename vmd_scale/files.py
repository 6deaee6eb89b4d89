"""Files that are whole or absent (written to a temporary name, flushed, renamed), and what is read is checked."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any, TypeVar

from vmd_scale.errors import UserError

Item = TypeVar("Item")


def write_atomically(path: str | Path, content: bytes | str) -> None:
    """Write a file so that no reader, and no crash, ever meets half of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: str | Path, value: Any) -> None:
    write_atomically(path, json.dumps(value, indent=2) + "\n")


def check_writable(path: str | Path | None, name: str) -> None:
    """Find out before the work whether its result could be written; nothing is made. `name` is the option's.

    Raises:
        UserError: the path is a folder, or a folder above it is a file or may not be written to.
    """
    if path is None:
        return
    path = Path(path).absolute()
    above = next(parent for parent in path.parents if parent.exists())
    for wrong, why in (
        (path.is_dir(), "is a folder, expected a file"),
        (not above.is_dir(), f"{above} is not a folder"),
        (not os.access(above, os.W_OK), f"{above} is not writable"),
    ):
        if wrong:
            raise UserError(f"{name} {path}: {why}")


def flush_to_disk(path: str | Path) -> None:
    """Wait until a file, or a folder's list of names, has left the operating system's memory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: str | Path, kind: type[Item]) -> Item:
    """A JSON file as a dataclass, a list of them, or another type.

    Raises:
        UserError: no such file, not JSON, or values that do not fit; names the file and the key.
    """
    try:
        values = json.loads(Path(path).read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable JSON file: {error}") from None
    return checked(kind, values, str(path))


def checked(kind: type[Item], values: object, origin: str) -> Item:
    """Plain values as `kind`; keys that it does not know are left out, they are a newer version's."""
    from pydantic import TypeAdapter, ValidationError  # here: benchmarks write files where pydantic is missing

    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{origin}: {'.'.join(map(str, first['loc']))}: {first['msg'].lower()}") from None
