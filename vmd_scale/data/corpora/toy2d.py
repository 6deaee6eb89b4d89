"""Two-dimensional toy distributions on a 50 x 50 grid: a row is the cell (x, y) (arXiv 2505.17384).

All live in the square [-4, 4]^2; what falls outside belongs to the cell at the border. The paper does not state its
constants; these are the usual ones of two-dimensional toys.

checkerboard   uniform over the dark ones of 4 x 4 squares
swiss_roll     (t cos t, t sin t) / 5 for t uniform in [1.5 pi, 4.5 pi], and normal noise of 0.2 in x and y
circles        radius 3 or 1.5, each half of the time, any angle, and normal noise of 0.24 in x and y

The draws are the same everywhere but where a rounding error of a cosine meets a cell's border (once in 10^8 draws).
"""

import math
from collections.abc import Callable, Iterator

import numpy as np

from vmd_scale.config import DataConfig
from vmd_scale.data.corpora.draws import below, uniform, words
from vmd_scale.data.corpora.registry import Document, corpus
from vmd_scale.data.corpora.symbol_rows import as_documents, check_tokenizer, variant_of
from vmd_scale.errors import UserError

GRID = 50
EXTENT = 4.0
ROWS = {"train": 100_000, "validation": 10_000, "test": 10_000}
SQUARES = 4
SWISS_ROLL_NOISE, CIRCLES_NOISE = 0.2, 0.24
NODES = 8192  # of the quadrature; against four times as many no probability moves by 1e-8


@corpus("toy2d", origin="checkerboard")
def toy2d(config: DataConfig, split: str) -> Iterator[Document]:
    """Independent draws of the variant that data.source names, others in every split."""
    check_tokenizer(config, GRID)
    variant = variant_of(config, split, "checkerboard")
    return as_documents(toy2d_draws(variant, f"toy2d {variant} {split}", ROWS[split]))


def toy2d_draws(source: str, name: str, count: int) -> np.ndarray:
    """Independent cells (x, y), int64 [count, 2], of the random stream `name`; `UserError` for an unknown source."""
    draw = {"checkerboard": _draw_checkerboard, "swiss_roll": _draw_swiss_roll, "circles": _draw_circles}
    return draw[_checked(source)](words(name, 4 * count).reshape(4, count))


def toy2d_distribution(source: str = "checkerboard") -> np.ndarray:
    """Probabilities of the cells, float64 [50, 50] over (x, y); they sum to 1.

    Exact for ``checkerboard``. For ``swiss_roll`` and ``circles`` the noise is integrated exactly over
    every cell and the curve by the midpoint rule.

    Raises:
        UserError: an unknown source.
    """
    mass: dict[str, Callable[[], np.ndarray]] = {
        "checkerboard": _checkerboard_mass,
        "swiss_roll": lambda: _mass_along(*_swiss_roll_at(_midpoints()), SWISS_ROLL_NOISE),
        "circles": lambda: np.mean(
            [_mass_along(*_circle_at(_midpoints(), radius), CIRCLES_NOISE) for radius in (1.5, 3.0)], axis=0
        ),
    }
    return mass[_checked(source)]()


def _checked(source: str) -> str:
    if source not in ("checkerboard", "swiss_roll", "circles"):
        raise UserError(
            f"data.source {source!r}: corpus 'toy2d' has the variants 'checkerboard', 'swiss_roll' and 'circles'"
        )
    return source


# A square's side is 12.5 cells: the checkerboard is exact on half cells, 25 a side.


def _dark_half_cells() -> np.ndarray:
    """bool [100, 100]."""
    square = np.arange(2 * GRID) * SQUARES // (2 * GRID)
    return (square[:, None] + square) % 2 == 0


def _checkerboard_mass() -> np.ndarray:
    dark = _dark_half_cells()
    return dark.reshape(GRID, 2, GRID, 2).sum(axis=(1, 3)) / dark.sum()


def _draw_checkerboard(random_words: np.ndarray) -> np.ndarray:
    half_cells = np.argwhere(_dark_half_cells())
    return half_cells[below(len(half_cells), random_words[0])] // 2


def _swiss_roll_at(u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    t = 1.5 * math.pi * (1 + 2 * u)
    return t * np.cos(t) / 5, t * np.sin(t) / 5


def _circle_at(u: np.ndarray, radius: float | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return radius * np.cos(2 * math.pi * u), radius * np.sin(2 * math.pi * u)


def _draw_swiss_roll(random_words: np.ndarray) -> np.ndarray:
    return _noisy_cells(*_swiss_roll_at(uniform(random_words[0])), SWISS_ROLL_NOISE, random_words[2:])


def _draw_circles(random_words: np.ndarray) -> np.ndarray:
    radius = np.where(below(2, random_words[1]), 3.0, 1.5)
    return _noisy_cells(*_circle_at(uniform(random_words[0]), radius), CIRCLES_NOISE, random_words[2:])


def _noisy_cells(x: np.ndarray, y: np.ndarray, noise: float, random_words: np.ndarray) -> np.ndarray:
    radius = noise * np.sqrt(-2 * np.log(uniform(random_words[0])))  # Box-Muller
    dx, dy = _circle_at(uniform(random_words[1]), radius)
    cells = np.floor((np.stack([x + dx, y + dy], axis=1) + EXTENT) * (GRID / (2 * EXTENT)))
    return np.clip(cells, 0, GRID - 1).astype(np.int64)


def _midpoints() -> np.ndarray:
    return (np.arange(NODES) + 0.5) / NODES


def _mass_along(x: np.ndarray, y: np.ndarray, noise: float) -> np.ndarray:
    """Mean over points [n] of the cells' probabilities under normal noise around each, [50, 50]."""
    inner = np.linspace(-EXTENT, EXTENT, GRID + 1)[1:-1]

    def of_cells(centre: np.ndarray) -> np.ndarray:
        """[n, 50]; the cells at the border reach to infinity."""
        scaled = (inner - centre[:, None]) / (noise * math.sqrt(2))
        cumulative = np.array([(1 + math.erf(z)) / 2 for z in scaled.flat]).reshape(scaled.shape)
        return np.diff(cumulative, axis=1, prepend=0.0, append=1.0)

    return of_cells(x).T @ of_cells(y) / len(x)
