"""A configuration from its file, and what a command line adds to it; errors in words.

A run is described by one JSON file. ``"base": "other.json"`` (relative to the file) inherits, ``--set a.b=value``
overrides.
"""

import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from vmd_scale.config import Config, step_values
from vmd_scale.errors import UserError

WORDS = {  # of pydantic, and of docs/configuration.md
    "array": "a list",
    "boolean": "true or false",
    "dictionary": "an object",
    "integer": "a whole number",
    "number": "a number",
    "string": "text",
    "tuple": "a list",
}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a JSON file, follow its ``base``, apply ``a.b=value`` overrides and validate the result.

    Raises:
        UserError: missing file, bad JSON, unknown key (with the nearest valid one), wrong type, contradiction.
    """
    return parse_config(_read_with_base(Path(path), seen=()), origin=str(path), overrides=overrides)


def parse_config(values: dict[str, Any], origin: str, overrides: Sequence[str] = ()) -> Config:
    """Apply ``a.b=value`` overrides to plain values, which are changed by it, and validate; errors name `origin`."""
    for override in overrides:
        _apply_override(values, override)
    try:
        return Config.model_validate_json(json.dumps(values))
    except ValidationError as error:
        raise UserError(f"{origin}: {_explain(error.errors())}") from None


def parse_step_list(text: str, option: str) -> tuple[float, ...]:
    """``1,4,inf`` of a command line as numbers.

    Raises:
        UserError: names the option.
    """
    parts = text.split(",")
    if not all(part == "inf" or (part.isdecimal() and int(part) > 0) for part in parts):
        raise UserError(f"{option} {text!r}: expected positive whole numbers or 'inf', such as 1,4,inf")
    return step_values([part if part == "inf" else int(part) for part in parts])


def parse_counts(text: str, option: str) -> tuple[int, ...]:
    """``1,4,16`` of a command line.

    Raises:
        UserError: names the option.
    """
    if not all(part.isdecimal() and int(part) > 0 for part in text.split(",")):
        raise UserError(f"{option} {text!r}: expected positive whole numbers, such as 1,4,16")
    return tuple(int(part) for part in text.split(","))


def _read_with_base(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in seen:
        raise UserError(f"{path}: 'base' goes round in a circle: {' -> '.join(map(str, [*seen, path]))}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such configuration file") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not a readable JSON file: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: a configuration is a JSON object, found {type(values).__name__}")
    base = values.pop("base", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise UserError(f"{path}: 'base' must be a file name, found {base!r}")
    return _merge(_read_with_base(path.parent / base, (*seen, path.resolve())), values)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"--set {override}: expected KEY=VALUE, for example training.steps=100")
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text  # a bare word is a string
    node = values
    *parents, leaf = key.split(".")
    for parent in parents:
        if node.get(parent) is None:  # a section that is not there, or null as in what a run writes down
            node[parent] = {}
        node = node[parent]
        if not isinstance(node, dict):
            raise UserError(f"--set {override}: {parent} is a value, not a section")
    node[leaf] = value


def _explain(errors: Sequence[Any]) -> str:
    """Pydantic's errors in this project's words: key, what was found, what is allowed."""
    messages: dict[str, list[str]] = {}
    found: dict[str, str] = {}
    for error in errors:
        location = [str(part) for part in error["loc"]]
        if error["type"] == "extra_forbidden":
            messages[_unknown_key(location)] = []
        elif error["type"] == "missing":
            messages[f"missing key {'.'.join(location)!r}"] = []
        elif error["type"] == "value_error":
            messages[str(error["ctx"]["error"])] = []
        else:  # a key of several allowed types gives one error for each of them
            key = ".".join(part for part in location if part in _all_keys() or part.isdigit())
            messages.setdefault(key, []).append(_in_our_words(error["msg"]))
            found[key] = f", found {error['input']!r}"
    return "; ".join(f"{key}: {' or '.join(m)}{found[key]}" if m else key for key, m in messages.items())


def _in_our_words(message: str) -> str:
    """Kinds of values are called as in docs/configuration.md."""
    for theirs, ours in WORDS.items():
        message = message.replace(f"a valid {theirs}", ours)
    return message[0].lower() + message[1:]


def _unknown_key(location: Sequence[str]) -> str:
    """Names the nearest valid key: of the same section, else of any other."""
    section = _section_at(location[:-1])
    allowed = sorted(section.model_fields) if section else []
    near = [".".join((*location[:-1], leaf)) for leaf in difflib.get_close_matches(location[-1], allowed, n=1)]
    if not near:
        leaves = {leaf: f"{name}.{leaf}" for name in Config.model_fields for leaf in _fields_of(name)}
        near = [leaves[leaf] for leaf in difflib.get_close_matches(location[-1], leaves, n=1)]
    hint = f"did you mean {near[0]!r}?" if near else f"allowed: {', '.join(allowed)}"
    return f"unknown key {'.'.join(location)!r}; {hint}"


def _fields_of(name: str) -> list[str]:
    section = _section_at([name])
    return list(section.model_fields) if section else []


def _section_at(path: Sequence[str]) -> type[BaseModel] | None:
    section: type[BaseModel] = Config
    for part in path:
        field = section.model_fields.get(part)
        inner = None if field is None else section_of(field.annotation)
        if inner is None:
            return None
        section = inner
    return section


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section that a value of this type is, or may be, or has as items; None where it is no section."""
    options = (annotation, *get_args(annotation))
    return next((one for one in options if isinstance(one, type) and issubclass(one, BaseModel)), None)


def _all_keys(section: type[BaseModel] = Config) -> set[str]:
    keys = set(section.model_fields)
    for field in section.model_fields.values():
        if (inner := section_of(field.annotation)) is not None:
            keys |= _all_keys(inner)
    return keys
