"""Corpora of text records: any text of the user's, and OpenWebText."""

from collections.abc import Iterator

from vmd_scale.config import DataConfig
from vmd_scale.data.corpora.registry import Document, corpus, mapped_splits
from vmd_scale.data.corpora.sources import split_records, text_splits

OPENWEBTEXT_VALIDATION = 100_000


@corpus("text", splits=text_splits)
def text(config: DataConfig, split: str) -> Iterator[Document]:
    """.txt (a document a line), .jsonl with "text", .parquet, a folder of these, or ``hf:NAME``."""
    return map(Document, split_records(config, split, config.validation_documents))


@corpus(
    "openwebtext",
    licence="web pages, copyright of their authors; collection CC0",
    splits=lambda config: mapped_splits(config, ("train", "validation")),
)
def openwebtext(config: DataConfig, split: str) -> Iterator[Document]:
    """The published split: the last 100,000 documents are validation; there is no test split."""
    return map(Document, split_records(config, split, config.validation_documents or OPENWEBTEXT_VALIDATION))
