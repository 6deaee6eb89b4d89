"""The amortized encoder q(z | x0, m): one diagonal Gaussian per latent group."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from vmd_scale.model.architecture import Architecture
from vmd_scale.model.attention import choose_kernel, rotary_table
from vmd_scale.model.layers import Block, Norm, Stack, initialize

LOG_STD_RANGE = (-8.0, 4.0)  # keeps exp() finite when a run is started with a large learning rate


class Posterior(NamedTuple):
    """Diagonal Gaussians, one a latent group. Both fields are fp32 [B, G, d_z]."""

    mean: Tensor
    log_std: Tensor

    def sample(self, epsilon: Tensor) -> Tensor:
        """Reparameterised draw from standard normal noise of the same shape."""
        return self.mean + self.log_std.exp() * epsilon

    def kl(self) -> Tensor:
        """KL(q || N(0, I)) of each group in nats, [B, G]."""
        per_unit = 0.5 * (self.mean.square() + (2 * self.log_std).exp() - 1) - self.log_std
        return per_unit.sum(-1)

    def log_ratio_to_prior(self, z: Tensor) -> Tensor:
        """log p(z) - log q(z) of each group in nats, [B, G]."""
        standardised = (z - self.mean) * (-self.log_std).exp()
        return (0.5 * (standardised.square() - z.square()) + self.log_std).sum(-1)


class Encoder(nn.Module):
    """Reads the clean tokens and the mask pattern, pools over each group's masked positions."""

    def __init__(self, a: Architecture) -> None:
        super().__init__()
        self.groups, self.head_width = a.groups, a.head_width
        width, heads = a.encoder_width, a.encoder_width // a.head_width
        kernel = choose_kernel(a.attention)
        self.embedding = nn.Embedding(a.vocab_size, width)
        self.pattern = nn.Embedding(2, width)
        self.position = nn.Embedding(a.row_length, width)
        self.blocks = Stack(
            Block(width, heads, a.mlp_ratio, a.mlp, a.norm, a.dropout, kernel, condition=0)
            for _ in range(a.encoder_layers)
        )
        self.norm = Norm(width, a.norm)
        self.out = nn.Linear(width, 2 * a.latent_width)
        initialize(self, a.encoder_layers)
        nn.init.normal_(self.out.weight, std=0.02)  # q starts near the prior, the KL near zero

    def forward(self, clean: Tensor, masked: Tensor, attend: Tensor | None) -> Posterior:
        """q(z | x0, m). A group without a masked position gets some posterior, which nothing may use.

        Args:
            clean: int64 [B, L].
            masked: bool [B, L], the pattern m; all maskable positions for q(z | x0).
            attend: bool [B, L], false at padding; None where there is none.
        """
        positions = torch.arange(clean.shape[1], device=clean.device)
        h = self.embedding(clean) + self.pattern(masked.long()) + self.position(positions)
        rotary = rotary_table(positions, self.head_width)
        mask = None if attend is None else attend[:, None, None, :]
        h = self.norm(self.blocks(h, rotary, mask)).float().unflatten(1, (self.groups, -1))
        pooled_over = masked.float().unflatten(1, (self.groups, -1)).unsqueeze(-1)
        pooled = (h * pooled_over).sum(2) / pooled_over.sum(2).clamp(min=1)
        mean, log_std = self.out(pooled.to(self.out.weight.dtype)).float().chunk(2, dim=-1)
        return Posterior(mean, log_std.clamp(*LOG_STD_RANGE))
