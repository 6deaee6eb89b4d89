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
    """Undo the tokenized punctuation and contractions of the One Billion Word benchmark.

    Quotes open and close in turn. One without a partner closes when it ends the sentence or follows punctuation other
    than a colon, and opens otherwise; an apostrophe after an s is the possessive of a plural.

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
    closes = i > 0 and (i == len(tokens) - 1 or (token not in tokens[i + 1 :] and before in _TO_THE_LEFT - {":"}))
    return closes, not closes


def detokenize_ptb(text: str) -> str:
    """Undo the tokens of the Penn Treebank file: contractions, \\\\/, N for a number, <unk> for a rare word.

    >>> detokenize_ptb("the traders ' union does n't want $ N from <unk> 's fund")
    "the traders' union doesn't want $1 from ?'s fund"
    """
    text = re.sub(r"(?<=s) '(?= )", "'", text)
    text = re.sub(r" (?='s|n't)", "", text).replace("\\/", "/")
    text = re.sub(r"(?<= )N(?= )", "1", text)
    return re.sub(r"(?<=[$#]) (?=1)", "", text).replace("<unk>", "?")


def detokenize_wikitext(text: str) -> str:
    """Undo the tokens of WikiText: @-@, punctuation, brackets, quotes in pairs, headings, N for a number.

    >>> detokenize_wikitext('a 1 @,@ 500 @-@ kg " boat " ( or ship ) , so to speak .')
    'a 1,500-kg "boat" (or ship), so to speak.'
    """
    text = re.sub(r"(?<=s) '", "'", text)
    text = re.sub(r" @([-,.])@ ", r"\1", text)
    text = re.sub(r" (?=[:;.!?,](?:\s|$))", "", text)
    text = re.sub(r"(?<=[(\[{])\s+|\s+(?=[)\]}])", "", text)
    text = re.sub(r" '(s|t|m|d|re|ve|ll)\b", r"'\1", text)
    text = re.sub(r"(?<!\w)'\s+([^']+?)\s+'", r"'\1'", _tighten_quotes(text))
    text = re.sub(r"=(?: =)+", lambda found: found[0].replace(" ", ""), text)
    text = text.replace(" ° ", "°")
    text = re.sub(r" *\n *", "\n", text)
    return re.sub(r"(?<= )N(?= )", "1", text)


def _tighten_quotes(text: str) -> str:
    """No space inside a pair of double quotes; a last one without a partner is left alone."""
    parts = text.split('"')
    return '"'.join(part.strip() if n % 2 and n < len(parts) - 1 else part for n, part in enumerate(parts))


def normalize_lambada(text: str) -> str:
    """Plain double quotes, and a newline in front.

    >>> normalize_lambada(" “Go,” she said ")
    '\\n"Go," she said'
    """
    return "\n" + text.replace("“", '"').replace("”", '"').strip()


def detokenize_scientific(text: str) -> str:
    """arXiv and PubMed articles: WikiText's rules, then LM1B's, line by line."""
    return "\n".join(detokenize_lm1b(line) for line in detokenize_wikitext(text).split("\n"))


NORMALIZERS: dict[str, Callable[[str], str]] = {
    "none": lambda text: text,
    "text8": to_text8_alphabet,
    "lm1b": detokenize_lm1b,
    "ptb": detokenize_ptb,
    "wikitext": detokenize_wikitext,
    "lambada": normalize_lambada,
    "scientific": detokenize_scientific,
}
