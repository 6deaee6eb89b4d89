"""Sudoku: counting solutions, and the puzzles that are generated."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from task_rows import data

from vmd_scale.data.corpora import SPLITS, documents
from vmd_scale.data.corpora.sudoku_generator import generated_puzzle, split_of_solution
from vmd_scale.data.corpora.sudoku_grids import count_solutions, is_valid_solution

PUZZLE = "004300209005009001070060043006002087190007400050083000600000105003508690042910300"
SOLUTION = "864371259325849761971265843436192587198657432257483916689734125713528694542916378"
SEVENTH = "800500016000002083700381405904050001057000000000008094608073000500020007070005639"


def digits(text: str) -> np.ndarray:
    return np.array([int(c) for c in text])


def test_counting_solutions() -> None:
    assert count_solutions(digits(PUZZLE)) == 1
    assert count_solutions(digits(SOLUTION)) == 1
    assert count_solutions(np.zeros(81, dtype=int), limit=7) == 7
    assert count_solutions([5, 5, *[0] * 79]) == 0
    # a rectangle of two digits in two rows, columns and boxes can be exchanged
    grid = digits(SOLUTION)
    nine = grid.reshape(9, 9)
    rectangle = next(
        (a, b, c, d)
        for a in range(9)
        for b in range(a + 1, 9)
        for c in range(9)
        for d in range(c + 1, 9)
        if (nine[a, c], nine[a, d]) == (nine[b, d], nine[b, c]) and (a // 3 == b // 3) != (c // 3 == d // 3)
    )
    a, b, c, d = rectangle
    nine[[a, a, b, b], [c, d, c, d]] = 0
    assert count_solutions(nine.ravel(), limit=10) == 2


def test_valid_solutions() -> None:
    grid = digits(SOLUTION)
    swapped = grid.copy()
    swapped[[0, 1]] = swapped[[1, 0]]  # the row still has all digits
    band = np.roll(grid, 9)  # rows and columns are right, boxes are not
    assert is_valid_solution(np.stack([grid, swapped, band, grid - 1])).tolist() == [True, False, False, False]
    assert is_valid_solution(grid.tolist())
    with pytest.raises(ValueError, match="81"):
        is_valid_solution(grid[:80])


@pytest.mark.parametrize(("source", "low", "high"), [("generate:200", 29, 37), ("generate:60:24-30", 24, 30)])
def test_generated_puzzles(source: str, low: int, high: int) -> None:
    config = data("sudoku", source)
    seen: set[bytes] = set()
    total = 0
    for split in SPLITS:
        for document in documents(config, split):
            assert document.tokens is not None
            assert document.given is not None
            grid = document.tokens + 1
            assert is_valid_solution(grid)
            assert low <= document.given.sum() <= high
            assert split_of_solution(grid) == split
            if total % 3 == 0:
                assert count_solutions(np.where(document.given, grid, 0)) == 1
            seen.add(grid.tobytes())
            total += 1
    assert total == len(seen) == int(source.split(":")[1])


def test_puzzles_are_always_the_same() -> None:
    grid, given = generated_puzzle(7, "test")
    assert "".join(map(str, np.where(given, grid, 0))) == SEVENTH
    other, _ = generated_puzzle(7, "test", (24, 30))
    assert not np.array_equal(grid, other)


def test_all_puzzles_of_a_mapped_source_are_of_its_split() -> None:
    mapped = data("sudoku", {"test": "generate:20:30-34"})
    assert len(list(documents(mapped, "test"))) == 20


@settings(max_examples=30, deadline=None)
@given(number=st.integers(0, 10**9 - 1), split=st.sampled_from(SPLITS))
def test_every_number_is_a_puzzle(number: int, split: str) -> None:
    grid, given_cells = generated_puzzle(number, split, (26, 40))
    assert is_valid_solution(grid)
    assert 26 <= given_cells.sum() <= 40
    assert count_solutions(np.where(given_cells, grid, 0)) == 1
