"""Objective iw: the importance-weighted bound (IWAE, arXiv 1509.00519) along whole paths of the T-step sampler.

    E_{T, path} E_{z_k ~ q(z | x0)} [ -log 1/K sum_k p(z_k) / q(z_k | x0) prod_path p(x0 | x before, z_k) ]

A valid bound, tighter than nelbo at T K times the cost: meant for few steps. With more latents, q need not fit the true
posterior as closely, and z is used better.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import one_hot, pad

from vmd_scale.diffusion.corruption import masked_index, masked_share
from vmd_scale.diffusion.noise import Stream
from vmd_scale.diffusion.objective import Loss, Objective, TrainingInputs
from vmd_scale.diffusion.paths import reveal_steps
from vmd_scale.model import ScaledGradient


class ImportanceWeighted(Objective):
    """`importance_samples` is K; every T of `steps` is finite; the other arguments are those of `Objective`."""

    def __init__(self, *, steps: Sequence[float], importance_samples: int, **shared: Any) -> None:
        super().__init__(**shared)
        self.steps, self.importance_samples = tuple(steps), importance_samples

    def prepare(
        self, clean: Tensor, maskable: Tensor, attend: Tensor | None, step: int, positions: Tensor, global_batch: int
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
            kl_weight=in_groups.any(-1).float(),
            ratio=masked_share(masked, maskable[owner], self.groups),
            dropout_seed=self.noise.integer(Stream.DROPOUT, step, int(positions[0])),
            owner=owner,
        )

    def __call__(self, model: Module, x: TrainingInputs, annealing: float) -> Loss:
        """The annealing factor b multiplies log p(z) / q(z | x0), whose mean is minus the KL.

        The encoder learns by the doubly reparameterized gradient (arXiv 1810.04152), which does not lose its signal as
        K grows: q is constant in the weights w (normalized over K), and what reaches z is multiplied by 1 - b + b w.
        """
        assert x.epsilon is not None
        assert x.owner is not None
        scale = torch.ones(*x.epsilon.shape[:-1], 1, device=x.epsilon.device)
        inputs = (x.clean, x.noisy, x.index, x.encoder_mask, x.epsilon, x.attend, x.ratio)
        nll, posterior = model(*inputs, x.owner, scale)
        of_states = nll.unflatten(1, (self.groups, -1)).sum(-1).unflatten(0, (len(x.owner), -1))  # [S, K, G]
        # A matrix product: on a GPU index_add sums in an order that changes from run to run.
        owned = one_hot(x.owner, len(x.clean)).to(nll.dtype)  # [S, B]
        of_paths = (owned.T @ of_states.flatten(1)).view(x.epsilon.shape[:-1])  # [B, K, G]
        z = ScaledGradient.apply(posterior.sample(x.epsilon), scale)
        constant = posterior._replace(mean=posterior.mean.detach(), log_std=posterior.log_std.detach())
        log_ratio = constant.log_ratio_to_prior(z) * x.kl_weight.unsqueeze(1)
        log_weight = annealing * log_ratio - of_paths
        scale.copy_((1 - annealing + annealing * log_weight.detach().softmax(1)).unsqueeze(-1))
        total = (math.log(self.importance_samples) - log_weight.logsumexp(1)).sum()
        kl = (x.kl_weight * posterior.kl()).sum()
        return Loss(total, of_paths.detach().mean(1).sum(), kl.detach(), x.maskable.sum())
