"""A training step as bare PyTorch makes it: model, objective, clipping, AdamW, EMA. Needs torch and numpy alone."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from vmd_scale.diffusion.noise import Noise
from vmd_scale.diffusion.objective import Nelbo, Surrogate, TrainingInputs
from vmd_scale.model import VMD, Architecture

LATENT_WIDTH = 128
VOCAB = 50_257  # of GPT-2; with the mask symbol 50,258, for which the head has no row
LENGTH = 1024
SIZES = {"110M": (12, 768, 12), "1B": (20, 2048, 16)}  # layers, width, heads
ROWS = {"110M": 64, "1B": 32}  # of a step on one GPU; MDLM has 512 on eight


def attention_flops(rows: int, heads: int, width: int, length: int) -> int:
    """Of a dense kernel, forward and backward: 2 products of L x L there, and back 4 of gradients (PaLM's count).

    What a flash kernel computes again, one product more, is no work that anybody asked for: as in MFU, it is not
    counted. Masks leave some of it out.
    """
    return 3 * 2 * 2 * rows * heads * width * length**2


def shape(layers: int, width: int, heads: int, length: int, vocab: int, latent: bool, **changes: Any) -> Architecture:
    """A network with the encoder that a configuration gets by default; without a latent, the MDM baseline."""
    values: dict[str, Any] = {
        "vocab_size": vocab,
        "row_length": length,
        "groups": 1,
        "layers": layers,
        "width": width,
        "heads": heads,
        "mlp_ratio": 4.0,
        "mlp": "gelu",
        "norm": "layernorm",
        "dropout": 0.0,
        "tie_embeddings": False,
        "time_conditioning": False,
        "attention": "auto",
        "condition_width": min(128, width),
        "latent_width": LATENT_WIDTH if latent else 0,
        "injection": "adaln",
        "encoder_layers": max(1, layers // 4),
        "encoder_width": width // heads * max(1, heads // 2),
    }
    return Architecture(**{**values, **changes})


class BareStep:
    """Calls are training steps. In bf16, the optimizer works on fp32 masters, as ZeRO does.

    `objective`: what a VMD is trained with; an MDM always has nelbo with T = inf. `fused`: AdamW in one kernel.
    """

    def __init__(
        self,
        a: Architecture,
        rows: int,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        objective: str = "vmd",
        compiled: bool = False,
        model: VMD | None = None,
        fused: bool = True,
    ) -> None:
        torch.manual_seed(0)
        self.model = (VMD(a) if model is None else model).to(device, dtype).train()
        shared = {"law": "balanced", "groups": a.groups, "latent_width": a.latent_width, "mask_id": a.mask_id}
        shared["noise"] = Noise(0)
        surrogate = objective == "vmd" and a.latent_width > 0
        self.objective = Surrogate(**shared) if surrogate else Nelbo(steps=(math.inf,), **shared)
        self.a, self.rows, self.device = a, rows, torch.device(device)
        self.parameters = list(self.model.parameters())
        low = dtype != torch.float32
        self.masters = [p.detach().float() for p in self.parameters] if low else self.parameters
        self.ema = [p.detach().clone() for p in self.masters]
        matrices = [p for p in self.masters if p.dim() >= 2]
        vectors = [p for p in self.masters if p.dim() < 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}], lr=1e-4, fused=fused
        )
        if compiled:
            self.model.compiled_loss = self.device.type == "cuda"
            self.model.compile_blocks(dynamic=False)
        self.number = 0

    def prepare(self, seed: int = 0) -> TrainingInputs:
        """What the loader's thread does."""
        generator = torch.Generator().manual_seed(seed)
        clean = torch.randint(self.a.vocab_size, (self.rows, self.a.row_length), generator=generator)
        everything = torch.ones_like(clean, dtype=torch.bool)
        x = self.objective.prepare(clean, everything, None, seed, torch.arange(self.rows), self.rows)
        return x.to(self.device)

    def loss(self, x: TrainingInputs) -> torch.Tensor:
        return self.objective(self.model, x, 1.0).total / x.maskable.sum()

    def update(self) -> None:
        """Clip, step, average."""
        low = self.masters is not self.parameters
        if low:
            for master, p in zip(self.masters, self.parameters, strict=True):
                master.grad = None if p.grad is None else p.grad.float()
        torch.nn.utils.clip_grad_norm_(self.masters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(self.ema, [p.detach() for p in self.masters], 0.001)
            if low:
                torch._foreach_copy_(self.parameters, self.masters)
                for p in self.parameters:
                    p.grad = None

    def step(self, x: TrainingInputs) -> None:
        self.loss(x).backward()
        self.update()

    def __call__(self) -> None:
        """A step on one of a few batches that lie ready."""
        batches = self.batches
        self.step(batches[self.number % len(batches)])
        self.number += 1

    @property
    def masked_share(self) -> float:
        """Of the positions of its batches, those at which the head is computed."""
        return sum(len(x.index) for x in self.batches) / sum(x.clean.numel() for x in self.batches)

    @property
    def batches(self) -> Sequence[TrainingInputs]:
        if not hasattr(self, "_ready"):
            self._ready = [self.prepare(seed) for seed in range(4)]
        return self._ready
