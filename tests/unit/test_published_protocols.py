"""Published protocols on shards that were prepared for them: what is counted, and that wrong options are refused."""

import math
import os
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from vmd_scale.build import build_model
from vmd_scale.config_file import parse_config
from vmd_scale.data.prepare import prepare
from vmd_scale.data.shards import ShardReader
from vmd_scale.errors import UserError
from vmd_scale.evaluation.perplexity import Request, evaluate
from vmd_scale.tokenization import load_tokenizer

SHARED = Path(os.environ.get("VMD_SHARED_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"sample corpora not at {SHARED}")


def prepared(folder: Path, text: str, **data):
    """A reader of the test split, and an untrained model of its rows."""
    (folder / "test.txt").write_text(text)
    values = {
        "data": {"source": {"test": str(folder / "test.txt")}, "shards": str(folder / "shards"), **data},
        "model": {"layers": 1, "width": 8, "heads": 1},
        "diffusion": {"objective": "nelbo", "steps": ["inf"]},
        "training": {"steps": 1, "global_batch": 2, "micro_batch": 2},
    }
    config = parse_config(values, origin="test")
    prepare(config.data, progress=False)
    model = build_model(config, load_tokenizer(config.data.tokenizer).vocab_size).eval()
    return ShardReader(config.data.shards, "test"), model


def test_text8_of_mdlm_counts_its_specials(tmp_path: Path) -> None:
    text = "the quick brown fox jumps over the lazy dog " * 30
    how = {"tokenizer": "text8_mdlm", "row_length": 256, "row_specials": True}
    reader, model = prepared(tmp_path, text, corpus="text8", **how)
    tokens, _ = reader.read(np.arange(reader.rows))
    assert (tokens[:, 0] == 2).all()
    assert (tokens[:, -1] == 3).all()
    assert load_tokenizer("text8_mdlm").decode(tokens[:, 1:-1].ravel()) == text[: reader.rows * 254]
    (result,) = evaluate(model, reader, Request("text8_mdlm", "test", (1.0,)), "raw", 0)
    assert result.tokens == reader.rows * 256
    assert result.caveat == f"not the published test set: {len(text.strip()) + 1:,} characters instead of 5,000,000"


@needs_shared
def test_padding_that_is_attended_is_masked_and_not_counted(tmp_path: Path) -> None:
    lines = (SHARED / "lm1b" / "news.en.heldout-00000-of-00050").read_text().splitlines()[:6]
    how = {"packing": "pad", "row_specials": True, "row_length": 128, "tokenizer": f"bert:{SHARED / 'tokenizers'}"}
    reader, model = prepared(tmp_path, "\n".join(lines) + "\n", corpus="lm1b", **how)
    request = {"split": "test", "steps": (math.inf,), "paths": "bernoulli"}
    (plain,) = evaluate(model, reader, Request("lm1b_unpacked", **request), "raw", 0)
    (compat,) = evaluate(model, reader, Request("lm1b_unpacked_mdlm", **request), "raw", 0)
    counted = reader.manifest.splits["test"].counted_tokens
    assert plain.tokens == compat.tokens == counted < 6 * 128
    assert (plain.bound, compat.bound) == ("elbo", "compat")
    assert plain.nats_per_token != compat.nats_per_token  # pads are seen, and masked with the same noise
    wrong = ({"steps": (4.0,)}, {"samples": (2,)}, {"paths": "balanced"}, {"surrogate": True})
    for option in wrong:
        with pytest.raises(UserError, match="is an estimate of the published code"):
            evaluate(model, reader, Request("lm1b_unpacked_mdlm", **{**request, **option}), "raw", 0)


@needs_shared
def test_the_first_token_of_bd3_is_given(tmp_path: Path) -> None:
    text = "one line of a page of the web, long enough for some tokens\n" * 260
    how = {"tokenizer": f"gpt2:{SHARED / 'tokenizers'}", "row_length": 1024}
    reader, model = prepared(tmp_path, text, corpus="openwebtext", **how)
    (result,) = evaluate(model, reader, Request("owt_bd3", "test", (1.0,), micro_batch=1), "raw", 0)
    assert reader.rows > 1
    assert result.tokens == reader.rows * 1023


@needs_shared
@pytest.mark.parametrize(
    ("protocol", "how"),
    [
        ("lm1b_packed", {"corpus": "lm1b", "tokenizer": f"bert:{SHARED / 'tokenizers'}", "row_length": 128}),
        ("owt_mdlm", {"corpus": "openwebtext", "tokenizer": f"gpt2:{SHARED / 'tokenizers'}", "row_length": 1024}),
    ],
)
def test_every_token_between_the_specials_is_counted(protocol: str, how: dict, tmp_path: Path) -> None:
    text = "A sentence , or two , of the news , and it 's one a line .\n" * 260
    reader, model = prepared(tmp_path, text, **how, row_specials=True)
    (result,) = evaluate(model, reader, Request(protocol, "test", (1.0,), rows=3, micro_batch=1), "raw", 0)
    assert result.tokens == 3 * how["row_length"]
    assert result.caveat is not None


def test_text8_and_sentencepiece_rows_have_no_specials(tmp_path: Path) -> None:
    words = {"[UNK]": 0, "[SEP]": 1, **{f"w{n}": n + 2 for n in range(8190)}}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    (tmp_path / "d3pm").mkdir()
    tokenizer.save(str(tmp_path / "d3pm" / "tokenizer.json"))
    cases = {
        "text8": ("one line of text " * 80, {"corpus": "text8", "tokenizer": "text8", "row_length": 256}),
        "lm1b_d3pm": (
            "\n".join(f"w{n} w{n + 1} , w2" for n in range(200)),
            {"corpus": "lm1b", "tokenizer": str(tmp_path / "d3pm"), "row_length": 128, "normalizer": "none"},
        ),
    }
    for protocol, (text, how) in cases.items():
        (tmp_path / protocol).mkdir()
        reader, model = prepared(tmp_path / protocol, text, **how)
        (result,) = evaluate(model, reader, Request(protocol, "test", (1.0,)), "raw", 0)
        assert result.tokens == reader.rows * how["row_length"]
