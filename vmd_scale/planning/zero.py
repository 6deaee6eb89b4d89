"""What a plan depends on of the `deepspeed` section. Defaults are those that a run fills in (training/engine.py)."""

from dataclasses import dataclass
from typing import Any

from vmd_scale.config import Config


@dataclass(frozen=True)
class Zero:
    """ZeRO (arXiv 1910.02054) as DeepSpeed 0.19 does it. Sizes are bytes of one element."""

    stage: int
    low: int  # of weights in the forward pass, and of their gradients in the backward pass
    summed: int  # of gradients where micro-batches are added up
    sent: int  # of gradients between ranks
    apart: bool  # DeepSpeed's BF16_Optimizer: fp32 gradients of all weights, beside those of the backward pass
    lean: bool  # it, as training/lean_bf16.py changes it
    scattered: bool  # each rank gets the sum of its part only; else all get all of it
    keeps_low: bool  # where they are apart: whether those of the backward pass live until the next one
    overlaps: bool  # gradients travel while the backward pass goes on
    settings: dict[str, Any]  # the user's `zero_optimization`

    @classmethod
    def of(cls, config: Config, precision: str) -> "Zero":
        """`precision`: fp32 | bf16."""
        section, stage = config.deepspeed, config.zero_stage
        settings = section.get("zero_optimization", {})
        low = 2 if precision == "bf16" else 4
        summed = _bytes(section.get("data_types", {}).get("grad_accum_dtype"))
        sent = _bytes(section.get("communication_data_type"))
        apart = stage == 1 and low < summed
        scaled_before = section.get("prescale_gradients", False) or section.get("gradient_predivide_factor", 1.0) != 1.0
        lean = apart and sent == 4 and not scaled_before
        return cls(
            stage=stage,
            low=low,
            summed=max(low, summed),
            sent=sent,
            apart=apart,
            lean=lean,
            scattered=stage == 3 or (lean and config.training.optimizer != "muon"),
            keeps_low=apart and not section.get("bf16", {}).get("immediate_grad_update", True),
            overlaps=stage > 0 and not apart and bool(settings.get("overlap_comm", stage == 3)),
            settings=settings,
        )

    def bucket(self, parameters: int) -> float:
        """Elements of gradients that are reduced at once. DeepSpeed allocates all of it, however few there are."""
        return float(self.settings.get("reduce_bucket_size", min(BUCKET, parameters)))

    def shards(self, ranks: int) -> dict[str, int]:
        """Into how many parts the ranks divide weights, gradients and optimizer."""
        return {part: ranks if self.stage >= first else 1 for part, first in SHARDED_FROM.items()}


BUCKET = 500_000_000  # DeepSpeed's; where the user asks for none, the engine asks for one of at most all parameters
SHARDED_FROM = {"weights": 3, "gradients": 2, "optimizer": 1}  # the stage from which on each rank holds 1/N of it


def _bytes(name: str | None) -> int:
    """Of an element of a type as DeepSpeed spells it: fp32, bf16, torch.float16, ..."""
    return 2 if name is not None and "16" in name else 4
