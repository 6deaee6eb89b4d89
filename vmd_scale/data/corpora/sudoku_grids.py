"""Solving Sudoku and checking solutions: for the generator, and for judging what a model wrote.

A cell is a bit of an 81-bit number, and a position is nine such numbers: the cells where each digit may still stand.
Counting the candidates of all cells at once is then a few operations on whole numbers.
"""

from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np

CELLS = 81
ALL_CELLS = (1 << CELLS) - 1
UNIT_NUMBERS = [(c // 9, 9 + c % 9, 18 + c // 27 * 3 + c % 9 // 3) for c in range(CELLS)]  # row, column, box
UNITS = [sum(1 << cell for cell in range(CELLS) if n in UNIT_NUMBERS[cell]) for n in range(27)]
# the cells that do not see this one, and the cell itself
UNSEEN = [(ALL_CELLS & ~(UNITS[r] | UNITS[c] | UNITS[b])) | 1 << cell for cell, (r, c, b) in enumerate(UNIT_NUMBERS)]
IN_ORDER = [list(range(9))] * CELLS

Candidates = list[int]  # for each digit 0 .. 8 the cells where it may stand


def is_valid_solution(grid: np.ndarray | Sequence[int]) -> np.ndarray:
    """Whether every row, column and box has the digits 1 .. 9: integers [..., 81] -> bool [...]."""
    grids = np.asarray(grid, dtype=np.int64)
    if grids.shape[-1:] != (CELLS,):
        raise ValueError(f"a grid has {CELLS} cells, found shape {grids.shape}")
    nine = grids.reshape(*grids.shape[:-1], 9, 9)
    boxes = nine.reshape(*grids.shape[:-1], 3, 3, 3, 3).swapaxes(-3, -2).reshape(nine.shape)
    digits = np.arange(1, 10)
    units = np.concatenate([nine, nine.swapaxes(-1, -2), boxes], axis=-2)
    return (np.sort(units, axis=-1) == digits).all(axis=(-1, -2))


def count_solutions(puzzle: np.ndarray | Sequence[int], limit: int = 2) -> int:
    """Solutions of a puzzle, integers [81] with 0 for an empty cell; counting ends at `limit`."""
    digits = [int(digit) for digit in puzzle]
    if len(digits) != CELLS or min(digits) < 0 or max(digits) > 9:
        raise ValueError(f"a puzzle is {CELLS} digits 0..9, found {digits}")
    return sum(1 for _ in islice(solutions(candidates_of(digits)), limit))


def candidates_of(digits: Sequence[int]) -> Candidates:
    """Where each digit may stand when the clues (1 .. 9) are all that is known."""
    empty = sum(1 << cell for cell, digit in enumerate(digits) if not digit)
    candidates = [empty] * 9
    for cell, digit in enumerate(digits):
        if digit:
            candidates[digit - 1] |= 1 << cell
    return candidates


def digits_of(solved: Candidates) -> np.ndarray:
    """The grid 1 .. 9 of a solution, int64 [81]."""
    return np.array([next(d for d in range(9) if solved[d] >> cell & 1) + 1 for cell in range(CELLS)], dtype=np.int64)


def solutions(candidates: Candidates, orders: Sequence[Sequence[int]] = IN_ORDER) -> Iterator[Candidates]:
    """All solutions, depth first; `orders` says for each cell in which order its digits (0 .. 8) are tried."""
    stack = [(list(candidates), 0)]
    while stack:
        position, settled = stack.pop()
        settled = _settle(position, settled)
        if settled == ALL_CELLS:
            yield position
        elif settled >= 0:
            bit = _cell_with_fewest(position, settled)
            for digit in reversed(orders[bit.bit_length() - 1]):
                if position[digit] & bit:
                    child = [cells & ~bit for cells in position]
                    child[digit] |= bit
                    stack.append((child, settled))


def _settle(position: Candidates, settled: int) -> int:
    """Draw all simple conclusions, in place; the cells that have one candidate, or -1 for a contradiction."""
    while True:
        once = twice = 0
        for cells in position:
            twice |= once & cells
            once |= cells
        if once != ALL_CELLS:
            return -1  # a cell without a candidate
        fresh = once & ~twice & ~settled
        if not fresh:
            if settled == ALL_CELLS:
                return settled
            found = _place_where_only(position, settled)
            if found <= 0:
                return found or settled
            continue
        settled |= fresh
        for digit in range(9):
            here = position[digit] & fresh
            while here:
                bit = here & -here
                here ^= bit
                position[digit] &= UNSEEN[bit.bit_length() - 1]


def _place_where_only(position: Candidates, settled: int) -> int:
    """Place digits that have one cell left in a row, column or box: 1 if any was, 0 if none, -1 for a contradiction."""
    placed = 0
    for digit in range(9):
        for unit in UNITS:
            cells = position[digit] & unit
            if not cells & (cells - 1) and not cells & settled:
                if not cells:
                    return -1  # nowhere to stand
                for other in range(9):
                    if other != digit:
                        position[other] &= ~cells
                placed = 1
    return placed


def _cell_with_fewest(position: Candidates, settled: int) -> int:
    """The bit of an open cell with two candidates; else with three, with four, with any number."""
    at_least = [0] * 6  # at_least[n]: cells with n candidates or more
    for cells in position:
        for n in range(5, 1, -1):
            at_least[n] |= at_least[n - 1] & cells
        at_least[1] |= cells
    for n in (2, 3, 4):
        if exactly := at_least[n] & ~at_least[n + 1] & ~settled:
            return exactly & -exactly
    rest = ALL_CELLS & ~settled
    return rest & -rest
