"""Is the latent used, or has it collapsed to its prior? KL at several mask ratios, and active units."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vmd_scale.build import masks_of
from vmd_scale.data.loader import evaluation_batches
from vmd_scale.data.shards import ShardReader
from vmd_scale.diffusion.noise import Noise, Stream
from vmd_scale.diffusion.paths import random_ranks
from vmd_scale.evaluation.perplexity import chosen_rows
from vmd_scale.model import VMD
from vmd_scale.model.documents import any_of

MASK_RATIOS = (0.1, 0.25, 0.5, 0.75, 1.0)
HISTOGRAM_BINS = 20
ACTIVE_VARIANCE = 0.01  # Burda et al., arXiv 1509.00519, section 5.1


@dataclass(frozen=True)
class LatentUsage:
    step: int
    rows: int
    kl_by_mask_ratio: dict[str, float]  # nats of a latent group, q(z | x0, m) against its prior
    active_units: int  # whose posterior mean varies over the rows: Var(E_q[z]) > 0.01, in units of the prior
    latent_width: int
    kl_histograms: dict[str, dict[str, list[float]]] = field(default_factory=dict)  # by mask ratio: counts and edges
    kl_not_finite: dict[str, int] = field(default_factory=dict)  # by mask ratio: groups that no histogram can hold

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def describe(self) -> str:
        by_ratio = ", ".join(f"{kl:.3f} at {ratio}" for ratio, kl in self.kl_by_mask_ratio.items())
        return f"{self.active_units} of {self.latent_width} units active; KL in nats, by mask ratio: {by_ratio}"


@torch.no_grad()
def latent_usage(
    model: VMD,
    reader: ShardReader,
    step: int,
    objective: str,
    rows: int = 256,
    micro_batch: int = 64,
    seed: int = 0,
    after_batch: Callable[[], None] = lambda: None,
) -> LatentUsage:
    """Measure on a fixed random choice of rows. Under ZeRO-3 all ranks must call it: they compute the same.

    Args:
        model: with a latent, in evaluation mode.
        objective: what it was trained with: only `vmd` teaches the encoder about rows that are masked in part.
        after_batch: called after each batch.
    """
    ratios = MASK_RATIOS if objective == "vmd" else (1.0,)
    a, device = model.architecture, next(model.parameters()).device
    numbers = chosen_rows(reader.rows, rows)
    kls: dict[float, list[Tensor]] = {ratio: [] for ratio in ratios}
    means: list[Tensor] = []
    scored_groups: list[Tensor] = []
    for batch in evaluation_batches(reader, numbers, micro_batch):
        maskable, attend = masks_of(batch, reader.manifest)
        in_groups = maskable.view(len(maskable), a.groups, -1)
        u = Noise(seed).uniform(Stream.PATH, 0, batch.positions, in_groups.shape[1:])
        ranks, count = random_ranks(u, in_groups), in_groups.sum(-1, keepdim=True)
        scored = any_of(maskable, attend, a.groups, a.documents).to(device)
        for ratio in ratios:
            masked = in_groups & (ranks <= (ratio * count).ceil())
            device_attend = None if attend is None else attend.to(device)
            q = model.encode(batch.tokens.to(device), masked.view_as(maskable).to(device), device_attend)
            kls[ratio].append(q.kl()[scored].cpu())
            if ratio == 1.0:
                mean = q.mean if q.prior is None else q.prior.standardised(q.mean)
                means.append(mean.cpu())
                scored_groups.append(scored.cpu())
        after_batch()
    # Over the rows, in each block (or place of a document) by itself: a mean that only tells its number says nothing.
    mean, scored = torch.cat(means), torch.cat(scored_groups)
    of_groups = [mean[scored[:, g], g].var(0) for g in range(mean.shape[1]) if scored[:, g].sum() > 1]
    variance = torch.stack(of_groups).mean(0)
    return LatentUsage(
        step=step,
        rows=len(numbers),
        kl_by_mask_ratio={str(ratio): float(torch.cat(kl).double().mean()) for ratio, kl in kls.items()},
        active_units=int((variance > ACTIVE_VARIANCE).sum()),
        latent_width=a.latent_width,
        kl_histograms={str(ratio): _histogram(torch.cat(kl)) for ratio, kl in kls.items()},
        kl_not_finite={str(ratio): int((~torch.cat(kl).isfinite()).sum()) for ratio, kl in kls.items()},
    )


def _histogram(values: Tensor) -> dict[str, list[float]]:
    """How many groups, over all rows, have a KL between one edge, in nats, and the next. Only finite ones count."""
    counts, edges = np.histogram(values[values.isfinite()].double().numpy(), bins=HISTOGRAM_BINS)
    return {"counts": counts.tolist(), "edges": [round(edge, 6) for edge in edges.tolist()]}
