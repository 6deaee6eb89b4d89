"""What a position of a row is for."""

from enum import IntEnum
from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:  # those who prepare shards in many processes need no PyTorch
    from torch import Tensor

Roles = TypeVar("Roles", np.ndarray, "Tensor")


class Role(IntEnum):
    """Stored as uint8 beside the tokens, and only where some position is not ordinary."""

    PADDING = 0  # never attended, never counted
    ORDINARY = 1  # may be masked, counted
    GIVEN = 2  # attended, never masked, never counted: the clues of a Sudoku
    FIRST = 3  # ordinary, and the first token of a document: packing `document`


def is_counted(roles: Roles) -> Roles:
    """Positions that may be masked and are counted in losses, as bools."""
    return (roles == Role.ORDINARY) | (roles == Role.FIRST)
