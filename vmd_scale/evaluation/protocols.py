"""Evaluation protocols by name: which rows are scored, and what their data must look like.

A perplexity means nothing without its protocol. `rows` scores the run's own rows, whatever they are; the others are
published ones and refuse shards that were prepared differently.
"""

from dataclasses import dataclass, field
from typing import Any

from vmd_scale.data.manifest import Manifest
from vmd_scale.errors import UserError


@dataclass(frozen=True)
class Protocol:
    name: str
    description: str
    requires: dict[str, Any] = field(default_factory=dict)  # keys of the manifest and their values

    def check(self, manifest: Manifest) -> None:
        """Raises `UserError` where the shards are not what the protocol says."""
        for key, wanted in self.requires.items():
            found = getattr(manifest, key)
            if found != wanted:
                raise UserError(
                    f"protocol {self.name} needs shards with data.{key} {wanted!r}, these have {found!r}; "
                    "protocol 'rows' scores whatever rows there are"
                )


LM1B = {"corpus": "lm1b", "normalizer": "lm1b", "vocab_size": 30522, "row_length": 128}  # bert-base-uncased

PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol("rows", "the run's own rows, as they were prepared"),
        Protocol(
            "text8",
            "27 symbols, 256 characters a row, non-overlapping (D3PM, MD4)",
            {"corpus": "text8", "tokenizer": "text8", "row_length": 256, "packing": "wrap", "row_specials": False},
        ),
        Protocol(
            "lm1b_packed",
            "sentences ended by [SEP], concatenated, 126 between [CLS] and [SEP] (MDLM's wrapped LM1B)",
            LM1B | {"packing": "wrap", "row_specials": True},
        ),
        Protocol(
            "lm1b_unpacked",
            "one sentence a row of 128; padding is neither attended nor counted",
            LM1B | {"packing": "pad"},
        ),
        Protocol(
            "owt_mdlm",
            "GPT-2 BPE, 1,022 tokens between two end-of-text tokens (MDLM)",
            {
                "corpus": "openwebtext",
                "vocab_size": 50257,
                "row_length": 1024,
                "packing": "wrap",
                "row_specials": True,
            },
        ),
    )
}


def get_protocol(name: str) -> Protocol:
    if name not in PROTOCOLS:
        raise UserError(f"protocol {name!r} does not exist; allowed: {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]
