"""The denoiser p(x0 | xt, z): a bidirectional transformer. Its head never predicts the mask symbol (SUBS)."""

import math

import torch
from torch import Tensor, nn

from vmd_scale.model.architecture import Architecture
from vmd_scale.model.attention import block_diffusion_mask, choose_kernel, rotary_table
from vmd_scale.model.layers import Block, Norm, Stack, initialize


class Denoiser(nn.Module):
    def __init__(self, a: Architecture) -> None:
        super().__init__()
        self.architecture = a
        kernel = choose_kernel(a.attention)
        condition = a.condition_width if a.has_condition else 0
        self.embedding = nn.Embedding(a.vocab_size + 1, a.width)
        # Rotary attention sees differences of positions only: where everything is masked, all positions would look
        # alike, and z could not say which token belongs where.
        self.position = nn.Embedding(a.row_length, a.width)
        self.blocks = Stack(
            Block(a.width, a.heads, a.mlp_ratio, a.mlp, a.norm, a.dropout, kernel, condition) for _ in range(a.layers)
        )
        self.norm = Norm(a.width, a.norm)
        self.head = None if a.tie_embeddings else nn.Linear(a.width, a.vocab_size, bias=False)
        self.latent_to_condition = None
        self.latent_to_embedding = None
        if a.latent_width and a.injection == "adaln":
            self.latent_to_condition = nn.Sequential(
                nn.Linear(a.latent_width, condition), nn.SiLU(), nn.Linear(condition, condition)
            )
        elif a.latent_width:
            self.latent_to_embedding = nn.Linear(a.latent_width, a.width)
        self.time_to_condition = None
        if a.time_conditioning:
            self.time_to_condition = nn.Sequential(
                nn.Linear(condition, condition), nn.SiLU(), nn.Linear(condition, condition)
            )
        initialize(self, a.layers)
        for projection in (self.latent_to_condition, self.latent_to_embedding):
            for parameter in projection.parameters() if projection is not None else ():
                if parameter.dim() == 2:  # z must be heard from the first step on, or the posterior collapses
                    nn.init.normal_(parameter, std=1 / math.sqrt(parameter.shape[1]))

    def forward(
        self,
        noisy: Tensor,
        z: Tensor | None,
        attend: Tensor | None = None,
        mask_ratio: Tensor | None = None,
        clean: Tensor | None = None,
    ) -> Tensor:
        """Hidden states of every position.

        Args:
            noisy: int64 [B, L], mask_id where masked.
            z: [B, G, d_z], or None without a latent.
            attend: bool [B, L], false at padding.
            mask_ratio: [B, G], read only with time_conditioning.
            clean: int64 [B, L], read only by the block variant (G > 1): what the blocks before condition on.

        Returns:
            [B, L, D].
        """
        a, length = self.architecture, noisy.shape[1]
        positions = torch.arange(length, device=noisy.device)
        x = self.embedding(noisy) + self.position(positions)
        if self.latent_to_embedding is not None:
            assert z is not None
            added = self.latent_to_embedding(z.to(x.dtype))
            x = (x.unflatten(1, (a.groups, -1)) + added.unsqueeze(2)).flatten(1, 2)
        mask = None if attend is None else attend[:, None, None, :]
        condition = self._condition(x, z, mask_ratio)
        if a.groups > 1:
            assert clean is not None
            x = torch.cat((x, self.embedding(clean) + self.position(positions)), dim=1)
            positions = torch.cat((positions, positions))
            blockwise = block_diffusion_mask(length, a.groups, noisy.device)
            mask = blockwise if mask is None else blockwise & torch.cat((mask, mask), dim=-1)
            if condition is not None:  # the clean half is conditioned on no z
                condition = torch.cat((condition, torch.zeros_like(condition)), dim=1)
        rotary = rotary_table(positions, a.head_width)
        x = self.blocks(x, rotary, mask, condition)
        return self.norm(x[:, :length])

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> fp32 [..., V]."""
        if self.head is not None:
            return self.head(hidden).float()
        return (hidden @ self.embedding.weight[: self.architecture.vocab_size].T).float()

    def _condition(self, x: Tensor, z: Tensor | None, mask_ratio: Tensor | None) -> Tensor | None:
        """What modulates the blocks, [B, G, C]."""
        condition = None
        if self.latent_to_condition is not None:
            assert z is not None
            condition = self.latent_to_condition(z.to(x.dtype))
        if self.time_to_condition is not None:
            assert mask_ratio is not None
            time = self.time_to_condition(_sinusoids(mask_ratio, self.architecture.condition_width).to(x.dtype))
            condition = time if condition is None else condition + time
        return None if condition is None else nn.functional.silu(condition)


def _sinusoids(ratio: Tensor, width: int) -> Tensor:
    """[B, G] in [0, 1] -> fp32 [B, G, width]."""
    frequencies = torch.exp(-math.log(1000.0) * torch.arange(width // 2, device=ratio.device) / (width // 2))
    angles = 1000.0 * ratio.float().unsqueeze(-1) * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1)
