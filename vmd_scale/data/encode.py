"""Documents to token ids, in as many processes as wanted; the order of the documents is kept."""

from collections.abc import Callable, Iterator
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
    """What went in, empty documents apart; characters and bytes of the normalised text.

    `lengths` counts the documents of 2^i .. 2^(i+1) - 1 tokens, for i = 0, 1, ...
    """

    documents: int = 0
    skipped_documents: int = 0
    characters: int = 0
    utf8_bytes: int = 0
    lengths: list[int] = field(default_factory=list)

    def add_length(self, tokens: int) -> None:
        at = max(0, tokens.bit_length() - 1)
        self.lengths.extend([0] * (at + 1 - len(self.lengths)))
        self.lengths[at] += 1

    def add(self, other: "TextCounts") -> None:
        self.documents += other.documents
        self.skipped_documents += other.skipped_documents
        self.characters += other.characters
        self.utf8_bytes += other.utf8_bytes


class Encoder:
    """Normalises and tokenizes; the same object works here and, pickled, in another process."""

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
) -> Iterator[EncodedDocument]:
    """The encoded documents of a split, in the corpus' order; `counts` is brought up to date on the way.

    data.workers processes share the work. They only ever hold what they work on, so that memory stays bounded.

    Raises:
        RunFailed: a worker process was killed.
    """
    encoder = Encoder(tokenizer, normalizer_name(config))
    chunks = _chunks(raw_documents(config, split))
    results = map(encoder.encode, chunks) if config.workers == 1 else _in_processes(encoder, chunks, config.workers)
    length = 0
    for encoded, more in results:
        counts.add(more)
        for document in encoded:
            length += len(document.tokens)
            if document.last:
                counts.add_length(length)
                length = 0
            yield document


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
    encoder: Encoder, chunks: Iterator[list[Document]], workers: int
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
