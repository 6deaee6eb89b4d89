"""Shards for the zero-shot protocols, prepared from the user's files as the protocol says."""

from collections.abc import Sequence
from pathlib import Path

from vmd_scale.config import DataConfig
from vmd_scale.data.prepare import prepare
from vmd_scale.errors import UserError
from vmd_scale.evaluation.protocols import ZERO_SHOT


def parse_sources(texts: Sequence[str]) -> dict[str, str]:
    """``ptb=ptb.valid.txt`` of a command line, as {set: file}.

    Raises:
        UserError: names what is wrong, and the sets that there are.
    """
    sources = {name: source for name, _, source in (text.partition("=") for text in texts)}
    for name, source in sources.items():
        if name not in ZERO_SHOT or not source:
            known = ", ".join(f"{key} ({one.split})" for key, one in ZERO_SHOT.items())
            raise UserError(f"--source {name}={source}: expected SET=FILE, or SET=hf:NAME; sets: {known}")
    if not sources:
        raise UserError("protocol zero_shot needs --source SET=FILE at least once, such as --source ptb=ptb.valid.txt")
    return sources


def prepare_set(name: str, source: str, trained_on: DataConfig, folder: Path) -> None:
    """Prepare one set with the run's tokenizer and rows in ``folder/name``, if it is not there.

    Raises:
        UserError: what is wrong with the source, or shards in the folder that were made of another one.
    """
    one = ZERO_SHOT[name]
    config = DataConfig(
        corpus=one.corpus,
        source={one.split: source},  # type: ignore[dict-item]  # a split's name
        tokenizer=trained_on.tokenizer,
        row_length=trained_on.row_length,
        row_specials=trained_on.row_specials,
        shards=str(folder / name),
    )
    prepare(config, progress=False)
