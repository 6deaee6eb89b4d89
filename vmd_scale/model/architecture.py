"""What must be known to build the network, as plain numbers (no configuration machinery)."""

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Architecture:
    """Shape of a VMD. Letters used everywhere: B rows, L positions, G latent groups, D width, V vocabulary."""

    vocab_size: int  # V, without the mask symbol, whose id is V
    row_length: int
    groups: int  # G, diffusion blocks of a row; 1 is plain masked diffusion
    layers: int
    width: int
    heads: int
    mlp_ratio: float
    mlp: str  # gelu | swiglu
    norm: str  # layernorm | rmsnorm
    dropout: float
    tie_embeddings: bool
    time_conditioning: bool
    attention: str  # auto | flash | sdpa | flex | reference
    condition_width: int
    latent_width: int  # d_z; 0 is the MDM baseline
    injection: str  # adaln | add
    encoder_layers: int
    encoder_width: int
    biases: bool = False  # of the denoiser's MLPs and head
    prior: str = "standard"  # standard: N(0, I) | conditional: a network that reads the visible tokens
    documents: int = 1  # of a row, at most, each with a z of its own; more than 1 only where G = 1

    @property
    def mask_id(self) -> int:
        return self.vocab_size

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def has_condition(self) -> bool:
        """Whether anything modulates the blocks through adaLN."""
        return self.time_conditioning or (self.latent_width > 0 and self.injection == "adaln")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)
