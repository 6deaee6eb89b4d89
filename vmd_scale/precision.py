"""In which precision a network computes: asked for by a configuration or an option, and said of what it computed.

Losses, log-probabilities and draws are fp32 or float64 whatever it is.
"""

import torch

from vmd_scale.model import VMD

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PRECISIONS = ("auto", *DTYPES)


def precision_on(device: torch.device, wanted: str) -> str:
    """fp32 or bf16; auto is bf16 on a GPU that has it."""
    if wanted != "auto":
        return wanted
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"


def precision_of(model: VMD) -> str:
    """What its weights are in: fp32, bf16, or PyTorch's name of another one."""
    dtype = next(model.parameters()).dtype
    return next((name for name, known in DTYPES.items() if known == dtype), str(dtype).removeprefix("torch."))


def describe_kernels(model: VMD, precision: str, padded: bool, sampling: bool = False) -> str:
    """For the log: the precision, and by what kernel each network attends; see `VMD.attention_kernels`."""
    kernels = model.attention_kernels(DTYPES[precision], padded, sampling)
    return f"precision {precision}, attention: {', '.join(f'{k} by {v}' for k, v in kernels.items())}"
