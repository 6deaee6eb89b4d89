"""Everything before the first step: what can be wrong is found here, on all ranks alike, before memory is taken."""

import logging
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from vmd_scale.config import Config
from vmd_scale.data.manifest import check_compatible, read_manifest
from vmd_scale.data.prepare import prepare
from vmd_scale.data.shards import ShardReader
from vmd_scale.data.verification import remember, verify_share
from vmd_scale.errors import UserError
from vmd_scale.evaluation.protocols import get_protocol
from vmd_scale.files import write_atomically
from vmd_scale.model.attention import flash_available
from vmd_scale.tokenization import Tokenizer
from vmd_scale.training.engine import check_deepspeed_keys, deepspeed_config, resolve_precision
from vmd_scale.training.fp8 import check_fp8
from vmd_scale.training.launch import World, world_size_from_environment
from vmd_scale.training.lock import RunLock
from vmd_scale.training.loop import Trainer
from vmd_scale.training.preflight import check_disk, check_ranks

PREPARATION_TIMEOUT = timedelta(days=7)
log = logging.getLogger(__name__)


def check_before_start(config: Config, world_size: int | None = None) -> None:
    """What can be known to be wrong before ranks meet.

    Args:
        world_size: number of ranks; None takes it from the environment.

    Raises:
        UserError: contradictions with the number of ranks, the precision or the `deepspeed` section; an attention
            kernel that is not there; unknown protocols.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check_deepspeed_keys(config)
    deepspeed_config(config, world_size or world_size_from_environment(), resolve_precision(config, device))
    if config.model.attention == "flash" and not flash_available():
        raise UserError("model.attention 'flash' needs a GPU and flash-attn (pip install flash-attn); or use 'auto'")
    if config.training.fp8:
        check_fp8(resolve_precision(config, device))
    for protocol in config.evaluation.protocols:
        get_protocol(protocol)


def prepare_together(config: Config, world: World, tokenizer: Tokenizer) -> None:
    """Rank 0 prepares the shards that are missing, the others wait; then all verify them.

    Raises:
        UserError: on every rank, what is wrong with the data.
    """
    group = dist.new_group(backend="gloo", timeout=PREPARATION_TIMEOUT)  # a corpus may take hours
    problem: list[str | None] = [None]
    if world.is_main:
        try:
            prepare(config.data)
        except UserError as error:
            problem = [str(error)]
    dist.broadcast_object_list(problem, src=0, group=group)
    if problem[0] is not None:
        raise UserError(problem[0])
    check_ranks(config, world)
    check_compatible(read_manifest(config.data.shards), config.data, tokenizer)
    _verify_together(config, world, group)
    dist.destroy_process_group(group)


def _verify_together(config: Config, world: World, group: dist.ProcessGroup) -> None:
    splits = ["train"]
    if config.evaluation.every:
        splits.append("validation")
        manifest = read_manifest(config.data.shards)
        for protocol in config.evaluation.protocols:
            get_protocol(protocol).check(manifest)
        if ShardReader(config.data.shards, "validation", manifest).rows < 2:
            raise UserError("evaluation.every: the validation split has 1 row, at least 2 are needed")
    answers: list[Any] = [None] * world.size
    mine = verify_share(config.data.shards, splits, world.rank, world.size)
    dist.all_gather_object(answers, mine, group=group)
    for problem, _ in answers:
        if problem is not None:
            raise UserError(problem)
    if world.is_main:
        remember(config.data.shards, [good for _, good in answers])


def pretrain(config: Config, run_folder: Path, world: World, tokenizer: Tokenizer) -> int:
    """Train, resuming where the run folder's newest whole checkpoint stands. Returns the exit code.

    Raises:
        UserError: another run holds the folder; no room for a checkpoint; a checkpoint that is not of this run.
        RunFailed: see `Trainer.train`.
    """
    lock, training = RunLock(run_folder), config.training
    try:
        _on_main(world, lock.acquire)
        trainer = Trainer(config, run_folder, world, tokenizer)
        _on_main(
            world,
            lambda: check_disk(run_folder, trainer.parameters, training.keep_checkpoints, bool(training.ema_decay)),
        )
        first = trainer.resume()
        if world.is_main:
            write_atomically(run_folder / "config.json", config.to_json())
        if first >= config.training.steps:
            log.info("nothing to do: %d steps are done, training.steps is %d", first, config.training.steps)
            trainer.record("finished", first)
            return 0
        code = trainer.train(first)
        world.barrier()
        return code
    finally:
        lock.release()


def _on_main(world: World, check: Callable[[], None]) -> None:
    """Do something on rank 0 that may end in a `UserError`; then it does on all."""
    problem: str | None = None
    if world.is_main:
        try:
            check()
        except (UserError, OSError) as error:
            problem = str(error)
    problem = world.first_problem(problem)
    if problem is not None:
        raise UserError(problem)
