"""Writing, pruning and resuming sharded checkpoints (the format is in vmd_scale/checkpoints.py).

All ranks write in parallel into a staging folder; it gets its name by one rename after everything is on disk.
"""

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file

from vmd_scale.checkpoints import DEEPSPEED, LATEST, MANIFEST, RUN_STATE, damage, whole_checkpoints
from vmd_scale.config import Config, parse_config
from vmd_scale.errors import UserError
from vmd_scale.files import flush_to_disk, sha256_of, write_atomically, write_json
from vmd_scale.training.ema import ShardedEMA
from vmd_scale.training.launch import World
from vmd_scale.training.zero import ShardedMaster, fragment_values

log = logging.getLogger(__name__)


class Checkpointer:
    """Writes, prunes, verifies and loads the checkpoints of one run. Its methods are called by all ranks together."""

    def __init__(
        self, folder: Path, world: World, engine: Any, master: ShardedMaster, ema: ShardedEMA | None, keep: int
    ) -> None:
        self.folder, self.world, self.engine = folder, world, engine
        self.master, self.ema, self.keep = master, ema, keep

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Write the checkpoint of `step` completed steps and make it the latest."""
        final = self.folder / f"step-{step:08d}"
        staging = self.folder / f".staging-{final.name}"
        if self.world.is_main:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
        self.world.barrier()
        self.engine.save_checkpoint(str(staging), tag=DEEPSPEED, save_latest=False)
        self._save_fragments(staging)
        if self.world.is_main:
            write_json(staging / RUN_STATE, {"step": step, **state})
        self.world.barrier()
        files = self._hash_in_parallel(staging)
        if self.world.is_main:
            write_json(staging / MANIFEST, {"step": step, "files": files})
            shutil.rmtree(final, ignore_errors=True)
            os.rename(staging, final)
            flush_to_disk(self.folder)
            write_atomically(self.folder / LATEST, final.name + "\n")
            self._prune()
        self.world.barrier()
        return final

    def find_latest(self) -> Path | None:
        """The newest checkpoint that is whole, the same on all ranks. Damaged ones are reported and set aside."""
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
        if self.world.is_main and found is not None:
            write_atomically(self.folder / LATEST, found.name + "\n")
        self.world.barrier()
        return found

    def load(self, checkpoint: Path) -> dict[str, Any]:
        """Restore engine and EMA from a verified checkpoint; returns its run state.

        Raises:
            UserError: it was written by another number of ranks, or another ZeRO stage or precision.
        """
        state = json.loads((checkpoint / RUN_STATE).read_text())
        now = {
            "world_size": self.world.size,
            "zero_stage": int(self.engine.zero_optimization_stage()),
            "precision": "bf16" if self.engine.bfloat16_enabled() else "fp32",
        }
        for key, value in now.items():
            if state[key] != value:
                raise UserError(
                    f"{checkpoint} was written with {key} {state[key]}, this run has {value}; start it as before"
                )
        self.engine.load_checkpoint(str(checkpoint), tag=DEEPSPEED)
        if self.ema is not None:
            self._load_ema(checkpoint, state["ema_updates"])
        return state

    def _save_fragments(self, staging: Path) -> None:
        sources = {"master": self.master.partitions}
        if self.ema is not None:
            sources["ema"] = self.ema.partitions
        tensors, shapes = {}, {}
        for fragment in self.master.fragments:
            shapes[fragment.name] = fragment.shape
            for kind, partitions in sources.items():
                values = fragment_values(fragment, partitions).detach()
                tensors[f"{kind}/{fragment.name}/{fragment.start}"] = values.to("cpu", copy=True).contiguous()
        save_file(tensors, staging / self._weights_file(), metadata={"shapes": json.dumps(shapes)})

    def _load_ema(self, checkpoint: Path, updates: int) -> None:
        assert self.ema is not None
        self.ema.updates = updates
        with safe_open(checkpoint / self._weights_file(), framework="pt") as file:
            for fragment in self.master.fragments:
                values = file.get_tensor(f"ema/{fragment.name}/{fragment.start}")
                fragment_values(fragment, self.ema.partitions).copy_(values)
        if int(self.engine.zero_optimization_stage()) == 0:  # only rank 0 has them on disk
            for partition in self.ema.partitions:
                dist.broadcast(partition, src=0)

    def _weights_file(self) -> str:
        return f"weights-{self.world.rank:05d}-of-{self.world.size:05d}.safetensors"

    def _hash_in_parallel(self, folder: Path) -> dict[str, dict[str, Any]]:
        """Size and hash of every file, each rank flushing and hashing its share; whole on every rank."""
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        mine = {}
        for path in files[self.world.rank :: self.world.size]:
            flush_to_disk(path)
            mine[str(path.relative_to(folder))] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        shares: list[Any] = [None] * self.world.size
        dist.all_gather_object(shares, mine, group=self.world.host_group)
        return {name: record for share in shares for name, record in share.items()}

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
        problems: list[str | None] = [None] * self.world.size
        dist.all_gather_object(problems, problem, group=self.world.host_group)
        return next((p for p in problems if p is not None), None)

    def _prune(self) -> None:
        for old in whole_checkpoints(self.folder)[: -self.keep]:
            shutil.rmtree(old)
        for leftover in self.folder.glob(".staging-*"):
            shutil.rmtree(leftover, ignore_errors=True)


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
