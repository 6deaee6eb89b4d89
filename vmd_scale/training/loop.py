"""The training loop: next batch, loss, backward, step, EMA, log, maybe evaluate, maybe save."""

import functools
import logging
import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from vmd_scale.build import Parts, masks_of
from vmd_scale.checkpoints import all_checkpoints
from vmd_scale.config import Config
from vmd_scale.data.loader import Batch, TrainLoader
from vmd_scale.data.manifest import contents_of, manifests_of
from vmd_scale.data.mixture import training_rows
from vmd_scale.data.shards import ShardReader, shard_cache
from vmd_scale.diffusion.objective import TrainingInputs
from vmd_scale.errors import RunFailed
from vmd_scale.evaluation.ranks import Ranks
from vmd_scale.initial_weights import initialize_from
from vmd_scale.precision import describe_kernels
from vmd_scale.tokenization import Tokenizer
from vmd_scale.training.checkpoint import Checkpointer
from vmd_scale.training.ema import ShardedEMA
from vmd_scale.training.engine import build_engine, resolve_precision
from vmd_scale.training.faults import Watchdog
from vmd_scale.training.launch import World
from vmd_scale.training.meter import Meter, flops_per_token
from vmd_scale.training.optim import set_learning_rates
from vmd_scale.training.preemption import STOPPED_EXIT_CODE, StopRequest
from vmd_scale.training.preflight import bytes_of_checkpoint
from vmd_scale.training.progress import Progress
from vmd_scale.training.same_run import check_same_run
from vmd_scale.training.status import State, write_status
from vmd_scale.training.telemetry import Telemetry
from vmd_scale.training.validation import validate
from vmd_scale.training.zero import ShardedMaster
from vmd_scale.weight_sources import settled

MAX_ROLLBACKS = 5  # of a run, over all its starts
log = logging.getLogger(__name__)


class StopAgreed(Exception):
    """Raised on all ranks at once, between two batches of an evaluation."""


class Trainer:
    """One run on one rank. Everything that lives longer than a step is built here; `train` is the loop."""

    def __init__(
        self, config: Config, run_folder: Path, world: World, tokenizer: Tokenizer, parts: Parts | None = None
    ) -> None:
        parts = parts or Parts()
        self.config, self.run_folder, self.world = config, run_folder, world
        self.tokenizer, self.fingerprint = tokenizer, tokenizer.fingerprint
        training = config.training
        self.precision = resolve_precision(config, world.device)
        model = parts.model(config, tokenizer.vocab_size)
        (resumes,) = world.any(world.is_main and bool(all_checkpoints(run_folder / "checkpoints")))
        initial: dict[str, torch.Tensor] = {}
        if (source := training.init_from) is not None and not resumes:
            found = world.from_main(lambda: settled(source))
            world.on_all(lambda: initial.update(initialize_from(model, found, tokenizer.fingerprint)))
        self.checkpoint_bytes = bytes_of_checkpoint(model, bool(training.ema_decay))
        self.objective = parts.objective(config, tokenizer.vocab_size)
        log.info("%s", describe_kernels(model, self.precision, config.data.packing == "pad"))
        self.engine = build_engine(config, model, world, self.precision)
        self.master = ShardedMaster(self.engine)
        self.master.start_from(initial)  # which the engine has rounded to the precision of the forward pass
        self.ema = ShardedEMA(self.master, training.ema_decay) if training.ema_decay else None
        manifests = world.from_main(lambda: manifests_of(config.data))
        self.contents = contents_of(manifests)
        self.reader, self.order = training_rows(config.data, training.seed, manifests)
        self.loader = TrainLoader(
            self.reader, self.order, training.global_batch, training.micro_batch, world.rank, world.size, self._prepare
        )
        self.checkpoints = Checkpointer(
            run_folder / "checkpoints", world, self.master, self.ema, training.keep_checkpoints
        )
        self.stop = StopRequest(run_folder, world.is_main, world.launchers)
        self.watchdog = Watchdog(training.hang_timeout)
        self.progress, self.stopped = Progress.at_start(world.device), False
        flops = flops_per_token(config, model, tokenizer.vocab_size, self.precision, manifests, world.device)
        self.meter = Meter(config, world, self.loader, flops, self.precision)

    @functools.cached_property
    def validation_rows(self) -> ShardReader:
        data, manifest = self.config.data, self.reader.manifest
        return ShardReader(data.shards, "validation", manifest, check_sizes=False, cache=shard_cache(data))

    def resume(self) -> int:
        """Load the newest whole checkpoint, if there is one. Returns the number of completed steps."""
        found = self.checkpoints.find_latest()
        if found is None:
            return 0
        check_same_run(self.config, self.fingerprint, self.contents, found)
        return self._restore(found)

    def _restore(self, checkpoint: Path) -> int:
        state = self.checkpoints.load(checkpoint)
        self.progress = Progress.from_state(state, self.world.device)
        self.progress.owes_evaluation &= self.config.evaluation.every is not None
        changed = [f"{key} {state[key]} -> {value}" for key, value in self._changeable().items() if state[key] != value]
        how = f" ({', '.join(changed)})" if changed else ""
        log.info("resumed from %s at step %d%s", checkpoint, state["step"], how)
        return state["step"]

    def _changeable(self) -> dict[str, Any]:
        """What may be another at every start, and is said then."""
        return {"world_size": self.world.size, "zero_stage": self.config.zero_stage, "precision": self.precision}

    def train(self, first_step: int) -> int:
        """Run to the configured step. Returns the exit code: 0, or `STOPPED_EXIT_CODE` after a stop request.

        Raises:
            RunFailed: too many steps in a row without a finite gradient; too many roll-backs; the last checkpoint
                cannot be written.
        """
        telemetry = Telemetry(self.run_folder, self.config, self.world.is_main, first_step)
        self.meter.start(first_step, self.progress)
        self.record("running", first_step)
        self.engine.train()
        self.watchdog.progress()
        if first_step:
            telemetry.event("resumed", first_step, world_size=self.world.size)
        done = first_step
        try:
            while (done < self.config.training.steps or self.progress.owes_evaluation) and not self.stopped:
                done = self._train_until_interrupted(done, telemetry)
            if not self.checkpoints.finish():
                raise RunFailed(f"the last checkpoint, of step {done}, could not be written; see the log")
        except RunFailed as error:
            self.checkpoints.finish()  # what was being written is as good as ever
            self.record("failed", done, str(error))
            raise
        finally:
            self.watchdog.close()
            telemetry.close()
        if not self.stopped:
            self.record("finished", done)
            self.stop.obeyed()  # a request that came with the last step
            return 0
        self.record("stopped", done, self.stop.reason())
        self.stop.obeyed()
        log.warning("stop requested: checkpoint of step %d written, exit code %d", done, STOPPED_EXIT_CODE)
        return STOPPED_EXIT_CODE

    def record(self, state: State, step: int, reason: str = "") -> None:
        """For whoever looks at the run folder when these processes are gone."""
        if self.world.is_main:
            try:
                write_status(self.run_folder, state, step, reason)
            except OSError as error:  # a full disk: what is to be said elsewhere is worth more
                log.error("status %r of step %d could not be written: %s", state, step, error)

    def _train_until_interrupted(self, done: int, telemetry: Telemetry) -> int:
        """Steps to the end of the run, to a stop request or to a roll-back. Returns the number of completed steps."""
        config, training, shift = self.config, self.config.training, self.progress.skipped_batches
        if self.progress.owes_evaluation and self._evaluate_and_save(done, telemetry, self._ask()):
            return done
        for batches in self.loader.steps(done + shift, training.steps + shift):
            asked = self._ask()  # answered while the step is computed
            losses = self._step(done, batches, telemetry)
            done += 1
            telemetry.step()
            self.watchdog.progress()
            if done % config.telemetry.log_every == 0 or done == training.steps:
                record = self.meter.record(done, losses, self.progress, self.master.gradient_norm())
                telemetry.log(record)
                if self._is_spike(record, telemetry) and training.loss_spike == "rollback":
                    with self.meter.paused():
                        step = self._roll_back(done, telemetry)
                    if step is not None:
                        return step
            if self._evaluate_and_save(done, telemetry, asked):
                return done
        return done

    def _ask(self) -> Callable[[], list[bool]]:
        """On any rank: is a stop requested, is a checkpoint still being written?"""
        return self.world.ask_any(self.stop.seen(), self.checkpoints.writing)

    def _evaluate_and_save(self, done: int, telemetry: Telemetry, asked: Callable[[], list[bool]]) -> bool:
        """What is due after `done` steps. Returns whether the run stops here, on request; `asked` is of `_ask`."""
        training, every = self.config.training, self.config.evaluation.every
        bound, owed = math.inf, self.progress.owes_evaluation
        if owed or (every and done % every == 0):
            with self.meter.paused():
                try:
                    bound = self._evaluate(done, telemetry)
                except StopAgreed:
                    log.warning("step %d: the evaluation is cut short by a stop request; the next start makes it", done)
        stopping, writing = asked()
        stopping |= self.progress.owes_evaluation  # the same on all ranks
        due = stopping or done % training.checkpoint_every == 0 or done == training.steps
        due |= owed or bound < self.checkpoints.best_bound
        with self.meter.paused():
            if self.checkpoints.pending and (due or not writing):
                self._publish(done, telemetry)
            if due:
                self._save(done, bound)
        self.stopped = stopping and (done < training.steps or self.progress.owes_evaluation)
        if self.stopped:
            telemetry.event("stopped", done)
        return self.stopped

    def _is_spike(self, record: dict[str, Any], telemetry: Telemetry) -> bool:
        """A step that was skipped has done no harm."""
        ignored = self.config.training.loss_spike == "ignore" or self.progress.skipped_in_a_row
        if ignored or not self.progress.spikes.is_spike(record["loss"]):
            return False
        log.warning("step %d: the loss, %.4f, is far above those before it", record["step"], record["loss"])
        telemetry.event("spike", record["step"], loss=record["loss"])
        return True

    def _roll_back(self, done: int, telemetry: Telemetry) -> int | None:
        """To the newest checkpoint from before the spike could have begun, leaving out the batches since then.

        Returns its step, or None if there is none.
        """
        if self.progress.rollbacks >= MAX_ROLLBACKS:
            raise RunFailed(
                f"step {done}: the loss rose far above those before it after {MAX_ROLLBACKS} roll-backs; look at the "
                "data and the learning rate, or go on with training.loss_spike 'warn'"
            )
        if self.checkpoints.pending:
            self._publish(done, telemetry)
        # The last loss that was judged and found good is of the weights before the update of its step.
        found = self.checkpoints.go_back(done - self.config.telemetry.log_every - 1)
        if found is None:
            log.warning("there is no checkpoint from before the spike: going on")
            return None
        abandoned, rows = self.progress, self.config.training.global_batch
        step = self._restore(found)
        self.progress.after_rollback(abandoned, done - step)
        log.warning(
            "rolled back to step %d; the rows at positions %d to %d of the sample order are left out",
            step,
            (step + abandoned.skipped_batches) * rows,
            (done + abandoned.skipped_batches) * rows - 1,
        )
        telemetry.went_back_to(step)
        telemetry.event("rolled back", step, rolled_back_from=done)
        self.meter.went_back_to(step, self.progress)
        self.engine.train()
        self._save(step, math.inf)  # anew: called again before the next one is due, the run must know what it left out
        return step

    def _publish(self, done: int, telemetry: Telemetry) -> None:
        if not self.checkpoints.finish():
            telemetry.event("checkpoint failed", done)

    def _prepare(self, step: int, batch: Batch) -> TrainingInputs:
        """In the loader's thread: everything random about a micro-batch is decided here, on the host."""
        if self.world.device.type == "cuda":
            torch.cuda.set_device(self.world.device)  # a thread starts on GPU 0
        maskable, attend = masks_of(batch, self.reader.manifest)
        inputs = self.objective.prepare(
            batch.tokens, maskable, attend, step, batch.positions, self.config.training.global_batch
        )
        return inputs.to(self.world.device)

    def _step(self, step: int, batches: list[TrainingInputs], telemetry: Telemetry) -> torch.Tensor:
        """One optimizer step. Returns this rank's sums [total, reconstruction, KL, tokens], float64, on the device."""
        config, engine = self.config, self.engine
        set_learning_rates(engine.optimizer.param_groups, step, config.training)
        counted = self._count_tokens(batches)
        # DeepSpeed averages over ranks and accumulation; the loss is a sum over the global number of tokens.
        scale = len(batches) * self.world.size / counted
        annealing = config.diffusion.kl_weight.at(step)
        sums = torch.zeros(4, dtype=torch.float64, device=self.world.device)
        for inputs in batches:
            if config.model.dropout:
                torch.manual_seed(inputs.dropout_seed)
            loss = self.objective(engine, inputs, annealing)
            engine.backward(loss.total * scale)
            self.master.before_step()
            engine.step()
            sums += torch.stack((loss.total.detach(), loss.reconstruction, loss.kl, loss.tokens)).double()
        if self.progress.count_step(counted, engine.skipped_steps):
            self._report_skipped(step, telemetry)
        elif self.ema is not None:
            self.ema.update()
        return sums

    def _report_skipped(self, step: int, telemetry: Telemetry) -> None:
        rows, limit = self.config.training.global_batch, self.config.training.max_skipped_steps
        batch = step + self.progress.skipped_batches
        numbers = self.order.row_numbers(np.arange(batch * rows, (batch + 1) * rows, dtype=np.int64)).tolist()
        log.warning("step %d skipped: its gradient is not finite; rows of the batch: %s", step + 1, numbers)
        telemetry.event("skipped", step + 1, rows=numbers)
        if self.progress.skipped_in_a_row >= limit:
            raise RunFailed(
                f"{limit} steps in a row, up to step {step + 1}, had no finite gradient; the log names their rows"
            )

    def _count_tokens(self, batches: list[TrainingInputs]) -> torch.Tensor:
        """Counted positions of the global batch, int64 on the device."""
        mine = torch.stack([inputs.maskable.sum() for inputs in batches]).sum()
        if self.world.size > 1:
            dist.all_reduce(mine)
        return mine

    def _evaluate(self, done: int, telemetry: Telemetry) -> float:
        """With the averaged weights. Returns the lowest bound, nats per token.

        Raises:
            StopAgreed: on all ranks, nothing is recorded, and the evaluation is owed.
        """
        self.progress.owes_evaluation = True
        self._go_on()
        self.engine.eval()
        weights, model = "raw" if self.ema is None else "ema", self.engine.module
        ranks = Ranks(self.world.rank, self.world.size, self.world.host_group)
        try:
            with nullcontext() if self.ema is None else self.ema.applied():
                found = validate(
                    model, self.config, self.validation_rows, self.tokenizer, weights, done, ranks, self._go_on
                )
        finally:
            self.engine.train()
        self.progress.owes_evaluation = False
        self.watchdog.progress()
        if found.usage is not None:
            telemetry.latent(found.usage.to_dict())
        if found.samples is not None:
            telemetry.samples(found.samples)
        for result in found.results:
            telemetry.evaluation(result.to_dict())
        best = found.best
        log.info("step %d: validation %.4f bits/token at T = %s", done, best.bits_per_token, best.steps)
        return best.nats_per_token

    def _go_on(self) -> None:
        """Between two batches of an evaluation, which may last longer than a hang or the time after a signal."""
        self.watchdog.progress()
        if self.world.any(self.stop.seen())[0]:
            raise StopAgreed

    def _save(self, done: int, bound: float) -> None:
        state = {
            **self.progress.to_state(),
            **self._changeable(),
            "config": self.config.model_dump(mode="json"),
            "tokenizer_fingerprint": self.fingerprint,
            "contents": self.contents,
        }
        self.checkpoints.begin(done, state, bound)
        self.watchdog.progress()
