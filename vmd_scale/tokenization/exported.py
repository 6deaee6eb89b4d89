"""What transformers' AutoTokenizer reads: tokenizer.json with the mask in it, and tokenizer_config.json.

The mask of the diffusion belongs to no tokenizer of ours (see the package), but a stranger wants to write "a [MASK] b".
So the exported tokenizer.json has one token more than what it was made from, which is beside it: that is what this
project reads, and what gives a run that continues from an exported folder the same fingerprint.
"""

import json
from typing import Any

import tokenizers

from vmd_scale.tokenization.interface import MASK_TEXT

TOKENIZER_JSON, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
PLAIN = "tokenizer.plain.json"  # the tokenizer.json without the mask
ORIGINAL = "vmd_scale_original"  # key of tokenizer_config.json: the file that this project reads instead
TOKENIZER_FILES = ("characters.json", "symbols.json", "spiece.model", PLAIN, TOKENIZER_JSON, TOKENIZER_CONFIG)


def exported_files(
    serialized: str,
    mask_id: int,
    specials: dict[str, str | None],
    original: str | None = None,
    joins_spaces: bool = False,
) -> dict[str, bytes]:
    """tokenizer.json and tokenizer_config.json.

    Args:
        serialized: a tokenizer.json that knows no mask.
        specials: bos_token, eos_token, pad_token, unk_token.
        original: name of the file that this project reads instead.
        joins_spaces: whether a space is part of the token after it. Then the mask stands for it too, as in RoBERTa:
            "a [MASK] b" is a, the mask, " b".

    Raises:
        RuntimeError: the library gives the mask another id.
    """
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "mask_token": MASK_TEXT,
    }
    settings |= {key: token for key, token in specials.items() if token is not None}
    if original is not None:
        settings[ORIGINAL] = original
    if joins_spaces:  # in full: by its text alone, transformers would put a token without that into the place of ours
        settings["mask_token"] = {"__type": "AddedToken", "content": MASK_TEXT, "lstrip": True, "special": True}
    return {
        TOKENIZER_JSON: with_mask(serialized, mask_id, joins_spaces).encode(),
        TOKENIZER_CONFIG: (json.dumps(settings, indent=2) + "\n").encode(),
    }


def with_mask(serialized: str, mask_id: int, joins_spaces: bool = False) -> str:
    """A tokenizer.json in which "[MASK]" is `mask_id`, and which, like training, puts no tokens around a text.

    A "[MASK]" that the vocabulary has already, BERT's, which was never trained here, is renamed.

    Raises:
        RuntimeError: the library gives the mask another id.
    """
    description = json.loads(serialized)
    _rename(description, MASK_TEXT, f"{MASK_TEXT} of the vocabulary")
    _fill_holes(description, mask_id)
    description |= {"padding": None, "truncation": None}
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(description))
    if tokenizer.num_special_tokens_to_add(is_pair=False):
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(description | {"post_processor": None}))
    tokenizer.add_special_tokens([tokenizers.AddedToken(MASK_TEXT, lstrip=joins_spaces, normalized=False)])
    if (found := tokenizer.token_to_id(MASK_TEXT)) != mask_id:
        raise RuntimeError(f"{MASK_TEXT} became token {found} of tokenizer.json instead of {mask_id}")
    return tokenizer.to_str()


def _rename(description: dict[str, Any], old: str, new: str) -> None:
    """Rename a token, in place, if there is one of that name."""
    vocabulary = description["model"]["vocab"]
    if isinstance(vocabulary, dict):
        if old in vocabulary:
            vocabulary[new] = vocabulary.pop(old)
    else:  # of a unigram model: pieces and their scores, by id
        vocabulary[:] = [[new if piece == old else piece, score] for piece, score in vocabulary]
    for token in description["added_tokens"]:
        if token["content"] == old:
            token["content"] = new


def _fill_holes(description: dict[str, Any], size: int) -> None:
    """Name the ids below `size` that no token has, in place: the library numbers new tokens by counting old ones."""
    vocabulary = description["model"]["vocab"]
    if isinstance(vocabulary, dict):
        known = {*vocabulary.values(), *(token["id"] for token in description["added_tokens"])}
        vocabulary |= {f"[unused id {i}]": i for i in range(size) if i not in known}
