"""How far a run has come, besides its steps: what the loop counts and every checkpoint's run state keeps."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vmd_scale.training.faults import SpikeDetector


@dataclass
class Progress:
    """The same on all ranks.

    Attributes:
        tokens: counted in all, over all ranks; int64 [], on the device, so that counting waits for nothing.
        skipped_steps: in all, because a gradient was not finite.
        skipped_in_a_row: up to the present step; not kept by a checkpoint.
        skipped_batches: of the sample order, by rolling back: step n is made of batch n + skipped_batches.
        rollbacks: over all starts of the run.
        owes_evaluation: a stop request has cut short that of the present step.
        spikes: the logged losses that the next ones are compared with.
    """

    tokens: Tensor
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    skipped_batches: int = 0
    rollbacks: int = 0
    owes_evaluation: bool = False
    spikes: SpikeDetector = field(default_factory=SpikeDetector)

    @classmethod
    def at_start(cls, device: torch.device) -> "Progress":
        return cls(torch.zeros((), dtype=torch.int64, device=device))

    @classmethod
    def from_state(cls, state: Mapping[str, Any], device: torch.device) -> "Progress":
        """Out of a checkpoint's run state; those of older versions know nothing of roll-backs and owed evaluations."""
        return cls(
            tokens=torch.tensor(state["tokens"], dtype=torch.int64, device=device),
            skipped_steps=state["skipped_steps"],
            skipped_batches=state["skipped_batches"],
            rollbacks=state.get("rollbacks", 0),
            owes_evaluation=state.get("owes_evaluation", False),
            spikes=SpikeDetector(state["losses"]),
        )

    def to_state(self) -> dict[str, Any]:
        """For a checkpoint's run state. Waits for the device."""
        return {
            "tokens": int(self.tokens),
            "skipped_steps": self.skipped_steps,
            "skipped_batches": self.skipped_batches,
            "rollbacks": self.rollbacks,
            "owes_evaluation": self.owes_evaluation,
            "losses": self.spikes.state(),
        }

    def count_step(self, tokens: Tensor, skipped_steps: int) -> bool:
        """A step of so many tokens (int64 [], over all ranks) was made. Returns whether it was skipped.

        Args:
            skipped_steps: in all, after it.
        """
        skipped = skipped_steps > self.skipped_steps
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        self.skipped_steps = skipped_steps
        self.tokens += tokens
        return skipped

    def after_rollback(self, abandoned: "Progress", steps: int) -> None:
        """Go on, as restored from a checkpoint, without the batches of the `steps` that were `abandoned`."""
        self.skipped_batches = abandoned.skipped_batches + steps
        self.rollbacks = abandoned.rollbacks + 1
        self.owes_evaluation = False
