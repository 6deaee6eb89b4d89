"""Published figures by protocol, as their papers print them. Drift between protocols exceeds the gaps between methods.

A figure that couples the positions inside a step without a bound on that (EDLM, VADD) is marked: it is not a bound.
"""

from dataclasses import dataclass

PAPERS = {
    "D3PM": "arXiv 2107.03006",
    "SEDD": "arXiv 2310.16834",
    "MDLM": "arXiv 2406.07524",
    "MD4": "arXiv 2406.04329",
    "BD3-LM": "arXiv 2503.09573",
    "EDLM": "arXiv 2410.21357",
    "RDLM": "arXiv 2502.11564",
    "Duo": "arXiv 2506.10892",
    "LoMDM": "arXiv 2602.02112",
    "VADD": "arXiv 2505.17384",
    "re-run": "a user of kuleshov-group/mdlm, who evaluated the released weights",
}


@dataclass(frozen=True)
class Figure:
    model: str
    value: float
    unit: str  # bits per character | perplexity
    source: str  # the paper of the method, or the one that compared it with others
    is_bound: bool = True


def _figures(unit: str, *entries: tuple[str, float, str]) -> tuple[Figure, ...]:
    """Entries (model, value, paper); a model whose name ends in * has no bound."""
    return tuple(Figure(m.rstrip("*"), value, unit, PAPERS[paper], m[-1] != "*") for m, value, paper in entries)


def _zero_shot(mdlm: float, ar: float, rerun: float, vadd: float | None = None) -> tuple[Figure, ...]:
    entries = [("AR", ar, "MDLM"), ("MDLM", mdlm, "MDLM"), ("MDLM, weights run again", rerun, "re-run")]
    return _figures("perplexity", *entries, *([("VADD*", vadd, "VADD")] if vadd else []))


_TEXT8 = _figures(
    "bits per character",
    ("AR", 1.23, "D3PM"),
    ("D3PM absorb", 1.45, "D3PM"),
    ("SEDD", 1.39, "SEDD"),
    ("MDLM", 1.40, "MDLM"),
    ("MD4", 1.37, "MD4"),
    ("GenMD4", 1.34, "MD4"),
    ("RDLM", 1.32, "RDLM"),
    ("EDLM*", 1.24, "EDLM"),
)
_LM1B_UNPACKED = _figures(
    "perplexity",
    ("AR", 22.3, "MDLM"),
    ("SEDD", 32.79, "SEDD"),
    ("MDLM, 33 B tokens", 27.0, "MDLM"),
    ("MDLM, 327 B tokens", 23.0, "MDLM"),
    ("GenMD4", 26.9, "MD4"),
    ("LoMDM", 25.4, "LoMDM"),
    ("Duo", 29.9, "Duo"),
    ("VADD*", 20.53, "VADD"),
)
_LM1B_PACKED = _figures(
    "perplexity",
    ("AR", 22.83, "BD3-LM"),
    ("SEDD", 32.68, "BD3-LM"),
    ("MDLM", 31.78, "BD3-LM"),
    ("BD3-LM, blocks of 16", 30.60, "BD3-LM"),
    ("BD3-LM, blocks of 8", 29.83, "BD3-LM"),
    ("BD3-LM, blocks of 4", 28.23, "BD3-LM"),
    ("LoMDM", 27.2, "LoMDM"),
)
_OPENWEBTEXT = _figures(
    "perplexity",
    ("AR", 17.54, "BD3-LM"),
    ("SEDD", 24.10, "BD3-LM"),
    ("MDLM", 23.0, "BD3-LM"),
    ("MDLM", 23.2, "MDLM"),
    ("BD3-LM, blocks of 16", 22.27, "BD3-LM"),
    ("BD3-LM, blocks of 8", 21.68, "BD3-LM"),
    ("BD3-LM, blocks of 4", 20.73, "BD3-LM"),
    ("LoMDM", 20.4, "LoMDM"),
    ("Duo", 25.2, "Duo"),
    ("EDLM*", 17.58, "EDLM"),
)

PUBLISHED: dict[str, tuple[Figure, ...]] = {
    "text8": _TEXT8,
    "text8_mdlm": _TEXT8,
    "lm1b_packed": _LM1B_PACKED,
    "lm1b_unpacked": _LM1B_UNPACKED,
    "lm1b_unpacked_mdlm": _LM1B_UNPACKED,
    "owt_mdlm": _OPENWEBTEXT,
    "owt_bd3": _OPENWEBTEXT,
    "zero_shot/ptb": _zero_shot(95.26, 82.05, 83.82),
    "zero_shot/wikitext": _zero_shot(32.83, 25.75, 36.90, 34.78),
    "zero_shot/lm1b": _zero_shot(67.01, 51.25, 67.94, 69.71),
    "zero_shot/lambada": _zero_shot(47.52, 51.28, 48.40),
    "zero_shot/ag_news": _zero_shot(61.15, 52.09, 64.79, 68.0),
    "zero_shot/pubmed": _zero_shot(41.89, 49.01, 42.87, 40.62),
    "zero_shot/arxiv": _zero_shot(37.37, 41.73, 37.73, 36.39),
}

# Generative perplexity of packed LM1B by GPT-2 large, by the number of steps (VADD's paper).
GENERATIVE_STEPS = (1, 2, 4, 8, 16, 32, 64, 128)
GENERATIVE = {
    "MDLM": (1434, 998, 478, 261, 179, 149, 134, 126),
    "VADD": (1271, 763, 371, 221, 168, 140, 127, 118),
}


def generative_figures() -> str:
    """The published generative perplexities, as a text table."""
    lines = [f"published for lm1b_packed, generative perplexity by GPT-2 large  [{PAPERS['VADD']}]:"]
    lines.append("  T    " + "".join(f"{steps:>7}" for steps in GENERATIVE_STEPS))
    return "\n".join([*lines, *(f"  {m} " + "".join(f"{v:>7}" for v in values) for m, values in GENERATIVE.items())])


def figures_of(protocol: str) -> tuple[Figure, ...]:
    """Published figures of a protocol; empty where there are none."""
    return PUBLISHED.get(protocol, ())
