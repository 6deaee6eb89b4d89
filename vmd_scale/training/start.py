"""Everything before the first step: what can be wrong is found here, on all ranks alike, before memory is taken."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from vmd_scale.build import Parts
from vmd_scale.checkpoints import all_checkpoints
from vmd_scale.config import Config
from vmd_scale.data.manifest import check_compatible, read_manifest, unigram_bits_per_token
from vmd_scale.data.prepare import prepare_all
from vmd_scale.data.verification import remember, verify_share
from vmd_scale.determinism import be_deterministic
from vmd_scale.errors import UserError
from vmd_scale.evaluation.protocols import get_protocol
from vmd_scale.files import check_writable, write_atomically, write_json
from vmd_scale.initial_weights import fit
from vmd_scale.model.attention import flash_available
from vmd_scale.tokenization import Tokenizer, keep_tokenizer, load_tokenizer
from vmd_scale.training.engine import check_deepspeed_keys, deepspeed_config, resolve_precision
from vmd_scale.training.fp8 import check_fp8
from vmd_scale.training.launch import World, joined_world, world_size_from_environment
from vmd_scale.training.lock import RunLock
from vmd_scale.training.loop import Trainer
from vmd_scale.training.preflight import check_disk, check_ranks, check_shared
from vmd_scale.training.same_run import check_newest
from vmd_scale.training.telemetry import FACTS, start_logging

PREPARATION_TIMEOUT = timedelta(days=7)
log = logging.getLogger(__name__)


def check_before_start(config: Config, world_size: int | None = None) -> None:
    """What can be known to be wrong before ranks meet.

    Args:
        world_size: number of ranks; None takes it from the environment.

    Raises:
        UserError: contradictions with the number of ranks, the precision or the `deepspeed` section; unknown protocols.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = resolve_precision(config, device)
    check_settings(config, world_size or world_size_from_environment(), precision)
    if config.training.fp8:
        check_fp8(precision)


def check_settings(config: Config, world_size: int, precision: str) -> None:
    """The part of `check_before_start` that needs nothing of the machine that trains; `precision`: fp32 | bf16."""
    check_deepspeed_keys(config)
    deepspeed_config(config, world_size, precision)
    for protocol in config.evaluation.protocols:
        if get_protocol(protocol).pads_attended:
            raise UserError(
                f"evaluation.protocols: {protocol!r} is an estimate of published code and bounds nothing, so that it "
                "cannot say which checkpoint is best; evaluate.py computes it"
            )


def check_attention(config: Config) -> None:
    """Try the kernel, on this rank's own GPU: not before `join_world`, which chooses it.

    Raises:
        UserError: it is not there, or does not work.
    """
    if config.model.attention == "flash" and not flash_available(config.head_width):
        raise UserError("model.attention 'flash' needs a GPU and flash-attn (pip install flash-attn); or use 'auto'")


def check_beginning(config: Config, run_folder: Path, tokenizer: Tokenizer, parts: Parts) -> None:
    """What is wrong with a run's model, its first weights or its folder, before a corpus is prepared for hours.

    The model is built without memory for it. Of the weights, names and shapes are compared; what is damaged inside of
    a file is found when it is read.

    Raises:
        UserError: patterns of names that nothing has; see `initial_weights.fit`, `check_newest`.
    """
    resumes = True
    with suppress(OSError):  # unreadable: resuming finds out
        resumes = bool(all_checkpoints(run_folder / "checkpoints"))
    check_newest(config, tokenizer.fingerprint, run_folder)
    try:
        with torch.device("meta"):
            model = parts.model(config, tokenizer.vocab_size)
    except (NotImplementedError, RuntimeError):  # a model of one's own that computes something while it is built
        return
    if config.training.init_from is not None and not resumes:
        fit(model, config.training.init_from, tokenizer.fingerprint)


def prepare_together(config: Config, world: World, tokenizer: Tokenizer) -> None:
    """Rank 0 prepares the shards that are missing, the others wait; then all verify them.

    Raises:
        UserError: on every rank, what is wrong with the data.
        RunFailed: on every rank, the preparation broke off.
    """
    splits = ["train", "validation"] if config.evaluation.every else ["train"]
    with patient_group() as group:
        world.on_main(lambda: prepare_all(config.data, enough=splits), group)
        check_ranks(config, world)
        world.on_all(lambda: _check_manifests(config, tokenizer), group)
        _verify_together(config, splits, world, group)


@contextmanager
def patient_group() -> Iterator[dist.ProcessGroup]:
    """Of all ranks, for what may take hours, such as preparing a corpus."""
    group = dist.new_group(backend="gloo", timeout=PREPARATION_TIMEOUT)
    yield group
    dist.destroy_process_group(group)


def _check_manifests(config: Config, tokenizer: Tokenizer) -> None:
    for data in config.data.corpora():
        check_compatible(read_manifest(data.shards), data, tokenizer)


def _verify_together(config: Config, splits: list[str], world: World, group: dist.ProcessGroup) -> None:
    if "validation" in splits:
        manifest = read_manifest(config.data.shards)
        for protocol in config.evaluation.protocols:
            get_protocol(protocol).check(manifest)
        record = manifest.splits.get("validation")
        if record is not None and record.rows < 2:  # one that is missing is named below
            raise UserError("evaluation.every: the validation split has 1 row, at least 2 are needed")
    for data in config.data.corpora():
        verify_together(data.shards, splits, world, group)
        splits = ["train"]  # of those of a mixture


def verify_together(
    shards: str, splits: Sequence[str], world: World | None, group: dist.ProcessGroup | None = None
) -> None:
    """Compare the checksums of the shards of some splits, each file on one rank; without a world all of them here.

    Raises:
        UserError: on every rank, a shard is not what the manifest says.
    """
    if world is None:
        problem, mine = verify_share(shards, splits, 0, 1)
        good = [mine]
    else:
        problem, mine = verify_share(shards, splits, world.rank, world.size)
        problem = world.first_problem(problem, group)
        good = [{}] * world.size
        dist.all_gather_object(good, mine, group=group or world.host_group)
    if problem is not None:
        raise UserError(problem)
    if world is None or world.is_main:
        remember(shards, good)


def start(config: Config, run_folder: Path, parts: Parts | None = None) -> int:
    """All of a run, on this rank: checks, joining the others, shards, training. Returns the exit code.

    Args:
        parts: a model or an objective of one's own; docs/extending.md has examples.

    Raises:
        UserError, RunFailed: a folder that cannot be made; see `check_before_start`, `check_beginning`,
            `prepare_together`, `pretrain`.
    """
    config = config.resolved()
    if config.training.deterministic:
        be_deterministic()
    check_writable(run_folder / "config.json", "--output")
    tokenizer = load_tokenizer(config.data.tokenizer)
    check_before_start(config)
    hang = config.training.hang_timeout
    with joined_world(PREPARATION_TIMEOUT if hang is None else timedelta(seconds=hang + 60)) as world:
        world.on_all(lambda: check_attention(config))
        # On one rank: a checkpoint that it looks into has a file of each of the ranks that wrote it.
        world.on_main(lambda: check_beginning(config, run_folder, tokenizer, parts or Parts()))
        prepare_together(config, world, tokenizer)
        run_folder.mkdir(parents=True, exist_ok=True)
        start_logging(run_folder, world.rank)
        return pretrain(config, run_folder, world, tokenizer, parts)


def pretrain(config: Config, run_folder: Path, world: World, tokenizer: Tokenizer, parts: Parts | None = None) -> int:
    """Train, resuming where the run folder's newest whole checkpoint stands. Returns the exit code.

    Raises:
        UserError: another run holds the folder; ranks that do not share it; no room for a checkpoint; a checkpoint that
            is not of this run.
        RunFailed: see `Trainer.train`.
    """
    lock, training = RunLock(run_folder), config.training
    try:
        world.on_main(lock.acquire)
        check_shared(run_folder, world)
        trainer = Trainer(config, run_folder, world, tokenizer, parts)
        each, keep = trainer.checkpoint_bytes, training.keep_checkpoints
        world.on_main(lambda: check_disk(run_folder, each, keep, len(all_checkpoints(run_folder / "checkpoints"))))
        first = trainer.resume()
        if world.is_main:
            write_atomically(run_folder / "config.json", config.to_json())
            write_json(run_folder / FACTS, {"unigram_bits_per_token": unigram_bits_per_token(trainer.contents)})
            keep_tokenizer(tokenizer, run_folder)
        if first >= config.training.steps and not trainer.progress.owes_evaluation:
            log.info("nothing to do: %d steps are done, training.steps is %d", first, config.training.steps)
            trainer.record("finished", first)
            return 0
        code = trainer.train(first)
        world.barrier()
        return code
    finally:
        lock.release()
