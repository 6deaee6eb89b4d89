"""Writing, pruning and resuming sharded checkpoints (the format is in vmd_scale/checkpoints.py).

A save has two halves. `begin` copies this rank's fragments to host memory, which is all that training waits for, and a
thread writes them into a staging folder. When the threads of all ranks have ended, `publish` gives the folder its name
by one rename: a checkpoint is whole, or it does not exist.
"""

import json
import logging
import os
import shutil
import threading
import time
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


class Checkpointer:
    """Writes, prunes, verifies and loads the checkpoints of one run. Its methods are called by all ranks together.

    Attributes:
        pending: a save has begun and is not published yet; the same on all ranks.
    """

    def __init__(self, folder: Path, world: World, master: ShardedMaster, ema: ShardedEMA | None, keep: int) -> None:
        self.folder, self.world, self.master, self.ema, self.keep = folder, world, master, ema, keep
        self._writer: _Writer | None = None

    @property
    def pending(self) -> bool:
        return self._writer is not None

    @property
    def writing(self) -> bool:
        """Whether this rank's thread is still at work."""
        return self._writer is not None and self._writer.is_alive()

    def begin(self, step: int, state: dict[str, Any], best: bool = False) -> None:
        """Start to write the checkpoint of `step` completed steps; waits for the one before, if need be.

        Args:
            best: it is better than all before, and outlives them.
        """
        self.finish()
        started = time.perf_counter()
        staging = self.folder / f"{STAGING}step-{step:08d}"
        fragments = self.master.fragments if self.world.is_main or not self.master.is_replicated else []
        sources = {"master": self.master.partitions}
        if self.ema is not None:
            sources["ema"] = self.ema.partitions
        optimizer = self.master.optimizer_state()
        state |= {
            "step": step,
            "optimizer_state": sorted(optimizer),
            "optimizer_updates": self.master.optimizer_updates(),
        }
        of_rank = f"{self.world.rank:05d}-of-{self.world.size:05d}.safetensors"
        contents = {
            f"weights-{of_rank}": copy_to_host(fragments, sources),
            f"optimizer-{of_rank}": copy_to_host(fragments, optimizer),
        }
        run_state = state if self.world.is_main else None
        self._writer = _Writer(staging, step, contents, shapes_of(fragments), run_state, best)
        self._writer.start()
        log.debug("checkpoint of step %d: training waited %.3f s", step, time.perf_counter() - started)

    def finish(self) -> bool:
        """Wait until nothing is being written, and publish it. Returns whether that went well."""
        if self._writer is None:
            return True
        self._writer.join()
        return self.publish()

    def publish(self) -> bool:
        """Make what all ranks have written the latest checkpoint. Returns whether that went well.

        A save that failed on any rank is thrown away with a loud message: training goes on, with what there was before.
        """
        assert self._writer is not None
        writer, self._writer = self._writer, None
        mine = None if writer.problem is None else f"rank {self.world.rank}: {writer.problem}"
        problem = self.world.first_problem(mine)
        shares: list[Any] = [None] * self.world.size
        dist.all_gather_object(shares, writer.files, group=self.world.host_group)
        if problem is None:
            if self.world.is_main:
                problem = self._name(writer, {name: record for share in shares for name, record in share.items()})
            problem = self.world.first_problem(problem)
        if problem is not None and self.world.is_main:
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
            if writer.best:
                write_atomically(self.folder / BEST, final.name + "\n")
            self._prune()
        except OSError as error:
            return str(error)
        return None

    def go_back(self, step: int) -> Path | None:
        """The newest checkpoint of `step` or before, the same on all ranks; those after it are thrown away."""
        found: list[Path | None] = [None]
        if self.world.is_main:
            for checkpoint in whole_checkpoints(self.folder):
                if step_of(checkpoint) <= step:
                    found = [checkpoint]
                elif found[0] is not None:
                    shutil.rmtree(checkpoint)
        dist.broadcast_object_list(found, src=0, group=self.world.host_group)
        return found[0]

    def find_latest(self) -> Path | None:
        """The newest checkpoint that is whole, the same on all ranks. Damaged ones are reported and set aside.

        Raises:
            UserError: there are checkpoints, and all are damaged.
        """
        found, damaged = None, False
        for candidate in reversed(whole_checkpoints(self.folder)):
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

    def load(self, checkpoint: Path) -> dict[str, Any]:
        """Restore weights, their average and the optimizer's state from a verified checkpoint; returns its run state.

        Whatever world size, ZeRO stage and precision wrote it.

        Raises:
            UserError: it is not of this model, or of a version that kept the optimizer's state elsewhere.
        """
        state = json.loads((checkpoint / RUN_STATE).read_text())
        if "optimizer_state" not in state:
            raise UserError(f"{checkpoint} is of an older version: it can be evaluated and exported, not resumed")
        fragments, targets = self.master.fragments, {"master": self.master.partitions}
        if self.ema is not None:
            targets["ema"] = self.ema.partitions
            self.ema.updates = state["ema_updates"]
        load_fragments(checkpoint, "weights-*", fragments, targets, self.world)
        optimizer = self.master.start_optimizer_state(state["optimizer_state"], state["optimizer_updates"])
        load_fragments(checkpoint, "optimizer-*", fragments, optimizer, self.world)
        self.master.publish()
        self.master.resumed_at(state["step"], state["skipped_steps"])
        return state

    def _verify(self, checkpoint: Path) -> str | None:
        """What is wrong with a checkpoint, or None. Hashes in parallel; all ranks get the same answer."""
        wanted: dict[str, Any] = {}
        problem: str | None = None
        try:
            wanted = json.loads((checkpoint / MANIFEST).read_text())["files"]
        except (OSError, ValueError, KeyError) as error:
            problem = f"{MANIFEST}: {error}"
        for name in sorted(wanted)[self.world.rank :: self.world.size]:
            problem = problem or damage(checkpoint / name, wanted[name])
        return self.world.first_problem(problem)

    def _prune(self) -> None:
        best = self.folder / BEST
        kept = best.read_text().strip() if best.exists() else ""
        for old in whole_checkpoints(self.folder)[: -self.keep]:
            if old.name != kept:
                shutil.rmtree(old)


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
        best: bool,
    ) -> None:
        super().__init__(name="checkpoint", daemon=True)  # a rank that fails meanwhile must be able to end
        self.staging, self.step, self.best = staging, step, best
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
    fixed = [("data", k) for k in ours["data"] if k not in ("shards", "workers", "source", "shard_tokens")]
    fixed += [("model", k) for k in ours["model"] if k != "attention"]
    fixed += [("latent", k) for k in ours["latent"]] + [("diffusion", k) for k in ours["diffusion"]]
    fixed += [("training", k) for k in ("global_batch", "seed", "ema_decay")]
    for section, key in fixed:
        before = saved[section][key]
        if before != ours[section][key]:
            raise UserError(
                f"{section}.{key} is {ours[section][key]!r}, but {checkpoint} was trained with {before!r}; "
                "choose another --output, or put it back"
            )
