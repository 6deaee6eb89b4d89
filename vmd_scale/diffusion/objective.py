"""The training objectives (docs/method.md), on inputs that were prepared on the host.

    nelbo   E_{T, k} E_{q(z | x0)}    [ w * sum_masked -log p(x0 | xt, z) ]  +      KL( q(z | x0)    || p(z) )
    vmd     E_t      E_{q(z | x0, m)} [ 1/t * ( sum_masked -log p(x0 | xt, z) + lambda KL( q(z | x0, m) || p(z) ) ) ]

`nelbo` is the negative of a valid lower bound on the likelihood of the T-step sampler. `vmd` is the surrogate of
arXiv 2510.23606 and 2505.17384: it trains good few-step samplers and bounds nothing. The third one, `iw`, is in
importance.py.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from vmd_scale.diffusion.corruption import Corruption, choose_steps, corrupt, stratified
from vmd_scale.diffusion.noise import Noise, Stream
from vmd_scale.model.documents import any_of, has_documents


@dataclass(frozen=True)
class TrainingInputs:
    """Everything random about a micro-batch, decided: the loss is a deterministic function of this and the weights."""

    clean: Tensor  # int64 [B, L]
    maskable: Tensor  # bool [B, L]: counted in the loss
    attend: Tensor | None  # bool [B, L], false at padding, or int32 [B, L], see model/documents.py
    noisy: Tensor  # int64 [B, L]; of objective iw [S, L]: all states of all rows' paths
    index: Tensor  # int64 [N]
    encoder_mask: Tensor  # bool [B, L]: the pattern m that the encoder reads
    epsilon: Tensor | None  # fp32 [B, G, d_z], or one a document [B, N, d_z]; iw: [B, K, G, d_z]
    kl_weight: Tensor  # fp32 [B, G] or [B, N], without the annealing factor
    ratio: Tensor  # fp32 [B, G]; iw: [S, G]
    dropout_seed: int
    nll_weight: Tensor | None = None  # fp32 [B, G], not iw
    owner: Tensor | None = None  # int64 [S], iw only: whose state it is

    def to(self, device: torch.device) -> "TrainingInputs":
        if device.type == "cpu":
            return self
        tensors: dict[str, Any] = {
            f.name: value.pin_memory().to(device, non_blocking=True)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(self, **tensors)


@dataclass(frozen=True)
class Loss:
    """Sums over the rows of a micro-batch, in nats; `total` carries the gradient, the others are for telemetry."""

    total: Tensor  # reconstruction + annealing factor * KL (less free bits); iw: minus the log of the mean weight
    reconstruction: Tensor
    kl: Tensor
    tokens: Tensor  # counted positions


class Objective(ABC):
    """Prepares inputs on the host and computes the loss from them.

    Args:
        law: of the revealing order, see paths.py.
        groups: blocks of a row, G.
        latent_width: d_z, 0 without a latent.
        documents: of a row at most, N, where rows tell documents apart.
    """

    def __init__(
        self, *, law: str, groups: int, latent_width: int, mask_id: int, noise: Noise, documents: int = 1
    ) -> None:
        self.law, self.groups, self.documents = law, groups, documents
        self.latent_width, self.mask_id, self.noise = latent_width, mask_id, noise

    @abstractmethod
    def prepare(
        self, clean: Tensor, maskable: Tensor, attend: Tensor | None, step: int, positions: Tensor, global_batch: int
    ) -> TrainingInputs:
        """Draw all noise for rows at `positions`, int64 [B], of the global batch of a training step."""

    @abstractmethod
    def __call__(self, model: Module, x: TrainingInputs, annealing: float) -> Loss:
        """The loss of one micro-batch. `model` is a `VMD`, or an engine around one; `annealing` multiplies the KL."""


class OneTimeObjective(Objective):
    """One T, time and corrupted state for each row and group; the latent is read from a pattern of masks.

    Args:
        steps: the T that are drawn from; infinity is continuous time.
        free_bits: nats of KL that a latent has for free.
    """

    def __init__(self, *, steps: Sequence[float], free_bits: float = 0.0, **shared: Any) -> None:
        super().__init__(**shared)
        self.steps, self.free_bits = tuple(steps), free_bits

    @abstractmethod
    def pattern(self, maskable: Tensor, c: Corruption) -> tuple[Tensor, Tensor]:
        """What the encoder reads as masked, bool [B, L], and the weight of the KL of a latent that has any, [B, G]."""

    def prepare(
        self, clean: Tensor, maskable: Tensor, attend: Tensor | None, step: int, positions: Tensor, global_batch: int
    ) -> TrainingInputs:
        """Draw T, t, masks and latent noise."""
        length = clean.shape[1]
        u = stratified(self.noise, step, positions, global_batch, self.groups)
        total, u_time = choose_steps(u, self.steps)
        u_path = self.noise.uniform(Stream.PATH, step, positions, (self.groups, length // self.groups))
        c = corrupt(clean, maskable, total, u_time, u_path, self.law, self.mask_id)
        epsilon = None
        if self.latent_width:
            latents = self.documents if has_documents(attend) else self.groups
            epsilon = self.noise.normal(Stream.LATENT, step, positions, (latents, self.latent_width))
        encoder_mask, kl_weight = self.pattern(maskable, c)
        return TrainingInputs(
            clean=clean,
            maskable=maskable,
            attend=attend,
            noisy=c.noisy,
            index=c.index,
            encoder_mask=encoder_mask,
            epsilon=epsilon,
            nll_weight=c.weight,
            kl_weight=kl_weight * any_of(encoder_mask, attend, self.groups, self.documents),
            ratio=c.ratio,
            dropout_seed=self.noise.integer(Stream.DROPOUT, step, int(positions[0])),
        )

    def __call__(self, model: Module, x: TrainingInputs, annealing: float) -> Loss:
        inputs = (x.clean, x.noisy, x.index, x.encoder_mask, x.epsilon, x.attend, x.ratio)
        reconstruction, posterior = model(*inputs, nll_weight=x.nll_weight)
        if posterior is None:
            kl, total = reconstruction.new_zeros(()), reconstruction
        else:
            per_group_kl = posterior.kl()
            kl = (x.kl_weight * per_group_kl).sum()
            paid = (x.kl_weight * (per_group_kl - self.free_bits).clamp(min=0)).sum() if self.free_bits else kl
            total = reconstruction + annealing * paid
        return Loss(total, reconstruction.detach(), kl.detach(), x.maskable.sum())


class Nelbo(OneTimeObjective):
    """The valid bound: q reads the whole row, and its KL is paid once."""

    def pattern(self, maskable: Tensor, c: Corruption) -> tuple[Tensor, Tensor]:
        return maskable, torch.ones_like(c.weight)


class Surrogate(OneTimeObjective):
    """The papers' objective: q reads the pattern m of a continuous time, and its KL is weighted as the tokens are."""

    def __init__(self, **options: Any) -> None:
        super().__init__(steps=(math.inf,), **options)

    def pattern(self, maskable: Tensor, c: Corruption) -> tuple[Tensor, Tensor]:
        return c.masked, c.weight
