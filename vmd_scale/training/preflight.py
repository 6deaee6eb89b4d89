"""Before the first step: do all ranks mean the same run, can they talk to each other, is there room on the disk?"""

import hashlib
import json
import logging
import secrets
import shutil
import socket
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from vmd_scale.config import Config
from vmd_scale.data.manifest import MANIFEST
from vmd_scale.data.remote import is_remote, read_remote
from vmd_scale.errors import RunFailed, UserError
from vmd_scale.training.launch import World

log = logging.getLogger(__name__)


def check_ranks(config: Config, world: World) -> None:
    """All ranks must have the same configuration, code, versions and data, and an all-reduce must give the sum.

    Raises:
        UserError: on every rank; names what differs, and where.
    """
    mine = facts(config)
    everybody: list[Any] = [None] * world.size
    dist.all_gather_object(everybody, mine, group=world.host_group)
    for name, value in everybody[0].items():
        for rank, facts_there in enumerate(everybody):
            if facts_there[name] != value:
                raise UserError(f"{name} differs between ranks: {value} on rank 0, {facts_there[name]} on rank {rank}")
    found = torch.full((1024,), float(world.rank + 1), device=world.device)
    dist.all_reduce(found)
    wanted = world.size * (world.size + 1) / 2
    got = f"rank {world.rank}: an all-reduce gave {float(found[0])} instead of {wanted}"
    wrong = None if bool((found == wanted).all()) else got
    wrong = world.first_problem(wrong)
    if wrong is not None:
        raise UserError(f"{wrong}: the ranks' network or their devices are at fault")


def check_shared(folder: Path, world: World) -> None:
    """All ranks must see one and the same run folder: a checkpoint is made of files of all of them.

    Raises:
        UserError: on every rank; names a rank that does not see what rank 0 writes.
    """
    token = folder / world.from_main(lambda: f".shared-{secrets.token_hex(8)}")

    def look() -> None:
        if not token.exists():
            raise UserError(
                f"{folder}: rank {world.rank} on {socket.gethostname()} does not see what rank 0 writes there; "
                "--output must lie on a file system that all nodes share"
            )

    world.on_main(token.touch)
    try:
        world.on_all(look)
    finally:
        world.on_main(token.unlink)


def facts(config: Config) -> dict[str, str]:
    """What must be the same on all ranks, by name."""
    import deepspeed

    code = hashlib.sha256()
    package = Path(__file__).resolve().parents[1]
    for path in sorted(package.rglob("*.py")):
        code.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes())
    manifests = {f"the manifest in {data.shards}": data.shards for data in config.data.corpora()}
    return {
        "the configuration": _digest(json.dumps(config.model_dump(mode="json"), sort_keys=True).encode()),
        "the code of vmd_scale": code.hexdigest()[:12],
        "the version of torch": torch.__version__,
        "the version of deepspeed": deepspeed.__version__,
    } | {name: _digest_of_manifest(shards) for name, shards in manifests.items()}


def bytes_of_checkpoint(model: nn.Module, with_ema: bool) -> int:
    """In fp32: what is trained has masters, two moments and perhaps an average; what is frozen lies there once."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters()) - trained
    return 4 * (4 if with_ema else 3) * trained + 4 * frozen


def check_disk(folder: Path, each: int, keep: int, there: int = 0) -> None:
    """
    Args:
        each: bytes of a checkpoint.
        keep: checkpoints that are kept, of which so many are `there`.

    Raises:
        UserError: not even one checkpoint fits. (A warning, if it is fewer than will be kept.)
    """
    free = shutil.disk_usage(folder).free
    if free < each:
        raise UserError(f"{folder}: {free / 1e9:.2f} GB are free, and one checkpoint takes {each / 1e9:.2f} GB")
    missing = max(0, keep - there) + 1  # one is written before the oldest is thrown away
    if free < each * missing:
        log.warning(
            "%s: %.1f GB are free; %d checkpoints to come, one being written among them, take %.1f GB",
            folder,
            free / 1e9,
            missing,
            each * missing / 1e9,
        )


def _digest_of_manifest(shards: str) -> str:
    try:
        if is_remote(shards):
            return _digest(read_remote(f"{shards.rstrip('/')}/{MANIFEST}") or b"")
        return _digest((Path(shards) / MANIFEST).read_bytes())
    except OSError as error:  # on one node only, perhaps: then it is this that differs
        return f"unreadable ({error.strerror})"
    except (UserError, RunFailed) as error:
        return f"unreadable ({error})"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]
