"""The training loop: next batch, loss, backward, step, EMA, log, maybe evaluate, maybe save."""

import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from vmd_scale.build import build_architecture, build_model, build_objective, masks_of
from vmd_scale.config import Config, step_values
from vmd_scale.data.loader import Batch, TrainLoader
from vmd_scale.data.order import SampleOrder
from vmd_scale.data.shards import ShardReader
from vmd_scale.diffusion.objective import TrainingInputs
from vmd_scale.evaluation.latent import latent_usage
from vmd_scale.evaluation.perplexity import Ranks, Request, evaluate
from vmd_scale.planning import denoiser_passes, masked_share, peak_flops, training_flops_per_token
from vmd_scale.tokenization import Tokenizer
from vmd_scale.training.checkpoint import Checkpointer, check_same_run
from vmd_scale.training.ema import ShardedEMA
from vmd_scale.training.engine import build_engine, resolve_precision
from vmd_scale.training.launch import World
from vmd_scale.training.optim import learning_rate_at
from vmd_scale.training.preemption import STOPPED_EXIT_CODE, StopRequest
from vmd_scale.training.telemetry import Stopwatch, Telemetry
from vmd_scale.training.zero import ShardedMaster

log = logging.getLogger(__name__)


class Trainer:
    """One run on one rank. Everything that lives longer than a step is built here; `train` is the loop."""

    def __init__(self, config: Config, run_folder: Path, world: World, tokenizer: Tokenizer) -> None:
        self.config, self.run_folder, self.world = config, run_folder, world
        self.fingerprint = tokenizer.fingerprint
        training = config.training
        self.precision = resolve_precision(config, world.device)
        model = build_model(config, tokenizer.vocab_size)
        self.objective = build_objective(config, tokenizer.vocab_size)
        self.engine = build_engine(config, model, world, self.precision)
        self.master = ShardedMaster(self.engine)
        self.ema = ShardedEMA(self.master, training.ema_decay) if training.ema_decay else None
        self.reader = ShardReader(config.data.shards, "train")
        self.loader = TrainLoader(
            self.reader,
            SampleOrder(self.reader.rows, training.seed),
            training.global_batch,
            training.micro_batch,
            world.rank,
            world.size,
            self._prepare,
        )
        self.checkpoints = Checkpointer(
            run_folder / "checkpoints", world, self.engine, self.master, self.ema, training.keep_checkpoints
        )
        self.stop = StopRequest(run_folder)
        self.tokens = torch.zeros((), dtype=torch.int64, device=world.device)  # counted in all, over all ranks
        self.skipped_steps = 0
        a = build_architecture(config, tokenizer.vocab_size)
        self.flops_per_token = training_flops_per_token(a, masked_share(config), denoiser_passes(config))
        self.peak_flops = peak_flops(world.device)

    def resume(self) -> int:
        """Load the newest whole checkpoint, if there is one. Returns the number of completed steps."""
        found = self.checkpoints.find_latest()
        if found is None:
            return 0
        check_same_run(self.config, self.fingerprint, found)
        state = self.checkpoints.load(found)
        self.tokens.fill_(state["tokens"])
        self.skipped_steps = state["skipped_steps"]
        log.info("resumed from %s at step %d", found, state["step"])
        return state["step"]

    def train(self, first_step: int) -> int:
        """Run to the configured step. Returns the exit code: 0, or `STOPPED_EXIT_CODE` after a stop request."""
        config, training = self.config, self.config.training
        telemetry = Telemetry(self.run_folder, config, self.world.is_main, first_step)
        self.watch, self.waited = Stopwatch(), self.loader.wait_seconds
        self.step_at_log, self.tokens_at_log = first_step, int(self.tokens)
        self.engine.train()
        for step, batches in enumerate(self.loader.steps(first_step, training.steps), start=first_step):
            losses = self._step(step, batches)
            done = step + 1
            telemetry.step()
            if done % config.telemetry.log_every == 0 or done == training.steps:
                telemetry.log(self._metrics(done, losses))
            if config.evaluation.every and done % config.evaluation.every == 0:
                with self.watch.paused():
                    self._evaluate(done, telemetry)
            stopping = self.world.agree(self.stop.seen())
            if stopping or done % training.checkpoint_every == 0 or done == training.steps:
                with self.watch.paused():
                    self._save(done)
            if stopping and done < training.steps:
                self.stop.obeyed()
                log.warning("stop requested: checkpoint of step %d written, exit code %d", done, STOPPED_EXIT_CODE)
                telemetry.close()
                return STOPPED_EXIT_CODE
        telemetry.close()
        return 0

    def _prepare(self, step: int, batch: Batch) -> TrainingInputs:
        """In the loader's thread: everything random about a micro-batch is decided here, on the host."""
        if self.world.device.type == "cuda":
            torch.cuda.set_device(self.world.device)  # a thread starts on GPU 0
        maskable, attend = masks_of(batch, self.reader.manifest)
        inputs = self.objective.prepare(
            batch.tokens, maskable, attend, step, batch.positions, self.config.training.global_batch
        )
        return inputs.to(self.world.device)

    def _step(self, step: int, batches: list[TrainingInputs]) -> torch.Tensor:
        """One optimizer step. Returns this rank's sums [total, reconstruction, KL, tokens], float64, on the device."""
        config, engine = self.config, self.engine
        for group in engine.optimizer.param_groups:
            group["lr"] = learning_rate_at(step, config.training)
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
        skipped = engine.skipped_steps - self.skipped_steps
        self.skipped_steps = engine.skipped_steps
        if self.ema is not None and not skipped:
            self.ema.update()
        self.tokens += counted
        return sums

    def _count_tokens(self, batches: list[TrainingInputs]) -> torch.Tensor:
        """Counted positions of the global batch, int64 on the device."""
        mine = torch.stack([inputs.maskable.sum() for inputs in batches]).sum()
        if self.world.size > 1:
            dist.all_reduce(mine)
        return mine

    def _metrics(self, done: int, losses: torch.Tensor) -> dict[str, Any]:
        """The record of a logged step: one collective, the only one that logging adds."""
        if self.world.size > 1:
            dist.all_reduce(losses)
        total, reconstruction, kl, counted = losses.tolist()
        seconds, tokens = self.watch.lap(), int(self.tokens)
        waited, self.waited = self.loader.wait_seconds - self.waited, self.loader.wait_seconds
        steps, self.step_at_log = done - self.step_at_log, done
        new_tokens, self.tokens_at_log = tokens - self.tokens_at_log, tokens
        # The network computes padding and given tokens too: they are work, though not progress.
        positions = steps * self.config.training.global_batch * self.config.data.row_length
        return {
            "step": done,
            "tokens": tokens,
            "loss": total / counted,
            "reconstruction": reconstruction / counted,
            "kl": kl / counted,
            "kl_weight": self.config.diffusion.kl_weight.at(done - 1),
            "lr": learning_rate_at(done - 1, self.config.training),
            "grad_norm": self.master.gradient_norm(),
            "tokens_per_second": new_tokens / seconds,
            "mfu": positions * self.flops_per_token / (seconds * self.peak_flops * self.world.size),
            "data_wait_fraction": waited / seconds,
            "skipped_steps": self.skipped_steps,
        }

    def _evaluate(self, done: int, telemetry: Telemetry) -> None:
        """Bounds on the validation split with the averaged weights. Draws nothing from any generator of the run."""
        evaluation = self.config.evaluation
        self.engine.eval()
        reader = ShardReader(self.config.data.shards, "validation")
        weights = "raw" if self.ema is None else "ema"
        results = []
        with nullcontext() if self.ema is None else self.ema.applied():
            for protocol in evaluation.protocols or ("rows",):
                request = Request(
                    protocol=protocol,
                    split="validation",
                    steps=step_values(evaluation.steps),
                    rows=evaluation.rows,
                    paths=self.config.diffusion.paths,
                    micro_batch=self.config.training.micro_batch,
                )
                ranks = Ranks(self.world.rank, self.world.size, self.world.host_group)
                results += evaluate(self.engine.module, reader, request, weights, done, ranks)
            if self.config.latent.width:
                objective, micro_batch = self.config.diffusion.objective, self.config.training.micro_batch
                used = latent_usage(self.engine.module, reader, done, objective, micro_batch=micro_batch)
                telemetry.latent(used.to_dict())
        for result in results:
            telemetry.evaluation(result.to_dict())
        best = min(results, key=lambda r: r.nats_per_token)
        log.info("step %d: validation %.4f bits/token at T = %s", done, best.bits_per_token, best.steps)
        self.engine.train()

    def _save(self, done: int) -> None:
        state = {
            "tokens": int(self.tokens),
            "skipped_steps": self.skipped_steps,
            "ema_updates": 0 if self.ema is None else self.ema.updates,
            "config": self.config.model_dump(mode="json"),
            "tokenizer_fingerprint": self.fingerprint,
            "world_size": self.world.size,
            "zero_stage": self.config.zero_stage,
            "precision": self.precision,
        }
        self.checkpoints.save(done, state)
