"""What a position of a row is for."""

from enum import IntEnum


class Role(IntEnum):
    """Stored as uint8 beside the tokens, and only where some position is not ordinary."""

    PADDING = 0  # never attended, never counted
    ORDINARY = 1  # may be masked, counted
    GIVEN = 2  # attended, never masked, never counted: the clues of a Sudoku
