"""What a model is fine-tuned on: prompts with responses, and texts with labels; JSON lines.

    {"prompt": "Write a haiku about rain.\\n", "response": "..."}        corpus prompts
    {"prompt": "Oil prices rise again\\nTopic:", "label": " Business"}   corpus labels

The prompt is never masked and never counted. A label is a response that is one of few, which are found in the data.
"""

from collections.abc import Iterator
from pathlib import Path

from vmd_scale.config import DataConfig
from vmd_scale.data.corpora.files import content_suffix, csv_records, json_lines
from vmd_scale.data.corpora.registry import SPLITS, Document, corpus, in_twentieth
from vmd_scale.data.corpora.sources import local_source
from vmd_scale.data.packing import check_prompts
from vmd_scale.errors import UserError

MOST_LABELS = 1000


@corpus("prompts")
def prompts(config: DataConfig, split: str) -> Iterator[Document]:
    """JSON lines of "prompt" and "response". Fills the row after the response with the tokenizer's end token."""
    check_prompts(config)
    return (Document(prompt=p, text=r) for p, r in _pairs(config, split, "response"))


@corpus("labels")
def labels(config: DataConfig, split: str) -> Iterator[Document]:
    """JSON lines of "prompt" and "label", or CSV of class and texts."""
    check_prompts(config)
    choices = choices_of(config)
    for prompt, label in _pairs(config, split, "label"):
        if label not in choices:
            raise UserError(f"data.source: label {label!r} of the {split} split does not occur in training")
        yield Document(prompt=prompt, text=label, choices=choices)


def choices_of(config: DataConfig) -> tuple[str, ...]:
    """All labels of the training split, sorted.

    Raises:
        UserError: fewer than two, or more than `MOST_LABELS`: then it is not a classification.
    """
    found = {label for _, label in _pairs(config, "train", "label")}
    if not 2 <= len(found) <= MOST_LABELS:
        raise UserError(f"data.source: {len(found)} different labels in the training split; 2 to {MOST_LABELS} allowed")
    return tuple(sorted(found))


def _pairs(config: DataConfig, split: str, response: str) -> Iterator[tuple[str, str]]:
    assert split in SPLITS
    source = local_source(config, split)
    path = Path(source.path)
    is_csv = response == "label" and content_suffix(path) == ".csv"
    for number, pair in enumerate(_classes(path) if is_csv else _json_pairs(path, response)):
        if source.is_split or in_twentieth(number, split):
            yield pair


def _json_pairs(path: Path, response: str) -> Iterator[tuple[str, str]]:
    for number, found in json_lines(path):
        record = found if isinstance(found, dict) else {}
        prompt, answer = record.get("prompt"), record.get(response)
        if not isinstance(prompt, str) or not isinstance(answer, str) or not answer:
            raise UserError(f'{path}, line {number}: expected an object with strings "prompt" and "{response}"')
        yield prompt, answer


def _classes(path: Path) -> Iterator[tuple[str, str]]:
    """``"class","title","text"`` a record, or fewer or more texts."""
    for number, fields in csv_records(path):
        if len(fields) < 2 or not fields[0].strip():
            raise UserError(f"{path}, record {number}: {len(fields)} fields, expected a class and one text or more")
        yield " ".join(fields[1:]) + "\n", fields[0].strip()
