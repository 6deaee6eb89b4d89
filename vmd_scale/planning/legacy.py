"""What a run will cost, on paper: parameters, FLOPs per token, memory per rank."""

import time
from dataclasses import dataclass

import torch
from torch import nn

from vmd_scale.config import Config, step_values
from vmd_scale.model import VMD, Architecture
from vmd_scale.model.head import CHUNK_ELEMENTS

# Dense bf16 peak in FLOP/s, from the vendors' data sheets.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40": 181e12,
    "4090": 165e12,
    "V100": 125e12,
}


@dataclass(frozen=True)
class Cost:
    """A plan, per rank where it says so."""

    denoiser_parameters: int
    encoder_parameters: int  # with a conditional prior's
    flops_per_token: float  # forward and backward, of the masked share of the head
    weights_bytes: float  # per rank, each of these
    gradients_bytes: float
    optimizer_bytes: float
    ema_bytes: float
    activations_bytes: float  # a rough estimate
    logits_bytes: float

    @property
    def total_bytes(self) -> float:
        return (
            self.weights_bytes
            + self.gradients_bytes
            + self.optimizer_bytes
            + self.ema_bytes
            + self.activations_bytes
            + self.logits_bytes
        )


def count_parameters(module: nn.Module | None) -> int:
    return 0 if module is None else sum(p.numel() for p in module.parameters())


def denoiser_passes(config: Config) -> float:
    """Forwards of the denoiser for one row: 1, with objective iw K of them for each step of the path."""
    if config.diffusion.objective != "iw":
        return 1.0
    longest = config.data.row_length // config.groups
    steps = [min(T, longest) for T in step_values(config.diffusion.steps)]
    return config.diffusion.importance_samples * sum(steps) / len(steps)


def masked_share(config: Config) -> float:
    """Mean share of positions at which the head is computed in training, under the linear schedule."""
    if config.diffusion.objective == "iw":  # along a whole path, each position once
        return float(config.diffusion.importance_samples)
    if config.diffusion.objective == "vmd":
        return 0.5
    steps = step_values(config.diffusion.steps)
    return sum(0.5 + 0.5 / T for T in steps) / len(steps)  # mean of k/T over k = 1..T; 1/2 for T = inf


def training_flops_per_token(a: Architecture, masked: float, passes: float = 1.0) -> float:
    """Matrix-product FLOPs of forward and backward (3 x forward) for one token of a row.

    Denoiser (`passes` times) and encoder blocks, attention at the row's length, and the head at the masked share of
    the positions.
    Element-wise work and recomputation are not counted, as is usual for MFU.
    """

    def blocks(layers: int, width: int, length: int) -> float:
        matrices = 4 * width * width + 2 * a.mlp_ratio * width * width
        return layers * (2 * matrices + 4 * length * width)

    sequences = 2 if a.groups > 1 else 1  # the block variant runs over [noisy ; clean]
    forward = passes * sequences * blocks(a.layers, a.width, sequences * a.row_length)
    forward += masked * 2 * a.width * a.vocab_size
    if a.latent_width:
        readers = 2 if a.prior == "conditional" else 1  # the encoder, and a prior of the same size
        forward += readers * blocks(a.encoder_layers, a.encoder_width, a.row_length)
    return 3 * forward


def plan(config: Config, architecture: Architecture, world_size: int, precision: str) -> Cost:
    """Costs of a run on `world_size` ranks; builds the model without memory to count its parameters."""
    with torch.device("meta"):
        model = VMD(architecture)
    denoiser = count_parameters(model.denoiser)
    encoder = count_parameters(model.encoder) + count_parameters(model.prior_network)
    parameters, stage = denoiser + encoder, config.zero_stage
    low = 2 if precision == "bf16" else 4
    shard = {
        "weights": world_size if stage >= 3 else 1,
        "gradients": world_size if stage >= 2 else 1,
        "optimizer": world_size if stage >= 1 else 1,
    }
    master = 4 if stage > 0 else 0
    micro, a = config.training.micro_batch, architecture
    # Kept for the backward pass, per position and layer: about 16 widths, and 2 mlp_ratio more for the MLP.
    per_layer = (16 + 2 * a.mlp_ratio) * low
    kept_layers = (1 / 16 if config.training.activation_checkpointing == "full" else 1) * per_layer
    sequences = 2 if a.groups > 1 else 1
    activations = denoiser_passes(config) * micro * a.row_length * a.layers * a.width * kept_layers * sequences
    if a.latent_width:
        activations += micro * a.row_length * a.encoder_layers * a.encoder_width * per_layer
    logits = 3 * 4 * min(CHUNK_ELEMENTS, micro * a.row_length * masked_share(config) * a.vocab_size)
    return Cost(
        denoiser_parameters=denoiser,
        encoder_parameters=encoder,
        flops_per_token=training_flops_per_token(a, masked_share(config), denoiser_passes(config)),
        weights_bytes=low * parameters / shard["weights"],
        gradients_bytes=4 * parameters / shard["gradients"],
        optimizer_bytes=(8 + master) * parameters / shard["optimizer"],
        ema_bytes=(4 * parameters / shard["optimizer"]) if config.training.ema_decay else 0.0,
        activations_bytes=activations,
        logits_bytes=logits,
    )


def peak_flops(device: torch.device) -> float:
    """Peak FLOP/s of a device: from the data sheet for a known GPU, else measured with one matrix product."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for key, value in PEAK_FLOPS.items():
            if key in name:
                return value
    return measured_flops(device)


def measured_flops(device: torch.device, size: int = 768, repeats: int = 5) -> float:
    """FLOP/s of a square fp32 matrix product (bf16 on GPU): the best of a few."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    size = 8 * size if device.type == "cuda" else size
    a = torch.randn(size, size, device=device, dtype=dtype)
    best = 0.0
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best


def describe(cost: Cost, config: Config, world_size: int, peak: float | None = None) -> str:
    """The text of ``--dry-run``."""
    mib = 2**20
    tokens = config.training.steps * config.training.global_batch * config.data.row_length
    lines = [
        f"parameters        denoiser {cost.denoiser_parameters:,}   encoder {cost.encoder_parameters:,}",
        f"tokens            {tokens:,} in {config.training.steps:,} steps "
        f"of {config.training.global_batch} rows x {config.data.row_length}",
        f"FLOPs per token   {cost.flops_per_token:,.0f} (forward and backward)",
        f"FLOPs in all      {cost.flops_per_token * tokens:.3g}",
        f"memory per rank   {cost.total_bytes / mib:,.0f} MiB on {world_size} rank(s), ZeRO stage {config.zero_stage}",
    ]
    for name in ("weights", "gradients", "optimizer", "ema", "activations", "logits"):
        lines.append(f"    {name:<13} {getattr(cost, name + '_bytes') / mib:>12,.1f} MiB")
    if peak:
        hours = cost.flops_per_token * tokens / (peak * world_size) / 3600
        lines.append(
            f"hours             {hours:,.2f} at the peak of this device ({peak / 1e12:,.2f} TFLOP/s a rank); "
            f"{hours / 0.4:,.2f} at 40 % of it"
        )
    return "\n".join(lines)
