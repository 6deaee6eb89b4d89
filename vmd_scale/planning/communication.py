"""Seconds that collectives take: rings and trees over a net of nodes, by the alpha-beta model.

A message of n bytes costs `latency + n / bandwidth` (Hockney, Parallel Computing 20, 1994; Thakur, Rabenseifner and
Gropp, IJHPCA 19, 2005). A ring of p ranks moves 2 (p - 1) / p of the bytes through every link in 2 (p - 1) steps
(Patarasu and Yuan, JPDC 69, 2009); a double binary tree moves 2 x the bytes in 2 log2 p steps (Sanders, Speck and
Traeff, Parallel Computing 35, 2009), which is what NCCL changes to where the ring's steps would cost more.
"""

import math
from typing import NamedTuple

from vmd_scale.planning.hardware import GPU
from vmd_scale.planning.zero import Zero

INSIDE_LATENCY = 3e-6  # seconds a step, between the GPUs of a node
BETWEEN_LATENCY = 12e-6  # between nodes, with the collective library's own share
ATTAINED = 0.8  # of the links' bandwidth, by large messages


def all_reduce(size: float, ranks: int, gpu: GPU) -> float:
    """Seconds for the sum of `size` bytes: reduce-scatter in the nodes, all-reduce between them, all-gather.

    Large messages go in pieces, one phase of one beside another phase of the next: the slower net decides.
    """
    nodes, local = _nodes(ranks, gpu)
    inside = 2 * _ring_bytes(size, local) / (ATTAINED * gpu.inside)
    latency = 2 * (local - 1) * INSIDE_LATENCY
    if nodes == 1:
        return inside + latency
    share, bandwidth = size / local, ATTAINED * gpu.between  # each GPU of a node has a port of its own
    ring = max(inside, 2 * _ring_bytes(share, nodes) / bandwidth) + 2 * (nodes - 1) * BETWEEN_LATENCY
    tree = max(inside, 2 * share / bandwidth) + 2 * math.log2(nodes) * BETWEEN_LATENCY
    return latency + min(ring, tree)


def all_gather(size: float, ranks: int, gpu: GPU) -> float:
    """Seconds until all ranks have the whole of `size` bytes; a reduce-scatter takes as long.

    Rings only: between nodes, latency grows with their number.
    """
    nodes, local = _nodes(ranks, gpu)
    inside = _ring_bytes(size, local) / (ATTAINED * gpu.inside)
    between = _ring_bytes(size / local, nodes) / (ATTAINED * gpu.between)
    return max(inside, between) + (local - 1) * INSIDE_LATENCY + (nodes - 1) * BETWEEN_LATENCY


class Communication(NamedTuple):
    """Seconds of an optimizer step, by the computation that they can hide behind."""

    forward: float
    backward: float
    alone: float  # behind none

    def exposed(self, forward: float, backward: float, hidden: float) -> float:
        """What is not hidden.

        Args:
            forward, backward: seconds of computation that it may travel beside.
            hidden: at most this share of it is.
        """
        beside_forward, beside_backward = min(hidden * self.forward, forward), min(hidden * self.backward, backward)
        return sum(self) - beside_forward - beside_backward


def communication_of(
    zero: Zero, parameters: int, micro_batches: int, layers: int, ranks: int, gpu: GPU
) -> Communication:
    """Of an optimizer step.

    Args:
        micro_batches: accumulated in a step. Stages 2 and 3 reduce the gradients of each of them.
        layers: messages that the weights of stage 3 are gathered in.
    """
    if ranks == 1:
        return Communication(0.0, 0.0, 0.0)
    weights, gradients = zero.low * parameters, zero.sent * parameters
    # Stages 2 and 3 reduce gradients bucket by bucket, the last one when the backward pass has ended; and so does stage
    # 1 in a step's last micro-batch, where it overlaps.
    bucket = zero.bucket(parameters)
    last = (parameters % bucket or bucket) / parameters
    if zero.stage == 3:
        gathered = micro_batches * layers * all_gather(weights / layers, ranks, gpu)  # forward, and again backward
        reduced = micro_batches * all_gather(gradients, ranks, gpu)
        return Communication(gathered, gathered + (1 - last) * reduced, last * reduced)
    # DeepSpeed 0.19 sums all gradients on all ranks, of which each keeps its part; stage 2 at once.
    times = micro_batches if zero.stage == 2 else 1
    reduced = times * (all_gather if zero.scattered else all_reduce)(gradients, ranks, gpu)
    updated = all_gather(weights, ranks, gpu) if zero.stage > 0 else 0.0  # after the optimizer, before the next forward
    return Communication(0.0, (1 - last) * reduced, last * reduced + updated)


def _nodes(ranks: int, gpu: GPU) -> tuple[int, int]:
    """Nodes, and ranks in each of them."""
    local = min(ranks, gpu.in_node)
    return -(-ranks // local), local


def _ring_bytes(size: float, ranks: int) -> float:
    """That each link of a ring carries, in one direction, of a reduce-scatter or an all-gather of `size` bytes."""
    return (ranks - 1) / ranks * size
