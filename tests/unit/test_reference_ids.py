"""GPT-2 and BERT ids are those of the reference tokenizers on whole real files.

What the reference finds is in reference_ids.json, written by ``benchmarks/protocols.py reference``.
"""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest

from vmd_scale.config import DataConfig
from vmd_scale.data.corpora import raw_documents
from vmd_scale.tokenization import load_tokenizer

SHARED = Path(os.environ.get("VMD_SHARED_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
REFERENCE = json.loads((Path(__file__).parent / "reference_ids.json").read_text())["ids"]
FILES = {
    "lm1b": ("test", "lm1b/news.en.heldout-00000-of-00050"),
    "ptb": ("validation", "zero_shot/ptb.valid.txt"),
    "wikitext": ("validation", "zero_shot/wikitext2.valid.tokens.xz"),
    "lambada": ("test", "zero_shot/lambada_test.jsonl.xz"),
    "ag_news": ("test", "zero_shot/ag_news_test.csv.xz"),
    "openwebtext": ("validation", "openwebtext/openwebtext_1000docs.jsonl.xz"),
}


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"sample corpora not at {SHARED}")
@pytest.mark.parametrize("name", ["gpt2", "bert"])
@pytest.mark.parametrize("corpus", FILES)
def test_ids_are_those_of_the_reference(name: str, corpus: str) -> None:
    split, file = FILES[corpus]
    tokenizer = load_tokenizer(f"{name}:{SHARED / 'tokenizers'}")
    config = DataConfig(corpus=corpus, source={split: str(SHARED / file)}, tokenizer=name, row_length=64, shards="none")
    digest, documents, tokens = hashlib.sha256(), 0, 0
    for document in raw_documents(config, split):
        ids = tokenizer.encode(document.text)
        digest.update(np.append(ids, -1).astype("<i4").tobytes())
        documents, tokens = documents + 1, tokens + len(ids)
    assert {"documents": documents, "tokens": tokens, "sha256": digest.hexdigest()} == REFERENCE[name][corpus]
