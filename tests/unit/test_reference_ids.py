"""GPT-2 and BERT ids are those of the reference tokenizers on whole real files, and protocols count what they counted.

What the reference finds is in reference_ids.json, written by ``benchmarks/protocols.py reference``.
"""

import hashlib
import json
import os
import runpy
from pathlib import Path

import numpy as np
import pytest

from vmd_scale.config import DataConfig
from vmd_scale.data.corpora import raw_documents
from vmd_scale.tokenization import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("VMD_SHARED_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
REFERENCE = json.loads((Path(__file__).parent / "reference_ids.json").read_text())["ids"]
BENCHMARK = runpy.run_path(str(ROOT / "benchmarks" / "protocols.py"))
FILES = BENCHMARK["FILES"]
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"sample corpora not at {SHARED}")


@needs_shared
@pytest.mark.parametrize("name", ["lm1b_packed", "lm1b_unpacked", "zero_shot/ptb", "zero_shot/wikitext"])
def test_what_protocols_count_is_what_the_results_say(name: str) -> None:
    """Normalisers, tokenizers and packing all have a part in it."""
    written = json.loads((ROOT / "docs" / "results" / "protocols.json").read_text())["counts"]
    assert [BENCHMARK["count"](name, SHARED)] == [record for record in written if record["protocol"] == name]


@needs_shared
@pytest.mark.parametrize("name", ["gpt2", "bert"])
@pytest.mark.parametrize("corpus", [corpus for corpus in FILES if corpus in REFERENCE["gpt2"]])
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
