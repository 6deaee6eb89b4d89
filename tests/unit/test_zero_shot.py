"""A model of GPT-2 rows is asked about another corpus: prepared from a local file, as the protocol says, and scored."""

import os
from pathlib import Path

import pytest
import torch

from vmd_scale.build import build_model
from vmd_scale.config_file import parse_config
from vmd_scale.data.shards import ShardReader
from vmd_scale.errors import UserError
from vmd_scale.evaluation.perplexity import Request, evaluate
from vmd_scale.evaluation.zero_shot import prepare_set
from vmd_scale.tokenization import load_tokenizer

SHARED = Path(os.environ.get("VMD_SHARED_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
GPT2 = f"gpt2:{SHARED / 'tokenizers'}"
pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason=f"sample corpora not at {SHARED}")


@pytest.fixture(scope="module")
def config():
    values = {
        "data": {
            "corpus": "openwebtext",
            "tokenizer": GPT2,
            "row_length": 1024,
            "row_specials": True,
            "shards": "none",
        },
        "model": {"layers": 1, "width": 8, "heads": 1},
        "diffusion": {"objective": "nelbo", "steps": ["inf"]},
        "training": {"steps": 1, "global_batch": 2, "micro_batch": 2},
    }
    return parse_config(values, origin="test")


def test_ptb_is_prepared_and_scored(config, tmp_path: Path) -> None:
    lines = (SHARED / "zero_shot" / "ptb.valid.txt").read_text().splitlines()[:120]
    source = tmp_path / "ptb.txt"
    source.write_text("\n".join(lines) + "\n")
    prepare_set("ptb", str(source), config.data, tmp_path)
    reader = ShardReader(tmp_path / "ptb", "validation")
    tokens, roles = reader.read(torch.arange(reader.rows).numpy())
    assert roles is None
    assert (tokens[:, [0, -1]] == 50256).all()
    record = reader.manifest.splits["validation"]
    assert record.documents == 120
    tokenizer = load_tokenizer(GPT2)
    first = tokenizer.decode(tokens[0, 1:30])
    assert first.startswith("consumers may want to move their telephones")
    model = build_model(config, tokenizer.vocab_size).eval()
    request = Request("zero_shot/ptb", "validation", (float("inf"),), micro_batch=2)
    (result,) = evaluate(model, reader, request, "raw", 0)
    assert result.tokens == reader.rows * 1024
    assert result.caveat == "not the published validation set: 120 documents instead of 3,370"
    assert result.nats_per_token > 5  # it has learned nothing
    with pytest.raises(UserError, match=r"wikitext needs shards with data\.corpus 'wikitext', these have 'ptb'"):
        evaluate(model, reader, Request("zero_shot/wikitext", "validation", (1.0,)), "raw", 0)


def test_another_source_in_the_same_folder_is_refused(config, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text("one sentence of some words\n" * 400)
    prepare_set("ptb", str(tmp_path / "a.txt"), config.data, tmp_path)
    prepare_set("ptb", str(tmp_path / "a.txt"), config.data, tmp_path)
    with pytest.raises(UserError, match=r"data\.source"):
        prepare_set("ptb", str(tmp_path / "b.txt"), config.data, tmp_path)
