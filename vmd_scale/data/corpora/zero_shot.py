"""The corpora that models trained on something else are asked about: PTB, WikiText, LAMBADA, AG News, arXiv, PubMed.

They come with splits of their own, so that data.source names a file for each, ``{"validation": "ptb.valid.txt"}``, or
the Hugging Face dataset; a lone file would have to be split by guess, and is refused.
"""

from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

from vmd_scale.config import DataConfig
from vmd_scale.data.corpora.files import content_suffix, csv_records, files_of, lines, records
from vmd_scale.data.corpora.registry import Document, DocumentSource, corpus
from vmd_scale.data.corpora.sources import source_of, split_records, text_splits
from vmd_scale.errors import UserError

TABLES, PLAIN = (".jsonl", ".json", ".parquet"), (".tokens", ".raw")

Reader = Callable[[Path], Iterator[str]]


def _sentences(path: Path) -> Iterator[str]:
    return map(str.strip, lines(path))


def _wikitext_lines(path: Path) -> Iterator[str]:
    """A line keeps its end, as in the Hugging Face dataset that figures were published with."""
    return (line + "\n" for line in lines(path))


def _news(path: Path) -> Iterator[str]:
    """``"class","title","description"`` a line; the text is title and description."""
    for number, row in csv_records(path):
        if len(row) != 3:
            raise UserError(f"{path}, record {number}: {len(row)} fields, expected class, title, description")
        yield f"{row[1]} {row[2]}"


def _documents(config: DataConfig, split: str, column: str, plain: Reader, suffix: str = ".txt") -> Iterator[Document]:
    """Records of .jsonl or .parquet and of the hub by their `column`; other files by `plain`."""
    source = source_of(config, split)
    if source.on_hub:
        return map(Document, split_records(config, split, None, column))
    if not source.is_split:
        raise UserError(
            f"data.source {source.path!r}: corpus {config.corpus!r} has splits of its own; say which one this is, such "
            f'as {{"validation": "{source.path}"}}'
        )
    files, column = files_of(Path(source.path), (suffix, *PLAIN)), config.text_column or column
    texts = (records(f, column) if content_suffix(f) in TABLES else plain(f) for f in files)
    return map(Document, chain.from_iterable(texts))


@corpus("ptb", normalizer="ptb", licence="LDC, free for research", splits=text_splits)
def ptb(config: DataConfig, split: str) -> Iterator[Document]:
    """The Penn Treebank as language models use it; a sentence is a document."""
    return _documents(config, split, "sentence", _sentences)


@corpus("wikitext", normalizer="wikitext", licence="Wikipedia, CC BY-SA and GFDL", splits=text_splits)
def wikitext(config: DataConfig, split: str) -> Iterator[Document]:
    """WikiText-2 or -103, raw (published) or as tokens; a line that is not blank is a document."""
    return (document for document in _documents(config, split, "text", _wikitext_lines) if document.text.strip())


@corpus("lambada", normalizer="lambada", licence="MIT (OpenAI's copy); texts of their authors", splits=text_splits)
def lambada(config: DataConfig, split: str) -> Iterator[Document]:
    """LAMBADA in OpenAI's version, ``{"text": ...}`` a line."""
    return _documents(config, split, "text", _sentences)


@corpus("ag_news", licence="AG's corpus of news articles, non-commercial", splits=text_splits)
def ag_news(config: DataConfig, split: str) -> Iterator[Document]:
    """AG News; title and description are the document."""
    return _documents(config, split, "text", _news, ".csv")


def _scientific(name: str) -> DocumentSource:
    @corpus(name, normalizer="scientific", licence="articles of their authors, for research", splits=text_splits)
    def articles(config: DataConfig, split: str) -> Iterator[Document]:
        """Bodies of articles, the "article" of each record of the scientific papers dataset."""
        return _documents(config, split, "article", _sentences)

    return articles


arxiv, pubmed = _scientific("arxiv"), _scientific("pubmed")
