"""The embedded corpus: the documentation that comes with every Python, so that a first run needs no download."""

import ast
import functools
import platform
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from vmd_scale.config import DataConfig
from vmd_scale.data.corpora.registry import SPLITS, Document, corpus, in_twentieth
from vmd_scale.data.normalize import to_text8_alphabet
from vmd_scale.errors import UserError

SHORTEST = 20  # characters, after normalization
EXCLUDED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__", "lib2to3"}
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@corpus(
    "python_docs",
    normalizer="text8",
    licence="Python Software Foundation License",
    origin=f"Python {platform.python_version()} standard library",
    splits=lambda config: SPLITS,
)
def python_docs(config: DataConfig, split: str) -> Iterator[Document]:
    """Language topics and docstrings of the standard library; they depend on the Python version, slightly."""
    if config.source is not None:
        raise UserError(f"data.source {config.source!r}: corpus 'python_docs' is embedded; leave the source null")
    return (Document(text) for number, text in enumerate(_texts()) if in_twentieth(number, split))


@functools.lru_cache(maxsize=1)  # three splits, one reading; a few megabytes
def _texts() -> tuple[str, ...]:
    from pydoc_data.topics import topics

    kept: dict[str, str] = {}  # normalized -> as written
    for text in (*(topics[name] for name in sorted(topics)), *_docstrings(Path(sysconfig.get_path("stdlib")))):
        normalised = to_text8_alphabet(text).strip()
        if len(normalised) >= SHORTEST:
            kept.setdefault(normalised, text)
    return tuple(kept.values())


def _docstrings(root: Path) -> Iterator[str]:
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        if EXCLUDED & set(path.relative_to(root).parts):
            continue
        source = path.read_bytes()
        if b'"""' not in source and b"'''" not in source:
            continue  # cheap; the few one-line docstrings in single quotes are not worth the parsing
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes in someone else's file
                tree = ast.parse(source)
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, DOCUMENTED) and (text := ast.get_docstring(node)):
                yield text
