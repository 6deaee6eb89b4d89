"""Variational masked diffusion: encoder and denoiser put together. ``latent_width = 0`` is plain MDM, the same code."""

import torch
from torch import Tensor, nn

from vmd_scale.model.architecture import Architecture
from vmd_scale.model.attention import kernel_name
from vmd_scale.model.denoiser import Denoiser
from vmd_scale.model.encoder import Encoder, Gaussian, Posterior, ScaledGradient
from vmd_scale.model.head import masked_nll, pieces_of, weighted_nll
from vmd_scale.model.layers import Stack


class VMD(nn.Module):
    """p(x0 | xt, z) and q(z | x0, m) of arXiv 2510.23606; p(z) is N(0, I), or a network that reads what is visible.

    `fused_loss`: whether large logits go through `weighted_nll`, which reads the head's matrix; where a rank holds only
    a part of it (ZeRO-3), it must be false. `compiled_loss`: see `weighted_nll`.
    """

    fused_loss = True
    compiled_loss = False

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        if architecture.prior == "conditional" and architecture.groups > 1:
            raise ValueError("a conditional prior would see the blocks that come after: it needs groups = 1")
        self.architecture = architecture
        self.denoiser = Denoiser(architecture)
        self.encoder = Encoder(architecture, architecture.vocab_size) if architecture.latent_width else None
        conditional = architecture.latent_width > 0 and architecture.prior == "conditional"
        self.prior_network = Encoder(architecture, architecture.vocab_size + 1) if conditional else None

    @property
    def networks(self) -> list[Denoiser | Encoder]:
        """Those that there are."""
        networks = (self.denoiser, self.encoder, self.prior_network)
        return [network for network in networks if network is not None]

    @property
    def stacks(self) -> list[Stack]:
        """The blocks of each network that there is."""
        return [network.blocks for network in self.networks]

    def compile_blocks(self, dynamic: bool | None = None) -> None:
        """torch.compile of blocks and last norms alone: of one shape, all layers of a network share what is compiled.

        Of `forward`, not by `block.compile`, which would take hooks along: ZeRO-3's gather weights and break the graph.

        `dynamic`: false where shapes never change; None compiles again, for any number of rows, when they first do.
        """
        for network in self.networks:
            for module in (*network.blocks, network.norm):
                module.forward = torch.compile(module.forward, dynamic=dynamic)

    def attention_kernels(self, dtype: torch.dtype, padded: bool, sampling: bool = False) -> dict[str, str]:
        """Their names, by network.

        Args:
            padded: whether rows have padding, which no varlen kernel leaves out.
            sampling: which has no use for the encoder, and computes blocks one after the other, without a mask.
        """
        networks: dict[str, Denoiser | Encoder | None] = {
            "denoiser": self.denoiser,
            "encoder": None if sampling else self.encoder,
            "prior": self.prior_network,
        }
        return {
            name: kernel_name(
                "sdpa" if sampling and network.blocks.kernel == "flex" else network.blocks.kernel, dtype, padded
            )
            for name, network in networks.items()
            if network is not None
        }

    @property
    def hidden_matrices(self) -> list[nn.Parameter]:
        """Weights of attention and MLPs, which map hidden states to hidden states: what Muon is for."""
        return [
            p
            for stack in self.stacks
            for name, p in stack.named_parameters()
            if p.dim() == 2 and ".modulation." not in name
        ]

    def checkpoint_activations(self, kind: str) -> None:
        """What the backward pass computes again instead of keeping it: see `Stack.checkpoint_activations`."""
        for stack in self.stacks:
            stack.checkpoint_activations(kind)

    def forward(
        self,
        clean: Tensor,
        noisy: Tensor,
        index: Tensor,
        encoder_mask: Tensor | None = None,
        epsilon: Tensor | None = None,
        attend: Tensor | None = None,
        mask_ratio: Tensor | None = None,
        owner: Tensor | None = None,
        z_gradient: Tensor | None = None,
        nll_weight: Tensor | None = None,
    ) -> tuple[Tensor, Posterior | None]:
        """Encode, draw z, denoise, score: everything one training step needs, in one call.

        Args:
            clean, noisy: int64 [B, L].
            index: int64 [N], flat numbers of the masked positions (see `masked_nll`).
            encoder_mask: bool [B, L], the pattern m that the encoder sees.
            epsilon: fp32 [B, G, d_z], standard normal noise.
            attend: bool [B, L] or None; mask_ratio: [B, G] or None.
            owner: int64 [S], for several states of a row and K latents of each: then `noisy` and `mask_ratio` are of S
                states, each of the row `owner`; `epsilon` is [B, K, G, d_z], and `index` numbers positions of [S K, L].
            z_gradient: fp32 [B, K, G, 1], multiplies the gradient that reaches z; see `ScaledGradient`.
            nll_weight: fp32 [B, G], asks for a weighted sum, whose gradient is cheaper.

        Returns:
            -log p(x0 | xt, z) at masked positions, zero elsewhere, fp32 [B, L] or [S K, L], or with `nll_weight` their
            weighted sum, a scalar; and q, None without a latent.
        """
        if self.encoder is None:
            return self._score(clean, noisy, index, None, attend, mask_ratio, nll_weight), None
        assert encoder_mask is not None
        assert epsilon is not None
        posterior = self.encode(clean, encoder_mask, attend)
        z = posterior.sample(epsilon)
        if z_gradient is not None:
            z = ScaledGradient.apply(z, z_gradient)
        if owner is not None:
            latents = epsilon.shape[1]
            z, owner = z[owner].flatten(0, 1), owner.repeat_interleave(latents)
            clean, attend = clean[owner], None if attend is None else attend[owner]
            noisy = noisy.repeat_interleave(latents, 0)
            mask_ratio = None if mask_ratio is None else mask_ratio.repeat_interleave(latents, 0)
        return self._score(clean, noisy, index, z, attend, mask_ratio, nll_weight), posterior

    def encode(self, clean: Tensor, encoder_mask: Tensor, attend: Tensor | None = None) -> Posterior:
        """q(z | x0, m), beside the prior of the same latent."""
        assert self.encoder is not None
        q = self.encoder(clean, encoder_mask, attend)
        noisy = clean.masked_fill(encoder_mask, self.architecture.mask_id)
        return Posterior(q.mean, q.log_std, self.prior(noisy, encoder_mask, attend))

    def prior(self, noisy: Tensor, masked: Tensor, attend: Tensor | None = None) -> Gaussian | None:
        """p(z | visible tokens): int64 [B, L] with mask_id where masked, bool [B, L]. None stands for N(0, I)."""
        return None if self.prior_network is None else self.prior_network(noisy, masked, attend)

    def token_nll(
        self,
        clean: Tensor,
        noisy: Tensor,
        index: Tensor,
        z: Tensor | None,
        attend: Tensor | None = None,
        mask_ratio: Tensor | None = None,
    ) -> Tensor:
        """-log p(x0 | xt, z) for a given z: nats at masked positions, zero elsewhere, fp32 [B, L]."""
        hidden = self.denoiser(noisy, z, attend, mask_ratio, clean)
        return masked_nll(hidden, clean, index, self.denoiser.logits, self.architecture.vocab_size)

    def _score(
        self,
        clean: Tensor,
        noisy: Tensor,
        index: Tensor,
        z: Tensor | None,
        attend: Tensor | None,
        mask_ratio: Tensor | None,
        nll_weight: Tensor | None,
    ) -> Tensor:
        """`token_nll`, or its weighted sum; small logits, which are kept anyway, have nothing to gain."""
        in_one_piece = pieces_of(clean, self.architecture.vocab_size) == 1
        fused = self.fused_loss and self.denoiser.has_plain_head and torch.is_grad_enabled()
        if nll_weight is None or in_one_piece or not fused:
            nll = self.token_nll(clean, noisy, index, z, attend, mask_ratio)
            return (
                nll if nll_weight is None else (nll_weight * nll.unflatten(1, (nll_weight.shape[1], -1)).sum(-1)).sum()
            )
        hidden = self.denoiser(noisy, z, attend, mask_ratio, clean)
        matrix, bias = self.denoiser.output_matrix, self.denoiser.output_bias
        return weighted_nll(hidden, clean, index, matrix, nll_weight, self.compiled_loss, bias)

    def logits(
        self, noisy: Tensor, z: Tensor | None, attend: Tensor | None = None, mask_ratio: Tensor | None = None
    ) -> Tensor:
        """fp32 [B, L, V] for every position of `noisy`; the block variant takes earlier blocks from `noisy` itself."""
        return self.denoiser.logits(self.denoiser(noisy, z, attend, mask_ratio, clean=noisy))
