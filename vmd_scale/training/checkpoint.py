"""Writing, pruning and resuming sharded checkpoints (the format is in vmd_scale/checkpoints.py).

A save has two halves. `begin` copies this rank's fragments to host memory, which is all that training waits for, and a
thread writes them into a staging folder. When the threads of all ranks have ended, `finish` gives the folder its name
by one rename: a checkpoint is whole, or it does not exist.
"""

import json
import logging
import math
import os
import shutil
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from vmd_scale.checkpoints import (
    BEST,
    LATEST,
    MANIFEST,
    RUN_STATE,
    all_checkpoints,
    altered,
    missing_or_torn,
    step_of,
    whole_checkpoints,
)
from vmd_scale.errors import RunFailed, UserError
from vmd_scale.files import flush_to_disk, sha256_of, write_atomically, write_json
from vmd_scale.training.ema import ShardedEMA
from vmd_scale.training.fragments import copy_to_host, load_fragments, shapes_of
from vmd_scale.training.launch import World
from vmd_scale.training.zero import ShardedMaster

log = logging.getLogger(__name__)
STAGING, DAMAGED = ".staging-", "damaged-"


class Checkpointer:
    """Writes, prunes, verifies and loads the checkpoints of one run. Its methods are called by all ranks together.

    Attributes:
        pending: a save has begun and is not published yet; the same on all ranks.
        best_bound: of the checkpoint that `best` names, nats per token on validation; infinite without one.
    """

    def __init__(self, folder: Path, world: World, master: ShardedMaster, ema: ShardedEMA | None, keep: int) -> None:
        self.folder, self.world, self.master, self.ema, self.keep = folder, world, master, ema, keep
        self.best_bound = math.inf
        self._writer: _Writer | None = None
        self._buffers: dict[str, dict[str, Tensor]] = {"weights": {}, "optimizer": {}}  # one save at a time uses them

    @property
    def pending(self) -> bool:
        return self._writer is not None

    @property
    def writing(self) -> bool:
        """Whether this rank's thread is still at work."""
        return self._writer is not None and self._writer.is_alive()

    def begin(self, step: int, state: dict[str, Any], bound: float = math.inf) -> None:
        """Start to write the checkpoint of `step` completed steps. Nothing else may be pending.

        Args:
            bound: of its weights on validation. One that is better than all before outlives them.
        """
        assert not self.pending
        staging = self.folder / f"{STAGING}step-{step:08d}"
        fragments = self.master.fragments if self.world.is_main or not self.master.is_replicated else []
        sources = {"master": self.master.partitions}
        if self.ema is not None:
            sources["ema"] = self.ema.partitions
        optimizer = self.master.optimizer_state()
        of_rank = f"{self.world.rank:05d}-of-{self.world.size:05d}.safetensors"
        contents = {
            f"{kind}-{of_rank}": copy_to_host(fragments, values, self._buffers[kind])
            for kind, values in (("weights", sources), ("optimizer", optimizer))
            if fragments
        }
        if share := self.master.frozen_share:
            frozen = copy_to_host(share, {"frozen": self.master.frozen_exact}, self._buffers["weights"])
            contents.setdefault(f"weights-{of_rank}", {}).update(frozen)
        updates = self.master.optimizer_updates()
        run_state = {
            **state,
            "step": step,
            "best_bound": min(bound, self.best_bound),
            "ema_updates": 0 if self.ema is None else self.ema.updates,
            "optimizer_state": sorted(optimizer),
            "optimizer_updates": updates,
        }
        self._writer = _Writer(
            staging, step, contents, shapes_of([*fragments, *share]), run_state if self.world.is_main else None, bound
        )
        self._writer.start()

    def finish(self) -> bool:
        """Wait until all ranks have written, and make it the latest checkpoint. Returns whether that went well.

        A save that failed on any rank is thrown away with a loud message: training goes on, with what there was before.
        """
        if self._writer is None:
            return True
        writer, self._writer = self._writer, None
        writer.join()
        mine = None if writer.problem is None else f"rank {self.world.rank}: {writer.problem}"
        problem = self.world.first_problem(mine)
        shares: list[Any] = [None] * self.world.size
        dist.all_gather_object(shares, writer.files, group=self.world.host_group)
        if problem is None:
            if self.world.is_main:
                problem = self._name(writer, {name: record for share in shares for name, record in share.items()})
            problem = self.world.first_problem(problem)
        if problem is None:
            self.best_bound = min(self.best_bound, writer.bound)
        elif self.world.is_main:
            shutil.rmtree(writer.staging, ignore_errors=True)
            kept = whole_checkpoints(self.folder)
            before = f"the newest is {kept[-1].name}" if kept else "there is none"
            log.error("CHECKPOINT OF STEP %d NOT WRITTEN (%s): training goes on; %s", writer.step, problem, before)
        return problem is None

    def _name(self, writer: "_Writer", files: dict[str, Any]) -> str | None:
        """On rank 0, if it sees what all ranks say they wrote: from a staging folder to a checkpoint.

        Returns what went wrong.
        """
        final = self.folder / writer.staging.name.removeprefix(STAGING)
        try:
            for name, record in files.items():
                problem = missing_or_torn(writer.staging / name, record)
                if problem is not None:
                    return f"{problem}, as rank 0 sees it"
            write_json(writer.staging / MANIFEST, {"step": writer.step, "files": files})
            flush_to_disk(writer.staging)
            replaced = _hide([final] if final.exists() else [])
            os.rename(writer.staging, final)
            flush_to_disk(self.folder)
        except OSError as error:
            return str(error)
        self._point_to(final, LATEST, *([BEST] if writer.bound < self.best_bound else []))
        self._prune(replaced)
        return None

    def _point_to(self, checkpoint: Path, *pointers: str) -> None:
        """Nothing that is whole depends on a pointer: one that cannot be written costs a message."""
        try:
            for pointer in pointers:
                write_atomically(self.folder / pointer, checkpoint.name + "\n")
        except OSError as error:
            log.error("%s is whole, but %s cannot be made to name it: %s", checkpoint, " and ".join(pointers), error)

    def find_latest(self) -> Path | None:
        """The newest checkpoint that is whole, the same on all ranks. Damaged ones are reported and set aside.

        Raises:
            UserError: there are checkpoints, and all are damaged: now, or when the run was called before.
            RunFailed: see `_damage_of`.
        """
        found = self._newest_whole(self._candidates())
        self.world.on_main(lambda: self._tidy(found))
        return found

    def go_back(self, step: int) -> Path | None:
        """The newest whole checkpoint of `step` or before, the same on all ranks; those after it are thrown away.

        Raises:
            RunFailed: see `_damage_of`.
        """
        candidates = self._candidates()
        newer = [checkpoint for checkpoint in candidates if step_of(checkpoint) > step]
        found = self._newest_whole(candidates[len(newer) :])
        if found is not None:
            self.world.on_main(lambda: self._forget(newer, found))
        return found

    def resume_best(self, bound: float) -> None:
        """Go on from the lowest bound of a checkpoint's run state, unless what had it is gone: then the next is best.

        It may be damaged, or of a time before which the run went back.
        """

        def is_there() -> bool:
            name = self._best_name()
            if name and not (self.folder / name).is_dir():
                (self.folder / BEST).unlink()
                return False
            return bool(name)

        self.best_bound = bound if self.world.from_main(is_there) else math.inf

    def _candidates(self) -> list[Path]:
        """Newest first, as rank 0 sees them: on a shared file system the others may not see the same yet."""
        names = self.world.from_main(lambda: [path.name for path in reversed(all_checkpoints(self.folder))])
        return [self.folder / name for name in names]

    def _newest_whole(self, candidates: list[Path]) -> Path | None:
        """The first that is whole. Those before it are set aside: pruning would count them as the newest."""
        for candidate in candidates:
            problem = self._damage_of(candidate)
            if problem is None:
                return candidate
            self.world.on_main(partial(_set_aside, candidate, problem))
        return None

    def _tidy(self, found: Path | None) -> None:
        """On rank 0, at a start: nothing whole is not always nothing; leftovers of a run that was killed go."""
        damaged = sorted(path.name for path in self.folder.glob(f"{DAMAGED}*"))
        if found is None and damaged:
            raise UserError(
                f"all checkpoints in {self.folder} are damaged and were set aside ({', '.join(damaged)}): nothing to "
                "resume from; put a good copy back as step-..., or choose another --output to start anew"
            )
        for leftover in self.folder.glob(f"{STAGING}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        if found is not None:
            self._point_to(found, LATEST)

    def _forget(self, newer: list[Path], found: Path) -> None:
        self._point_to(found, LATEST)
        if self._best_name() in [checkpoint.name for checkpoint in newer]:
            (self.folder / BEST).unlink()
        _throw_away(newer)

    def load(self, checkpoint: Path) -> dict[str, Any]:
        """Restore weights, their average, the optimizer's state and the best bound from a verified checkpoint.

        Whatever world size, ZeRO stage and precision wrote it. Returns its run state.

        Raises:
            UserError: it is not of this model, or of a version that kept the optimizer's state elsewhere.
        """
        state = json.loads((checkpoint / RUN_STATE).read_text())
        if "optimizer_state" not in state:
            raise UserError(f"{checkpoint} is of an older version: it can be evaluated and exported, not resumed")
        files = sorted(json.loads((checkpoint / MANIFEST).read_text())["files"])
        weights, moments = (
            [checkpoint / n for n in files if n.startswith(kind)] for kind in ("weights-", "optimizer-")
        )
        fragments, targets = self.master.fragments, {"master": self.master.partitions}
        if self.ema is not None:
            targets["ema"] = self.ema.partitions
            self.ema.updates = state["ema_updates"]
        load_fragments(weights, fragments, targets, self.world)
        if self.world.any(bool(self.master.frozen_fragments))[0]:
            load_fragments(weights, self.master.frozen_fragments, {"frozen": self.master.frozen}, self.world)
            load_fragments(weights, self.master.frozen_share, {"frozen": self.master.frozen_exact}, self.world)
        optimizer = self.master.start_optimizer_state(state["optimizer_state"], state["optimizer_updates"])
        load_fragments(moments, fragments, optimizer, self.world)
        self.master.publish()
        self.master.resumed_at(state["step"], state["skipped_steps"])
        self.resume_best(state["best_bound"])
        return state

    def _damage_of(self, checkpoint: Path) -> str | None:
        """What is wrong with a checkpoint, or None. Hashes in parallel; all ranks get the same answer.

        Raises:
            RunFailed: on all ranks: one cannot read what rank 0 sees (a mount is missing, a server does not answer).
                That says nothing of the checkpoint.
        """
        rank, size = self.world.rank, self.world.size
        wanted, problem = self.world.from_main(lambda: _read_manifest(checkpoint, rank))
        problems = [problem]

        def read_share() -> None:
            with _reading(checkpoint, rank):
                problems.extend(altered(checkpoint / name, wanted[name]) for name in sorted(wanted)[rank::size])

        if problem is None:
            self.world.on_all(read_share)
        return self.world.first_problem(next((p for p in problems if p is not None), None))

    def _prune(self, replaced: list[Path]) -> None:
        try:
            _delete(replaced)
            _throw_away([old for old in all_checkpoints(self.folder)[: -self.keep] if old.name != self._best_name()])
        except OSError as error:
            log.warning("an old checkpoint could not be thrown away: %s", error)

    def _best_name(self) -> str:
        best = self.folder / BEST
        return best.read_text().strip() if best.exists() else ""


def _read_manifest(checkpoint: Path, rank: int) -> tuple[dict[str, Any], str | None]:
    """Size and hash of each file by name, and what is wrong that sizes can tell, or None."""
    wanted: dict[str, Any] = {}
    with _reading(checkpoint, rank):
        try:
            listed = json.loads((checkpoint / MANIFEST).read_text())["files"]
            wanted = {name: {key: record[key] for key in ("bytes", "sha256")} for name, record in listed.items()}
        except FileNotFoundError:
            return wanted, f"{MANIFEST} is missing"
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            return wanted, f"{MANIFEST} is not one: {type(error).__name__}: {error}"
        problems = (missing_or_torn(checkpoint / name, wanted[name]) for name in sorted(wanted))
        return wanted, next((p for p in problems if p is not None), None)


@contextmanager
def _reading(checkpoint: Path, rank: int) -> Iterator[None]:
    """What cannot be read is not known to be damaged."""
    try:
        yield
    except OSError as error:
        raise RunFailed(
            f"rank {rank} on {socket.gethostname()} cannot read {checkpoint} ({error}): nothing was changed; call "
            "again when it can be read, or move it away to go on from the one before"
        ) from None


def _set_aside(checkpoint: Path, problem: str) -> None:
    aside = checkpoint.with_name(DAMAGED + checkpoint.name)
    if aside.exists():
        _throw_away([aside])
    os.rename(checkpoint, aside)
    log.error("checkpoint %s is damaged (%s): set aside as %s", checkpoint, problem, aside.name)


def _throw_away(folders: list[Path]) -> None:
    """By a rename first: a kill in the middle leaves no half of a checkpoint, only what the next start clears."""
    _delete(_hide(folders))


def _hide(folders: list[Path]) -> list[Path]:
    hidden = [folder.with_name(f"{STAGING}old-{folder.name}") for folder in folders]
    for folder, aside in zip(folders, hidden, strict=True):
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(folder, aside)
    return hidden


def _delete(folders: list[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder)


class _Writer(threading.Thread):
    """Writes one rank's files.

    Attributes:
        files: size and hash of each, by name.
        problem: why it failed, or None.
    """

    def __init__(
        self,
        staging: Path,
        step: int,
        contents: Mapping[str, dict[str, Tensor]],
        metadata: dict[str, str],
        run_state: dict[str, Any] | None,
        bound: float,
    ) -> None:
        super().__init__(name="checkpoint", daemon=True)  # a rank that fails meanwhile must be able to end
        self.staging, self.step, self.bound = staging, step, bound
        self.files: dict[str, dict[str, Any]] = {}
        self.problem: str | None = None
        self._contents, self._metadata, self._run_state = contents, metadata, run_state

    def run(self) -> None:
        try:
            self.staging.mkdir(parents=True, exist_ok=True)
            for name, tensors in self._contents.items():
                save_file(tensors, self.staging / name, metadata=self._metadata)
                self._record(name)
            if self._run_state is not None:
                write_json(self.staging / RUN_STATE, self._run_state)
                self._record(RUN_STATE)
        except Exception as error:  # whatever it is, training must hear of it, not die of it
            self.problem = f"{type(error).__name__}: {error}"

    def _record(self, name: str) -> None:
        path = self.staging / name
        flush_to_disk(path)
        self.files[name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
