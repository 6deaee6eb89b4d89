"""Sudoku puzzles with one solution, made here: puzzle number n of a split is always the same.

A random grid is filled first. Its clues grow from a few random cells: while the puzzle has another solution, a cell
in which that one differs becomes a clue. Then clues are added, or such that nothing depends on are taken away, until
there are as many as wanted. One core makes about 250 puzzles of 29-37 clues a second, 150 of 24-30, 50 of 24.
"""

import hashlib
from itertools import count

import numpy as np

from vmd_scale.data.corpora.draws import words
from vmd_scale.data.corpora.registry import in_twentieth
from vmd_scale.data.corpora.sudoku_grids import CELLS, candidates_of, digits_of, solutions

CLUES = (29, 37)
FEWEST_CLUES, MOST_CLUES = 24, 80  # below 24 most grids have no puzzle that is found like this
FIRST_CLUES = 28  # the fastest


def generated_puzzle(number: int, split: str, clues: tuple[int, int] = CLUES) -> tuple[np.ndarray, np.ndarray]:
    """One puzzle: its solution (1 .. 9), int64 [81], and which cells are clues, bool [81].

    The hash of a solution says which split it belongs to, so that no solution is in two, whatever was generated.

    Args:
        number: with `split` and `clues`, the seed.
        clues: fewest and most; counts in the middle are the most frequent.
    """
    for attempt in count():
        name = f"sudoku {split} {clues[0]}-{clues[1]} {number} {attempt}"
        grid = _relabelled(_filled(f"{name} grid"), split, f"{name} digits")
        coins = int(words(f"{name} count", 1)[0]) & ((1 << clues[1] - clues[0]) - 1)
        found = _clues(grid.tolist(), np.argsort(words(f"{name} clues", CELLS)).tolist(), clues[0] + coins.bit_count())
        if found is not None:
            given = np.zeros(CELLS, dtype=bool)
            given[list(found)] = True
            return grid, given
    raise AssertionError("count() has no end")


def split_of_solution(grid: np.ndarray) -> str:
    """The split that a solution (1 .. 9), integers [81], may be generated for: 18 of 20 are for train."""
    number = hashlib.sha256(grid.astype(np.uint8).tobytes()).digest()[0]
    return next(split for split in ("validation", "test", "train") if in_twentieth(number % 20, split))


def _filled(name: str) -> np.ndarray:
    """A random grid: three boxes that do not see each other are free, a solver tries the rest in a random order."""
    orders = np.argsort(words(name, (CELLS + 3) * 9).reshape(-1, 9), axis=1)
    grid = np.zeros((3, 3, 3, 3), dtype=np.int64)  # band, row, stack, column
    for box in range(3):
        grid[box, :, box] = orders[CELLS + box].reshape(3, 3) + 1
    return digits_of(next(solutions(candidates_of(grid.ravel().tolist()), orders.tolist())))


def _relabelled(grid: np.ndarray, split: str, name: str) -> np.ndarray:
    """The grid with its digits renamed, at random, until it is one of the split."""
    for trial in count():
        names = np.argsort(words(f"{name} {trial}", 9)) + 1
        renamed = names[grid - 1]
        if split_of_solution(renamed) == split:
            return renamed
    raise AssertionError("count() has no end")


def _clues(grid: list[int], order: list[int], wanted: int) -> set[int] | None:
    """So many cells that determine the grid; `order` is the cells' order of preference. Null where none are found."""
    truth = candidates_of(grid)
    # the true digit comes last: what is found first is another solution, if there is one
    orders = [[*(d for d in range(9) if d != digit - 1), digit - 1] for digit in grid]
    clues = set(order[:FIRST_CLUES])

    def difference(cells: set[int], without: int | None = None) -> int:
        """Cells, as bits, where some other solution of these clues differs from the grid; 0 where there is none."""
        start = candidates_of([digit if cell in cells else 0 for cell, digit in enumerate(grid)])
        if without is not None:
            start[grid[without] - 1] &= ~(1 << without)
        for found in solutions(start, orders):
            if found != truth:
                return sum(right & ~cells for right, cells in zip(truth, found, strict=True))
        return 0

    while differing := difference(clues):
        clues.add(next(cell for cell in order if differing >> cell & 1))
    for cell in [cell for cell in order if cell in clues]:
        if len(clues) <= wanted:
            break
        if not difference(clues - {cell}, without=cell):
            clues.remove(cell)
    clues.update([cell for cell in order if cell not in clues][: max(0, wanted - len(clues))])
    return clues if len(clues) == wanted else None
