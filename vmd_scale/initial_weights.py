"""`training.init_from`: the weights that a new run starts from, wherever they come from (weight_sources.py).

What the new model has and the old one has not must be a whole latent part, time conditioning or an adapter: it starts
fresh, and a model that gets it computes at first what it did before. Weights that depend on z must come with the
encoder that gives z its meaning. What only the old one has must be a whole such part. The row may become shorter.
"""

import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vmd_scale.adapters import LATENT_PARTS, matches, occurs
from vmd_scale.errors import UserError
from vmd_scale.model import VMD
from vmd_scale.weight_sources import read_weights

OPTIONAL = (*LATENT_PARTS, "denoiser.time_to_condition.*")
ADAPTERS = ("*.lora_a", "*.lora_b")
INJECTION = ("denoiser.latent_to_condition.*", "denoiser.latent_to_embedding.*")
MODULATION = "denoiser.blocks.*.modulation.*"  # of which time conditioning, and MDLM's constant, have a part too
POSITION = "position.weight"
WITHOUT_ENCODER = (
    "the model is conditioned on z but comes without its encoder, and a new one would make z meaningless; "
    "export it again with --encoder, or go on without a latent (latent.width=0)"
)
SECTIONS = "do the sections model and latent match the old configuration?"
log = logging.getLogger(__name__)


class Misfit(Exception):
    """How weights do not fit a model, in words."""


@dataclass(frozen=True)
class Fit:
    """What becomes of weights in a model."""

    filled: dict[str, Tensor]  # fp32 by the model's names, in its shapes
    fresh: list[str]  # what only the model has
    left_out: list[str]  # what only the weights have


def initialize_from(model: VMD, source: str, fingerprint: str | None = None) -> dict[str, Tensor]:
    """Fill `model` with the weights of `source`, in place.

    Args:
        fingerprint: of the tokenizer; compared where the source knows its own.

    Returns:
        What it was filled with: fp32 by parameter name, whatever becomes of the model.

    Raises:
        UserError: see `fit`.
    """
    found = fit(model, source, fingerprint)
    model.load_state_dict(found.filled, strict=False)
    _silence(model, found.fresh)
    fresh = f"; fresh: {_parts(found.fresh)}" if found.fresh else ""
    left_out = f"; left out: {_parts(found.left_out)}" if found.left_out else ""
    log.info("weights from %s: %d tensors%s%s", source, len(found.filled), fresh, left_out)
    return found.filled


def fit(model: VMD, source: str, fingerprint: str | None = None) -> Fit:
    """What becomes of the weights of `source` in `model`, which is left as it is.

    With a model on the meta device this is cheap, whatever the size: names and shapes are compared, no value is read.

    Raises:
        UserError: nothing there, not readable, another tokenizer, or weights that do not fit.
    """
    on_meta = next(model.parameters()).is_meta
    weights, its_fingerprint = read_weights(source, model.architecture, torch.device("meta" if on_meta else "cpu"))
    try:
        if fingerprint and its_fingerprint and its_fingerprint != fingerprint:
            raise Misfit(
                f"trained with a tokenizer of fingerprint {its_fingerprint[:12]}, but data.tokenizer has "
                f"{fingerprint[:12]}"
            )
        return _fit(model.state_dict(), weights)
    except Misfit as how:
        raise UserError(f"training.init_from {source}: {how}") from None


def _fit(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Fit:
    fresh = [name for name in own if name not in weights]
    left_out = [name for name in weights if name not in own]
    _check_fresh(fresh, own, weights)
    _check_left_out(left_out, own)
    filled = {name: _in_shape(name, value, own[name].shape) for name, value in weights.items() if name in own}
    return Fit(filled, fresh, left_out)


def _check_fresh(fresh: Iterable[str], own: Iterable[str], weights: Iterable[str]) -> None:
    """Adapters start fresh, and parts that the weights have nothing of; an encoder only if nothing depends on z yet."""
    listens = any(occurs(part, weights) for part in INJECTION)
    if occurs("encoder.*", own) and not occurs("encoder.*", weights) and listens:
        raise Misfit(WITHOUT_ENCODER)
    begun = [part for part in OPTIONAL if part != MODULATION and occurs(part, weights)]
    whole = [name for name in fresh if not matches(name, ADAPTERS)]
    needed = [name for name in whole if not matches(name, OPTIONAL) or matches(name, begun)]
    if needed:
        raise Misfit(f"has no {', '.join(needed[:4])}{' ...' if len(needed) > 4 else ''}; {SECTIONS}")


def _check_left_out(left_out: Iterable[str], own: Iterable[str]) -> None:
    """Only parts that the model has nothing of."""
    unwanted = [part for part in OPTIONAL if not occurs(part, own)]
    unused = [name for name in left_out if not matches(name, unwanted)]
    if unused:
        raise Misfit(f"this model has no place for {unused[0]} ({len(unused)} such tensors); {SECTIONS}")


def _in_shape(name: str, value: Tensor, wanted: torch.Size) -> Tensor:
    """A row may become shorter; all else has the model's shape already."""
    is_position = name.endswith(POSITION)
    if is_position and value.shape[0] > wanted[0] and value.shape[1:] == wanted[1:]:
        value = value[: wanted[0]]
    if value.shape != wanted:
        why = "; a row may become shorter, not longer (data.row_length)" if is_position else ""
        raise Misfit(f"{name} is {list(value.shape)}, this model's is {list(wanted)}{why}")
    return value


def _silence(model: VMD, fresh: Collection[str]) -> None:
    """Make parts that start fresh say nothing at first. Fresh modulations are zero already, trained ones are not."""
    layers = ["latent_to_embedding", "prior_network.out"]  # of which zeros are the prior N(0, I)
    if "denoiser.blocks.0.modulation.weight" not in fresh:
        layers += ["latent_to_condition.2", "time_to_condition.2"]
    for name, parameter in model.named_parameters():
        if name in fresh and name.rpartition(".")[0].removeprefix("denoiser.") in layers:
            nn.init.zeros_(parameter)


def _parts(names: Iterable[str]) -> str:
    """Not every tensor."""
    return ", ".join(sorted({".".join(name.split(".")[:2]) for name in names}))
