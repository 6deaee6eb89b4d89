"""The network: denoiser, encoder, and the two put together. Depends on torch alone."""

from vmd_scale.model.architecture import Architecture
from vmd_scale.model.encoder import Gaussian, Posterior, ScaledGradient
from vmd_scale.model.vmd import VMD

__all__ = ["VMD", "Architecture", "Gaussian", "Posterior", "ScaledGradient"]
