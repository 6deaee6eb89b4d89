"""Prompts with responses and texts with labels become rows in which the prompt is given; labels are scored exactly."""

import itertools
import json
import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_models import architecture
from torch import nn

from vmd_scale.config_file import parse_config
from vmd_scale.data.corpora import raw_documents
from vmd_scale.data.corpora.prompts import choices_of
from vmd_scale.data.loader import Batch
from vmd_scale.data.prepare import prepare
from vmd_scale.data.roles import Role
from vmd_scale.data.shards import ShardReader
from vmd_scale.errors import UserError
from vmd_scale.evaluation.classification import label_log_probabilities, label_tokens
from vmd_scale.finetuning import finetuning_config
from vmd_scale.model import VMD
from vmd_scale.tokenization import load_tokenizer

NEWS = [("aa", " x"), ("bb c", " yy"), ("defghijklmnopq", " x"), ("", " yy")] * 10


def config_of(tmp_path, corpus, records, **data):
    path = tmp_path / f"{corpus}.jsonl"
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    values = {"corpus": corpus, "source": str(path), "tokenizer": "text8", "row_length": 12, "packing": "pad"}
    return parse_config(
        {"data": {**values, "shards": str(tmp_path / "shards"), **data},
         "model": {"layers": 1, "width": 8, "heads": 1},
         "training": {"steps": 1, "global_batch": 1, "micro_batch": 1}}, "test",
    )  # fmt: skip


def shown(config, number):
    """A prepared row: prompt in brackets, then what is counted; padding is left out."""
    tokens, roles = ShardReader(config.data.shards, "train").read(np.array([number]))
    text = load_tokenizer("text8").decode(tokens[0])
    parts = ["".join(c for c, role in zip(text, roles[0], strict=True) if role == kind) for kind in Role]
    assert "".join(f"{r}" for r in roles[0]) == "2" * len(parts[2]) + "1" * len(parts[1]) + "0" * len(parts[0])
    return f"[{parts[Role.GIVEN]}]{parts[Role.ORDINARY]}"


def test_a_response_is_filled_up_to_the_end_of_its_row(tmp_path):
    records = [{"prompt": p, "response": r} for p, r in (("ab", "cd"), ("abcdefghijklmn", "xyz"), ("a", "b" * 14))]
    config = config_of(tmp_path, "prompts", records * 10)
    manifest = prepare(config.data, progress=False)
    assert shown(config, 0) == "[ab]cd        "
    assert shown(config, 1) == "[fghijklmn]xyz"  # too long: the prompt loses its start
    assert shown(config, 2) == "[]bbbbbbbbbbbb"
    assert manifest.splits["train"].truncated_documents == sum(n % 3 > 0 for n in range(30) if n % 20 < 18)


def test_a_label_is_filled_up_to_the_longest(tmp_path):
    config = config_of(tmp_path, "labels", [{"prompt": p, "label": lab} for p, lab in NEWS])
    prepare(config.data, progress=False)
    assert choices_of(config.data) == (" x", " yy")
    # the third is too long: it loses its end
    assert [shown(config, n) for n in range(4)] == ["[aa] x ", "[bb c] yy", "[defghijkl] x ", "[] yy"]
    names, tokens = label_tokens(config, load_tokenizer("text8"))
    assert [load_tokenizer("text8").decode(row) for row in tokens] == [" x ", " yy"]
    assert names == (" x", " yy")


@pytest.mark.parametrize(
    ("labels", "data"),
    [
        (("+1", "-1"), {"normalizer": "text8"}),  # "one", both: signs are nothing to text8
        (("World", "world"), {"normalizer": "text8"}),
        (("x", "x ", "yy"), {}),  # a shorter label is filled up, with spaces here
    ],
)
def test_labels_that_are_the_same_tokens_are_refused(tmp_path, labels, data):
    """Else the first of them would be the truth of both, and an accuracy would mean nothing."""
    config = config_of(tmp_path, "labels", [{"prompt": "a", "label": lab} for lab in labels] * 20, **data)
    first, second = sorted(labels)[:2]
    message = f"labels {first!r} and {second!r} are the same tokens by data.tokenizer 'text8' and data.normalizer"
    with pytest.raises(UserError, match=re.escape(message)):
        label_tokens(config, load_tokenizer("text8"))


@pytest.mark.parametrize(
    ("corpus", "records", "data", "message"),
    [
        ("labels", [{"prompt": "a", "label": "x"}] * 20, {}, "1 different labels in the training split"),
        ("labels", [{"prompt": "a", "response": "x"}], {}, r'line 1: expected an object with strings "prompt" and "la'),
        ("prompts", [{"prompt": "a", "response": "x"}, "{"], {}, "line 2: not JSON"),
        ("prompts", [{"prompt": "a", "response": ""}], {}, "line 1: expected an object"),
        ("prompts", [{"prompt": "a", "response": "x"}], {"packing": "wrap"}, "have prompts: only 'pad'"),
    ],
)
def test_bad_records_are_named(tmp_path, corpus, records, data, message):
    with pytest.raises(UserError, match=message):
        prepare(config_of(tmp_path, corpus, records, **data).data, progress=False)


def test_csv_of_class_and_texts_is_read_as_it_comes(tmp_path):
    """As AG News has it: quotes doubled, lines broken inside a field."""
    path = tmp_path / "news.csv"
    path.write_text('"3","Wall St. ""bears""","Oil\nagain"\n"1","Peace","talks"\n' * 20)
    config = config_of(tmp_path, "labels", []).data.model_copy(update={"source": str(path)})
    found = list(raw_documents(config, "train"))
    assert [(d.prompt, d.text) for d in found[:2]] == [('Wall St. "bears" Oil\nagain\n', "3"), ("Peace talks\n", "1")]
    assert {d.choices for d in found} == {("1", "3")}
    assert [len(list(raw_documents(config, split))) for split in ("train", "validation", "test")] == [36, 2, 2]
    path.write_text('"3"\n')
    with pytest.raises(UserError, match=r"news\.csv, record 1: 1 fields, expected a class and one text or more"):
        list(raw_documents(config, "train"))


def test_a_label_that_training_never_saw_is_an_error(tmp_path):
    records = [{"prompt": p, "label": lab} for p, lab in NEWS]
    records[18] = {"prompt": "a", "label": " z"}  # of validation
    with pytest.raises(UserError, match="label ' z' of the validation split does not occur in training"):
        prepare(config_of(tmp_path, "labels", records).data, progress=False)


def test_labels_that_cannot_be_scored_are_refused(tmp_path):
    config = config_of(tmp_path, "labels", [{"prompt": "a", "label": lab} for lab in (" x", "y" * 13)] * 20)
    with pytest.raises(UserError, match=r"longest label has 13 tokens, but data\.row_length is 12"):
        prepare(config.data, progress=False)
    blocks = parse_config(config.model_dump(mode="json") | {"diffusion": {"block_size": 4}}, "test")
    options = {"weights": "w", "source": None, "output": tmp_path, "base": blocks}
    assert finetuning_config(corpus="prompts", **options).groups == 3
    with pytest.raises(UserError, match=r"diffusion\.block_size=null, found 4"):
        finetuning_config(corpus="labels", **options)


@pytest.mark.parametrize("row_specials", [False, True])
def test_a_prompt_begins_as_training_rows_do(tmp_path, row_specials):
    text = [{"prompt": "a", "response": "b"}]
    config = config_of(tmp_path, "text", text, packing="wrap", tokenizer="text8_mdlm", row_specials=row_specials)
    tokenizer = load_tokenizer("text8_mdlm")
    path = Path(__file__).resolve().parents[2] / "launchers" / "sample.py"
    mask_id = tokenizer.vocab_size
    model = SimpleNamespace(architecture=SimpleNamespace(mask_id=mask_id))
    trained = SimpleNamespace(config=config, tokenizer=tokenizer, model=model)
    prompt_tokens, begin = runpy.run_path(str(path))["prompt_tokens"], [tokenizer.begin_id] * row_specials
    assert prompt_tokens("ab", trained).tolist() == [*begin, *tokenizer.encode("ab")]
    holes = [*begin, mask_id, *tokenizer.encode("ab"), mask_id, mask_id, *tokenizer.encode("c")]
    assert prompt_tokens("[MASK]ab[MASK][MASK]c", trained).tolist() == holes
    room = config.data.row_length - row_specials
    prompt_tokens("a" * (room - 1), trained)
    prompt_tokens("a" * (room - 1) + "[MASK]", trained)
    for text in ("a" * room, "a" * room + "[MASK]"):  # nothing left to draw; more than a row
        with pytest.raises(UserError, match="--prompt"):
            prompt_tokens(text, trained)


@pytest.mark.parametrize("latent_width", [0, 2])
def test_label_probabilities_are_those_of_the_one_step_sampler(latent_width):
    """All labels of two symbols together: their probabilities sum to one, and each is the product of two factors."""
    torch.manual_seed(0)
    a = architecture(row_length=5, heads=1, attention="sdpa", condition_width=4, latent_width=latent_width)
    model = VMD(a).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    roles = torch.tensor([[2, 2, 1, 1, 0], [2, 1, 1, 0, 0]], dtype=torch.uint8)  # prompts of two lengths
    tokens = torch.tensor([[0, 2, 1, 1, 0], [1, 0, 2, 0, 0]])
    batch = Batch(tokens, roles, torch.arange(2), np.arange(2))
    attend, labels = roles != Role.PADDING, torch.tensor(list(itertools.product(range(3), repeat=2)))
    logs = label_log_probabilities(model, batch, attend, labels, draws=7 if latent_width else 1)
    torch.testing.assert_close(logs.exp().sum(-1), torch.ones(2, dtype=torch.float64))
    if not latent_width:
        noisy = tokens.masked_fill(roles == Role.ORDINARY, 3)
        p = model.logits(noisy, None, attend).double().log_softmax(-1)
        for row, at in ((0, (2, 3)), (1, (1, 2))):
            wanted = torch.stack([sum(p[row, i, s] for i, s in zip(at, label, strict=True)) for label in labels])
            torch.testing.assert_close(logs[row], wanted.detach())


def test_a_hole_of_an_earlier_block_does_not_see_what_is_given_later():
    blind_holes = runpy.run_path(str(Path(__file__).resolve().parents[2] / "launchers" / "sample.py"))["blind_holes"]
    for groups, prompt, blind in (
        (1, [3, 0, 1, 2], False),
        (2, [3, 0, 1], False),  # the same block
        (2, [3, 0, 1, 2], True),
        (2, [0, 0, 1, 3, 3, 3], False),
        (2, [3, 3, 3, 3], False),
        (2, [], False),
    ):
        assert blind_holes(torch.tensor(prompt, dtype=torch.int64), architecture(row_length=6, groups=groups)) == blind


@pytest.mark.parametrize(
    ("prompt", "shown"),
    [
        ("the [MASK][MASK][MASK] sat", "the ___ sat"),
        ("th[MASK]s is", "th_s is"),
        ("The first [MASK]rgument", "the first _rgument"),
        ("a [MASK] [MASK]", "a _ _"),
        ("one,[MASK]two", "one_two"),
    ],
)
def test_the_clean_up_of_texts_moves_no_hole(tmp_path, prompt, shown):
    """Of text8 it puts a space around all that it is given, and one in place of what it does not know."""
    text = [{"prompt": "a", "response": "b"}]
    config = config_of(tmp_path, "text", text, packing="wrap", normalizer="text8", row_length=40)
    tokenizer = load_tokenizer("text8")
    path = Path(__file__).resolve().parents[2] / "launchers" / "sample.py"
    model = SimpleNamespace(architecture=SimpleNamespace(mask_id=tokenizer.vocab_size))
    trained = SimpleNamespace(config=config, tokenizer=tokenizer, model=model)
    tokens = runpy.run_path(str(path))["prompt_tokens"](prompt, trained).tolist()
    assert "".join(tokenizer.decode([t]) if t < 27 else "_" for t in tokens).strip() == shown
