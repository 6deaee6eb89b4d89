"""Figures of samples: closed forms, what of a row is judged, and the judges."""

import json
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch

from vmd_scale.build import build_architecture
from vmd_scale.checkpoints import TrainedModel
from vmd_scale.config_file import load_config
from vmd_scale.data.shards import ShardReader
from vmd_scale.diffusion.sampler import Sampler
from vmd_scale.errors import UserError
from vmd_scale.evaluation import generation
from vmd_scale.evaluation.generation import (
    GenerationResult,
    as_judged,
    distinct_share,
    generation_table,
    mauve_score,
    unigram_entropies,
)
from vmd_scale.evaluation.judges import HuggingFaceJudge, NGramJudge, Sample, load_judge, parse_judge
from vmd_scale.evaluation.ranks import Ranks
from vmd_scale.model import VMD
from vmd_scale.tokenization import SubwordTokenizer, load_tokenizer


def sample_of(ids: list[int], text: str = "", ended: bool = False) -> Sample:
    return Sample(np.array(ids, dtype=np.int64), text, ended)


def words(end: str) -> SubwordTokenizer:
    """[BEGIN] and `end` around words a, b, c; the ids are 0, 1, 2 and 3, 4, 5 for what is special."""
    vocabulary = {"a": 0, "b": 1, "c": 2, "[PAD]": 3, "[BEGIN]": 4, end: 5}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="c"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(["[PAD]", "[BEGIN]", end])
    return SubwordTokenizer("words", made.to_str(), "[BEGIN]", end, "[PAD]")


def test_unigram_entropy_of_known_distributions() -> None:
    found = unigram_entropies([sample_of([1, 1, 1]), sample_of([0, 1, 2, 3]), sample_of([0, 0, 1, 2]), sample_of([])])
    np.testing.assert_allclose(found, [0, math.log(4), 1.5 * math.log(2), 0], atol=1e-12)


def test_distinct_shares() -> None:
    samples = [sample_of([0, 1, 0, 1]), sample_of([0, 1])]
    assert distinct_share(samples, 1) == 2 / 6
    assert distinct_share(samples, 2) == 2 / 4  # 01, 10, 01 and 01
    assert distinct_share(samples, 3) == 1
    assert math.isnan(distinct_share(samples, 5))


def test_a_text_ends_with_the_first_end_of_text() -> None:
    tokenizer = words("<|endoftext|>")
    judged = as_judged(np.array([4, 0, 1, 5, 2, 5]), tokenizer, 5)
    assert judged.ids.tolist() == [0, 1]
    assert (judged.text, judged.ended) == ("a b", True)
    whole = as_judged(np.array([0, 1, 2]), tokenizer, 5)
    assert (whole.ids.tolist(), whole.ended) == ([0, 1, 2], False)
    empty = as_judged(np.array([4, 5, 0]), tokenizer, 5)
    assert (empty.ids.tolist(), empty.text, empty.ended) == ([], "", True)


def test_a_row_of_sentences_is_judged_whole() -> None:
    judged = as_judged(np.array([4, 0, 1, 5, 2, 5, 3, 3]), words("[SEP]"), None)
    assert (judged.ids.tolist(), judged.text, judged.ended) == ([0, 1, 2], "a b c", False)


def test_begin_and_end_may_be_one_token() -> None:
    made = words("<|endoftext|>")
    both = SubwordTokenizer("both", made.files()["tokenizer.json"].decode(), "<|endoftext|>", "<|endoftext|>", None)
    judged = as_judged(np.array([5, 0, 1, 5, 2]), both, 5)
    assert (judged.ids.tolist(), judged.ended) == ([0, 1], True)


def test_the_table_says_what_was_changed_of_the_sampler() -> None:
    """The real texts that come first were drawn by none."""
    shared = {"protocol": "generation", "judge": "j", "latent": "none", "paths": "none", "samples": 2, "tokens": 9,
              "generative_perplexity": 2.0, "standard_error": 0.1, "unigram_entropy": 1.0, "unigram_entropy_error": 0.1,
              "distinct": {"1": 1.0, "2": 1.0, "3": 1.0, "4": 1.0}, "weights": "ema", "step": 1, "seed": 0,
              "row_length": 8, "split": "validation", "data": "text"}  # fmt: skip
    real, drawn = (GenerationResult(**shared, steps=s, changes=c) for s, c in (("data", ""), (4, "temperature 0.5")))
    assert "temperature 0.5" in generation_table([real, drawn]).splitlines()[0]


def test_the_ngram_judge_prefers_its_corpus(lab) -> None:
    judge = load_judge("ngram:4", str(lab.shards), load_tokenizer("text8"), torch.device("cpu"))
    assert judge.name.startswith("4-gram of ")
    assert isinstance(judge, NGramJudge)
    real = ShardReader(lab.shards, "validation").read(np.arange(20))[0]
    noise = np.random.default_rng(0).integers(0, 27, real.shape)
    perplexities = []
    for rows in (real, noise):
        nats, tokens = judge.score([sample_of(row) for row in rows.tolist()])
        assert tokens.tolist() == [32] * 20
        perplexities.append(math.exp(nats.sum() / tokens.sum()))
    assert perplexities[0] < 4 < 27 < perplexities[1]
    nats, tokens = judge.score([sample_of([]), sample_of([1])])
    assert (nats[0], tokens.tolist()) == (0, [0, 1])


def test_names_of_judges(tmp_path: Path) -> None:
    assert (parse_judge("ngram"), parse_judge("ngram:3"), parse_judge("gpt2")) == (0, 3, None)
    for wrong in ("ngram:0", "ngram:x"):
        with pytest.raises(UserError, match=f"--judge {wrong}: expected"):
            parse_judge(wrong)


@pytest.fixture
def causal_model(tmp_path: Path):
    """A tiny GPT-2 with a tokenizer of words, as a folder, and the model itself."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra transformers)")
    vocabulary = {word: n for n, word in enumerate(["a", "b", "c", "d", "<|endoftext|>"])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="d"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(["<|endoftext|>"])
    (tmp_path / "tokenizer.json").write_text(made.to_str())
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    torch.manual_seed(0)
    sizes = {"vocab_size": 5, "n_positions": 8, "n_embd": 16, "n_layer": 2, "n_head": 2}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, eos_token_id=4, bos_token_id=4)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)  # far from uniform
    model.save_pretrained(tmp_path)
    return tmp_path, model


def test_a_hugging_face_judge_counts_all_tokens_but_the_first(causal_model) -> None:
    folder, model = causal_model
    judge = HuggingFaceJudge(str(folder), torch.device("cpu"), micro_batch=2)
    assert judge.name == folder.name
    samples = [sample_of([], "a b c", True), sample_of([], "c a", False), sample_of([], "", False)]
    samples.append(sample_of([], "a b c d " * 5, True))  # longer than the model's 8 positions
    nats, tokens = judge.score(samples)
    assert tokens.tolist() == [3, 1, 0, 7]
    for n, ids in ((0, [0, 1, 2, 4]), (1, [2, 0]), (3, [0, 1, 2, 3, 0, 1, 2, 3])):
        with torch.no_grad():
            log_p = model(torch.tensor([ids])).logits.double().log_softmax(-1)[0]
        wanted = -sum(float(log_p[i, token]) for i, token in enumerate(ids[1:]))
        assert nats[n] == pytest.approx(wanted, rel=1e-4)
    features = judge.features(samples)
    assert features is not None
    assert features.shape == (4, 16)
    alone = HuggingFaceJudge(str(folder), torch.device("cpu")).features(samples[:1])
    np.testing.assert_allclose(features[:1], alone, rtol=1e-4, atol=1e-5)


def test_ranks_that_get_no_sample(lab, causal_model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four ranks, here threads, draw and judge two samples, and all find what one rank finds."""
    size, meeting, shares = 4, threading.Barrier(4, timeout=20), [None] * 4

    def gathered(ranks: Ranks, mine: object) -> list:
        if ranks.size == 1:
            return [mine]
        shares[ranks.rank] = mine
        meeting.wait()
        found = list(shares)
        meeting.wait()
        return found

    monkeypatch.setattr(Ranks, "gathered", gathered)
    monkeypatch.setattr(generation, "mauve_score", lambda reference, features: float((reference * features).sum()))
    tokenizer, config = load_tokenizer("text8"), load_config(lab.config)
    model = VMD(build_architecture(config, tokenizer.vocab_size)).eval()
    trained = TrainedModel(model, config, tokenizer, 0, "raw", lab.folder)
    judge = HuggingFaceJudge(str(causal_model[0]), torch.device("cpu"))

    def on(ranks: Ranks) -> list[generation.GenerationResult]:
        reader = ShardReader(lab.shards, "validation")
        return generation.evaluate_generation(trained, [Sampler(2)], judge, reader, 2, 0, 4, ranks)

    with ThreadPoolExecutor(size) as threads:
        together = list(threads.map(on, [Ranks(rank, size) for rank in range(size)]))
    for alone, *found in zip(on(Ranks()), *together, strict=True):
        for one in found:
            assert (one.steps, one.tokens, one.distinct) == (alone.steps, alone.tokens, alone.distinct)
            assert one.generative_perplexity == pytest.approx(alone.generative_perplexity, rel=1e-4)
            assert (one.mauve or 0) == pytest.approx(alone.mauve or 0, rel=1e-4)
    assert judge.features([]).shape == (0, 16)


def test_a_folder_that_holds_no_model(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed (extra transformers)")
    with pytest.raises(UserError, match="no such folder"):
        HuggingFaceJudge(str(tmp_path / "none"), torch.device("cpu"))
    with pytest.raises(UserError, match="not a causal language model"):
        HuggingFaceJudge(str(tmp_path), torch.device("cpu"))


def test_without_transformers_the_judge_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(UserError, match=r"needs transformers: pip install -e '\.\[transformers\]'; or use ngram"):
        HuggingFaceJudge(str(tmp_path), torch.device("cpu"))


def test_mauve_where_it_is() -> None:
    generator = np.random.default_rng(0)
    same, other = generator.normal(size=(2, 60, 4)).astype(np.float32)
    try:
        import mauve  # noqa: F401
    except ImportError:
        assert mauve_score(same, other) is None
        pytest.skip("mauve-text is not installed (extra mauve)")
    near, far = mauve_score(same, other), mauve_score(same, other + 20)
    assert far < near <= 1
