"""The corpora of the zero-shot protocol: their own files, their splits, and the columns of records."""

import json
import os
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from vmd_scale.config import DataConfig
from vmd_scale.data.corpora import available_splits, documents, raw_documents
from vmd_scale.errors import UserError

SHARED = Path(os.environ.get("VMD_SHARED_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"sample corpora not at {SHARED}")


def data(corpus: str, source: object, **more: object) -> DataConfig:
    return DataConfig(corpus=corpus, source=source, tokenizer="gpt2", row_length=64, shards="none", **more)


def texts(config: DataConfig, split: str) -> list[str]:
    return [document.text for document in documents(config, split)]


def test_a_sentence_a_line(tmp_path: Path) -> None:
    path = tmp_path / "ptb.valid.txt"
    path.write_text(" no it was n't black monday \n but N years \n")
    config = data("ptb", {"validation": str(path)})
    assert available_splits(config) == ("validation",)
    assert texts(config, "validation") == ["no it wasn't black monday", "but 1 years"]


def test_wikitext_keeps_the_ends_of_its_lines(tmp_path: Path) -> None:
    path = tmp_path / "wiki.valid.tokens"
    path.write_text(" \n = Boats = \n \n A boat , or ship . \n")
    wanted = [" = Boats =\n", " A boat, or ship.\n"]
    assert texts(data("wikitext", {"validation": str(path)}), "validation") == wanted
    assert texts(data("wikitext", {"validation": str(tmp_path)}), "validation") == wanted


def test_news_are_title_and_description(tmp_path: Path) -> None:
    path = tmp_path / "test.csv"
    path.write_text('"3","A ""big"" title","First, and\nsecond line"\n"1","T","D"\n')
    config = data("ag_news", {"test": str(path)})
    assert texts(config, "test") == ['A "big" title First, and\nsecond line', "T D"]
    path.write_text('"3","only a title"\n')
    with pytest.raises(UserError, match=r"test\.csv, record 1: 2 fields, expected class, title, description"):
        texts(config, "test")


def test_a_long_field_is_read_and_one_without_end_is_named(tmp_path: Path) -> None:
    path = tmp_path / "news.csv"
    path.write_text('"1","a","b"\n"1","' + "a" * 200_000 + '","b"\n')
    assert texts(data("ag_news", {"test": str(path)}), "test") == ["a b", "a" * 200_000 + " b"]
    path.write_text('"1","a","b"\n"1","never closed\n"1","c","d\n')
    with pytest.raises(UserError, match=r"news\.csv, after record 1: "):
        texts(data("ag_news", {"test": str(path)}), "test")


def test_blank_records_of_wikitext_are_no_documents_wherever_they_come_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    records = ["", " = A = \n", "", " text \n"]
    pyarrow.parquet.write_table(pyarrow.table({"text": records}), tmp_path / "raw.parquet")
    (tmp_path / "raw.txt").write_text("\n = A = \n\n text \n")
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *name: ["train", "validation", "test"])
    monkeypatch.setattr(datasets, "load_dataset", lambda *name, split, streaming: ({"text": r} for r in records))
    for source in ({"validation": str(tmp_path / f"raw{kind}")} for kind in (".parquet", ".txt")):
        assert texts(data("wikitext", source, normalizer="none"), "validation") == records[1::2]
    assert texts(data("wikitext", "hf:wikitext:raw", normalizer="none"), "validation") == records[1::2]


@pytest.mark.parametrize(("corpus", "column"), [("ptb", "sentence"), ("arxiv", "article"), ("pubmed", "article")])
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_records_have_their_text_where_the_published_dataset_has_it(
    corpus: str, column: str, suffix: str, tmp_path: Path
) -> None:
    def write(name: str, column: str) -> dict[str, str]:
        path = tmp_path / f"{name}{suffix}"
        if suffix == ".parquet":
            pyarrow.parquet.write_table(pyarrow.table({column: ["one , two"], "id": [1]}), path)
        else:
            path.write_text(json.dumps({column: "one , two", "id": 1}) + "\n")
        return {"validation": str(path)}

    assert [d.text for d in raw_documents(data(corpus, write("a", column)), "validation")] == ["one , two"]
    other = write("b", "body")
    assert texts(data(corpus, other, text_column="body", normalizer="none"), "validation") == ["one , two"]
    assert texts(data("text", other, text_column="body"), "validation") == ["one , two"]
    with pytest.raises(UserError, match=rf'"{column}".*data\.text_column'):
        texts(data(corpus, other), "validation")


def test_a_lone_file_is_not_split_by_guess(tmp_path: Path) -> None:
    path = tmp_path / "ptb.txt"
    path.write_text("a sentence\n")
    with pytest.raises(UserError, match="say which one this is, such as"):
        texts(data("ptb", str(path)), "validation")


def test_hub_names_of_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *name: ["train", "validation", "test"])
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *name, split, streaming: iter([{"article": f"{name} {split}"}])
    )
    config = data("arxiv", "hf:scientific_papers:arxiv", normalizer="none")
    assert texts(config, "validation") == ["('scientific_papers', 'arxiv') validation"]


@needs_shared
@pytest.mark.parametrize(
    ("corpus", "split", "file", "count"),
    [
        ("ptb", "validation", "ptb.valid.txt", 3370),
        ("wikitext", "validation", "wikitext2.valid.tokens.xz", 2461),
        ("lambada", "test", "lambada_test.jsonl.xz", 5153),
        ("ag_news", "test", "ag_news_test.csv.xz", 7600),
    ],
)
def test_the_real_files(corpus: str, split: str, file: str, count: int) -> None:
    found = texts(data(corpus, {split: str(SHARED / "zero_shot" / file)}), split)
    assert len(found) == count
    if corpus in ("ptb", "wikitext"):
        assert not any(mark in text for text in found for mark in (" n't", " @-@ ", " , "))
