"""Variational masked diffusion: encoder and denoiser put together. ``latent_width = 0`` is plain MDM, the same code."""

from torch import Tensor, nn

from vmd_scale.model.architecture import Architecture
from vmd_scale.model.denoiser import Denoiser
from vmd_scale.model.encoder import Encoder, Posterior
from vmd_scale.model.head import masked_nll


class VMD(nn.Module):
    """p(x0 | xt, z) and q(z | x0, m) of arXiv 2510.23606."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture
        self.denoiser = Denoiser(architecture)
        self.encoder = Encoder(architecture) if architecture.latent_width else None

    def forward(
        self,
        clean: Tensor,
        noisy: Tensor,
        index: Tensor,
        encoder_mask: Tensor | None = None,
        epsilon: Tensor | None = None,
        attend: Tensor | None = None,
        mask_ratio: Tensor | None = None,
    ) -> tuple[Tensor, Posterior | None]:
        """Encode, draw z, denoise, score: everything one training step needs, in one call.

        Args:
            clean, noisy: int64 [B, L].
            index: int64 [N], flat numbers of the masked positions (see `masked_nll`).
            encoder_mask: bool [B, L], the pattern m that the encoder sees.
            epsilon: fp32 [B, G, d_z], standard normal noise.
            attend: bool [B, L] or None; mask_ratio: [B, G] or None.

        Returns:
            -log p(x0 | xt, z) at masked positions, zero elsewhere, fp32 [B, L]; and q, None without a latent.
        """
        if self.encoder is None:
            return self.token_nll(clean, noisy, index, None, attend, mask_ratio), None
        assert encoder_mask is not None
        assert epsilon is not None
        posterior = self.encoder(clean, encoder_mask, attend)
        z = posterior.sample(epsilon)
        return self.token_nll(clean, noisy, index, z, attend, mask_ratio), posterior

    def encode(self, clean: Tensor, encoder_mask: Tensor, attend: Tensor | None = None) -> Posterior:
        """q(z | x0, m)."""
        assert self.encoder is not None
        return self.encoder(clean, encoder_mask, attend)

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

    def logits(
        self, noisy: Tensor, z: Tensor | None, attend: Tensor | None = None, mask_ratio: Tensor | None = None
    ) -> Tensor:
        """fp32 [B, L, V] for every position of `noisy`; the block variant takes earlier blocks from `noisy` itself."""
        return self.denoiser.logits(self.denoiser(noisy, z, attend, mask_ratio, clean=noisy))
