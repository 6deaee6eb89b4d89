"""A SentencePiece unigram model as a tokenizer.json, for readers that have no SentencePiece: the same ids.

The .model is a protocol buffer, of which few fields matter; no library is needed to read them.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

SPACE = "\u2581"
UNIGRAM = 1  # TrainerSpec.ModelType
UNKNOWN = " \u2047 "  # what SentencePiece shows for it; no text spells it, as the spaces of a text become SPACE
APART = "\x01"  # no letter of any text
BYTE_LITERAL = "<(?=0x[0-9A-F]{2}>)"


class Kind(IntEnum):
    """ModelProto.SentencePiece.Type."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass
class SentencePieceModel:
    """What sentencepiece_model.proto calls ModelProto, as far as it decides ids. Defaults are the format's."""

    pieces: list[tuple[str, float, Kind]] = field(default_factory=list)
    model_type: int = UNIGRAM
    whitespace_as_suffix: bool = False
    byte_fallback: bool = False
    normalization: str = ""
    charsmap: bytes = b""
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True
    escape_whitespaces: bool = True


def unigram_as_json(model: bytes) -> str | None:
    """The text of a tokenizer.json, or None for what it cannot express: other than unigram models, spaces as suffixes.

    Ids are those of SentencePiece for any text, but that
    * a control symbol that a text spells ("<s>") is read as one, as everywhere in transformers;
    * of several marks on one letter, others may be composed with it, or come in Unicode's order;
    * of two segmentations that are exactly as probable ("000" as "00" "0"), the other one may be chosen.
    """
    parsed = parse(model)
    if parsed.model_type != UNIGRAM or parsed.whitespace_as_suffix or not parsed.escape_whitespaces:
        return None
    unknown = next((i for i, piece in enumerate(parsed.pieces) if piece[2] == Kind.UNKNOWN), None)
    vocabulary = _vocabulary(parsed)
    tokenizer = tokenizers.Tokenizer(models.Unigram(vocabulary, unknown, parsed.byte_fallback))
    tokenizer.normalizer = normalizers.Sequence(list(_normalizers(parsed)))
    # Pieces do not reach over words, unless trained so; a text that is cut into words is faster to encode.
    crossing = any(SPACE in piece[1:] for piece, _, kind in parsed.pieces if kind in (Kind.NORMAL, Kind.USER_DEFINED))
    splits = [] if crossing else [pre_tokenizers.Split(SPACE, "merged_with_next")]
    # A text that spells "<0x41>" is not that byte.
    apart = pre_tokenizers.Split(tokenizers.Regex(BYTE_LITERAL), "merged_with_previous")
    splits += [apart] if parsed.byte_fallback else []
    if splits:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + ([decoders.Strip(" ", 1, 0)] if parsed.add_dummy_prefix else []))
    tokenizer.add_special_tokens(
        [tokenizers.AddedToken(piece, normalized=False) for piece, _, kind in parsed.pieces if kind == Kind.CONTROL]
    )
    return tokenizer.to_str()


def _vocabulary(parsed: SentencePieceModel) -> list[tuple[str, float]]:
    """With the scores that SentencePiece uses: a user's symbol always wins over its parts.

    What is no text has the lowest one, from which the score of unknown characters is counted.
    """
    normal = [score for _, score, kind in parsed.pieces if kind == Kind.NORMAL]
    lowest, highest = min(normal, default=0.0), max(normal, default=0.0)

    def score_of(piece: str, score: float, kind: Kind) -> float:
        if kind == Kind.USER_DEFINED:
            return len(piece.encode()) * highest - 0.1
        return score if kind == Kind.NORMAL else lowest

    return [
        (UNKNOWN if kind == Kind.UNKNOWN else piece, score_of(piece, score, kind))
        for piece, score, kind in parsed.pieces
    ]


def _normalizers(parsed: SentencePieceModel) -> Iterator[normalizers.Normalizer]:
    """Where a table of normalization is applied, the library gives it a letter with all its marks.

    It then replaces the letter and drops the marks that the table does not know on it, or knows only some of. So what
    can be composed is composed before, and a character that the table takes out, or we do, keeps other marks apart.
    """
    if parsed.charsmap and parsed.normalization.removesuffix("_cf") in ("nfkc", "nmt_nfkc"):
        yield normalizers.NFC()
        yield normalizers.Replace(tokenizers.Regex(r"(?=\p{M})"), APART)
        yield normalizers.Precompiled(parsed.charsmap)
        yield normalizers.Replace(APART, "")
    elif parsed.charsmap:
        yield normalizers.Precompiled(parsed.charsmap)
    if parsed.remove_extra_whitespaces:
        yield normalizers.Replace(tokenizers.Regex(r"\A +"), "")
        yield normalizers.Replace(tokenizers.Regex(" {2,}"), " ")
    yield normalizers.Replace(" ", SPACE)
    if parsed.remove_extra_whitespaces:
        yield normalizers.Replace(tokenizers.Regex(rf"{SPACE}+\z"), "")
    if parsed.add_dummy_prefix:
        yield normalizers.Prepend(SPACE)


def parse(model: bytes) -> SentencePieceModel:
    """Raises `ValueError` for bytes that are no protocol buffer."""
    parsed = SentencePieceModel()
    for number, value in _fields(model):
        if number == 1:
            of_piece = dict(_fields(value))
            (score,) = struct.unpack("<f", of_piece.get(2, b"\0" * 4))
            parsed.pieces.append((of_piece[1].decode(), score, Kind(of_piece.get(3, Kind.NORMAL))))
        elif number == 2:
            trainer = dict(_fields(value))
            parsed.model_type = trainer.get(3, UNIGRAM)
            parsed.whitespace_as_suffix = bool(trainer.get(24, 0))
            parsed.byte_fallback = bool(trainer.get(35, 0))
        elif number == 3:
            normalizer = dict(_fields(value))
            parsed.normalization = normalizer.get(1, b"").decode()
            parsed.charsmap = normalizer.get(2, b"")
            parsed.add_dummy_prefix = bool(normalizer.get(3, 1))
            parsed.remove_extra_whitespaces = bool(normalizer.get(4, 1))
            parsed.escape_whitespaces = bool(normalizer.get(5, 1))
    return parsed


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of each field of a protocol buffer: whole numbers, and the bytes of all else."""
    at = 0

    def whole_number() -> int:
        nonlocal at
        value = shift = 0
        while True:
            if at >= len(message):
                raise ValueError("a protocol buffer that ends in the middle of a number")
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(message):
        key = whole_number()
        kind = key & 7
        if kind == 0:
            yield key >> 3, whole_number()
            continue
        if kind not in (1, 2, 5):
            raise ValueError(f"field {key >> 3} of a protocol buffer is of the unknown kind {kind}")
        size = {1: 8, 5: 4}.get(kind) or (whole_number() if kind == 2 else 0)
        yield key >> 3, message[at : at + size]
        at += size
