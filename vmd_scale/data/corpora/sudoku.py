"""Sudoku: 81 cells a row of the grid after the other; the clues are given, the rest is to be found."""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from vmd_scale.config import DataConfig
from vmd_scale.data.corpora.files import lines
from vmd_scale.data.corpora.registry import Document, corpus, in_twentieth
from vmd_scale.data.corpora.sources import local_source, source_of
from vmd_scale.data.corpora.sudoku_generator import CLUES, FEWEST_CLUES, MOST_CLUES, generated_puzzle
from vmd_scale.data.corpora.sudoku_grids import CELLS
from vmd_scale.errors import UserError

GENERATE = "generate:"
FEWEST_PUZZLES = 20  # of which each split has one


@corpus("sudoku")
def sudoku(config: DataConfig, split: str) -> Iterator[Document]:
    """CSV of ``puzzle,solution`` with or without a header; 0 or . is an empty cell; tokens are digit - 1.

    ``generate:N`` makes N puzzles instead, ``generate:N:24-30`` such with 24 to 30 clues (else 29 to 37).
    """
    if config.tokenizer != "sudoku":
        raise UserError(f"data.tokenizer {config.tokenizer!r}: corpus 'sudoku' needs tokenizer 'sudoku'")
    if source_of(config, split).path.startswith(GENERATE):
        return _generated(config, split)
    return _read(config, split)


def _generated(config: DataConfig, split: str) -> Iterator[Document]:
    source = source_of(config, split)
    match = re.fullmatch(r"generate:([0-9]{1,9})(?::([0-9]{1,2})-([0-9]{1,2}))?", source.path)
    puzzles, *clues = (int(group) for group in match.groups() if group) if match else (0,)
    low, high = clues or CLUES
    if puzzles < FEWEST_PUZZLES or not FEWEST_CLUES <= low <= high <= MOST_CLUES:
        raise UserError(
            f"data.source {source.path!r}: expected generate:N or generate:N:LOW-HIGH, such as generate:20000:24-30, "
            f"with {FEWEST_PUZZLES} puzzles at least and {FEWEST_CLUES} to {MOST_CLUES} clues"
        )
    numbers = (number for number in range(puzzles) if source.is_split or in_twentieth(number, split))
    solved = (generated_puzzle(number, split, (low, high)) for number in numbers)
    return (Document(tokens=grid - 1, given=given) for grid, given in solved)


def _read(config: DataConfig, split: str) -> Iterator[Document]:
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
