"""Named protocols: what they demand, what they count, and that results of different ones do not mix."""

import re

import pytest
import torch
from example_results import example_result

from vmd_scale.data.manifest import Manifest, SplitRecord
from vmd_scale.errors import UserError
from vmd_scale.evaluation.perplexity import Result
from vmd_scale.evaluation.protocols import PROTOCOLS, ZERO_SHOT, get_protocol
from vmd_scale.evaluation.published import PUBLISHED
from vmd_scale.evaluation.tables import beside_published, table
from vmd_scale.evaluation.zero_shot import parse_sources

NAMED = [
    *("text8", "text8_mdlm", "lm1b_packed", "lm1b_unpacked", "lm1b_unpacked_mdlm", "lm1b_d3pm", "owt_mdlm", "owt_bd3"),
    *(f"zero_shot/{name}" for name in ("ptb", "wikitext", "lm1b", "lambada", "ag_news", "pubmed", "arxiv")),
]


def split_record(**changes) -> SplitRecord:
    counts = dict.fromkeys(("documents", "skipped_documents", "truncated_documents", "dropped_tokens"), 0)
    values = {"rows": 7, "counted_tokens": 99, "characters": 5, "utf8_bytes": 5, "unigram_entropy": 1.0, "shards": ()}
    return SplitRecord(**{**counts, **values, **changes})


def manifest_of(name: str, **changes) -> Manifest:
    """What the protocol demands, in shards."""
    required = get_protocol(name).requires
    values = {
        "tokenizer": "some",
        "tokenizer_fingerprint": "f" * 64,
        "vocab_size": 35 if name == "text8_mdlm" else 27,
        "dtype": "uint16",
        "row_length": 8,
        "packing": "wrap",
        "row_specials": False,
        "corpus": "some",
        "source": None,
        "normalizer": "none",
        "validation_documents": None,
        "licence": None,
        "splits": {"validation": split_record(), "test": split_record()},
    }
    return Manifest(**{**values, **required, **changes})


def result(**changes) -> Result:
    return example_result(**{"protocol": "text8", "split": "test", "tokens": 123_456, "rows": 482, **changes})


def test_all_named_protocols_are_there() -> None:
    assert set(NAMED) | {"rows"} == set(PROTOCOLS)
    assert set(PUBLISHED) == set(NAMED) - {"lm1b_d3pm"}
    with pytest.raises(UserError, match=r"'text9' does not exist; allowed: rows, text8, "):
        get_protocol("text9")


@pytest.mark.parametrize("name", NAMED)
def test_every_demand_is_checked(name: str) -> None:
    protocol = get_protocol(name)
    protocol.check(manifest_of(name))
    others = {"vocab_size": 99, "row_length": 64, "packing": "pad", "corpus": "other", "normalizer": "other"}
    others |= {"tokenizer": "other", "row_specials": None}
    for key, wanted in protocol.requires.items():
        other = not wanted if key == "row_specials" else "wrap" if wanted == "pad" else others[key]
        with pytest.raises(UserError, match=rf"{name} needs shards with data\.{key} {re.escape(repr(wanted))}, these"):
            protocol.check(manifest_of(name, **{key: other}))


def test_protocols_of_one_corpus_exclude_each_other() -> None:
    """Rows that pass two protocols could be reported as either."""
    same_rows = {("lm1b_unpacked", "lm1b_unpacked_mdlm")}
    for one in NAMED:
        for other in NAMED:
            if one < other and (one, other) not in same_rows:
                with pytest.raises(UserError, match="needs shards with"):
                    get_protocol(other).check(manifest_of(one, **({"tokenizer": "text8"} if one == "text8" else {})))


def test_what_is_not_the_published_set_is_said() -> None:
    protocol = get_protocol("lm1b_packed")
    whole = manifest_of("lm1b_packed", splits={"test": split_record(documents=6075), "validation": split_record()})
    assert protocol.caveat(whole, "test") is None
    assert protocol.caveat(whole, "validation") == "not the published validation set: published on test"
    part = manifest_of("lm1b_packed", splits={"test": split_record(documents=12)})
    assert protocol.caveat(part, "test") == "not the published test set: 12 documents instead of 6,075 or 306,688"
    assert get_protocol("rows").caveat(part, "test") is None
    text8 = manifest_of("text8", splits={"test": split_record(characters=5_000_000)})
    assert get_protocol("text8").caveat(text8, "test") is None


def test_another_text_of_the_same_length_is_not_the_published_one() -> None:
    text8 = manifest_of("text8", splits={"test": split_record(characters=5_000_000)}, remark="the text is not text8's")
    assert get_protocol("text8").caveat(text8, "test") == "not the published test set: the text is not text8's"
    assert get_protocol("rows").caveat(text8, "test") is None


@pytest.mark.parametrize("name", ["lm1b_packed", "zero_shot/lm1b"])
def test_one_file_of_lm1b_held_out_is_published_and_so_are_all_fifty(name: str) -> None:
    for documents, is_published in ((6_075, True), (306_688, True), (12, False)):
        manifest = manifest_of(name, splits={"test": split_record(documents=documents)})
        assert (get_protocol(name).caveat(manifest, "test") is None) is is_published


def test_empty_documents_are_of_the_published_number() -> None:
    record = split_record(documents=6_070, skipped_documents=5)
    assert get_protocol("lm1b_packed").caveat(manifest_of("lm1b_packed", splits={"test": record}), "test") is None


def test_which_tokens_are_masked_attended_and_counted() -> None:
    words = torch.tensor([[True, True, True, False], [True, True, True, True]])
    plain = get_protocol("lm1b_unpacked").score(words, words)
    assert torch.equal(plain.maskable, words)
    assert torch.equal(plain.counted, words)
    assert plain.attend is words
    compat = get_protocol("lm1b_unpacked_mdlm").score(words, words)
    assert compat.maskable.all()
    assert compat.attend is None
    assert torch.equal(compat.counted, words)
    first = get_protocol("owt_bd3").score(words, None)
    assert not first.maskable[:, 0].any()
    assert torch.equal(first.maskable[:, 1:], words[:, 1:])
    assert torch.equal(first.counted, first.maskable)


@pytest.mark.parametrize(
    "other",
    [
        {"protocol": "text8_mdlm"},
        {"split": "validation"},
        {"interval": "mdlm_compat"},
        {"caveat": "not the published test set"},
        {"data": "another corpus"},
    ],
)
def test_what_does_not_compare_is_not_put_into_one_table(other: dict[str, str]) -> None:
    results = [result(), result(**other)]
    (key,) = other
    with pytest.raises(UserError, match=f"cannot be compared: {key} .*--note"):
        table(results)
    text = table(results, note="two sides of a story")
    assert text.splitlines()[-1] == "note: two sides of a story"
    assert other[key] in text


def test_a_caveat_says_whose_it_is() -> None:
    one, two = result(), result(caveat="only a part")
    assert "caveat of line 2: only a part" in table([one, two], note="side by side")
    assert "\ncaveat: only a part" in table([two, two])


def test_the_fine_print_of_a_table() -> None:
    text = table([result(), result(steps="inf", k=16, bound="iw", paths="bernoulli", latent="none", rows=480)])
    first, head, *lines = text.splitlines()
    shared = (
        "protocol text8, data none, split test, tokens 123,456, interval full, weights ema, step 20, draws 1, seed 0"
    )
    assert first == shared
    assert head.split() == ["T", "z", "paths", "K", "bound", "bits/token", "+-", "perplexity", "+-", "rows"]
    assert lines[0].split() == ["8", "fixed", "balanced", "1", "elbo", "1.4427", "0.0144", "2.7183", "0.0272", "482"]
    assert lines[1].split()[:5] == ["inf", "none", "bernoulli", "16", "iw"]
    apart = table([result(), result(seed=1, weights="raw")])
    assert apart.splitlines()[1].split()[-2:] == ["weights", "seed"]
    assert apart.splitlines()[3].split()[-2:] == ["raw", "1"]


def test_published_figures_stand_beside_ours() -> None:
    text = beside_published([result(steps=1, nats_per_token=3.0), result(caveat="only a part")])
    assert "1.40  MDLM  [arXiv 2406.07524]" in text
    assert "1.24* EDLM" in text  # not a bound
    assert text.splitlines()[-1].split()[:3] == ["1.44", "this", "run,"]
    assert "T = 8" in text
    assert "not comparable: see the caveat" in text
    assert "32.83  MDLM" in beside_published([result(protocol="zero_shot/wikitext")])
    assert beside_published([result(protocol="rows")]) == ""
    compat = beside_published([result(protocol="lm1b_unpacked_mdlm", bound="compat")])
    assert compat.splitlines()[-1].split()[:3] == ["2.72*", "this", "run,"]


def test_sources_of_the_zero_shot_sets() -> None:
    assert parse_sources(["ptb=a=b.txt", "arxiv=hf:x:y"]) == {"ptb": "a=b.txt", "arxiv": "hf:x:y"}
    for wrong in ("ptb", "ptb=", "imdb=a.txt"):
        with pytest.raises(UserError, match=r"expected SET=FILE.*ptb \(validation\), .*lm1b \(test\)"):
            parse_sources([wrong])
    with pytest.raises(UserError, match="at least once"):
        parse_sources([])
    assert {one.normalizer for one in ZERO_SHOT.values()} == {
        "ptb",
        "wikitext",
        "lm1b",
        "lambada",
        "none",
        "scientific",
    }


def test_what_is_known_before_the_shards_are_there_is_compared_then() -> None:
    protocol = get_protocol("zero_shot/ptb")
    protocol.check_keys({"row_length": 1024, "vocab_size": 50257})
    for key, found in (("row_length", 128), ("row_specials", False), ("vocab_size", 27)):
        with pytest.raises(UserError, match=rf"needs shards with data\.{key} .*, these have {found}"):
            protocol.check_keys({"row_length": 1024, key: found})
