import csv
import gzip
import json
import logging
import lzma
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmd_scale.config import DataConfig
from vmd_scale.data.corpora import CORPORA, SPLITS, Document, available_splits, corpus, documents
from vmd_scale.data.normalize import detokenize_lm1b, to_text8_alphabet
from vmd_scale.errors import UserError

SHARED = Path(os.environ.get("VMD_SHARED_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"sample corpora not at {SHARED}")
PUZZLE = "004300209005009001070060043006002087190007400050083000600000105003508690042910300"
SOLUTION = "864371259325849761971265843436192587198657432257483916689734125713528694542916378"


def data(corpus: str, source: object = None, **more: object) -> DataConfig:
    values = {"tokenizer": "text8", "row_length": 16, "shards": "unused", **more}
    return DataConfig.model_validate({"corpus": corpus, "source": source, **values})


def texts(config: DataConfig, split: str) -> list[str]:
    return [document.text for document in documents(config, split)]


@pytest.fixture(scope="session")
def python_docs() -> dict[str, list[str]]:
    return {split: texts(data("python_docs"), split) for split in SPLITS}


# ---------------------------------------------------------------- normalisers


@given(st.text())
def test_text8_alphabet(text: str) -> None:
    normal = to_text8_alphabet(text)
    assert set(normal) <= set(" abcdefghijklmnopqrstuvwxyz")
    assert "  " not in normal
    assert not normal.endswith(" ")
    assert to_text8_alphabet(normal) == normal


def test_text8_alphabet_spells_digits() -> None:
    assert to_text8_alphabet("Don't pay 42!\n") == " don t pay four two"


@pytest.mark.parametrize(
    ("tokenised", "natural"),
    [
        ("But now , it 's over .", "But now, it's over."),
        ("I won 't and don 't .", "I won't and don't."),
        ("They did n't ; he 'll go !", "They didn't; he'll go!"),
        ('He said : " We pay $ 5 . "', 'He said: "We pay $5."'),
        ('two , " he said .', 'two," he said.'),
        ("( AP ) - A man [ 47 ] said :", "(AP) - A man [47] said:"),
        ("the workers ' rights", "the workers' rights"),
        ("a so called ' Kitchen ' thing", "a so called 'Kitchen' thing"),
        ("long @-@ term 10 % and / or", "long-term 10% and/or"),
    ],
)
def test_lm1b_detokeniser(tokenised: str, natural: str) -> None:
    assert detokenize_lm1b(tokenised) == natural


@given(st.text())
def test_lm1b_detokeniser_only_moves_spaces(text: str) -> None:
    tokens = [token for token in text.split() if "@" not in token]
    assert detokenize_lm1b(" ".join(tokens)).replace(" ", "") == "".join(tokens)


# ---------------------------------------------------------------- corpora


def test_python_docs(python_docs: dict[str, list[str]]) -> None:
    everything = [text for split in SPLITS for text in python_docs[split]]
    assert len(set(everything)) == len(everything)
    assert all(len(text) >= 20 and text.startswith(" ") for text in everything)
    assert set("".join(everything)) <= set(" abcdefghijklmnopqrstuvwxyz")
    assert len(everything) > 1000
    assert len(python_docs["train"]) == pytest.approx(0.9 * len(everything), rel=0.01)


def test_python_docs_has_no_source() -> None:
    with pytest.raises(UserError, match=r"data\.source"):
        texts(data("python_docs", "somewhere"), "train")


@pytest.mark.parametrize("suffix", ["", ".xz", ".gz", ".zip"])
def test_text8_is_split_by_characters(suffix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = " abc def ghij" * 100
    path = tmp_path / f"text8{suffix}"
    content = (text + "\n").encode()
    if suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("text8", content)
    else:
        path.write_bytes({"": bytes, ".xz": lzma.compress, ".gz": gzip.compress}[suffix](content))
    with caplog.at_level(logging.WARNING):
        parts = ["".join(texts(data("text8", str(path)), split)) for split in SPLITS]
    assert "".join(parts) == text
    assert [len(part) for part in parts] == [1170, 65, 65]
    assert "do not report" in caplog.text
    config = data("text8", str(path))
    assert CORPORA["text8"].remark(config) == "the text is not text8's"


@needs_shared
def test_text8_pieces_are_one_document() -> None:
    pieces = list(documents(data("text8", str(SHARED / "text8" / "text8.prefix.xz")), "train"))
    assert sum(len(piece.text) for piece in pieces) == 12_549_840 * 90 // 100
    assert [piece.last for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert all(piece.text.startswith(" ") for piece in pieces)


@needs_shared
def test_text8_is_known_by_its_beginning(tmp_path: Path) -> None:
    real = str(SHARED / "text8" / "text8.prefix.xz")
    for source in (real, {"train": real, "test": "elsewhere"}, {"test": "elsewhere"}):
        config = data("text8", source)
        assert CORPORA["text8"].remark(config) is None
    other = data("text8", str(SHARED / "wiki" / "wiki2019_text8style.txt.xz"))
    assert CORPORA["text8"].remark(other) == "the text is not text8's"


def test_half_a_surrogate_pair_is_named(tmp_path: Path) -> None:
    path = tmp_path / "web.jsonl"
    path.write_text('{"text": "fine \\ud83d\\ude00"}\n{"text": "a \\ud83d b"}\n')
    with pytest.raises(UserError, match=r"web\.jsonl, line 2: half of a surrogate pair"):
        texts(data("text", {"train": str(path)}), "train")


def test_lm1b_folder_has_the_published_splits(tmp_path: Path) -> None:
    root = tmp_path / "1-billion-word-language-modeling-benchmark-r13output"
    training, heldout = (root / f"{name}-monolingual.tokenized.shuffled" for name in ("training", "heldout"))
    training.mkdir(parents=True)
    heldout.mkdir()
    for n in (1, 2):
        (training / f"news.en-0000{n}-of-00100").write_text(f"train {n} , yes .\n")
    for n in (0, 1, 2):
        (heldout / f"news.en.heldout-0000{n}-of-00050").write_text(f"held {n} .\n")
    for folder in (root, tmp_path):
        config = data("lm1b", str(folder))
        assert texts(config, "train") == ["train 1, yes.", "train 2, yes."]
        assert texts(config, "test") == ["held 0."]
        assert texts(config, "validation") == ["held 1.", "held 2."]
    assert texts(data("lm1b", str(root), normalizer="none"), "test") == ["held 0 ."]


@needs_shared
def test_lm1b_samples() -> None:
    folder = SHARED / "lm1b"
    source = {
        "validation": str(folder / "dev_sample.tokens.xz"),
        "test": str(folder / "news.en.heldout-00000-of-00050"),
    }
    config = data("lm1b", source)
    assert available_splits(config) == ("validation", "test")
    assert len(texts(config, "validation")) == 12_216
    test = texts(config, "test")
    assert len(test) == 6075
    assert not any(" ," in text or " 's " in text for text in test)


@needs_shared
def test_openwebtext_sample() -> None:
    source = str(SHARED / "openwebtext" / "openwebtext_1000docs.jsonl.xz")
    config = data("openwebtext", source, validation_documents=100)
    assert (len(texts(config, "train")), len(texts(config, "validation"))) == (900, 100)
    with pytest.raises(UserError, match="no 'test' split"):
        texts(config, "test")
    with pytest.raises(UserError, match=r"data\.validation_documents is 100,000"):
        texts(data("openwebtext", source), "validation")


@needs_shared
@pytest.mark.parametrize(("file", "puzzles"), [("sudoku_20k", 20_000), ("kids", 10_000)])
def test_sudoku_samples(file: str, puzzles: int) -> None:
    config = data("sudoku", str(SHARED / "sudoku" / f"{file}.csv.xz"), tokenizer="sudoku", row_length=81)
    assert sum(1 for split in SPLITS for _ in documents(config, split)) == puzzles


def test_sudoku_rows(tmp_path: Path) -> None:
    path = tmp_path / "puzzles.csv"
    path.write_text(f"quizzes,solutions\n{PUZZLE},{SOLUTION}\n")
    config = data("sudoku", {"test": str(path)}, tokenizer="sudoku", row_length=81)
    (puzzle,) = documents(config, "test")
    assert puzzle.tokens is not None
    assert puzzle.given is not None
    assert "".join(map(str, puzzle.tokens + 1)) == SOLUTION
    assert np.array_equal(puzzle.given, [c != "0" for c in PUZZLE])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (f"{PUZZLE[1:]},{SOLUTION}", "81 digits"),
        (f"{PUZZLE},{SOLUTION[:-1]}x", "81 digits"),
        (f"{PUZZLE},{SOLUTION[:-1]}0", "empty cell"),
        (f"9{PUZZLE[1:]},{SOLUTION}", "contradicts"),
        (PUZZLE, "1 fields"),
    ],
)
def test_sudoku_rows_are_checked(row: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "puzzles.csv"
    path.write_text(f"{PUZZLE},{SOLUTION}\n{row}\n")
    with pytest.raises(UserError, match=message) as error:
        list(documents(data("sudoku", {"test": str(path)}, tokenizer="sudoku"), "test"))
    assert "line 2" in str(error.value)


def test_sudoku_wants_its_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.tokenizer"):
        list(documents(data("sudoku", str(tmp_path)), "train"))


def write_records(path: Path, records: list[str]) -> None:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": records, "n": list(range(len(records)))}), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": record}) + "\n" for record in records))
    elif path.suffix == ".zst":
        lines = "".join(json.dumps({"text": record}) + "\n" for record in records)
        with pyarrow.output_stream(path, compression="zstd") as file:
            file.write(lines.encode())
    elif path.suffix == ".csv":
        with open(path, "w", newline="") as table:
            csv.writer(table).writerows([["n", "text"], *([n, record] for n, record in enumerate(records))])
    else:
        path.write_text("".join(record + "\n" for record in records))


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".jsonl.zst", ".csv", ".parquet"])
def test_text_records_and_their_splits(suffix: str, tmp_path: Path) -> None:
    records = [f"record {n}" for n in range(40)]
    write_records(tmp_path / f"b{suffix}", records[25:])
    write_records(tmp_path / f"a{suffix}", records[:25])
    config = data("text", str(tmp_path))
    assert texts(config, "validation") == ["record 18", "record 38"]
    assert texts(config, "test") == ["record 19", "record 39"]
    assert len(texts(config, "train")) == 36
    last = data("text", str(tmp_path), validation_documents=5)
    assert available_splits(last) == ("train", "validation")
    assert texts(last, "validation") == records[-5:]
    assert texts(last, "train") == records[:-5]
    mapped = data("text", {"train": str(tmp_path / f"a{suffix}"), "test": str(tmp_path / f"b{suffix}")})
    assert available_splits(mapped) == ("train", "test")
    assert texts(mapped, "test") == records[25:]


def test_of_a_folder_files_without_a_suffix_are_text_only_where_there_is_no_other(tmp_path: Path) -> None:
    (tmp_path / "LICENSE").write_text("permission is granted\n")
    assert texts(data("text", {"train": str(tmp_path)}), "train") == ["permission is granted"]
    write_records(tmp_path / "a.jsonl", ["a record"])
    assert texts(data("text", {"train": str(tmp_path)}), "train") == ["a record"]


# ---------------------------------------------------------------- wrong input


@pytest.mark.parametrize("column", ["n", "raw"])
def test_a_parquet_column_that_is_not_text_is_named(column: str, tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"n": [1, 2], "raw": [b"a", b"b"]}), tmp_path / "a.parquet")
    config = data("text", {"train": str(tmp_path / "a.parquet")}, text_column=column)
    with pytest.raises(UserError, match=rf'a\.parquet: column "{column}" is (int64|binary), expected string'):
        texts(config, "train")


@pytest.mark.parametrize("name", ["text8", "lm1b", "openwebtext", "text", "sudoku"])
def test_missing_source(name: str, tmp_path: Path) -> None:
    for source in (None, str(tmp_path / "missing.txt"), {"train": str(tmp_path / "missing.txt")}):
        config = data(name, source, tokenizer="sudoku" if name == "sudoku" else "text8")
        with pytest.raises(UserError, match=r"data\.source"):
            texts(config, "train")


def test_unknown_corpus_and_split(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'text8'"):
        texts(data("txt8"), "train")
    with pytest.raises(UserError, match="no 'test' split"):
        texts(data("text", {"train": str(tmp_path)}), "test")


def test_not_utf8_names_file_and_offset(tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes(b"first line\ncaf\xe9\n")
    with pytest.raises(UserError, match=r"latin\.txt: not UTF-8 at byte 14"):
        texts(data("text", {"train": str(path)}), "train")


@pytest.mark.parametrize("suffix", [".xz", ".gz", ".zst", ".zip", ".parquet"])
def test_damaged_archives(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"damaged{suffix}"
    path.write_bytes(b"this is no archive")
    with pytest.raises(UserError, match="damaged"):
        texts(data("text", {"train": str(path)}), "train")


@pytest.mark.parametrize("line", ["{broken", '{"body": "x"}', '["text"]', '{"text": 3}'])
def test_bad_json_lines(line: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(UserError, match="line 2"):
        texts(data("text", {"train": str(path)}), "train")


def test_fields_of_a_table_may_hold_commas_quotes_and_lines(tmp_path: Path) -> None:
    wanted = ['one, "two"', "three\nfour"]
    write_records(tmp_path / "a.csv", wanted)
    assert texts(data("text", {"train": str(tmp_path / "a.csv")}), "train") == wanted


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("id,body\n1,x\n", r'a\.csv: its first line names no column "text"; columns: id, body \(data\.text_column\)'),
        ("id,text\n1,x\n\n2\n", r"a\.csv, record 4: 1 fields, the first line has 2"),
    ],
)
def test_bad_tables(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(UserError, match=message):
        texts(data("text", {"train": str(tmp_path / "a.csv")}), "train")


def test_a_new_corpus_is_one_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmd_scale.data.corpora.registry.CORPORA", CORPORA)
    try:

        @corpus("haiku", normalizer="text8")
        def haiku(config: DataConfig, split: str) -> Iterator[Document]:
            yield Document("An old silent pond!")

        assert texts(data("haiku"), "train") == [" an old silent pond"]
    finally:
        CORPORA.pop("haiku", None)
