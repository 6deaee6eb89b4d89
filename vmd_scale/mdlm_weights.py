"""A name map: weights of MDLM's DiT (arXiv 2406.07524; its `backbone`) as weights of our denoiser.

Published MDLM models do not depend on the time: they condition every block on the embedding of 0, which makes their
adaLN a constant that the bias of our modulation holds exactly. What the final layer's adaLN does is folded into the
last norm and the head. Rotary embedding, the order of q, k and v and the activation are the same.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from vmd_scale.errors import UserError
from vmd_scale.model import Architecture

MARK = "vocab_embed.embedding"
OF_BLOCK = {
    "norm1.weight": "norm_attention.weight",
    "norm2.weight": "norm_mlp.weight",
    "attn_qkv.weight": "attention.qkv.weight",
    "attn_out.weight": "attention.out.weight",
    "mlp.0.weight": "mlp.up.weight",
    "mlp.0.bias": "mlp.up.bias",
    "mlp.2.weight": "mlp.down.weight",
    "mlp.2.bias": "mlp.down.bias",
}


def is_mdlm(weights: Mapping[str, Tensor]) -> bool:
    return any(name.endswith(MARK) for name in weights)


def from_mdlm(weights: Mapping[str, Tensor], a: Architecture, origin: str) -> dict[str, Tensor]:
    """The denoiser's weights; latent parts are left out, they start fresh.

    Args:
        a: of the model that takes them.
        origin: named in errors.

    Raises:
        UserError: the architecture cannot compute what MDLM's does, has another number of layers, or a tensor is
            missing.
    """
    if not a.biases or not a.has_condition or a.norm != "layernorm" or a.mlp != "gelu" or a.tie_embeddings:
        raise UserError(
            f"training.init_from {origin}: MDLM's weights need model.biases=true, model.norm='layernorm', "
            "model.mlp='gelu', model.tie_embeddings=false, and model.time_conditioning=true or a latent with "
            "latent.injection='adaln'"
        )
    prefix = next(name for name in weights if name.endswith(MARK)).removesuffix(MARK)
    given = {name.removeprefix(prefix): value.float() for name, value in weights.items() if name.startswith(prefix)}
    layers = len({name.split(".")[1] for name in given if name.startswith("blocks.")})
    if layers != a.layers:
        raise UserError(
            f"training.init_from {origin}: MDLM's weights of {layers} layers, but model.layers is {a.layers}"
        )
    try:
        return _mapped(given, a)
    except KeyError as error:
        raise UserError(f"training.init_from {origin}: looks like MDLM's weights, but has no {error}") from None


def _mapped(given: Mapping[str, Tensor], a: Architecture) -> dict[str, Tensor]:
    condition = _constant_condition(given)
    embedding = given[MARK]
    ours = {"embedding.weight": embedding, "position.weight": torch.zeros(a.row_length, embedding.shape[1])}
    for number in range(a.layers):
        block = f"blocks.{number}"
        for theirs, name in OF_BLOCK.items():
            ours[f"{block}.{name}"] = given[f"{block}.{theirs}"]
        shifts = _linear(given, f"{block}.adaLN_modulation", condition).chunk(6)
        gate_less_one = [value - 1 if n in (2, 5) else value for n, value in enumerate(shifts)]  # ours is 1 + gate
        ours[f"{block}.modulation.bias"] = torch.cat(gate_less_one)
    shift, scale = _linear(given, "output_layer.adaLN_modulation", condition).chunk(2)
    head = given["output_layer.linear.weight"]
    ours["norm.weight"] = given["output_layer.norm_final.weight"] * (1 + scale)
    ours["head.weight"] = head[: a.vocab_size]  # the last symbol is the mask, which is never predicted
    ours["head.bias"] = (given["output_layer.linear.bias"] + head @ shift)[: a.vocab_size]
    return {f"denoiser.{name}": value for name, value in ours.items()}


def _constant_condition(given: Mapping[str, Tensor]) -> Tensor:
    """What every block is conditioned on at time 0, whose sinusoids are ones and zeros."""
    half = given["sigma_map.mlp.0.weight"].shape[1] // 2
    time = torch.cat((torch.ones(half), torch.zeros(half)))
    hidden = F.silu(_linear(given, "sigma_map.mlp.0", time))
    return F.silu(_linear(given, "sigma_map.mlp.2", hidden))


def _linear(given: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.linear(x, given[f"{name}.weight"], given[f"{name}.bias"])
