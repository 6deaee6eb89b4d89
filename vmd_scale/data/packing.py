"""Documents of any length become rows of exactly L tokens.

wrap      documents one after the other, each closed by the tokenizer's end token if it has one; cut every L
pad       one document a row, cut off at L or padded to it; of a prompt with its response, the prompt is given
document  several whole documents a row, each closed likewise; one that is longer than L is cut into several, and one
          that then ends with its row is not closed: the end token would be a document of its own
ready     documents that come as tokens (puzzles) are rows already; with wrap or pad
"""

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from vmd_scale.config import DataConfig
from vmd_scale.data.roles import Role
from vmd_scale.errors import UserError
from vmd_scale.tokenization import Tokenizer

# Rows are handed on in batches of about so many tokens: big enough for numpy, small enough for any memory.
BATCH_TOKENS = 1 << 20
OPEN_ROWS = 64  # among which packing `document` looks for the one that a document fits best


@dataclass(frozen=True)
class EncodedDocument:
    """Ids [n] of a document or, when not `last`, of a piece of it. `ready`: they are a row, `given` [n] its clues.

    `given` without `ready` is a prompt: response and filling have `response_width` positions, or all that are left.
    """

    tokens: np.ndarray
    last: bool = True
    ready: bool = False
    given: np.ndarray | None = None
    response_width: int | None = None


@dataclass(frozen=True)
class Rows:
    """Some packed rows: ids [n, L], and `Role` numbers uint8 [n, L] where some position is not ordinary."""

    tokens: np.ndarray
    roles: np.ndarray | None = None


@dataclass
class PackingCounts:
    """What packing did to documents: cut off at the row's end, cut into several; tokens that filled no row."""

    truncated_documents: int = 0
    split_documents: int = 0
    dropped_tokens: int = 0


def check_packing(config: DataConfig, tokenizer: Tokenizer) -> None:
    """`UserError` when the rows of this configuration cannot be made with this tokenizer."""
    if not config.row_specials:
        return
    if config.packing == "document":
        raise UserError("data.row_specials is true, but goes with data.packing 'wrap' or 'pad', not with 'document'")
    missing = [name for name in ("begin", "end") if getattr(tokenizer, f"{name}_id") is None]
    if missing:
        raise UserError(
            f"data.row_specials is true, but tokenizer {tokenizer.name!r} has no {' and no '.join(missing)} token"
        )
    if config.row_length < 3:
        raise UserError(f"data.row_length must be at least 3 with data.row_specials, found {config.row_length}")


def pack(
    documents: Iterable[EncodedDocument], config: DataConfig, tokenizer: Tokenizer, counts: PackingCounts
) -> Iterator[Rows]:
    """Batches of rows, in the documents' order; `counts` is brought up to date on the way.

    The rows depend on the stream of documents alone, not on how it was cut into batches.

    Raises:
        UserError: see `check_packing`; ready documents or prompts with a packing that is not for them; a ready document
            whose length is not data.row_length.
    """
    check_packing(config, tokenizer)
    iterator = iter(documents)
    first = next(iterator, None)
    if first is None:
        return iter(())
    _check_kind(first, config)
    stream = _with_first(first, iterator)
    if first.ready:
        return _ready(stream, config)
    if first.given is not None:
        return _prompts(stream, config, tokenizer, counts)
    if config.packing == "wrap":
        return _wrap(stream, config, tokenizer, counts)
    if config.packing == "document":
        return _batches(_rows_of_documents(stream, config, tokenizer, counts), config, tokenizer)
    return _pad(stream, config, tokenizer, counts)


def _check_kind(first: EncodedDocument, config: DataConfig) -> None:
    """Corpora have documents of one kind: the first one tells which."""
    if first.ready and config.packing == "document":  # nothing would mark where a document, and its latent, begins
        raise UserError(
            f"data.packing 'document' found, but the documents of corpus {config.corpus!r} come as rows of tokens: "
            "'wrap' or 'pad' are allowed"
        )
    if not first.ready and first.given is not None and (config.packing != "pad" or config.row_specials):
        raise UserError(
            f"data.packing {config.packing!r} and data.row_specials {str(config.row_specials).lower()} found, but the "
            f"documents of corpus {config.corpus!r} have prompts: only 'pad' and false are allowed"
        )


def _with_first(first: EncodedDocument, rest: Iterator[EncodedDocument]) -> Iterator[EncodedDocument]:
    yield first
    yield from rest


def _wrap(
    documents: Iterator[EncodedDocument], config: DataConfig, tokenizer: Tokenizer, counts: PackingCounts
) -> Iterator[Rows]:
    length = config.row_length - 2 if config.row_specials else config.row_length
    end = [] if tokenizer.end_id is None else [tokenizer.end_id]
    buffer: list[np.ndarray] = []
    held = 0
    for document in documents:
        buffer.append(document.tokens)
        held += len(document.tokens)
        if document.last and end:
            buffer.append(np.array(end, dtype=document.tokens.dtype))
            held += 1
        if held >= max(BATCH_TOKENS, length):
            rows, rest = _cut(np.concatenate(buffer), length)
            yield Rows(_surround(rows, config, tokenizer))
            buffer, held = [rest], len(rest)
    if buffer:
        rows, rest = _cut(np.concatenate(buffer), length)
        counts.dropped_tokens += len(rest)
        if len(rows):
            yield Rows(_surround(rows, config, tokenizer))


def _cut(tokens: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Whole rows [n, length] and the remainder."""
    whole = len(tokens) // length * length
    return tokens[:whole].reshape(-1, length), tokens[whole:]


def _surround(rows: np.ndarray, config: DataConfig, tokenizer: Tokenizer) -> np.ndarray:
    if not config.row_specials:
        return rows
    begin = np.full((len(rows), 1), tokenizer.begin_id, dtype=rows.dtype)
    end = np.full((len(rows), 1), tokenizer.end_id, dtype=rows.dtype)
    return np.concatenate([begin, rows, end], axis=1)


def _pad(
    documents: Iterator[EncodedDocument], config: DataConfig, tokenizer: Tokenizer, counts: PackingCounts
) -> Iterator[Rows]:
    length = config.row_length - 2 if config.row_specials else config.row_length
    lengths: list[int] = []
    texts: list[np.ndarray] = []
    pieces: list[np.ndarray] = []
    for document in documents:
        if sum(map(len, pieces)) <= length:  # further pieces would only be cut off
            pieces.append(document.tokens)
        if not document.last:
            continue
        tokens = np.concatenate(pieces)
        pieces = []
        counts.truncated_documents += len(tokens) > length
        tokens = _surround(tokens[None, :length], config, tokenizer)[0]
        texts.append(tokens)
        lengths.append(len(tokens))
        if len(texts) * config.row_length >= BATCH_TOKENS:
            yield _padded(texts, lengths, config, tokenizer)
            texts, lengths = [], []
    if texts:
        yield _padded(texts, lengths, config, tokenizer)


def _padded(texts: list[np.ndarray], lengths: list[int], config: DataConfig, tokenizer: Tokenizer) -> Rows:
    filled = np.arange(config.row_length) < np.array(lengths)[:, None]
    tokens = np.full(filled.shape, tokenizer.pad_id or 0, dtype=texts[0].dtype)
    tokens[filled] = np.concatenate(texts)
    return Rows(tokens, np.where(filled, np.uint8(Role.ORDINARY), np.uint8(Role.PADDING)))


def _rows_of_documents(
    documents: Iterator[EncodedDocument], config: DataConfig, tokenizer: Tokenizer, counts: PackingCounts
) -> Iterator[list[np.ndarray]]:
    """The documents of each row: best fit among a bounded number of open rows."""
    open_rows: list[tuple[int, int, list[np.ndarray]]] = []  # (room that is left, number of the row, documents)
    opened = 0
    for text in _pieces_that_fit(documents, config.row_length, tokenizer, counts):
        place = bisect_left(open_rows, (len(text), -1))
        if place < len(open_rows):
            room, number, row = open_rows.pop(place)
        else:
            room, number, row, opened = config.row_length, opened, [], opened + 1
        row.append(text)
        room -= len(text)
        if not room or len(row) == config.documents_per_row:
            yield row
            continue
        insort(open_rows, (room, number, row))
        if len(open_rows) > OPEN_ROWS:
            yield open_rows.pop(0)[2]  # the fullest
    yield from (row for _, _, row in sorted(open_rows, key=lambda open_row: open_row[1]))


def _pieces_that_fit(
    documents: Iterator[EncodedDocument], length: int, tokenizer: Tokenizer, counts: PackingCounts
) -> Iterator[np.ndarray]:
    """Ids [1 .. L] of a document with its end token, or of a part of one that is longer."""
    rest: list[np.ndarray] = []
    parts = 0
    for document in documents:
        text = np.concatenate([*rest, document.tokens])
        while len(text) > length or (len(text) == length and not document.last):
            yield text[:length]
            text, parts = text[length:], parts + 1
        rest = [text]
        if document.last:
            if tokenizer.end_id is not None:
                full = len(text) == length or (parts and not len(text))
                counts.dropped_tokens += bool(full)
                text = text if full else np.append(text, np.array([tokenizer.end_id], dtype=text.dtype))
            if len(text):
                yield text
            counts.split_documents += parts + (len(text) > 0) > 1
            rest, parts = [], 0


def _batches(rows: Iterator[list[np.ndarray]], config: DataConfig, tokenizer: Tokenizer) -> Iterator[Rows]:
    while batch := list(islice(rows, -(-BATCH_TOKENS // config.row_length))):
        filled = _padded(
            [np.concatenate(row) for row in batch], [sum(map(len, row)) for row in batch], config, tokenizer
        )
        assert filled.roles is not None
        for roles, row in zip(filled.roles, batch, strict=True):
            roles[np.cumsum([0, *map(len, row[:-1])])] = Role.FIRST
        yield filled


def fill_id(tokenizer: Tokenizer) -> int:
    """What stands behind a response: its end again and again (arXiv 2502.09992, section 2.3), or padding."""
    return next((i for i in (tokenizer.end_id, tokenizer.pad_id) if i is not None), 0)


def _prompts(
    documents: Iterator[EncodedDocument], config: DataConfig, tokenizer: Tokenizer, counts: PackingCounts
) -> Iterator[Rows]:
    """Prompt (given), response and what fills it up (ordinary), padding. A prompt that is too long loses its start."""
    length = config.row_length
    batch: list[tuple[np.ndarray, np.ndarray]] = []
    for document in documents:
        assert document.given is not None
        if (document.response_width or 0) > length:
            raise UserError(
                f"data.source: the longest label has {document.response_width} tokens, but data.row_length is {length}"
            )
        prompt, response = document.tokens[document.given], document.tokens[~document.given]
        ended = len(response) + (document.response_width is None and tokenizer.end_id is not None)
        width = min(length, max(ended, document.response_width or 1))
        counts.truncated_documents += len(prompt) + width > length or len(response) > width
        prompt = prompt[max(0, len(prompt) + width - length) :]
        end = len(prompt) + width if document.response_width else length
        tokens = np.full(length, fill_id(tokenizer), dtype=document.tokens.dtype)
        tokens[: len(prompt)] = prompt
        tokens[len(prompt) : len(prompt) + min(len(response), width)] = response[:width]
        roles = np.full(length, Role.PADDING, dtype=np.uint8)
        roles[: len(prompt)], roles[len(prompt) : end] = Role.GIVEN, Role.ORDINARY
        batch.append((tokens, roles))
        if len(batch) * length >= BATCH_TOKENS:
            yield _rows_of(batch)
            batch = []
    if batch:
        yield _rows_of(batch)


def _rows_of(batch: list[tuple[np.ndarray, np.ndarray]]) -> Rows:
    return Rows(np.stack([tokens for tokens, _ in batch]), np.stack([roles for _, roles in batch]))


def _ready(documents: Iterator[EncodedDocument], config: DataConfig) -> Iterator[Rows]:
    batch: list[EncodedDocument] = []
    for document in documents:
        if len(document.tokens) != config.row_length:
            raise UserError(
                f"data.row_length is {config.row_length}, but corpus {config.corpus!r} has rows of "
                f"{len(document.tokens)} tokens; set data.row_length={len(document.tokens)}"
            )
        batch.append(document)
        if len(batch) * config.row_length >= BATCH_TOKENS:
            yield _stacked(batch)
            batch = []
    if batch:
        yield _stacked(batch)


def _stacked(batch: list[EncodedDocument]) -> Rows:
    tokens = np.stack([document.tokens for document in batch])
    if batch[0].given is None:
        return Rows(tokens)
    given = np.stack([document.given for document in batch if document.given is not None])
    return Rows(tokens, np.where(given, np.uint8(Role.GIVEN), np.uint8(Role.ORDINARY)))
