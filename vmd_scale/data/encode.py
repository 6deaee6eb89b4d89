"""Documents to token ids, in as many processes as wanted; the order of the documents is kept."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from vmd_scale.config import DataConfig
from vmd_scale.data.corpora import Document, normalizer_name, raw_documents
from vmd_scale.data.manifest import token_dtype
from vmd_scale.data.normalize import NORMALIZERS
from vmd_scale.data.packing import EncodedDocument
from vmd_scale.errors import RunFailed, UserError
from vmd_scale.processes import WorkerDied, map_in_processes
from vmd_scale.tokenization import Tokenizer

CHUNK_DOCUMENTS = 512
CHUNK_CHARACTERS = 1 << 20
CHUNKS_AHEAD = 4  # for each worker: what may be read but not yet written


@dataclass
class TextCounts:
    """What went in, empty documents apart; characters and bytes of the normalized text.

    `lengths` counts the documents of 2^i .. 2^(i+1) - 1 tokens, for i = 0, 1, ... `read` is how many documents, or
    pieces of them, the corpus has handed out, empty ones too, and `read_characters` what they were made of: where the
    next one is, and whether the corpus is still the same up to there.
    """

    documents: int = 0
    skipped_documents: int = 0
    characters: int = 0
    utf8_bytes: int = 0
    lengths: list[int] = field(default_factory=list)
    begun_length: int = 0  # of a document whose next piece follows
    read: int = 0
    read_characters: int = 0

    def add_lengths(self, documents: Iterable[EncodedDocument]) -> None:
        for document in documents:
            self.begun_length += len(document.tokens)
            if document.last:
                power = max(0, self.begun_length.bit_length() - 1)
                self.lengths.extend([0] * (power + 1 - len(self.lengths)))
                self.lengths[power] += 1
                self.begun_length = 0

    def add(self, other: "TextCounts") -> None:
        for name in ("documents", "skipped_documents", "characters", "utf8_bytes", "read", "read_characters"):
            setattr(self, name, getattr(self, name) + getattr(other, name))


class SourceChanged(Exception):
    """The corpus does not begin with what was read of it before."""


class DocumentEncoder:
    """Normalizes and tokenizes; the same object works here and, pickled, in another process."""

    def __init__(self, tokenizer: Tokenizer, normalizer: str) -> None:
        self.tokenizer = tokenizer
        self.normalizer = normalizer
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._widths: dict[tuple[str, ...], int] = {}  # tokens of the longest of some choices

    def encode(self, chunk: list[Document]) -> tuple[list[EncodedDocument], TextCounts]:
        """Ids of the documents that are not empty, in order."""
        normalize = NORMALIZERS[self.normalizer]
        counts = TextCounts()
        encoded = []
        for document in chunk:
            counts.documents += document.last
            counts.read += 1
            counts.read_characters += _size(document)
            if document.tokens is not None:
                tokens = document.tokens.astype(self._dtype)
                encoded.append(EncodedDocument(tokens, ready=True, given=document.given))
                continue
            if document.prompt is not None:
                encoded.append(self._with_prompt(document, normalize))
                counts.characters += len(document.prompt) + len(document.text)
                counts.utf8_bytes += len((document.prompt + document.text).encode())
                continue
            text = normalize(document.text)
            tokens = self._encode_text(text)
            if document.last and (not len(tokens) or not text.strip()):
                counts.skipped_documents += 1
                counts.documents -= 1
                continue
            counts.characters += len(text)
            counts.utf8_bytes += len(text) if text.isascii() else len(text.encode())
            encoded.append(EncodedDocument(tokens, last=document.last))
        return encoded, counts

    def _with_prompt(self, document: Document, normalize: Callable[[str], str]) -> EncodedDocument:
        prompt, response = (self._encode_text(normalize(text)) for text in (document.prompt or "", document.text))
        if document.choices and document.choices not in self._widths:
            self._widths[document.choices] = max(len(self._encode_text(normalize(c))) for c in document.choices)
        given = np.arange(len(prompt) + len(response)) < len(prompt)
        width = self._widths[document.choices] if document.choices else None
        return EncodedDocument(np.concatenate([prompt, response]), given=given, response_width=width)

    def _encode_text(self, text: str) -> np.ndarray:
        try:
            return self.tokenizer.encode(text).astype(self._dtype)
        except UserError as error:
            raise UserError(f"{error} (in the text that begins {text[:40]!r})") from None


def encoded_documents(
    config: DataConfig, split: str, tokenizer: Tokenizer, counts: TextCounts
) -> Iterator[list[EncodedDocument]]:
    """The encoded documents of a split, some at a time, in the corpus' order, from where `counts` has come to.

    `counts` is brought up to date on the way. data.workers processes share the work. They only ever hold what they work
    on, so that memory stays bounded.

    Raises:
        RunFailed: a worker process was killed.
        SourceChanged: what `counts` has read is not what is there.
    """
    encoder = DocumentEncoder(tokenizer, normalizer_name(config))
    documents = raw_documents(config, split)
    _pass_over(documents, counts)
    chunks = _chunks(documents)
    results = map(encoder.encode, chunks) if config.workers == 1 else _in_processes(encoder, chunks, config.workers)
    for encoded, more in results:
        counts.add(more)
        counts.add_lengths(encoded)
        yield encoded


def _pass_over(documents: Iterator[Document], counts: TextCounts) -> None:
    read = characters = 0
    for document in islice(documents, counts.read):
        read, characters = read + 1, characters + _size(document)
    if (read, characters) != (counts.read, counts.read_characters):
        raise SourceChanged


def _size(document: Document) -> int:
    return len(document.text) + len(document.prompt or "") + (0 if document.tokens is None else len(document.tokens))


def _chunks(documents: Iterator[Document]) -> Iterator[list[Document]]:
    """Lists of whole work: many short documents, or few long ones."""
    while chunk := list(islice(documents, 1)):
        characters = len(chunk[0].text)
        while characters < CHUNK_CHARACTERS and len(chunk) < CHUNK_DOCUMENTS:
            document = next(documents, None)
            if document is None:
                break
            chunk.append(document)
            characters += len(document.text)
        yield chunk


def _in_processes(
    encoder: DocumentEncoder, chunks: Iterator[list[Document]], workers: int
) -> Iterator[tuple[list[EncodedDocument], TextCounts]]:
    try:
        yield from map_in_processes(encoder.encode, chunks, workers, CHUNKS_AHEAD)
    except WorkerDied:
        raise RunFailed(
            f"a worker process of the preparation (data.workers={workers}) was killed, perhaps for want of memory; "
            "call again to go on, with fewer workers if it was memory"
        ) from None


def unigram_entropy(frequencies: np.ndarray) -> float:
    """Entropy of counts [V] as a distribution, in nats."""
    p = frequencies[frequencies > 0] / max(1, frequencies.sum())
    return float(-(p * np.log(p)).sum() + 0.0)
