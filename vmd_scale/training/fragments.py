"""Each rank's fragments of the weights and of the optimizer's state, as safetensors files that any other run can read.

A tensor of a file is named KIND/PARAMETER/FIRST: the elements FIRST, FIRST + 1, ... of a parameter, flattened. KIND is
`master`, `ema` and `frozen` (what is not trained) in the files weights-*, and the optimizer's own names (exp_avg,
exp_avg_sq) in optimizer-*.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from vmd_scale.errors import UserError
from vmd_scale.training.launch import World
from vmd_scale.training.zero import Fragment, fragment_values, held

Sources = Mapping[str, list[Tensor]]  # kind -> flat tensors laid out like `ShardedMaster.partitions`
Record = tuple[str, str, int, int, Path]  # kind, parameter, first element, size, file
Index = dict[tuple[str, str], list[tuple[int, int, Path]]]  # kind, parameter -> first element, size, file


def copy_to_host(fragments: Sequence[Fragment], sources: Sources, buffers: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a file will hold, out of reach of the steps that follow.

    Args:
        buffers: memory of the call before, which is used again (new memory costs more than the copy); grows as needed.
    """
    on_gpu, contents = False, {}
    for kind, partitions in sources.items():
        for f in held(fragments, partitions):
            values, name = fragment_values(f, partitions).detach(), f"{kind}/{f.name}/{f.start}"
            on_gpu |= values.is_cuda
            if name not in buffers:
                buffers[name] = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
            contents[name] = buffers[name].copy_(values, non_blocking=True)
    if on_gpu:
        torch.cuda.synchronize()
    return contents


def shapes_of(fragments: Iterable[Fragment]) -> dict[str, str]:
    """The metadata of a file: the shapes of the parameters whose fragments it holds."""
    return {"shapes": json.dumps({f.name: f.shape for f in fragments})}


@torch.no_grad()
def load_fragments(files: Sequence[Path], fragments: Sequence[Fragment], targets: Sources, world: World) -> None:
    """Fill this rank's fragments from the files of whatever ranks wrote them. Called by all ranks together.

    Args:
        files: all of a kind, in the order of the ranks that wrote them.
        targets: what is filled, by kind.

    Raises:
        UserError: elements that no file holds: another model's checkpoint.
    """
    wanted = {(kind, f.name, f.start): f.size for kind, values in targets.items() for f in held(fragments, values)}
    own = _headers(files[world.rank :][:1]) if len(files) == world.size else []
    (elastic,) = world.any({record[:3]: record[3] for record in own if record[0] in targets} != wanted)
    index = _index(_of_all_ranks(files, world) if elastic else own)
    problem: str | None = None
    with ExitStack() as stack:
        opened: dict[Path, Any] = {}
        for kind, partitions in targets.items():
            for fragment in held(fragments, partitions):
                target = fragment_values(fragment, partitions)
                if _fill(target, kind, fragment, index, opened, stack) != fragment.size:
                    problem = f"{files[0].parent}: {kind} of {fragment.name} is incomplete"
    problem = world.first_problem(problem)
    if problem is not None:
        raise UserError(problem)


def _fill(
    target: Tensor, kind: str, fragment: Fragment, index: Index, opened: dict[Path, Any], stack: ExitStack
) -> int:
    """Read what overlaps a fragment. Returns the number of elements found."""
    found = 0
    for start, size, path in index.get((kind, fragment.name), ()):
        first, last = max(start, fragment.start), min(start + size, fragment.start + fragment.size)
        if first >= last:
            continue
        if path not in opened:
            opened[path] = stack.enter_context(safe_open(path, framework="pt"))
        saved = opened[path].get_slice(f"{kind}/{fragment.name}/{start}")
        target[first - fragment.start : last - fragment.start].copy_(saved[first - start : last - start])
        found += last - first
    return found


def _headers(files: Iterable[Path]) -> list[Record]:
    """What files hold, without reading it."""
    records = []
    for path in files:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a mapping
                kind, parameter, start = key.split("/")
                records.append((kind, parameter, int(start), file.get_slice(key).get_shape()[0], path))
    return records


def _of_all_ranks(files: Sequence[Path], world: World) -> list[Record]:
    """Each rank reads the headers of its share of the files, and tells the others."""
    shares: list[Any] = [None] * world.size
    dist.all_gather_object(shares, _headers(files[world.rank :: world.size]), group=world.host_group)
    return [record for share in shares for record in share]


def _index(records: Iterable[Record]) -> Index:
    index: Index = {}
    for kind, parameter, start, size, path in records:
        index.setdefault((kind, parameter), []).append((start, size, path))
    return index
