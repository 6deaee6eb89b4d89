"""Text clean-up before tokenization: pure functions from text to text, chosen by ``data.normalizer``."""

import re
from collections.abc import Callable

DIGIT_NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
_TEXT8_TABLE = {ord("A") + i: chr(ord("a") + i) for i in range(26)}
_TEXT8_TABLE |= {ord("0") + digit: f" {name} " for digit, name in enumerate(DIGIT_NAMES)}

_CONTRACTION = re.compile(r"(n't|'(s|t|m|d|re|ve|ll))$", re.IGNORECASE)
_CONTRACTED = {"s", "t", "m", "d", "re", "ve", "ll"}
_JOIN = re.compile(r"@([-.,/:])@")
_TO_THE_LEFT = {",", ".", ";", ":", "?", "!", ")", "]", "}", "%", "..."}
_TO_THE_RIGHT = {"(", "[", "{", "$", "£", "€", "#"}
_TO_BOTH = {"/"}


def to_text8_alphabet(text: str) -> str:
    """Lower-case a-z and single spaces; digits are spelled out, everything else becomes a space.

    The result starts with a space unless it is empty, as text8 itself does, so that such texts can be concatenated.

    >>> to_text8_alphabet("It's 42!")
    ' it s four two'
    """
    words = re.findall("[a-z]+", text.translate(_TEXT8_TABLE))
    return " " + " ".join(words) if words else ""


def detokenize_lm1b(text: str) -> str:
    """Undo the tokenised punctuation and contractions of the One Billion Word benchmark.

    Quotes open and close in turn. One without a partner closes when it ends the sentence or follows punctuation, and
    opens otherwise; an apostrophe after an s is the possessive of a plural.

    >>> detokenize_lm1b('He said : " We won \\'t pay $ 5 ( or more ) . "')
    'He said: "We won\\'t pay $5 (or more)."'
    """
    tokens = text.split()
    pieces: list[str] = []
    glue = True  # no space in front of the next token
    open_quotes: set[str] = set()
    for i, token in enumerate(tokens):
        left = right = False  # does the token lean on its neighbour?
        if token in ('"', "'"):
            left, right = _lean_of_quote(tokens, i, token in open_quotes)
            if token in open_quotes:
                open_quotes.remove(token)
            elif right and not left and token in tokens[i + 1 :]:
                open_quotes.add(token)
        elif join := _JOIN.fullmatch(token):
            token, left, right = join[1], True, True
        elif token in _TO_BOTH:
            left = right = True
        elif token in _TO_THE_LEFT or _CONTRACTION.match(token):
            left = True
        elif token in _TO_THE_RIGHT:
            right = True
        if not (glue or left):
            pieces.append(" ")
        pieces.append(token)
        glue = right
    return "".join(pieces)


def _lean_of_quote(tokens: list[str], i: int, is_open: bool) -> tuple[bool, bool]:
    """Whether the quote at i leans left (it closes) and right (it opens); an apostrophe may do both."""
    token = tokens[i]
    if is_open:
        return True, False
    before = tokens[i - 1] if i else ""
    if token == "'" and before and i + 1 < len(tokens) and tokens[i + 1].lower() in _CONTRACTED:
        return True, True  # Corp. ' s
    if token == "'" and before.endswith(("s", "S")):
        return True, False  # the workers ' rights
    closes = i > 0 and (i == len(tokens) - 1 or (token not in tokens[i + 1 :] and before in _TO_THE_LEFT))
    return closes, not closes


NORMALIZERS: dict[str, Callable[[str], str]] = {
    "none": lambda text: text,
    "text8": to_text8_alphabet,
    "lm1b": detokenize_lm1b,
}
