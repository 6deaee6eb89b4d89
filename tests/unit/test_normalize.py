"""Clean-up before tokenization: what each normaliser does, and what it must leave alone."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmd_scale.data.normalize import NORMALIZERS

WORDS = st.lists(st.sampled_from(["boat", "Ship", "is", "the", "of", "rate"]), min_size=1, max_size=8).map(" ".join)


@pytest.mark.parametrize(
    ("name", "tokenised", "natural"),
    [
        ("ptb", "the company 's net fell N N to $ N million", "the company's net fell 1 1 to $1 million"),
        ("ptb", "N yields were # N higher", "N yields were #1 higher"),
        ("ptb", "it did n't say and\\/or do <unk> things", "it didn't say and/or do ? things"),
        ("ptb", "the workers ' rights", "the workers' rights"),
        ("wikitext", " = = Early life = = \n", " == Early life ==\n"),
        ("wikitext", "0 @.@ 7 – 2 @.@ 2 kg", "0.7 – 2.2 kg"),
        ("wikitext", "He said : yes ; no ! why ? well , then .", "He said: yes; no! why? well, then."),
        ("wikitext", "it ( the first [ of two ] ) is", "it (the first [of two]) is"),
        ("wikitext", 'a " big boat " and " small', 'a "big boat" and " small'),
        ("wikitext", "it is called ' the boat ' in England", "it is called 'the boat' in England"),
        ("wikitext", "the boat 's crew 'd say", "the boat's crew'd say"),
        ("wikitext", "at 5 ° C", "at 5°C"),
        ("wikitext", "about N boats", "about 1 boats"),
        ("wikitext", "one \n two", "one\ntwo"),
        ("lambada", "  “Go,” she said. ", '\n"Go," she said.'),
        ("scientific", "first line , as in ( 1 )\nwe do n't know", "first line, as in (1)\nwe don't know"),
        ("lm1b", 'He said : " I see .', 'He said: "I see.'),
        ("none", " a , b ", " a , b "),
    ],
)
def test_what_each_normaliser_does(name: str, tokenised: str, natural: str) -> None:
    assert NORMALIZERS[name](tokenised) == natural


@pytest.mark.parametrize("name", sorted(set(NORMALIZERS) - {"text8", "lambada"}))
@given(text=WORDS)
def test_plain_words_are_left_alone(name: str, text: str) -> None:
    assert NORMALIZERS[name](text) == text


@pytest.mark.parametrize("name", ["ptb", "wikitext", "lm1b", "scientific"])
@given(tokens=st.lists(st.sampled_from(["a", "cats", ",", ".", "(", ")", '"', "'s", "do", "n't", ":", "$", "5"])))
def test_only_spaces_move(name: str, tokens: list[str]) -> None:
    """But for numbers and rare words, which are none of these."""
    assert NORMALIZERS[name](" ".join(tokens)).replace(" ", "") == "".join(tokens)


@pytest.mark.parametrize("name", ["ptb", "wikitext", "scientific", "lm1b"])
@given(tokens=st.lists(st.sampled_from(["a", "cats", ",", ".", "(", ")", "of", "5", ";", "?"])))
def test_natural_text_is_not_changed_again(name: str, tokens: list[str]) -> None:
    natural = NORMALIZERS[name](" ".join(tokens))
    assert NORMALIZERS[name](natural) == natural
