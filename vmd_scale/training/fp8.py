"""Linear layers of the blocks in fp8, through torchao: from Hopper on, matrix units are twice as fast in it."""

import torch
from torch import nn

from vmd_scale.errors import UserError
from vmd_scale.model import VMD

MULTIPLE = 16  # what the kernels want of both sides of a matrix


def check_fp8(precision: str) -> None:
    """
    Raises:
        UserError: no GPU that has it, no torchao, or weights that are not bf16.
    """
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9):
        found = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
        raise UserError(
            f"training.fp8 needs a GPU of compute capability 8.9 or newer (H100, H200, B200): found {found}"
        )
    if precision != "bf16":
        raise UserError(f"training.fp8 needs training.precision 'bf16', found {precision!r}")
    try:
        import torchao.float8  # noqa: F401
    except ImportError as error:
        raise UserError(f"training.fp8 needs torchao (pip install torchao): {error}") from None


def convert_to_fp8(model: VMD) -> None:
    """In place, before blocks are compiled. Weights stay bf16 parameters with fp32 masters: ZeRO sees no difference.

    Each tensor is scaled by its own largest value. Embeddings, head, latent and modulations stay in bf16.
    """
    from torchao.float8 import convert_to_float8_training

    for stack in model.stacks:
        convert_to_float8_training(stack, module_filter_fn=_is_fit)


def _is_fit(module: nn.Module, name: str) -> bool:
    fits = isinstance(module, nn.Linear) and not (module.in_features % MULTIPLE or module.out_features % MULTIPLE)
    return fits and not name.endswith("modulation")
