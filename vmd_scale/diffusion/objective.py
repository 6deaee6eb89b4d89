"""The training objectives (DESIGN section 3), on inputs that were prepared on the host.

    nelbo   E_{T, k} E_{q(z | x0)}    [ w * sum_masked -log p(x0 | xt, z) ]  +      KL( q(z | x0)    || p(z) )
    iw      E_{T, path} E_{z_k ~ q(z | x0)} [ -log 1/K sum_k p(z_k) / q(z_k | x0) prod_path p(x0 | x before, z_k) ]
    vmd     E_t      E_{q(z | x0, m)} [ 1/t * ( sum_masked -log p(x0 | xt, z) + lambda KL( q(z | x0, m) || p(z) ) ) ]

`nelbo` and `iw` are negatives of valid lower bounds on the likelihood of the T-step sampler. `iw` (the importance-
weighted autoencoder of arXiv 1509.00519, along paths) is tighter, T K times as dear, and meant for few steps: there q
need not fit the true posterior, and z is used better. `vmd` is the surrogate of arXiv 2510.23606 and 2505.17384: it
trains good few-step samplers and bounds nothing.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import pad

from vmd_scale.diffusion.corruption import Corruption, choose_steps, corrupt, masked_index, masked_share, stratified
from vmd_scale.diffusion.noise import Noise, Stream
from vmd_scale.diffusion.paths import reveal_steps
from vmd_scale.model import ScaledGradient


@dataclass(frozen=True)
class TrainingInputs:
    """Everything random about a micro-batch, decided: the loss is a deterministic function of this and the weights."""

    clean: Tensor  # int64 [B, L]
    maskable: Tensor  # bool [B, L]: counted in the loss
    attend: Tensor | None  # bool [B, L], false at padding
    noisy: Tensor  # int64 [B, L]; of objective iw [S, L]: all states of all rows' paths
    index: Tensor  # int64 [N]
    encoder_mask: Tensor  # bool [B, L]: the pattern m that the encoder reads
    epsilon: Tensor | None  # fp32 [B, G, d_z]; iw: [B, K, G, d_z]
    nll_weight: Tensor  # fp32 [B, G]; iw: ones
    kl_weight: Tensor  # fp32 [B, G], without the annealing factor
    ratio: Tensor  # fp32 [B, G]; iw: [S, G]
    dropout_seed: int
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


class Objective:
    """Prepares inputs on the host and computes the loss from them."""

    def __init__(
        self,
        kind: str,
        steps: Sequence[float],
        law: str,
        groups: int,
        latent_width: int,
        mask_id: int,
        noise: Noise,
        free_bits: float = 0.0,
        importance_samples: int = 1,
    ) -> None:
        self.importance_samples = importance_samples
        self.kind, self.steps, self.law = kind, tuple(steps), law
        self.groups, self.latent_width, self.mask_id = groups, latent_width, mask_id
        self.noise, self.free_bits = noise, free_bits

    def prepare(
        self, clean: Tensor, maskable: Tensor, attend: Tensor | None, step: int, positions: Tensor, global_batch: int
    ) -> TrainingInputs:
        """Draw T, t, masks and latent noise for rows at `positions` of the global batch of a training step."""
        if self.kind == "iw":
            return self._prepare_paths(clean, maskable, attend, step, positions)
        batch, length = clean.shape
        u = stratified(self.noise, step, positions, global_batch, self.groups)
        choices = self.steps if self.kind == "nelbo" else (math.inf,)
        total, u_time = choose_steps(u, choices)
        u_path = self.noise.uniform(Stream.PATH, step, positions, (self.groups, length // self.groups))
        c: Corruption = corrupt(clean, maskable, total, u_time, u_path, self.law, self.mask_id)
        epsilon = None
        if self.latent_width:
            epsilon = self.noise.normal(Stream.LATENT, step, positions, (self.groups, self.latent_width))
        if self.kind == "nelbo":
            encoder_mask = maskable
            kl_weight = maskable.view(batch, self.groups, -1).any(-1).float()
        else:
            encoder_mask = c.masked
            kl_weight = c.weight * c.masked.view(batch, self.groups, -1).any(-1)
        return TrainingInputs(
            clean=clean,
            maskable=maskable,
            attend=attend,
            noisy=c.noisy,
            index=c.index,
            encoder_mask=encoder_mask,
            epsilon=epsilon,
            nll_weight=c.weight,
            kl_weight=kl_weight,
            ratio=c.ratio,
            dropout_seed=self.noise.integer(Stream.DROPOUT, step, int(positions[0])),
        )

    def _prepare_paths(
        self, clean: Tensor, maskable: Tensor, attend: Tensor | None, step: int, positions: Tensor
    ) -> TrainingInputs:
        """A T and a whole path for each row; its K latents share the path.

        Every T has its turn among the rows. So the number of states is that of the micro-batch alone, once it is filled
        up: all ranks and all steps have tensors of one shape, which ZeRO-3's collectives need and compilers like.
        """
        batch, samples, choices = len(clean), self.importance_samples, len(self.steps)
        in_groups = maskable.view(batch, self.groups, -1)
        u_path = self.noise.uniform(Stream.PATH, step, positions, in_groups.shape[1:])
        turn = (positions + int(self.noise.integer(Stream.TIME, step, 0) % choices)) % choices
        owners, before, revealed, states = [], [], [], 0
        for choice, steps in enumerate(self.steps):
            rows = (turn == choice).nonzero().squeeze(-1)
            longest = int(steps if self.law == "bernoulli" else min(steps, in_groups.shape[-1]))
            states += -(-batch // choices) * longest
            if not len(rows):
                continue
            reveal, total = reveal_steps(u_path[rows], in_groups[rows], steps, self.law)
            for k in range(total, 0, -1):
                owners.append(rows)
                before.append((reveal <= k) & in_groups[rows])
                revealed.append(reveal == k)
        filling = states - sum(map(len, owners))
        owner = pad(torch.cat(owners), (0, filling))  # states of row 0 in which nothing is masked or revealed
        masked, now = (pad(torch.cat(some).flatten(1), (0, 0, 0, filling)) for some in (before, revealed))
        shape = (samples, self.groups, self.latent_width)
        return TrainingInputs(
            clean=clean,
            maskable=maskable,
            attend=attend,
            noisy=clean[owner].masked_fill(masked, self.mask_id),
            index=masked_index(now.repeat_interleave(samples, 0)),
            encoder_mask=maskable,
            epsilon=self.noise.normal(Stream.LATENT, step, positions, shape),
            nll_weight=torch.ones(batch, self.groups),
            kl_weight=in_groups.any(-1).float(),
            ratio=masked_share(masked, maskable[owner], self.groups),
            dropout_seed=self.noise.integer(Stream.DROPOUT, step, int(positions[0])),
            owner=owner,
        )

    def __call__(self, model: Module, x: TrainingInputs, annealing: float) -> Loss:
        """The loss of one micro-batch. `model` is a `VMD`, or an engine around one."""
        if x.owner is not None:
            return self._importance_weighted(model, x, annealing)
        nll, posterior = model(x.clean, x.noisy, x.index, x.encoder_mask, x.epsilon, x.attend, x.ratio)
        per_group = nll.unflatten(1, (self.groups, -1)).sum(-1)  # [B, G]
        reconstruction = (x.nll_weight * per_group).sum()
        if posterior is None:
            kl, total = reconstruction.new_zeros(()), reconstruction
        else:
            per_group_kl = posterior.kl()
            kl = (x.kl_weight * per_group_kl).sum()
            paid = (x.kl_weight * (per_group_kl - self.free_bits).clamp(min=0)).sum() if self.free_bits else kl
            total = reconstruction + annealing * paid
        return Loss(total, reconstruction.detach(), kl.detach(), x.maskable.sum())

    def _importance_weighted(self, model: Module, x: TrainingInputs, annealing: float) -> Loss:
        """The annealing factor b multiplies log p(z) / q(z | x0), whose mean is minus the KL.

        The encoder learns by the doubly reparameterised gradient (arXiv 1810.04152), which does not lose its signal as
        K grows: q is constant in the weights w (normalised over K), and what reaches z is multiplied by 1 - b + b w.
        """
        assert x.epsilon is not None
        assert x.owner is not None
        scale = torch.ones(*x.epsilon.shape[:-1], 1, device=x.epsilon.device)
        inputs = (x.clean, x.noisy, x.index, x.encoder_mask, x.epsilon, x.attend, x.ratio)
        nll, posterior = model(*inputs, x.owner, scale)
        of_states = nll.unflatten(1, (self.groups, -1)).sum(-1).unflatten(0, (len(x.owner), -1))  # [S, K, G]
        # A matrix product: on a GPU index_add sums in an order that changes from run to run.
        owned = torch.nn.functional.one_hot(x.owner, len(x.clean)).to(nll.dtype)  # [S, B]
        of_paths = (owned.T @ of_states.flatten(1)).view(x.epsilon.shape[:-1])  # [B, K, G]
        z = ScaledGradient.apply(posterior.sample(x.epsilon), scale)
        constant = posterior._replace(mean=posterior.mean.detach(), log_std=posterior.log_std.detach())
        log_ratio = constant.log_ratio_to_prior(z) * x.kl_weight.unsqueeze(1)
        log_weight = annealing * log_ratio - of_paths
        scale.copy_((1 - annealing + annealing * log_weight.detach().softmax(1)).unsqueeze(-1))
        total = (math.log(self.importance_samples) - log_weight.logsumexp(1)).sum()
        kl = (x.kl_weight * posterior.kl()).sum()
        return Loss(total, of_paths.detach().mean(1).sum(), kl.detach(), x.maskable.sum())
