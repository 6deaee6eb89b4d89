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
        may_wait = name in WAITS or (name in INDEXING and any(_is_bool(x) for x in tree_leaves(args[1])))
        if may_wait and self.is_on_device((args, kwargs)):
            self.waits[name] += 1
            self.waiting[_caller()] += 1
        sizes = [x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.largest = max([self.largest, *sizes])
        return result

    def is_on_device(self, arguments):
        """Whether an operation is the device's business: here everything is."""
        return True


class DeviceWatch(Watch):
    """Plays a device that is not the host: on it is what was put there, and what was computed from that.

    `mixed`: operations of the named source file with arguments on both, where a real device refuses or waits.
    """

    def __init__(self, file):
        super().__init__()
        self.file, self.mixed, self._put = file, Counter(), {}

    def put(self, tensor):
        self._put[tensor.untyped_storage()._cdata] = tensor  # kept, so that no other one gets its place
        return tensor

    def is_on_device(self, arguments):
        return any(x.untyped_storage()._cdata in self._put for x in _tensors(arguments))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = super().__torch_dispatch__(function, types, args, kwargs)
        arguments = [x for x in _tensors((args, kwargs)) if x.dim()]
        there = [self.is_on_device(x) for x in arguments]
        if any(there) and not all(there) and self.file in _caller():
            self.mixed[f"{function} in {_caller()}"] += 1
        if any(there):
            for x in _tensors(result):
                self.put(x)
        return result


def _tensors(tree):
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


def _is_bool(x):
    return isinstance(x, torch.Tensor) and x.dtype in (torch.bool, torch.uint8)


def _caller():
    frame = sys._getframe(1)
    while "/torch/" in frame.f_code.co_filename or frame.f_code.co_filename == __file__:
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_code.co_name}"
