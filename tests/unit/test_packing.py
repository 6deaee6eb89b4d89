from functools import partial
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmd_scale.config import DataConfig
from vmd_scale.data import packing
from vmd_scale.data.packing import PACKERS, EncodedDocument, PackingCounts, check_packing, kind_of_packer
from vmd_scale.data.roles import Role
from vmd_scale.errors import UserError


class Letters:
    """Ids 0-9 are letters; begin, end and pad follow when asked for."""

    name = "letters"
    vocab_size = 13
    fingerprint = "letters"
    begin_id: int | None
    end_id: int | None
    pad_id: int | None

    def __init__(self, specials: bool) -> None:
        self.begin_id, self.end_id, self.pad_id = (10, 11, 12) if specials else (None, None, None)

    def encode(self, text: str) -> np.ndarray:
        raise NotImplementedError

    def decode(self, ids: object) -> str:
        raise NotImplementedError

    def files(self) -> dict[str, bytes]:
        return {}


def data(row_length: int, **more: object) -> DataConfig:
    values = {"corpus": "text", "tokenizer": "letters", "shards": "unused", **more}
    return DataConfig.model_validate({**values, "row_length": row_length})


def encoded(documents: list[list[int]]) -> list[EncodedDocument]:
    return [EncodedDocument(np.array(document, dtype=np.uint16)) for document in documents]


def packed(
    documents: list[EncodedDocument], config: DataConfig, specials: bool = True, at_once: int = 1000, anew: bool = False
) -> tuple[np.ndarray, np.ndarray | None, PackingCounts]:
    """All rows. `at_once`: documents between two takes; `anew`: after each take another packer goes on."""
    tokenizer, counts, parts = Letters(specials), PackingCounts(), []
    check_packing(config, tokenizer)
    if documents:
        make = partial(PACKERS[kind_of_packer(documents[0], config)], config, tokenizer, counts)
        packer = make()
        for number, document in enumerate(documents, start=1):
            packer.add(document)
            if number % at_once == 0:
                parts.append(packer.take())
                if anew:
                    held, packer = packer.held(), make()
                    packer.hold(held)
        parts.append(packer.take(last=True))
    found = [part for part in parts if part is not None]
    if not found:
        return np.zeros((0, config.row_length), dtype=np.uint16), None, counts
    roles = None if found[0].roles is None else np.concatenate([part.roles for part in found])
    return np.concatenate([part.tokens for part in found]), roles, counts


METHODS = ["wrap", "pad", "document"]
many_documents = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=30), max_size=20)


@settings(deadline=None)
@given(many_documents, st.integers(3, 12), st.booleans(), st.integers(1, 20))
def test_wrap_loses_only_the_remainder(documents: list[list[int]], length: int, specials: bool, at_once: int) -> None:
    rows, roles, counts = packed(encoded(documents), data(length), specials, at_once)
    stream = list(chain.from_iterable([*document, 11] if specials else document for document in documents))
    whole = len(stream) // length * length
    assert roles is None
    assert rows.ravel().tolist() == stream[:whole]
    assert counts.dropped_tokens == len(stream) - whole


@given(many_documents, st.integers(3, 12))
def test_wrap_with_row_specials(documents: list[list[int]], length: int) -> None:
    rows, _, _ = packed(encoded(documents), data(length, row_specials=True))
    stream = list(chain.from_iterable([*document, 11] for document in documents))
    assert np.all(rows[:, 0] == 10)
    assert np.all(rows[:, -1] == 11)
    assert rows[:, 1:-1].ravel().tolist() == stream[: rows.shape[0] * (length - 2)]


@settings(deadline=None)
@given(many_documents, st.integers(3, 12), st.booleans(), st.integers(1, 20))
def test_pad_is_one_document_a_row(documents: list[list[int]], length: int, row_specials: bool, at_once: int) -> None:
    config = data(length, packing="pad", row_specials=row_specials)
    rows, roles, counts = packed(encoded(documents), config, at_once=at_once)
    room = length - 2 if row_specials else length
    assert len(rows) == len(documents)
    assert counts.truncated_documents == sum(len(document) > room for document in documents)
    for n, document in enumerate(documents):
        assert roles is not None
        expected = [10, *document[:room], 11] if row_specials else document[:room]
        assert rows[n].tolist() == expected + [12] * (length - len(expected))
        assert roles[n].tolist() == [Role.ORDINARY] * len(expected) + [Role.PADDING] * (length - len(expected))


def test_padding_without_a_pad_token_is_zero() -> None:
    rows, _, _ = packed(encoded([[5]]), data(3, packing="pad"), specials=False)
    assert rows.tolist() == [[5, 0, 0]]


@pytest.mark.parametrize("length", [5, 4, 3, 2])
@pytest.mark.parametrize("method", METHODS)
def test_pieces_make_one_document(method: str, length: int) -> None:
    whole = [EncodedDocument(np.arange(9)), EncodedDocument(np.arange(4))]
    pieces = [
        EncodedDocument(np.arange(2), last=False),
        EncodedDocument(np.arange(2, 8), last=False),
        EncodedDocument(np.arange(8, 9)),
        EncodedDocument(np.arange(4)),
    ]
    config = data(length, packing=method)
    assert packed(pieces, config)[0].tolist() == packed(whole, config)[0].tolist()
    assert packed(pieces, config)[2] == packed(whole, config)[2]


pieces_of_documents = st.lists(st.tuples(st.lists(st.integers(0, 9), min_size=1, max_size=30), st.booleans()))


@settings(deadline=None)
@given(pieces_of_documents, st.integers(3, 12), st.booleans(), st.integers(1, 3), st.sampled_from(METHODS))
def test_rows_depend_on_the_documents_alone(
    pieces: list[tuple[list[int], bool]], length: int, specials: bool, at_once: int, method: str
) -> None:
    """Not on when they are taken, nor on whether another packer goes on with what the first one held."""
    documents = [EncodedDocument(np.array(ids, dtype=np.uint16), last=last) for ids, last in pieces]
    documents.append(EncodedDocument(np.array([7], dtype=np.uint16)))
    config = data(length, packing=method, documents_per_row=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "OPEN_ROWS", 3)
        rows, roles, counts = packed(documents, config, specials)
        for anew in (False, True):
            others = packed(documents, config, specials, at_once, anew)
            assert np.array_equal(others[0], rows)
            assert others[0].dtype == rows.dtype
            assert others[1] is None if roles is None else np.array_equal(others[1], roles)
            assert others[2] == counts


def test_ready_documents_are_rows() -> None:
    given_cells = np.array([True, False, True])
    document = EncodedDocument(np.array([1, 2, 3]), ready=True, given=given_cells)
    rows, roles, _ = packed([document, document], data(3))
    assert rows.tolist() == [[1, 2, 3]] * 2
    assert roles is not None
    assert roles.tolist() == [[Role.GIVEN, Role.ORDINARY, Role.GIVEN]] * 2
    with pytest.raises(UserError, match=r"data\.row_length is 4"):
        packed([document], data(4))


def test_row_specials_need_the_tokens() -> None:
    with pytest.raises(UserError, match=r"data\.row_specials"):
        packed(encoded([[1]]), data(4, row_specials=True), specials=False)
    with pytest.raises(UserError, match=r"data\.row_length"):
        packed(encoded([[1]]), data(2, row_specials=True))


def test_no_documents() -> None:
    assert len(packed([], data(4))[0]) == 0


@settings(deadline=None)
@given(many_documents, st.integers(3, 12), st.booleans(), st.integers(1, 4), st.integers(1, 3))
def test_document_packing_keeps_every_document_whole(
    documents: list[list[int]], length: int, specials: bool, most: int, open_rows: int
) -> None:
    config = data(length, packing="document", documents_per_row=most)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "OPEN_ROWS", open_rows)
        rows, roles, counts = packed(encoded(documents), config, specials)
    # Without the end token where it would be alone.
    closed = [[*document, 11] if specials and len(document) % length else document for document in documents]
    parts = [document[at : at + length] for document in closed for at in range(0, len(document), length)]
    assert counts.split_documents == sum(len(document) > length for document in closed)
    assert counts.dropped_tokens == sum(specials and len(document) % length == 0 for document in documents)
    found = []
    for n in range(len(rows)):
        assert roles is not None
        starts = np.flatnonzero(roles[n] == Role.FIRST).tolist()
        filled = int((roles[n] != Role.PADDING).sum())
        assert starts[0] == 0
        assert len(starts) <= most
        assert np.all(roles[n, filled:] == Role.PADDING)
        assert not np.any(roles[n] == Role.GIVEN)
        found += [rows[n, a:b].tolist() for a, b in zip(starts, [*starts[1:], filled], strict=True)]
    assert sorted(found) == sorted(parts)


def test_document_packing_fills_rows() -> None:
    generator = np.random.default_rng(0)
    documents = [list(range(1, n)) for n in generator.integers(2, 60, size=3000)]
    documents = [[token % 10 for token in document] for document in documents]
    config = data(128, packing="document", documents_per_row=32)
    rows, roles, _ = packed(encoded(documents), config)
    assert roles is not None
    assert (roles == Role.PADDING).mean() < 0.02
    assert len(rows) < 1.03 * sum(len(document) + 1 for document in documents) / 128


def test_document_packing_takes_no_row_specials() -> None:
    with pytest.raises(UserError, match=r"data\.row_specials .*not with 'document'"):
        packed(encoded([[1]]), data(4, packing="document", row_specials=True))


@pytest.mark.parametrize(
    ("ready", "wrong", "allowed"),
    [
        (True, {"packing": "document"}, [{"packing": "wrap"}, {"packing": "pad"}]),
        (False, {"packing": "document"}, [{"packing": "pad"}]),
        (False, {"packing": "wrap"}, [{"packing": "pad"}]),
        (False, {"packing": "pad", "row_specials": True}, [{"packing": "pad"}]),
    ],
)
def test_puzzles_and_prompts_are_packed_in_their_own_way_only(ready, wrong, allowed):
    """Otherwise a latent would be lost without a word, or padding attended."""
    documents = [EncodedDocument(np.arange(4, dtype=np.uint16), ready=ready, given=np.arange(4) < 2)] * 3
    with pytest.raises(UserError, match=rf"data\.packing '{wrong['packing']}'.* found, .*corpus 'text'.* allowed"):
        packed(documents, data(4, **wrong))
    for values in allowed:
        tokens, roles, _ = packed(documents, data(4, **values), specials=False)
        assert tokens.tolist() == [[0, 1, 2, 3]] * 3
        assert roles.tolist() == [[Role.GIVEN] * 2 + [Role.ORDINARY] * 2] * 3
