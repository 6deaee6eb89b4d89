"""The denoiser p(x0 | xt, z): a bidirectional transformer. Its head never predicts the mask symbol (SUBS)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vmd_scale.model.architecture import Architecture
from vmd_scale.model.attention import Mask, block_diffusion_mask, choose_kernel, rotary_table
from vmd_scale.model.documents import attention_mask, has_documents, members_of, positions_in
from vmd_scale.model.layers import Block, Condition, KeyValues, Norm, Stack, initialize


class Denoiser(nn.Module):
    def __init__(self, a: Architecture) -> None:
        super().__init__()
        self.architecture = a
        self.kernel = choose_kernel(a.attention, blocks=a.groups > 1, head_width=a.head_width)
        condition = a.condition_width if a.has_condition else 0
        self.embedding = nn.Embedding(a.vocab_size + 1, a.width)
        # Rotary attention sees differences of positions only: where everything is masked, all positions would look
        # alike, and z could not say which token belongs where.
        self.position = nn.Embedding(a.row_length, a.width)
        self.blocks = Stack(
            Block(a.width, a.heads, a.mlp_ratio, a.mlp, a.norm, a.dropout, self.kernel, condition, a.biases)
            for _ in range(a.layers)
        )
        self.norm = Norm(a.width, a.norm)
        self.head = None if a.tie_embeddings else nn.Linear(a.width, a.vocab_size, bias=a.biases)
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
                if parameter.dim() == 2:  # z must matter from the first step on, or the posterior collapses
                    nn.init.normal_(parameter, std=1 / math.sqrt(parameter.shape[1]))

    def forward(
        self,
        noisy: Tensor,
        z: Tensor | None,
        attend: Tensor | None = None,
        mask_ratio: Tensor | None = None,
        clean: Tensor | None = None,
        modulations: list[Tensor] | None = None,
    ) -> Tensor:
        """Hidden states of every position.

        Args:
            noisy: int64 [B, L], mask_id where masked.
            z: [B, G, d_z], or None without a latent; [B, N, d_z] where `attend` tells documents apart.
            attend: bool [B, L], false at padding, or int32 [B, L], see documents.py.
            mask_ratio: [B, G], read only with time_conditioning.
            clean: int64 [B, L], read only by the block variant (G > 1): what the blocks before condition on.
            modulations: those of z, see the method; only without blocks.

        Returns:
            [B, L, D].
        """
        a, length = self.architecture, noisy.shape[1]
        x = self.embedding(noisy) + self.position(positions_in(attend, length, noisy.device))
        positions = torch.arange(length, device=noisy.device)  # rotary attention sees differences: no need to restart
        if self.latent_to_embedding is not None:
            assert z is not None
            added = self.latent_to_embedding(z.to(x.dtype))
            if attend is not None and has_documents(attend):
                x = x + members_of(attend, added.shape[1]).to(x.dtype) @ added
            else:
                x = (x.unflatten(1, (a.groups, -1)) + added.unsqueeze(2)).flatten(1, 2)
        mask: Mask = attention_mask(attend, a.documents, self.blocks.kernel)
        condition = modulations or self._condition(z, mask_ratio, attend)
        if a.groups > 1:
            assert clean is not None
            assert not isinstance(condition, list)
            x = torch.cat((x, self.embedding(clean) + self.position(positions)), dim=1)
            positions = torch.cat((positions, positions))
            on_cpu = not noisy.is_cuda and torch.is_grad_enabled()  # where FlexAttention has no backward
            kernel = "sdpa" if self.kernel == "flex" and on_cpu else self.kernel
            mask = block_diffusion_mask(length, a.groups, attend, kernel, noisy.device)
            if condition is not None:  # the clean half is conditioned on no z
                condition = Condition(torch.cat((condition.vectors, torch.zeros_like(condition.vectors)), dim=1))
        rotary = rotary_table(positions, a.head_width)
        x = self.blocks(x, rotary, mask, condition)
        return self.norm(x[:, :length])

    def forward_block(
        self,
        tokens: Tensor,
        group: int,
        past: Sequence[KeyValues],
        z: Tensor | None,
        attend: Tensor | None = None,
        mask_ratio: Tensor | None = None,
        clean: bool = False,
        modulations: list[Tensor] | None = None,
    ) -> Tensor:
        """Hidden states of one block alone, the clean blocks before it being remembered: what `forward` gives for it.

        Args:
            tokens: int64 [B, L / G], the block numbered `group`.
            past: one for each layer. With `clean`, the block is complete: it is remembered, and sees no z.
            z: [B, 1, d_z], that of this block; modulations: those of z; mask_ratio: [B, 1]; attend: bool [B, L].

        Returns:
            [B, L / G, D].
        """
        end = (group + 1) * tokens.shape[1]
        positions = torch.arange(end - tokens.shape[1], end, device=tokens.device)
        x = self.embedding(tokens) + self.position(positions)
        a = self.architecture
        condition: Condition | list[Tensor] | None
        if clean:
            condition = Condition(x.new_zeros(len(x), 1, a.condition_width)) if a.has_condition else None
        else:
            condition = modulations or self._condition(z, mask_ratio)
            if self.latent_to_embedding is not None:
                assert z is not None
                x = x + self.latent_to_embedding(z.to(x.dtype))
        for layer in past:
            layer.growing = clean
        mask = None if attend is None else attend[:, None, None, :end]
        return self.norm(self.blocks(x, rotary_table(positions, a.head_width), mask, condition, past))

    def modulations(self, z: Tensor) -> list[Tensor] | None:
        """What z, [B, G, d_z], makes of every layer, [B, G, 6 D]: computed once for all forwards with the same z.

        None where that is not all, or not known: with time conditioning, other injections, blocks of one's own.
        """
        if self.latent_to_condition is None or self.time_to_condition is not None:
            return None
        condition = self._condition(z, None)
        assert condition is not None
        return self.blocks.modulations(condition)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> fp32 [..., V]."""
        if self.head is not None:
            return self.head(hidden).float()
        return (hidden @ self.output_matrix.T).float()

    @property
    def output_matrix(self) -> Tensor:
        """[V, D], the head; the mask symbol has no row in it."""
        return self.embedding.weight[: self.architecture.vocab_size] if self.head is None else self.head.weight

    @property
    def output_bias(self) -> Tensor | None:
        """[V], the head's, where it has one."""
        return None if self.head is None else self.head.bias

    @property
    def has_plain_head(self) -> bool:
        """Whether `output_matrix` and `output_bias` are all of the head: an adapter on it adds to them."""
        return self.head is None or type(self.head) is nn.Linear

    def _condition(self, z: Tensor | None, mask_ratio: Tensor | None, attend: Tensor | None = None) -> Condition | None:
        dtype = self.embedding.weight.dtype
        vectors = members = None
        if self.latent_to_condition is not None:
            assert z is not None
            vectors = self.latent_to_condition(z.to(dtype))
            if attend is not None and has_documents(attend):
                members = members_of(attend, z.shape[1]).to(dtype)
        if self.time_to_condition is not None:
            assert mask_ratio is not None
            time = self.time_to_condition(_sinusoids(mask_ratio, self.architecture.condition_width).to(dtype))
            vectors = time if vectors is None else vectors + time
        return None if vectors is None else Condition(nn.functional.silu(vectors), members)


def _sinusoids(ratio: Tensor, width: int) -> Tensor:
    """[B, G] in [0, 1] -> fp32 [B, G, width]."""
    frequencies = torch.exp(-math.log(1000.0) * torch.arange(width // 2, device=ratio.device) / (width // 2))
    angles = 1000.0 * ratio.float().unsqueeze(-1) * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1)
