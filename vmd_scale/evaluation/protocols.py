"""Evaluation protocols by name: which rows are scored, which of their tokens count, and what the data must look like.

A perplexity means nothing without its protocol. `rows` scores the run's own rows, whatever they are; the others are
published ones and refuse shards that were prepared differently. A corpus that was prepared in the same way but is not
the published one, or not all of it, is scored with a caveat that stays with the result.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vmd_scale.data.manifest import Manifest
from vmd_scale.errors import UserError


class Scored(NamedTuple):
    """What is masked and what is counted of some rows; bool [B, L], `attend` may be None for all."""

    maskable: Tensor
    attend: Tensor | None
    counted: Tensor


@dataclass(frozen=True)
class Protocol:
    """A published way to score a corpus.

    Attributes:
        requires: keys of the manifest and their values; a tuple lists all that are allowed.
        published: what the manifest says of the published corpus, by split: {"test": {"documents": 6075}}; a tuple
            lists all that are published.
        first_given: the first token of a row stays clean and is not counted.
        pads_attended: padding is masked and attended as if it were text, though not counted.
    """

    name: str
    description: str
    requires: Mapping[str, Any] = field(default_factory=dict)
    published: Mapping[str, Mapping[str, int | tuple[int, ...]]] = field(default_factory=dict)
    first_given: bool = False
    pads_attended: bool = False

    def fits(self, manifest: Manifest) -> bool:
        """Whether `check` has nothing to say."""
        try:
            self.check(manifest)
        except UserError:
            return False
        return True

    def check(self, manifest: Manifest) -> None:
        """Raises `UserError` where the shards are not what the protocol says."""
        self.check_keys({key: getattr(manifest, key) for key in self.requires})

    def check_keys(self, known: Mapping[str, Any]) -> None:
        """`check`, where no more than some keys of a manifest are known yet."""
        for key, wanted in self.requires.items():
            allowed = wanted if isinstance(wanted, tuple) else (wanted,)
            if key in known and known[key] not in allowed:
                raise UserError(
                    f"protocol {self.name} needs shards with data.{key} {' or '.join(map(repr, allowed))}, "
                    f"these have {known[key]!r}; protocol 'rows' scores whatever rows there are"
                )

    def caveat(self, manifest: Manifest, split: str) -> str | None:
        """Why a number on this split is not comparable with published ones; None when nothing speaks against it."""
        record, differences = manifest.splits[split], []
        for key, wanted in self.published.get(split, {}).items():
            found, allowed = getattr(record, key), wanted if isinstance(wanted, tuple) else (wanted,)
            if key == "documents":
                found += record.skipped_documents  # the published number is that of all
            if found not in allowed:
                differences.append(f"{found:,} {key} instead of {' or '.join(f'{n:,}' for n in allowed)}")
        if self.published and manifest.remark:
            differences.append(manifest.remark)
        if self.published and split not in self.published:
            differences.append(f"published on {' and '.join(self.published)}")
        return f"not the published {split} set: {', '.join(differences)}" if differences else None

    def score(self, maskable: Tensor, attend: Tensor | None) -> Scored:
        """Apply the protocol to the masks of prepared rows (`build.masks_of`)."""
        if self.first_given:
            maskable = maskable & (torch.arange(maskable.shape[1]) > 0)
        if self.pads_attended:
            return Scored(torch.ones_like(maskable), None, maskable)
        return Scored(maskable, attend, maskable)


# The number of characters, documents or sentences of the published sets tells whether one has them before one.
TEXT8 = {split: {"characters": 5_000_000} for split in ("validation", "test")}
# news.en.heldout-00000-of-00050 alone, or all 50 files of it, which are the Hugging Face data set's test split
LM1B_DOCUMENTS = (6_075, 306_688)
LM1B_TEST = {"test": {"documents": LM1B_DOCUMENTS}}
LM1B = {"corpus": "lm1b", "normalizer": "lm1b", "vocab_size": 30522, "row_length": 128}  # bert-base-uncased
GPT2_ROWS = {"vocab_size": 50257, "row_length": 1024, "packing": "wrap"}
OPENWEBTEXT = GPT2_ROWS | {"corpus": "openwebtext", "normalizer": "none"}
OPENWEBTEXT_VALIDATION = {"validation": {"documents": 100_000}}


@dataclass(frozen=True)
class ZeroShotSet:
    """A corpus that a model trained on OpenWebText is asked about."""

    corpus: str
    split: str
    normalizer: str
    documents: int | tuple[int, ...] | None  # of the published split, where their number is known


ZERO_SHOT = {
    "ptb": ZeroShotSet("ptb", "validation", "ptb", 3_370),
    "wikitext": ZeroShotSet("wikitext", "validation", "wikitext", 2_461),
    "lm1b": ZeroShotSet("lm1b", "test", "lm1b", LM1B_DOCUMENTS),
    "lambada": ZeroShotSet("lambada", "test", "lambada", 5_153),
    "ag_news": ZeroShotSet("ag_news", "test", "none", 7_600),
    "pubmed": ZeroShotSet("pubmed", "validation", "scientific", None),
    "arxiv": ZeroShotSet("arxiv", "validation", "scientific", None),
}


def _zero_shot(name: str, one: ZeroShotSet) -> Protocol:
    return Protocol(
        f"zero_shot/{name}",
        f"{one.corpus} ({one.split}) by a model of GPT-2 BPE rows of 1,024 between two end-of-text tokens (MDLM)",
        GPT2_ROWS | {"corpus": one.corpus, "normalizer": one.normalizer, "row_specials": True},
        {one.split: {} if one.documents is None else {"documents": one.documents}},
    )


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol("rows", "the run's own rows, as they were prepared"),
        Protocol(
            "text8",
            "27 symbols, 256 characters a row, non-overlapping; bits per character (D3PM, MD4)",
            {"corpus": "text8", "tokenizer": "text8", "row_length": 256, "packing": "wrap", "row_specials": False},
            TEXT8,
        ),
        Protocol(
            "text8_mdlm",
            "35 ids, 254 characters between [BOS] and [EOS], which are counted (MDLM)",
            {"corpus": "text8", "tokenizer": "text8_mdlm", "row_length": 256, "packing": "wrap", "row_specials": True},
            TEXT8,
        ),
        Protocol(
            "lm1b_packed",
            "sentences ended by [SEP], concatenated, 126 between [CLS] and [SEP] (MDLM's wrapped LM1B)",
            LM1B | {"packing": "wrap", "row_specials": True},
            LM1B_TEST,
        ),
        Protocol(
            "lm1b_unpacked",
            "one sentence a row of 128; padding is neither attended nor counted",
            LM1B | {"packing": "pad", "row_specials": True},
            LM1B_TEST,
        ),
        Protocol(
            "lm1b_unpacked_mdlm",
            "one sentence a row of 128; padding is masked and attended, though not counted: no bound (MDLM)",
            LM1B | {"packing": "pad", "row_specials": True},
            LM1B_TEST,
            pads_attended=True,
        ),
        Protocol(
            "lm1b_d3pm",
            "SentencePiece of 8,192 symbols, the corpus' own spelling, concatenated, 128 a row (D3PM)",
            {
                "corpus": "lm1b",
                "normalizer": "none",
                "vocab_size": 8192,
                "row_length": 128,
                "packing": "wrap",
                "row_specials": False,
            },
            LM1B_TEST,
        ),
        Protocol(
            "owt_mdlm",
            "GPT-2 BPE, 1,022 tokens between two end-of-text tokens (MDLM)",
            OPENWEBTEXT | {"row_specials": True},
            OPENWEBTEXT_VALIDATION,
        ),
        Protocol(
            "owt_bd3",
            "GPT-2 BPE, rows of 1,024 without specials; the first token is given and not counted (BD3-LM)",
            OPENWEBTEXT | {"row_specials": False},
            OPENWEBTEXT_VALIDATION,
            first_given=True,
        ),
        *(_zero_shot(name, one) for name, one in ZERO_SHOT.items()),
    )
}


def get_protocol(name: str) -> Protocol:
    """Raises `UserError` for a name that does not exist."""
    if name not in PROTOCOLS:
        raise UserError(f"protocol {name!r} does not exist; allowed: {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]
