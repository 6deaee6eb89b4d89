"""Sudoku: 81 cells a row of the grid after the other; the clues are given, the rest is to be found."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from vmd_scale.config import DataConfig
from vmd_scale.data.corpora.files import lines
from vmd_scale.data.corpora.registry import Document, corpus, in_twentieth
from vmd_scale.data.corpora.sources import local_source
from vmd_scale.errors import UserError

CELLS = 81


@corpus("sudoku")
def sudoku(config: DataConfig, split: str) -> Iterator[Document]:
    """CSV of ``puzzle,solution`` with or without a header; 0 or . is an empty cell; tokens are digit - 1."""
    if config.tokenizer != "sudoku":
        raise UserError(f"data.tokenizer {config.tokenizer!r}: corpus 'sudoku' needs tokenizer 'sudoku'")
    source = local_source(config, split)
    number = 0
    for line_number, line in enumerate(lines(Path(source.path)), start=1):
        fields = [field.strip() for field in line.split(",")]
        is_header = line_number == 1 and not line[:1].isdigit() and not line.startswith(".")
        if is_header or not line.strip():
            continue
        where = f"{source.path}, line {line_number}"
        if len(fields) != 2:
            raise UserError(f"{where}: expected 'puzzle,solution', found {len(fields)} fields")
        if source.is_split or in_twentieth(number, split):
            yield _puzzle(fields[0], fields[1], where)
        number += 1


def _puzzle(quiz: str, solution: str, where: str) -> Document:
    clues = _digits(quiz.replace(".", "0"), "puzzle", where)
    digits = _digits(solution, "solution", where)
    if digits.min() == 0:
        raise UserError(f"{where}: the solution has an empty cell")
    given = clues > 0
    wrong = given & (clues != digits)
    if wrong.any():
        cell = int(np.argmax(wrong))
        raise UserError(f"{where}: clue {clues[cell]} in cell {cell} contradicts the solution's {digits[cell]}")
    return Document(tokens=digits - 1, given=given)


def _digits(field: str, name: str, where: str) -> np.ndarray:
    if len(field) != CELLS or not (field.isascii() and field.isdigit()):
        raise UserError(f"{where}: the {name} must be {CELLS} digits, found {field[:90]!r} ({len(field)} characters)")
    return np.frombuffer(field.encode("ascii"), dtype=np.uint8).astype(np.int64) - ord("0")
