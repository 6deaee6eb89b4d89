"""Kernels that give the same result each time, and where none is needed.

On a GPU the gradients of flash attention, among others, are sums in an order that changes from run to run. PyTorch has
slower kernels with a fixed order, and cuBLAS wants to be told before it is first used.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def be_deterministic() -> None:
    """From now on in this process; call it before anything is computed on a GPU.

    An operation that cannot then raises. Not merely a warning: PyTorch's attention takes its deterministic backward
    pass only where it must.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)


@contextmanager
def any_order() -> Iterator[None]:
    """Inside, rounding may change from time to time: on a GPU, the cumsum that draws tokens has no other form."""
    wanted = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(wanted)
