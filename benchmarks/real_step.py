"""A training step as our own `Trainer` makes it, through DeepSpeed, on one batch again and again."""

import shutil
from pathlib import Path

from vmd_scale.config import Config
from vmd_scale.data.prepare import prepare
from vmd_scale.tokenization import load_tokenizer
from vmd_scale.training.launch import join_world
from vmd_scale.training.loop import Trainer


class RealStep:
    """Calls are training steps on this rank, in an empty run folder. Leave the world (`leave_world`) when done."""

    def __init__(self, config: Config, folder: Path) -> None:
        self.tokenizer = load_tokenizer(config.data.tokenizer)
        self.world = join_world()
        if self.world.is_main:
            shutil.rmtree(folder, ignore_errors=True)
            prepare(config.data, progress=False)
        self.world.barrier()
        self.trainer = Trainer(config, folder, self.world, self.tokenizer)
        self.batches = next(self.trainer.loader.steps(0, 1))
        self.trainer.engine.train()

    def __call__(self) -> None:
        self.trainer._step(0, self.batches, _Silent())

    @property
    def parameters(self) -> int:
        """Of the whole model, under ZeRO-3 too."""
        return sum(getattr(p, "ds_numel", p.numel()) for p in self.trainer.engine.module.parameters())


class _Silent:
    """Stands for the telemetry."""

    def event(self, *arguments: object, **details: object) -> None:
        pass
