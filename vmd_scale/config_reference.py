"""Every key of the configuration with its type, default and meaning, as Markdown: ``docs/configuration.md``.

python -m vmd_scale.config_reference > docs/configuration.md
"""

import json
from typing import Any, get_origin

from pydantic import BaseModel

from vmd_scale.config import Config
from vmd_scale.config_file import section_of

HEAD = """# Configuration

A run is one JSON file. `"base": "other.json"` inherits from another file, whose path is relative to this one: sections
are merged key by key, lists and values replaced. `--set section.key=VALUE` overrides one key (VALUE is JSON where it
can be, else text; lists of names or numbers may be written `a,b`; `data.mixture` is set only as a whole). What follows
from something else is computed, never asked. Unknown keys, wrong types and contradictions are errors, before anything
starts. The values that may be changed in the middle of a run are listed in
[operations.md](operations.md#resume-on-other-hardware-too).

This page is made from the code: `python -m vmd_scale.config_reference > docs/configuration.md`.
"""
DEEPSPEED = """## deepspeed

DeepSpeed's own JSON, passed through; the default is `{default}`. What the run derives (batch sizes, accumulation,
clipping, precision) is filled in; a key that contradicts it is an error that names both. Optimizer and scheduler are
ours. Parallelism is by data, with ZeRO stages 0 to 3: there is no tensor, pipeline or sequence parallelism.
`offload_optimizer` and `offload_param` may go to the `cpu`, not to `nvme`; bf16 needs stage 1 or higher; fp16 is not
offered.
"""


def markdown() -> str:
    """The whole page."""
    parts, schema = [HEAD], Config.model_json_schema()
    for name, field in Config.model_fields.items():
        if name == "deepspeed":
            parts.append(DEEPSPEED.format(default=json.dumps(field.get_default(call_default_factory=True))))
        else:
            assert isinstance(field.annotation, type)
            parts.append(f"## {name}\n\n" + _table(field.annotation, schema["$defs"]))
    return "\n".join(parts)


def _table(section: type[BaseModel], definitions: dict[str, Any], prefix: str = "") -> str:
    lines = [] if prefix else ["| key | allowed | default | meaning |", "| --- | --- | --- | --- |"]
    properties = definitions[section.__name__]["properties"]
    for name, field in section.model_fields.items():
        inner = section_of(field.annotation)
        if inner is not None:
            several = get_origin(field.annotation) is tuple
            if field.description:
                kind, default = ("list of objects", "[]") if several else ("object or null", "null")
                lines.append(f"| `{prefix}{name}` | {kind} | `{default}` | {field.description} |")
            lines.append(_table(inner, definitions, f"{prefix}{name}{'[]' if several else ''}.").rstrip("\n"))
            continue
        default = "required" if field.is_required() else f"`{json.dumps(field.default)}`"
        allowed = _allowed(properties[name], definitions).replace("|", "\\|")
        lines.append(f"| `{prefix}{name}` | {allowed} | {default} | {field.description or ''} |")
    return "\n".join(lines) + "\n"


def _allowed(schema: dict[str, Any], definitions: dict[str, Any]) -> str:
    """A JSON schema in words."""
    if "$ref" in schema:
        return _allowed(definitions[schema["$ref"].rsplit("/", 1)[1]], definitions)
    if "anyOf" in schema:
        return " or ".join(_allowed(option, definitions) for option in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{json.dumps(value)}`" for value in schema.get("enum", [schema.get("const")]))
    kind = schema.get("type", "object")
    if kind == "array":
        if "prefixItems" in schema:
            return "[" + ", ".join(_allowed(item, definitions) for item in schema["prefixItems"]) + "]"
        return f"list of {_allowed(schema.get('items', {}), definitions)}"
    words = {"integer": "whole number", "number": "number", "string": "text", "boolean": "`true`, `false`"}
    bounds = (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<"))
    limits = [f"{sign} {schema[key]:g}" if schema[key] < 2**31 else "" for key, sign in bounds if key in schema]
    return " ".join([words.get(kind, kind), *filter(None, limits)])


if __name__ == "__main__":
    print(markdown(), end="")
