"""Each rank's fragments of the weights and of the optimizer's state, as safetensors files that any other run can read.

A tensor of a file is named KIND/PARAMETER/FIRST: the elements FIRST, FIRST + 1, ... of a parameter, flattened. KIND is
`master` and `ema` in the files weights-*, and the optimizer's own names (exp_avg, exp_avg_sq) in optimizer-*.
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
from vmd_scale.training.zero import Fragment, fragment_values

Sources = Mapping[str, list[Tensor]]  # kind -> flat tensors laid out like `ShardedMaster.partitions`
Index = dict[tuple[str, str], list[tuple[int, int, str]]]  # kind, parameter -> first element, size, file


def copy_to_host(fragments: Iterable[Fragment], sources: Sources) -> dict[str, Tensor]:
    """What a file will hold, out of reach of the steps that follow."""
    fragments = list(fragments)
    return {
        f"{kind}/{f.name}/{f.start}": fragment_values(f, partitions).detach().to("cpu", copy=True)
        for kind, partitions in sources.items()
        for f in fragments
    }


def shapes_of(fragments: Iterable[Fragment]) -> dict[str, str]:
    """The metadata of a file: the shapes of the parameters whose fragments it holds."""
    return {"shapes": json.dumps({f.name: f.shape for f in fragments})}


@torch.no_grad()
def load_fragments(folder: Path, pattern: str, fragments: Sequence[Fragment], targets: Sources, world: World) -> None:
    """Fill this rank's fragments from the files of whatever ranks wrote them. Called by all ranks together.

    Args:
        pattern: of the names of the files.
        targets: what is filled, by kind.

    Raises:
        UserError: elements that no file holds: another model's checkpoint.
    """
    index = _index(sorted(folder.glob(pattern)), world)
    problem: str | None = None
    with ExitStack() as stack:
        opened: dict[str, Any] = {}
        for kind, partitions in targets.items():
            for fragment in fragments:
                found, target = 0, fragment_values(fragment, partitions)
                for start, size, name in index.get((kind, fragment.name), ()):
                    first, last = max(start, fragment.start), min(start + size, fragment.start + fragment.size)
                    if first >= last:
                        continue
                    if name not in opened:
                        opened[name] = stack.enter_context(safe_open(folder / name, framework="pt"))
                    saved = opened[name].get_slice(f"{kind}/{fragment.name}/{start}")
                    target[first - fragment.start : last - fragment.start].copy_(saved[first - start : last - start])
                    found += last - first
                if found != fragment.size:
                    problem = f"{folder}: {kind} of {fragment.name} is incomplete in {pattern}"
    problem = world.first_problem(problem)
    if problem is not None:
        raise UserError(problem)


def _index(files: Sequence[Path], world: World) -> Index:
    """Where everything lies. Each rank reads the headers of its share of the files, and tells the others."""
    mine = []
    for path in files[world.rank :: world.size]:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a mapping
                kind, parameter, start = key.split("/")
                mine.append((kind, parameter, int(start), file.get_slice(key).get_shape()[0], path.name))
    shares: list[Any] = [None] * world.size
    dist.all_gather_object(shares, mine, group=world.host_group)
    index: Index = {}
    for kind, parameter, start, size, name in (record for share in shares for record in share):
        index.setdefault((kind, parameter), []).append((start, size, name))
    return index
