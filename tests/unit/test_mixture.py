import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmd_scale.config import DataConfig
from vmd_scale.data.mixture import PERIOD, MixtureOrder, MixtureReader, interleave, quotas_of, training_rows
from vmd_scale.data.order import SampleOrder
from vmd_scale.data.prepare import prepare_all
from vmd_scale.data.roles import Role
from vmd_scale.errors import UserError

many_quotas = st.lists(st.integers(1, 40), min_size=1, max_size=6)


@settings(deadline=None)
@given(many_quotas)
def test_shares_are_exact_to_less_than_one_row(quotas: list[int]) -> None:
    """Of any first positions, not only of whole periods."""
    pattern = interleave(np.array(quotas))
    so_far = np.arange(1, len(pattern) + 1)
    for number, quota in enumerate(quotas):
        counts = np.cumsum(pattern == number)
        assert counts[-1] == quota
        assert np.abs(counts - so_far * quota / sum(quotas)).max() < 1


def test_quotas() -> None:
    assert quotas_of([1, 1]) == [1, 1]
    assert quotas_of([0.7, 0.2, 0.1]) == [7, 2, 1]
    assert quotas_of([30, 10]) == [3, 1]
    assert quotas_of([2.5]) == [1]
    rounded = quotas_of([3.14159265, 2.71828183])
    assert sum(rounded) == PERIOD
    assert rounded[0] == round(PERIOD * 3.14159265 / (3.14159265 + 2.71828183))
    with pytest.raises(UserError, match=r"data\.mixture: weight 1e-06 is less than 1/10000"):
        quotas_of([1.0, 1e-6])


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=4), st.integers(0, 2**62), st.data())
def test_every_corpus_goes_through_its_own_epochs(rows: list[int], seed: int, draw: st.DataObject) -> None:
    weights = draw.draw(st.lists(st.integers(1, 9), min_size=len(rows), max_size=len(rows)))
    order = MixtureOrder(rows, weights, seed)
    numbers = order.row_numbers(np.arange(3 * len(order.pattern) * max(rows)))
    first = np.cumsum([0, *rows])
    for number, length in enumerate(rows):
        of_corpus = numbers[(numbers >= first[number]) & (numbers < first[number + 1])] - first[number]
        whole = of_corpus[: len(of_corpus) // length * length].reshape(-1, length)
        assert len(whole) >= 1
        assert np.array_equal(np.sort(whole, axis=1), np.tile(np.arange(length), (len(whole), 1)))


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**40), st.integers(1, 60))
def test_independent_of_how_positions_are_asked(start: int, cut: int) -> None:
    order = MixtureOrder([10**12, 7, 1000], [0.5, 0.2, 0.3], 3)
    positions = start + np.arange(60)
    together = order.row_numbers(positions)
    apart = np.concatenate([order.row_numbers(positions[:cut]), order.row_numbers(positions[cut:])])
    assert np.array_equal(together, apart)


def test_a_mixture_of_one_is_its_order() -> None:
    positions = np.arange(500)
    assert np.array_equal(
        MixtureOrder([70], [3.0], 5).row_numbers(positions), SampleOrder(70, 5).row_numbers(positions)
    )


def test_corpora_of_one_size_have_orders_of_their_own() -> None:
    numbers = MixtureOrder([1000, 1000], [1, 1], 0).row_numbers(np.arange(2000))
    first, second = numbers[numbers < 1000], numbers[numbers >= 1000] - 1000
    assert (first == second).mean() < 0.02


class Rows:
    """Row r of corpus c is [c, r, r]."""

    def __init__(self, corpus: int, rows: int, has_roles: bool) -> None:
        self.corpus, self.rows, self.has_roles = corpus, rows, has_roles
        self.manifest = type("Manifest", (), {"row_length": 3})

    def read(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        assert np.all((rows >= 0) & (rows < self.rows))
        tokens = np.stack([np.full_like(rows, self.corpus), rows, rows], axis=1)
        return tokens, np.full(tokens.shape, np.uint8(Role.GIVEN)) if self.has_roles else None


def test_rows_are_read_from_their_corpus() -> None:
    reader = MixtureReader([Rows(0, 5, False), Rows(1, 2, True), Rows(2, 4, False)])  # type: ignore[list-item]
    assert reader.rows == 11
    tokens, roles = reader.read(np.array([10, 0, 5, 4, 6, 7]))
    assert tokens[:, :2].tolist() == [[2, 3], [0, 0], [1, 0], [0, 4], [1, 1], [2, 0]]
    assert roles is not None
    assert roles[:, 0].tolist() == [1, 1, 2, 1, 2, 1]


def test_from_a_configuration(tmp_path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text("\n".join(f"{name} " * 40 for _ in range(40)))
    data = DataConfig.model_validate({
        "corpus": "text", "source": str(tmp_path / "a.txt"), "tokenizer": "text8", "normalizer": "text8",
        "row_length": 16, "shards": str(tmp_path / "a"), "weight": 3.0,
        "mixture": ({"corpus": "text", "source": str(tmp_path / "b.txt"), "normalizer": "text8",
                     "shards": str(tmp_path / "b")},),
    })  # fmt: skip
    manifests = prepare_all(data, progress=False)
    assert [list(manifest.splits) for manifest in manifests.values()] == [["train", "validation", "test"], ["train"]]
    reader, order = training_rows(data, seed=1)
    tokens, _ = reader.read(order.row_numbers(np.arange(400)))
    of_b = (tokens == 2).any(1)  # the letter b
    assert of_b.reshape(-1, 4).sum(1).tolist() == [1] * 100
    with pytest.raises(ValueError, match="two corpora have the same shards"):
        DataConfig.model_validate({**data.model_dump(), "mixture": ({"corpus": "text", "shards": data.shards},)})
