"""Documents of any length become rows of exactly L tokens.

wrap      documents one after the other, each closed by the tokenizer's end token if it has one; cut every L
pad       one document a row, cut off at L or padded to it; of a prompt with its response, the prompt is given
document  several whole documents a row, each closed likewise; one that is longer than L is cut into several, and one
          that then ends with its row is not closed: the end token would be a document of its own
ready     documents that come as tokens (puzzles) are rows already; with wrap or pad

What a packer holds between two documents can be written down and taken up again: `held` and `hold`.
"""

from abc import ABC, abstractmethod
from bisect import bisect_left, insort
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from vmd_scale.config import DataConfig
from vmd_scale.data.manifest import token_dtype
from vmd_scale.data.roles import Role
from vmd_scale.errors import UserError
from vmd_scale.tokenization import Tokenizer

OPEN_ROWS = 64  # among which packing `document` looks for the one that a document fits best

Held = Mapping[str, np.ndarray]


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
class PackedRows:
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


def check_prompts(config: DataConfig) -> None:
    """`UserError` when documents of prompt and response cannot be packed with this configuration."""
    if config.packing != "pad" or config.row_specials:
        raise UserError(
            f"data.packing {config.packing!r} and data.row_specials {str(config.row_specials).lower()} found, but "
            f"the documents of corpus {config.corpus!r} have prompts: only 'pad' and false are allowed"
        )


class Packer(ABC):
    """Documents are added, rows are taken: those that are full at any time, the others when there are no more.

    The rows depend on the documents and their order alone, not on when they are taken. `counts` is kept up to date.
    """

    def __init__(self, config: DataConfig, tokenizer: Tokenizer, counts: PackingCounts) -> None:
        self.config, self.tokenizer, self.counts = config, tokenizer, counts
        self.room = config.row_length - 2 if config.row_specials else config.row_length  # without specials of the row
        self.nothing = np.empty(0, dtype=token_dtype(tokenizer.vocab_size))

    @abstractmethod
    def add(self, document: EncodedDocument) -> None:
        """Raises `UserError` for a document that fits into no row of this configuration."""

    @abstractmethod
    def take(self, last: bool = False) -> PackedRows | None:
        """The rows that are full by now, in order; with `last` also those that no document will fill."""

    def held(self) -> Held:
        """What was added and not yet taken, when `take` was just called."""
        return {}

    def hold(self, held: Held) -> None:
        """Continue where another packer `held` this."""
        assert not held

    def surrounded(self, rows: np.ndarray) -> np.ndarray:
        """Rows [n, room] between the specials that the configuration wants."""
        if not self.config.row_specials:
            return rows
        begin = np.full((len(rows), 1), self.tokenizer.begin_id, dtype=rows.dtype)
        end = np.full((len(rows), 1), self.tokenizer.end_id, dtype=rows.dtype)
        return np.concatenate([begin, rows, end], axis=1)

    def padded(self, texts: list[np.ndarray]) -> PackedRows:
        """A row for each text."""
        filled = np.arange(self.config.row_length) < np.array([len(text) for text in texts])[:, None]
        tokens = np.full(filled.shape, self.tokenizer.pad_id or 0, dtype=texts[0].dtype)
        tokens[filled] = np.concatenate(texts)
        return PackedRows(tokens, np.where(filled, np.uint8(Role.ORDINARY), np.uint8(Role.PADDING)))


class WrapPacker(Packer):
    def __init__(self, config: DataConfig, tokenizer: Tokenizer, counts: PackingCounts) -> None:
        super().__init__(config, tokenizer, counts)
        self._stream = [self.nothing]
        self._end = [] if tokenizer.end_id is None else [tokenizer.end_id]

    def add(self, document: EncodedDocument) -> None:
        self._stream.append(document.tokens)
        if document.last and self._end:
            self._stream.append(np.array(self._end, dtype=document.tokens.dtype))

    def take(self, last: bool = False) -> PackedRows | None:
        tokens = np.concatenate(self._stream)
        whole = len(tokens) // self.room * self.room
        self._stream = [tokens[whole:]]
        if last:
            self.counts.dropped_tokens += len(tokens) - whole
        return PackedRows(self.surrounded(tokens[:whole].reshape(-1, self.room))) if whole else None

    def held(self) -> Held:
        return {"stream": np.concatenate(self._stream)}

    def hold(self, held: Held) -> None:
        self._stream = [held["stream"]]


class PadPacker(Packer):
    def __init__(self, config: DataConfig, tokenizer: Tokenizer, counts: PackingCounts) -> None:
        super().__init__(config, tokenizer, counts)
        self._begun = self.nothing  # of a document whose next piece follows
        self._texts: list[np.ndarray] = []

    def add(self, document: EncodedDocument) -> None:
        if len(self._begun) <= self.room:  # further pieces would only be cut off
            self._begun = np.concatenate([self._begun, document.tokens])
        if document.last:
            self.counts.truncated_documents += len(self._begun) > self.room
            self._texts.append(self.surrounded(self._begun[None, : self.room])[0])
            self._begun = self.nothing

    def take(self, last: bool = False) -> PackedRows | None:
        texts, self._texts = self._texts, []
        return self.padded(texts) if texts else None

    def held(self) -> Held:
        return {"begun": self._begun}

    def hold(self, held: Held) -> None:
        self._begun = held["begun"]


class DocumentPacker(Packer):
    """Best fit among a bounded number of open rows."""

    def __init__(self, config: DataConfig, tokenizer: Tokenizer, counts: PackingCounts) -> None:
        super().__init__(config, tokenizer, counts)
        self._open: list[tuple[int, int, list[np.ndarray]]] = []  # (room that is left, number, documents), sorted
        self._opened = 0
        self._full: list[list[np.ndarray]] = []
        self._begun = self.nothing  # of a document whose next piece follows
        self._parts = 0  # that it has been cut into already

    def add(self, document: EncodedDocument) -> None:
        length, end = self.config.row_length, self.tokenizer.end_id
        text = np.concatenate([self._begun, document.tokens])
        while len(text) > length or (len(text) == length and not document.last):
            self._place(text[:length])
            text, self._parts = text[length:], self._parts + 1
        self._begun = text
        if document.last:
            if end is not None:
                full = len(text) == length or (self._parts and not len(text))
                self.counts.dropped_tokens += bool(full)
                text = text if full else np.append(text, np.array([end], dtype=text.dtype))
            if len(text):
                self._place(text)
            self.counts.split_documents += self._parts + (len(text) > 0) > 1
            self._begun, self._parts = self.nothing, 0

    def _place(self, text: np.ndarray) -> None:
        at = bisect_left(self._open, (len(text), -1))
        if at < len(self._open):
            room, number, row = self._open.pop(at)
        else:
            room, number, row = self.config.row_length, self._opened, []
            self._opened += 1
        row.append(text)
        room -= len(text)
        if not room or len(row) == self.config.documents_per_row:
            self._full.append(row)
            return
        insort(self._open, (room, number, row))
        if len(self._open) > OPEN_ROWS:
            self._full.append(self._open.pop(0)[2])  # the fullest

    def take(self, last: bool = False) -> PackedRows | None:
        rows, self._full = self._full, []
        if last:
            rows += [row for _, _, row in sorted(self._open, key=lambda open_row: open_row[1])]
            self._open = []
        if not rows:
            return None
        filled = self.padded([np.concatenate(row) for row in rows])
        assert filled.roles is not None
        for roles, row in zip(filled.roles, rows, strict=True):
            roles[np.cumsum([0, *map(len, row[:-1])])] = Role.FIRST
        return filled

    def held(self) -> Held:
        placed = [(number, text) for _, number, row in self._open for text in row]
        return {
            "begun": self._begun,
            "counters": np.array([self._parts, self._opened]),
            "row_of_document": np.array([number for number, _ in placed], dtype=np.int64),
            "ends": np.cumsum([len(text) for _, text in placed], dtype=np.int64),
            "tokens": np.concatenate([self.nothing, *(text for _, text in placed)]),
        }

    def hold(self, held: Held) -> None:
        self._begun = held["begun"]
        self._parts, self._opened = held["counters"].tolist()
        rows: dict[int, list[np.ndarray]] = {}
        texts = np.split(held["tokens"], held["ends"][:-1])
        for number, text in zip(held["row_of_document"].tolist(), texts, strict=False):  # no document is one text
            rows.setdefault(number, []).append(text)
        self._open = sorted((self.config.row_length - sum(map(len, row)), n, row) for n, row in rows.items())


def fill_id(tokenizer: Tokenizer) -> int:
    """What fills a row after its response: the end token (arXiv 2502.09992, section 2.3), or padding."""
    return next((i for i in (tokenizer.end_id, tokenizer.pad_id) if i is not None), 0)


class PromptPacker(Packer):
    """Prompt (given), response and what fills it up (ordinary), padding.

    A prompt that is too long loses its start, of which the response is farthest; a text with a label loses its end.
    """

    def __init__(self, config: DataConfig, tokenizer: Tokenizer, counts: PackingCounts) -> None:
        super().__init__(config, tokenizer, counts)
        self._rows: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, document: EncodedDocument) -> None:
        length = self.config.row_length
        assert document.given is not None
        if (document.response_width or 0) > length:
            raise UserError(
                f"data.source: the longest label has {document.response_width} tokens, but data.row_length is {length}"
            )
        prompt, response = document.tokens[document.given], document.tokens[~document.given]
        ended = len(response) + (document.response_width is None and self.tokenizer.end_id is not None)
        width = min(length, max(ended, document.response_width or 1))
        self.counts.truncated_documents += len(prompt) + width > length or len(response) > width
        room = length - width
        prompt = prompt[:room] if document.response_width else prompt[max(0, len(prompt) - room) :]
        end = len(prompt) + width if document.response_width else length
        tokens = np.full(length, fill_id(self.tokenizer), dtype=document.tokens.dtype)
        tokens[: len(prompt)] = prompt
        tokens[len(prompt) : len(prompt) + min(len(response), width)] = response[:width]
        roles = np.full(length, Role.PADDING, dtype=np.uint8)
        roles[: len(prompt)], roles[len(prompt) : end] = Role.GIVEN, Role.ORDINARY
        self._rows.append((tokens, roles))

    def take(self, last: bool = False) -> PackedRows | None:
        rows, self._rows = self._rows, []
        return (
            PackedRows(np.stack([tokens for tokens, _ in rows]), np.stack([roles for _, roles in rows]))
            if rows
            else None
        )


class ReadyPacker(Packer):
    def __init__(self, config: DataConfig, tokenizer: Tokenizer, counts: PackingCounts) -> None:
        super().__init__(config, tokenizer, counts)
        self._documents: list[EncodedDocument] = []

    def add(self, document: EncodedDocument) -> None:
        if len(document.tokens) != self.config.row_length:
            raise UserError(
                f"data.row_length is {self.config.row_length}, but corpus {self.config.corpus!r} has rows of "
                f"{len(document.tokens)} tokens; set data.row_length={len(document.tokens)}"
            )
        self._documents.append(document)

    def take(self, last: bool = False) -> PackedRows | None:
        documents, self._documents = self._documents, []
        if not documents:
            return None
        tokens = np.stack([document.tokens for document in documents])
        if documents[0].given is None:
            return PackedRows(tokens)
        given = np.stack([document.given for document in documents if document.given is not None])
        return PackedRows(tokens, np.where(given, np.uint8(Role.GIVEN), np.uint8(Role.ORDINARY)))


PACKERS: Mapping[str, Callable[[DataConfig, Tokenizer, PackingCounts], Packer]] = {
    "wrap": WrapPacker,
    "pad": PadPacker,
    "document": DocumentPacker,
    "prompts": PromptPacker,
    "ready": ReadyPacker,
}


def kind_of_packer(first: EncodedDocument, config: DataConfig) -> str:
    """One of PACKERS. Corpora have documents of one kind: the first one tells which.

    Raises:
        UserError: ready documents or prompts with a packing that is not for them.
    """
    if first.ready:
        if config.packing == "document":  # nothing would mark where a document, and its latent, begins
            raise UserError(
                f"data.packing 'document' found, but the documents of corpus {config.corpus!r} come as rows of tokens: "
                "'wrap' or 'pad' are allowed"
            )
        return "ready"
    if first.given is not None:
        check_prompts(config)
        return "prompts"
    return config.packing
