"""Sees what a step does: a test may assert why it is fast, without a clock."""

import sys
from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# What makes the host wait for a device. Reading a shape that depends on values does, too.
WAITS = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "masked_select", "unique_dim", "_unique2", "equal"}
WAITS |= {"repeat_interleave", "bincount"}
INDEXING = {"index", "index_put", "index_put_", "_unsafe_index", "_index_put_impl_"}  # they wait where an index is bool


class Watch(TorchDispatchMode):
    """Sees every operation, forward and backward."""

    def __init__(self):
        super().__init__()
        self.operations, self.waits, self.largest = Counter(), Counter(), 0
        self.waiting = Counter()  # by the code that asked for it, innermost outside of torch: file and function

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        self.operations[name] += 1
        if name in WAITS or (name in INDEXING and any(_is_bool(x) for x in tree_leaves(args[1]))):
            self.waits[name] += 1
            self.waiting[_caller()] += 1
        sizes = [x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.largest = max([self.largest, *sizes])
        return result


def _is_bool(x):
    return isinstance(x, torch.Tensor) and x.dtype in (torch.bool, torch.uint8)


def _caller():
    frame = sys._getframe(1)
    while "/torch/" in frame.f_code.co_filename or frame.f_code.co_filename == __file__:
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_code.co_name}"
