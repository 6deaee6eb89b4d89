"""Small models of every kind, and batches for them."""

import torch
from tiny_models import tiny_model

VARIANTS = {
    "plain": {},
    "mdm": {"latent_width": 0},
    "add": {"injection": "add"},
    "tied": {"tie_embeddings": True},
    "rmsnorm": {"norm": "rmsnorm"},
    "swiglu": {"mlp": "swiglu"},
    "time": {"time_conditioning": True},
    "mdm, time": {"latent_width": 0, "time_conditioning": True},
    "add, time": {"injection": "add", "time_conditioning": True},
    "conditional": {"prior": "conditional"},
    "conditional, add": {"prior": "conditional", "injection": "add", "norm": "rmsnorm"},
    "blocks": {"groups": 2},
    "blocks, add": {"groups": 3, "injection": "add"},
    "blocks, mdm": {"groups": 3, "latent_width": 0},
    "blocks, everything": {
        "groups": 2,
        "time_conditioning": True,
        "norm": "rmsnorm",
        "mlp": "swiglu",
        "tie_embeddings": True,
    },
}


def variant(name, seed=0, **changes):
    values = {"vocab_size": 5, "row_length": 6, "layers": 2, "encoder_layers": 2, "latent_width": 2}
    return tiny_model(seed, **{**values, **VARIANTS[name], **changes})


def inputs(model, rows=4, seed=0, share=0.6):
    """A batch in the form that VMD.forward takes, masks drawn at random, at least one masked position."""
    a, generator = model.architecture, torch.Generator().manual_seed(seed)
    clean = torch.randint(a.vocab_size, (rows, a.row_length), generator=generator)
    masked = torch.rand(clean.shape, generator=generator) < share
    masked[0, 0] = True
    return {
        "clean": clean,
        "noisy": clean.masked_fill(masked, a.mask_id),
        "index": masked.flatten().nonzero().squeeze(-1),
        "encoder_mask": masked,
        "epsilon": torch.randn(rows, a.groups, a.latent_width, generator=generator) if a.latent_width else None,
        "attend": None,
        "mask_ratio": torch.rand(rows, a.groups, generator=generator),
    }


def hidden(model, x, z=None, **changes):
    x = {**x, **changes}
    z = x["epsilon"] if z is None else z
    return model.denoiser(x["noisy"], z, x["attend"], x["mask_ratio"], x["clean"])


def close(one, other, tolerance=1e-5):
    return torch.allclose(one, other, atol=tolerance, rtol=tolerance)
