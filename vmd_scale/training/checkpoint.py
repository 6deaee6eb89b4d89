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
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from vmd_scale.checkpoints import BEST, LATEST, MANIFEST, RUN_STATE, damage, step_of, whole_checkpoints
from vmd_scale.config import Config, parse_config
from vmd_scale.errors import UserError
from vmd_scale.files import flush_to_disk, sha256_of, write_atomically, write_json
from vmd_scale.training.ema import ShardedEMA
from vmd_scale.training.fragments import copy_to_host, load_fragments, shapes_of
from vmd_scale.training.launch import World
from vmd_scale.training.zero import ShardedMaster

log = logging.getLogger(__name__)
STAGING = ".staging-"
# Keys of data that say where and how, not what.
MOVABLE = ("shards", "workers", "source", "shard_tokens", "cache", "cache_gib")


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
        run_state = {**state, "step": step, "optimizer_state": sorted(optimizer), "optimizer_updates": updates}
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
        """On rank 0: from a staging folder to a checkpoint. Returns what went wrong."""
        final = self.folder / writer.staging.name.removeprefix(STAGING)
        try:
            write_json(writer.staging / MANIFEST, {"step": writer.step, "files": files})
            flush_to_disk(writer.staging)
            shutil.rmtree(final, ignore_errors=True)
            os.rename(writer.staging, final)
            flush_to_disk(self.folder)
            write_atomically(self.folder / LATEST, final.name + "\n")
            if writer.bound < self.best_bound:
                write_atomically(self.folder / BEST, final.name + "\n")
        except OSError as error:
            return str(error)
        self._prune()
        return None

    def find_latest(self) -> Path | None:
        """The newest checkpoint that is whole, the same on all ranks. Damaged ones are reported and set aside.

        Raises:
            UserError: there are checkpoints, and all are damaged.
        """
        found, damaged = None, False
        for candidate in self._candidates():
            problem = self._verify(candidate)
            if problem is None:
                found = candidate
                break
            damaged = True
            if self.world.is_main:
                aside = candidate.with_name(f"damaged-{candidate.name}")  # else pruning would count it as the newest
                shutil.rmtree(aside, ignore_errors=True)
                os.rename(candidate, aside)
                log.error("checkpoint %s is damaged (%s): set aside as %s", candidate, problem, aside.name)
        if found is None and damaged:
            raise UserError(
                f"all checkpoints in {self.folder} are damaged and were set aside as damaged-step-*: "
                "nothing to resume from; choose another --output to start anew"
            )
        if self.world.is_main:
            for leftover in self.folder.glob(f"{STAGING}*"):  # of a run that was killed while it saved
                shutil.rmtree(leftover, ignore_errors=True)
            if found is not None:
                write_atomically(self.folder / LATEST, found.name + "\n")
        self.world.barrier()
        return found

    def go_back(self, step: int) -> Path | None:
        """The newest whole checkpoint of `step` or before, the same on all ranks; those after it are thrown away."""
        found, newer = None, []
        for candidate in self._candidates():
            if step_of(candidate) > step:
                newer.append(candidate)
            elif self._verify(candidate) is None:
                found = candidate
                break
        if found is not None and self.world.is_main:
            write_atomically(self.folder / LATEST, found.name + "\n")
            if self._best_name() in [checkpoint.name for checkpoint in newer]:
                (self.folder / BEST).unlink()
            for checkpoint in newer:
                shutil.rmtree(checkpoint, ignore_errors=True)
        return found

    def _candidates(self) -> list[Path]:
        """Newest first, as rank 0 sees them: on a shared file system the others may not see the same yet."""
        found: list[Any] = [[path.name for path in reversed(whole_checkpoints(self.folder))]]
        dist.broadcast_object_list(found, src=0, group=self.world.host_group)
        return [self.folder / name for name in found[0]]

    def load(self, checkpoint: Path) -> dict[str, Any]:
        """Restore weights, their average and the optimizer's state from a verified checkpoint; returns its run state.

        Whatever world size, ZeRO stage and precision wrote it.

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
        return state

    def _verify(self, checkpoint: Path) -> str | None:
        """What is wrong with a checkpoint, or None. Hashes in parallel; all ranks get the same answer."""
        wanted: dict[str, Any] = {}
        problem: str | None = None
        try:
            wanted = json.loads((checkpoint / MANIFEST).read_text())["files"]
            for name in sorted(wanted)[self.world.rank :: self.world.size]:
                problem = problem or damage(checkpoint / name, wanted[name])
        except (OSError, ValueError, KeyError, TypeError) as error:  # of this rank's node alone, perhaps
            problem = f"{type(error).__name__}: {error}"
        return self.world.first_problem(problem)

    def _prune(self) -> None:
        try:
            for old in whole_checkpoints(self.folder)[: -self.keep]:
                if old.name != self._best_name():
                    shutil.rmtree(old)
        except OSError as error:
            log.warning("an old checkpoint could not be thrown away: %s", error)

    def _best_name(self) -> str:
        best = self.folder / BEST
        return best.read_text().strip() if best.exists() else ""


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


def check_same_run(config: Config, fingerprint: str, checkpoint: Path) -> None:
    """A resumed run must be the same experiment; how long and how often may change.

    Raises:
        UserError: names the key and both values.
    """
    state = json.loads((checkpoint / RUN_STATE).read_text())
    if state["tokenizer_fingerprint"] != fingerprint:
        raise UserError(
            f"data.tokenizer {config.data.tokenizer!r} has fingerprint {fingerprint[:12]}, but {checkpoint} was "
            f"trained with {state['tokenizer_fingerprint'][:12]}: not the same tokenizer"
        )
    saved = parse_config(state["config"], str(checkpoint / RUN_STATE)).model_dump(mode="json")  # keys newer than it
    ours = config.model_dump(mode="json")
    for values in (saved, ours):
        values["data"]["mixture"] = [
            {key: value for key, value in each.items() if key not in MOVABLE} for each in values["data"]["mixture"]
        ]
    fixed = [("data", k) for k in ours["data"] if k not in MOVABLE]
    fixed += [("model", k) for k in ours["model"] if k != "attention"]
    fixed += [("latent", k) for k in ours["latent"]] + [("diffusion", k) for k in ours["diffusion"]]
    fixed += [("training", k) for k in ("global_batch", "seed", "ema_decay", "trainable", "lora")]
    for section, key in fixed:
        before = saved[section][key]
        if before != ours[section][key]:
            raise UserError(
                f"{section}.{key} is {ours[section][key]!r}, but {checkpoint} was trained with {before!r}; "
                "choose another --output, or put it back"
            )
