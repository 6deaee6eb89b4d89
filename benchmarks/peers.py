"""Public trainers of masked diffusion beside ours: a training step, and sampling, of their code and of ours in one run.

    git clone https://github.com/kuleshov-group/mdlm; git clone https://github.com/dvruette/gidd
    pip install lightning hydra-core omegaconf torchmetrics        # what their modules import
    python benchmarks/peers.py --mdlm mdlm --gidd gidd --json peers.json

Every side has layers, width, heads, rows, length and vocabulary in common and no dropout, and takes turns with the
others on random tokens. A step is loss, gradient, clipping, AdamW and, of MDLM's and ours, the moving average. What a
peer logs is left out. GIDD, here with its MDLM objective, compiles its step by default: it is measured both ways. Where
flash-attn is missing, MDLM's calls of it go to PyTorch's SDPA, which GIDD and ours use then too. `of_ours` is the speed
of a side against our VMD as it trains here, `peak_mib` what a step takes beside weights and optimizer. Sampling draws
the same number of rows in T steps; MDLM's sampler ends with one forward more.
"""

import argparse
import importlib
import importlib.util
import subprocess
import sys
import types
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from comparing import Report, in_turns, medians, ratio, table
from torch.nn import functional as F
from workload import VOCAB, BareStep, shape

from vmd_scale.diffusion.noise import Noise
from vmd_scale.diffusion.sampler import Sampler, sample
from vmd_scale.planning.peaks import peak_bytes
from vmd_scale.precision import DTYPES, precision_on

NEEDED = {"mdlm": ("lightning", "hydra", "omegaconf", "torchmetrics"), "gidd": ("omegaconf",)}
CONDITION = 128  # the width of what modulates the blocks, everywhere


class Sizes(argparse.Namespace):
    """The options: layers, width, heads, length, vocab, rows."""

    layers: int
    width: int
    heads: int
    length: int
    vocab: int
    rows: int

    @property
    def network(self) -> dict[str, int]:
        """As both peers call it; their head counts the mask symbol."""
        return {"hidden_size": self.width, "n_blocks": self.layers, "n_heads": self.heads, "cond_dim": CONDITION}


class Tokenizer:
    """What the peers ask of one. The mask symbol is the last."""

    def __init__(self, vocab: int) -> None:
        self.vocab_size, self.mask_token_id = vocab + 1, vocab
        self.mask_token, self.pad_token, self.eos_token = "<mask>", "<pad>", "<eos>"
        self.pad_token_id = self.eos_token_id = 0

    def __len__(self) -> int:
        return self.vocab_size


class Peer:
    """A peer's model and what it does, as its own code does it."""

    def __init__(
        self,
        parameters: list[torch.nn.Parameter],
        loss: Callable[[torch.Tensor], torch.Tensor],
        optimizer: torch.optim.Optimizer,
        average: Callable[[], None],
        draw: Callable[[int, int], object],
        sizes: Sizes,
        device: torch.device,
    ) -> None:
        self.parameters, self.loss, self.optimizer, self.average, self.draw = parameters, loss, optimizer, average, draw
        self.tokens = torch.randint(sizes.vocab, (sizes.rows, sizes.length)).to(device)

    def __call__(self) -> None:
        """A training step."""
        self.loss(self.tokens).backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average()


def mdlm(folder: Path, sizes: Sizes, device: torch.device) -> Peer:
    """kuleshov-group/mdlm: its `Diffusion`, with the settings of its configuration for OpenWebText."""
    # Not needed here, and they need mamba-ssm and torchvision.
    for name in ("dataloader", "models.dimamba", "models.autoregressive", "timm", "timm.scheduler"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["timm.scheduler"].CosineLRScheduler = type("CosineLRScheduler", (), {})
    if importlib.util.find_spec("flash_attn") is None:
        stand_in_for_flash_attn()
    diffusion = imported(folder, "diffusion")
    omegaconf = importlib.import_module("omegaconf")
    tokenizer = Tokenizer(sizes.vocab)
    diffusion.transformers.AutoTokenizer = types.SimpleNamespace(from_pretrained=lambda name: tokenizer)
    config = omegaconf.OmegaConf.create(
        {
            "backbone": "dit",
            "parameterization": "subs",
            "time_conditioning": False,
            "T": 0,
            "subs_masking": False,
            "noise": {"type": "loglinear"},
            "model": {**sizes.network, "length": sizes.length, "dropout": 0.0, "scale_by_sigma": True},
            "loader": {"eval_batch_size": sizes.rows},
            "sampling": {"predictor": "ddpm_cache", "noise_removal": True},
            "eval": {"gen_ppl_eval_model_name_or_path": ""},
            "optim": {"lr": 3e-4},
            "training": {
                "ema": 0.9999,
                "antithetic_sampling": True,
                "importance_sampling": False,
                "change_of_variables": False,
                "sampling_eps": 1e-3,
            },
        }
    )
    module = diffusion.Diffusion(config, tokenizer).to(device).train()
    module.ema.move_shadow_params_to_device(device)
    parameters = list(module.backbone.parameters())
    everywhere = torch.ones(sizes.rows, sizes.length, device=device)

    def draw(rows: int, steps: int) -> object:
        config.loader.eval_batch_size = rows
        return module._sample(num_steps=steps)

    optimizer = torch.optim.AdamW(parameters, lr=3e-4, weight_decay=0)
    average = partial(module.ema.update, parameters)
    return Peer(parameters, lambda x: module._loss(x, everywhere).loss, optimizer, average, draw, sizes, device)


def gidd(folder: Path, sizes: Sizes, device: torch.device, compiled: bool = False) -> Peer:
    """dvruette/gidd: its `DiffusionTrainer` with the settings of its configs/mdlm.yaml."""
    dit, process, loss, trainer, sampling = (
        imported(folder, f"gidd.{name}") for name in ("models.dit", "diffusion_process", "loss", "trainer", "sampling")
    )
    config = importlib.import_module("omegaconf").OmegaConf.create(
        {
            "model": {
                **sizes.network,
                "type": "diffusion",
                "diffusion_process": "mdlm",
                "dropout": 0.0,
                "max_seq_len": sizes.length,
                "t_eps": 1e-4,
            },
            "training": {"low_discrepancy_sampling": True},
            "loss": {"loss_type": "mdlm", "reduction": "tokenmean"},
        }
    )
    tokenizer, dtype = Tokenizer(sizes.vocab), DTYPES[precision_on(device, "auto")]
    model = dit.DIT(config, len(tokenizer)).to(device, dtype)
    schedule = process.get_noise_schedule(config, tokenizer)
    whole = trainer.get_trainer(config, model, tokenizer, schedule, loss.get_loss(config, tokenizer, schedule), dtype)
    whole = whole.to(device).train()
    sampler = sampling.get_sampler(config, model, tokenizer, schedule, compile_step=compiled)
    step = torch.compile(whole) if compiled else whole
    everywhere = torch.ones(sizes.rows, sizes.length, device=device)
    parameters = list(whole.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=5e-4, betas=(0.9, 0.99), eps=1e-9, weight_decay=0.02)

    def draw(rows: int, steps: int) -> object:
        return sampler.generate(rows, steps, sizes.length, decode=False, show_progress=False)

    def loss_of(x: torch.Tensor) -> torch.Tensor:
        return step({"input_ids": x, "attention_mask": everywhere})[0]

    return Peer(parameters, loss_of, optimizer, lambda: None, draw, sizes, device)


def imported(folder: Path, module: str) -> Any:
    """A module of a clone."""
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(module)
    finally:
        sys.path.remove(str(folder))


def stand_in_for_flash_attn() -> None:
    """What MDLM calls of flash-attn, by PyTorch."""

    def apply_rotary_emb_qkv_(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """qkv: [B, L, 3, heads, width]; cos, sin: [L, width / 2]."""
        cos, sin = cos[:, None, None], sin[:, None, None]
        first, second = qkv[:, :, :2].chunk(2, dim=-1)
        turned = torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)
        return torch.cat((turned, qkv[:, :, 2:]), dim=2)

    def flash_attn_varlen_qkvpacked_func(
        qkv: torch.Tensor, ends: torch.Tensor, longest: int, dropout: float, causal: bool
    ) -> torch.Tensor:
        """qkv: [B L, 3, heads, width], rows of one length."""
        q, k, v = qkv.unflatten(0, (-1, longest)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1)

    names = ("flash_attn", "flash_attn.layers", "flash_attn.layers.rotary", "flash_attn.flash_attn_interface")
    package, layers, rotary, interface = modules = [types.ModuleType(name) for name in names]
    sys.modules.update(zip(names, modules, strict=True))
    package.layers, layers.rotary, package.flash_attn_interface = layers, rotary, interface
    rotary.apply_rotary_emb_qkv_ = apply_rotary_emb_qkv_
    interface.flash_attn_varlen_qkvpacked_func = flash_attn_varlen_qkvpacked_func


def sides_of(args: Sizes, device: torch.device) -> dict[str, Peer | BareStep]:
    """Ours and the peers whose clones are named, by name."""
    on_gpu, dtype = device.type == "cuda", DTYPES[precision_on(device, "auto")]
    sides: dict[str, Peer | BareStep] = {}
    for name, latent in (("our VMD", True), ("our MDM", False)):
        a = shape(args.layers, args.width, args.heads, args.length, args.vocab, latent, condition_width=CONDITION)
        sides[name] = BareStep(a, args.rows, device, dtype, compiled=on_gpu)
        if args.compile and not on_gpu:
            sides[f"{name}, compiled"] = BareStep(a, args.rows, device, dtype, compiled=True)
    if args.mdlm:
        sides["MDLM"] = mdlm(args.mdlm, args, device)
    if args.gidd:
        sides["GIDD"] = gidd(args.gidd, args, device)
        if args.compile:
            sides["GIDD, compiled"] = gidd(args.gidd, args, device, compiled=True)
    return sides


def drawing(side: Peer | BareStep, rows: int, steps: int) -> Callable[[], object]:
    """Draws so many rows in so many steps."""
    if isinstance(side, Peer):
        return partial(side.draw, rows, steps)
    return partial(sample, side.model, Sampler(steps), Noise(0), torch.arange(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = torch.cuda.is_available()
    sizes = (12, 768, 12, 1024, 32) if on_gpu else (4, 256, 4, 256, 8)
    for name, size in zip(("layers", "width", "heads", "length", "rows"), sizes, strict=True):
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--vocab", type=int, default=VOCAB)
    for name in NEEDED:
        parser.add_argument(f"--{name}", type=Path, help="its clone")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, nargs="+", default=[8, 32], help="of the samplers")
    parser.add_argument("--draw", type=int, default=4, help="rows")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(namespace=Sizes())
    commits = {}
    for name, packages in NEEDED.items():
        folder = getattr(args, name)
        if folder is None:
            continue
        if not (folder / ("diffusion.py" if name == "mdlm" else "gidd")).exists():
            parser.error(f"--{name} {folder} is no clone of it")
        missing = [package for package in packages if importlib.util.find_spec(package) is None]
        if missing:
            parser.error(f"--{name}: its code imports {', '.join(missing)}, which is not installed")
        told = subprocess.run(["git", "-C", folder, "rev-parse", "HEAD"], capture_output=True, text=True)
        commits[name] = told.stdout.strip() or None
    warnings.simplefilter("ignore", FutureWarning)  # MDLM's way to ask for autocast
    device = torch.device("cuda" if on_gpu else "cpu")
    settings = {name: getattr(args, name) for name in ("layers", "width", "heads", "length", "vocab", "rows")}
    report = Report(__doc__, args.json, commits=commits, **settings)

    sides = sides_of(args, device)
    times = in_turns(sides, args.rounds, warmup=2)
    steps = {
        name: {
            "seconds": seconds,
            "tokens_per_second": args.rows * args.length / seconds,
            "of_ours": ratio(times, "our VMD", name),
            "parameters": sum(p.numel() for p in sides[name].parameters),
            "peak_mib": peak_bytes(sides[name], device) / 2**20,
        }
        for name, seconds in medians(times).items()
    }
    header = ("", *next(iter(steps.values())))
    report.add("training step", steps, table(header, [(name, *row.values()) for name, row in steps.items()]))

    drawn: dict[str, Any] = {}
    for number in args.steps:
        cases = {name: drawing(side, args.draw, number) for name, side in sides.items()}
        times = in_turns(cases, max(3, args.rounds // 3))
        for name, seconds in medians(times).items():
            drawn.setdefault(name, {})[f"T = {number}"] = args.draw * args.length / seconds
    text = table(("tokens/s", *drawn["our VMD"]), [(name, *row.values()) for name, row in drawn.items()])
    report.add("sampling", drawn, text)


if __name__ == "__main__":
    main()
