"""The amortized encoder q(z | x0, m), one diagonal Gaussian per latent group; and the prior it is measured against.

The same network serves as a conditional prior p(z | visible tokens): it then reads the mask symbol where the encoder
reads the clean token.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vmd_scale.model.architecture import Architecture
from vmd_scale.model.attention import choose_kernel, rotary_table
from vmd_scale.model.documents import attention_mask, has_documents, members_of, positions_in
from vmd_scale.model.layers import Block, Norm, Stack, initialize

LOG_STD_RANGE = (-8.0, 4.0)  # keeps exp() finite when a run is started with a large learning rate


class Gaussian(NamedTuple):
    """Diagonal Gaussians, one a latent group. Both fields are fp32 [B, G, d_z].

    z and its noise are [B, G, d_z], or [B, K, G, d_z] for K draws of each.
    """

    mean: Tensor
    log_std: Tensor

    def sample(self, epsilon: Tensor) -> Tensor:
        """Reparameterized draw from standard normal noise."""
        mean, log_std = self._beside(epsilon)
        return mean + log_std.exp() * epsilon

    def standardised(self, z: Tensor) -> Tensor:
        mean, log_std = self._beside(z)
        return (z - mean) * (-log_std).exp()

    def log_density(self, z: Tensor) -> Tensor:
        """The log density of each group in nats, without the normalizing constant: [B, G] or [B, K, G]."""
        _, log_std = self._beside(z)
        return -(0.5 * self.standardised(z).square() + log_std).sum(-1)

    def _beside(self, z: Tensor) -> tuple[Tensor, Tensor]:
        if z.dim() == self.mean.dim():
            return self.mean, self.log_std
        return self.mean.unsqueeze(1), self.log_std.unsqueeze(1)


class Posterior(NamedTuple):
    """q, fp32 [B, G, d_z], and the prior p it is measured against; None is N(0, I)."""

    mean: Tensor
    log_std: Tensor
    prior: Gaussian | None = None

    def sample(self, epsilon: Tensor) -> Tensor:
        """Reparameterized draw from standard normal noise, [B, G, d_z] or K of them [B, K, G, d_z]."""
        return Gaussian(self.mean, self.log_std).sample(epsilon)

    def kl_per_unit(self) -> Tensor:
        """KL(q || p) of each latent unit in nats, [B, G, d_z]."""
        mean, log_std = self.mean, self.log_std
        if self.prior is not None:  # measured in units of the prior's own deviation
            mean, log_std = self.prior.standardised(mean), log_std - self.prior.log_std
        return 0.5 * (mean.square() + (2 * log_std).exp() - 1) - log_std

    def kl(self) -> Tensor:
        """KL(q || p) of each group in nats, [B, G]."""
        return self.kl_per_unit().sum(-1)

    def log_ratio_to_prior(self, z: Tensor) -> Tensor:
        """log p(z) - log q(z) of each group in nats, [B, G] or [B, K, G]."""
        prior = -0.5 * z.square().sum(-1) if self.prior is None else self.prior.log_density(z)
        return prior - Gaussian(self.mean, self.log_std).log_density(z)


class ScaledGradient(torch.autograd.Function):
    """z as it is; its gradient is multiplied by a tensor that may be filled in later, until the backward pass begins.

    What the doubly reparameterized gradient of importance weights needs: they are known only after the forward pass.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, scale: Tensor) -> Tensor:
        ctx.scale = scale
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.scale, None


class Encoder(nn.Module):
    """Reads the clean tokens and the mask pattern, pools over each group's masked positions."""

    def __init__(self, a: Architecture, symbols: int) -> None:
        """`symbols`: V for the encoder, V + 1 for a prior, which may see the mask symbol."""
        super().__init__()
        self.groups, self.documents, self.head_width = a.groups, a.documents, a.head_width
        width, heads = a.encoder_width, a.encoder_width // a.head_width
        kernel = choose_kernel(a.attention, head_width=a.head_width)
        self.embedding = nn.Embedding(symbols, width)
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

    def forward(self, tokens: Tensor, masked: Tensor, attend: Tensor | None) -> Gaussian:
        """q(z | x0, m). A group without a masked position gets some Gaussian, which nothing may use.

        Args:
            tokens: int64 [B, L]: x0, for a prior xt.
            masked: bool [B, L], the pattern m; all maskable positions for q(z | x0).
            attend: bool [B, L], false at padding, or int32 [B, L], see documents.py; None where all is one document.
        """
        length, device = tokens.shape[1], tokens.device
        # As a product, whose gradient adds up all positions at once; that of an embedding of two rows would not.
        patterns = self.pattern(torch.arange(2, device=device))
        pattern = torch.stack((~masked, masked), -1).to(patterns.dtype) @ patterns
        h = self.embedding(tokens) + pattern + self.position(positions_in(attend, length, device))
        rotary = rotary_table(torch.arange(length, device=device), self.head_width)
        mask = attention_mask(attend, self.documents, self.blocks.kernel)
        h = self.norm(self.blocks(h, rotary, mask))
        if attend is not None and has_documents(attend):
            over = (members_of(attend, self.documents) & masked[:, :, None]).transpose(1, 2)  # [B, N, L]
            pooled = over.to(h.dtype) @ h
        else:
            over = masked.unflatten(1, (self.groups, -1))  # [B, G, L / G]
            pooled = (over.unsqueeze(2).to(h.dtype) @ h.unflatten(1, (self.groups, -1))).squeeze(2)
        pooled = pooled.float() / over.sum(-1, keepdim=True).clamp(min=1)
        mean, log_std = self.out(pooled.to(self.out.weight.dtype)).float().chunk(2, dim=-1)
        return Gaussian(mean, log_std.clamp(*LOG_STD_RANGE))
