"""The whole configuration: typed, validated, immutable.

Whatever follows from something else (accumulation, vocabulary, head width) is computed, never asked.
`vmd_scale/config_file.py` reads it from a file.
"""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from vmd_scale.config_rules import DEFAULT_STAGE, RULES

CACHE_GIB = 100.0  # of local copies of remote shards, where nothing else is configured
TOKENIZER_SUFFIXES = (".json", ".model", ".txt", ".bpe")


def _split_steps(value: object) -> object:
    """``--set diffusion.steps=1,4,inf`` is friendlier to a shell than a JSON list."""
    if isinstance(value, str):
        return tuple(int(part) if part.isdecimal() else part for part in value.split(","))
    return tuple(value) if isinstance(value, list) else (value,)


def _split_names(value: object) -> object:
    """The same for names: ``--set training.trainable=latent``."""
    return tuple(value.split(",")) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


def _as_text(value: object) -> object:
    """``--set data.source=0.3`` is read as a number."""
    return json.dumps(value) if type(value) in (int, float) else value


Names = Annotated[tuple[str, ...], BeforeValidator(_split_names)]
StepCount = Annotated[int, Field(ge=1)] | Literal["inf"]
StepCounts = Annotated[tuple[StepCount, ...], BeforeValidator(_split_steps), Field(min_length=1)]


def step_values(steps: Sequence[int | str]) -> tuple[float, ...]:
    """``[1, 4, "inf"]`` as numbers: ``(1.0, 4.0, math.inf)``."""
    return tuple(math.inf if step == "inf" else float(step) for step in steps)


def _without_folders(tokenizer: str) -> str:
    """OWNER/NAME of a hub, gpt2 for gpt2:FOLDER, of a file or folder its last name."""
    kind, colon, _ = tokenizer.partition(":")
    if colon and kind in ("gpt2", "bert"):
        return kind
    path = Path(tokenizer)
    is_file = path.exists() or path.suffix in TOKENIZER_SUFFIXES
    of_hub = not is_file and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", tokenizer)
    return tokenizer if of_hub else path.name


class Section(BaseModel):
    """Unknown keys, wrong types and later mutation are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class CorpusConfig(Section):
    corpus: str = Field(description="a named corpus (vmd_scale/data/corpora): python_docs, text8, lm1b, ...")
    source: Annotated[str | dict[Literal["train", "validation", "test"], str] | None, BeforeValidator(_as_text)] = (
        Field(
            default=None,
            description="local file or folder, Hugging Face dataset 'hf:NAME[@REVISION][:CONFIGURATION]', or one of "
            "these for each split",
        )
    )
    text_column: str | None = Field(
        default=None,
        description='where records of .jsonl, .csv, .parquet or a hub hold the text; null: "text" or the corpus\' own',
    )
    normalizer: Literal["none", "text8", "lm1b", "ptb", "wikitext", "lambada", "scientific"] | None = Field(
        default=None, description="text clean-up before tokenization; null: what the corpus is published with"
    )
    validation_documents: int | None = Field(
        default=None, ge=1, description="the last N documents are validation; null: the corpus' own rule"
    )
    shards: str = Field(description="folder of the prepared shards, or a URL: s3://, gs://, hf://, ...")
    weight: float = Field(
        default=1.0,
        gt=0,
        description="how much of the training rows comes from this corpus, relative to the other weights",
    )


class DataConfig(CorpusConfig):
    mixture: tuple[CorpusConfig, ...] = Field(
        default=(), description="more corpora to train on; bounds are computed on this section's own corpus"
    )
    tokenizer: str = Field(
        description="text8, text8_mdlm, sudoku, symbols:N, gpt2, bert-base-uncased, gpt2:FOLDER, bert:FOLDER, a name "
        "in tokenizer/assets or on the Hugging Face hub, or a path to tokenizer files"
    )
    row_length: int = Field(ge=2, description="tokens in a row, L")
    packing: Literal["wrap", "pad", "document"] = Field(
        default="wrap",
        description="wrap: concatenate and cut every L; pad: one document a row; document: several whole documents a "
        "row, each attends to itself only and has a latent of its own",
    )
    documents_per_row: int = Field(
        default=8, ge=1, description="maximum number of documents in a row, with packing document"
    )
    row_specials: bool = Field(
        default=False, description="put the tokenizer's begin and end tokens around every row (compat protocols)"
    )
    shard_tokens: int = Field(default=2**27, ge=1, description="maximum number of tokens in a shard file")
    cache: str | None = Field(
        default=None, description="folder for local copies of remote shards; null: ~/.cache/vmd_scale/shards"
    )
    cache_gib: float = Field(default=CACHE_GIB, gt=0, description="maximum size of this cache per node, GiB")
    workers: int = Field(default=1, ge=1, description="processes that prepare the shards; does not change the output")

    @model_validator(mode="after")
    def _own_folders(self) -> Self:
        folders = [self.shards, *(each.shards for each in self.mixture)]
        for folder in folders:
            if folders.count(folder) > 1:
                raise ValueError(
                    f"data.mixture: two corpora have the same shards, {folder!r}; each needs its own folder"
                )
        return self

    def corpora(self) -> tuple["DataConfig", ...]:
        """This corpus and those of the mixture, each with all of its settings."""
        alone = self.model_copy(update={"mixture": ()})
        return (alone, *(alone.model_copy(update=dict(each)) for each in self.mixture))


class ModelConfig(Section):
    layers: int = Field(default=12, ge=1, description="number of transformer blocks of the denoiser")
    width: int = Field(default=768, ge=1, description="width of the residual stream, D")
    heads: int = Field(default=12, ge=1, description="number of attention heads; width / heads must be even")
    mlp_ratio: float = Field(default=4.0, gt=0, description="hidden width of the MLP / width")
    mlp: Literal["gelu", "swiglu"] = Field(default="gelu", description="swiglu has as many parameters as gelu")
    norm: Literal["layernorm", "rmsnorm"] = Field(default="layernorm", description="computed in fp32; no biases")
    dropout: float = Field(
        default=0.0, ge=0, lt=1, description="dropout of what attention and MLP add to the residual stream"
    )
    tie_embeddings: bool = Field(default=False, description="the output head shares the matrix of the token embeddings")
    time_conditioning: bool = Field(default=False, description="the denoiser is told the mask ratio")
    biases: bool = Field(default=False, description="biases in MLPs and head, as MDLM's published weights have them")
    attention: Literal["auto", "flash", "sdpa", "flex", "reference"] = Field(
        default="auto",
        description="kernel; auto: on a GPU the fastest flash attention there is, flex for blocks, else sdpa; flash: "
        "flash-attn, or an error",
    )


class LatentConfig(Section):
    width: int = Field(
        default=0, ge=0, description="dimension of z, d_z; 0: no latent, the plain masked diffusion model (MDM)"
    )
    scope: Literal["row", "block"] = Field(default="row", description="one z per row, or one z per block of the row")
    injection: Literal["adaln", "add"] = Field(
        default="adaln", description="how z enters the denoiser: modulation of every block, or added to the embeddings"
    )
    encoder_layers: int | None = Field(
        default=None, ge=1, description="transformer blocks of the encoder; null: a quarter of model.layers, at least 1"
    )
    encoder_width: int | None = Field(
        default=None, ge=1, description="width of the encoder; null: half of model.width, in whole heads"
    )
    prior: Literal["standard", "conditional"] = Field(
        default="standard", description="standard: N(0, I); conditional: a network that reads the visible tokens"
    )


class KLWeight(Section):
    start: float = Field(default=1.0, ge=0, description="weight of the KL at the first step")
    end: float = Field(
        default=1.0, ge=0, description="weight of the KL after warmup_steps; below 1 the loss is no bound"
    )
    warmup_steps: int = Field(default=0, ge=0, description="steps of the linear way from start to end")

    def at(self, step: int) -> float:
        """Weight of the KL at a training step: linear from start to end."""
        progress = min(1.0, step / self.warmup_steps) if self.warmup_steps else 1.0
        return self.start + (self.end - self.start) * progress


class DiffusionConfig(Section):
    schedule: Literal["linear"] = Field(default="linear", description="alpha(t) = 1 - t: the mask ratio is t")
    objective: Literal["vmd", "nelbo", "iw"] = Field(
        default="nelbo",
        description="vmd: the papers' surrogate, no bound; nelbo: the bound of the T-step sampler, T drawn from steps; "
        "iw: its importance-weighted bound over importance_samples latents along whole paths, tighter and more "
        "expensive",
    )
    steps: StepCounts = Field(
        default=(1, 2, 4, "inf"),
        description="values of T to train for with nelbo and iw, drawn uniformly: one listed twice, twice as often",
    )
    importance_samples: int = Field(default=8, ge=1, description="latents per row with objective iw, K")
    paths: Literal["bernoulli", "balanced"] = Field(
        default="balanced",
        description="how many positions a step reveals: each by a coin of its own, or as many in every step",
    )
    block_size: int | None = Field(default=None, ge=1, description="block diffusion; null: the row is one block")
    kl_weight: KLWeight = KLWeight()
    free_bits: float = Field(default=0.0, ge=0, description="KL per latent that costs nothing, nats")


class LoRAConfig(Section):
    rank: int = Field(ge=1, description="rank of the adapters; required where lora is given")
    alpha: float | None = Field(
        default=None, gt=0, description="the low-rank product is multiplied by alpha / rank; null: 2 x rank"
    )
    layers: Names = Field(
        default=("*.attention.qkv", "*.attention.out", "*.mlp.up", "*.mlp.down"),
        min_length=1,
        description="patterns of the names of the linear layers that get adapters",
    )

    @property
    def scale(self) -> float:
        """alpha / rank. The default does not depend on the rank, so that another one needs no other learning rate."""
        return 2.0 if self.alpha is None else self.alpha / self.rank


class TrainingConfig(Section):
    steps: int = Field(ge=1, description="optimizer steps of the run")
    global_batch: int = Field(ge=1, description="rows in an optimizer step, over all ranks and accumulation")
    micro_batch: int = Field(ge=1, description="rows in one forward on one rank")
    optimizer: Literal["adamw", "muon"] = Field(
        default="adamw",
        description="muon: DeepSpeed's, for the matrices of attention and MLPs; AdamW for all else. With bf16 it needs "
        "ZeRO stage 1, with fp32 stage 0",
    )
    learning_rate: float = Field(default=3e-4, gt=0, description="peak learning rate of AdamW")
    muon_learning_rate: float = Field(
        default=0.02,
        gt=0,
        description="peak learning rate of Muon's matrices; the size of its updates does not depend on the gradient's",
    )
    muon_momentum: float = Field(default=0.95, ge=0, lt=1, description="momentum of Muon's matrices")
    lr_schedule: Literal["constant", "cosine", "linear"] = Field(
        default="constant", description="learning rate after warmup_steps; a pure function of the step"
    )
    warmup_steps: int = Field(
        default=2500, ge=0, description="steps in which the learning rate rises linearly to its peak"
    )
    final_lr_ratio: float = Field(
        default=0.0, ge=0, le=1, description="last learning rate / peak, with cosine and linear"
    )
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        default=(0.9, 0.999), description="betas of AdamW"
    )
    weight_decay: float = Field(
        default=0.0, ge=0, description="weight decay of matrices; vectors (norms, biases) have none"
    )
    gradient_clip: float = Field(default=1.0, ge=0, description="maximum global norm of the gradient; 0: no clipping")
    ema_decay: float = Field(default=0.9999, ge=0, lt=1, description="decay of the weights' moving average; 0: none")
    precision: Literal["auto", "fp32", "bf16"] = Field(default="auto", description="auto: bf16 on GPU, fp32 on CPU")
    seed: int = Field(
        default=0, ge=0, lt=2**63, description="seed of the first weights, of the order of rows and of all noise"
    )
    checkpoint_every: int = Field(default=1000, ge=1, description="optimizer steps between checkpoints")
    keep_checkpoints: int = Field(
        default=3, ge=1, description="number of newest checkpoints to keep; the best on validation is kept as well"
    )
    max_skipped_steps: int = Field(
        default=10, ge=1, description="the run ends after so many consecutive steps with a non-finite loss or gradient"
    )
    loss_spike: Literal["ignore", "warn", "rollback"] = Field(
        default="warn",
        description="what a spike of the loss causes; rollback: return to a checkpoint before it, skip batches since",
    )
    hang_timeout: float | None = Field(
        default=3600,
        gt=0,
        description="a rank ends itself after so many seconds without a finished step, evaluation batch or save; null: "
        "never",
    )
    activation_checkpointing: Literal["none", "selective", "full"] = Field(
        default="none",
        description="what is kept for the backward pass. none: all; selective: results of matrix products and "
        "attention; full: only the inputs of blocks",
    )
    init_from: str | None = Field(
        default=None, description="weights to start from: an exported folder, a run or checkpoint, MDLM's state dict"
    )
    trainable: Names = Field(
        default=(),
        description="patterns of parameter names; 'latent' stands for all parts that z needs. Empty: all, or with lora "
        "only its own",
    )
    lora: LoRAConfig | None = Field(default=None, description="low-rank adapters instead of full weights")
    fp8: bool = Field(
        default=False,
        description="linear layers of the blocks in fp8, by torchao, on GPUs of compute capability 8.9 and newer",
    )
    compile: bool = Field(
        default=True,
        description="torch.compile of the blocks; on GPU only, and at ZeRO stage 3 only where all weights are trained",
    )
    deterministic: bool = Field(
        default=False, description="on GPU, slower kernels that make a resumed run the same bit for bit"
    )


class EvaluationConfig(Section):
    every: int | None = Field(default=None, ge=1, description="evaluate on validation every N steps; null: never")
    protocols: Names = Field(default=(), description="names (evaluation/protocols.py); empty: rows")
    steps: StepCounts = Field(default=(8, 32, "inf"), description="values of T to compute bounds for")
    rows: int = Field(default=2048, ge=2, description="maximum number of validation rows")
    samples: int = Field(default=0, ge=0, description="rows to draw and log at every evaluation")


class TelemetryConfig(Section):
    log_every: int = Field(
        default=50,
        ge=1,
        description="steps between records; the loop synchronizes with the GPU only then, DeepSpeed's optimizer once "
        "or twice per step (overflow and clipping checks)",
    )
    wandb: Literal["disabled", "offline", "online"] = Field(
        default="disabled", description="Weights and Biases; a run never depends on it"
    )
    wandb_project: str = Field(default="vmd_scale", description="project of Weights and Biases")


class Config(Section):
    data: DataConfig
    model: ModelConfig = ModelConfig()
    latent: LatentConfig = LatentConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    training: TrainingConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    telemetry: TelemetryConfig = TelemetryConfig()
    deepspeed: dict[str, Any] = Field(default_factory=lambda: {"zero_optimization": {"stage": DEFAULT_STAGE}})

    @model_validator(mode="after")
    def _no_contradiction(self) -> Self:
        for rule in RULES:
            rule(self)
        return self

    @property
    def head_width(self) -> int:
        return self.model.width // self.model.heads

    @property
    def encoder_layers(self) -> int:
        return self.latent.encoder_layers or max(1, self.model.layers // 4)

    @property
    def encoder_width(self) -> int:
        return self.latent.encoder_width or self.head_width * max(1, self.model.heads // 2)

    @property
    def groups(self) -> int:
        """Blocks of a row, G: each has its own time and, with a latent, its own z."""
        return self.data.row_length // (self.diffusion.block_size or self.data.row_length)

    @property
    def documents(self) -> int:
        """Documents of a row at most, N, each with its own z; 1 where a row is not told apart into documents."""
        return self.data.documents_per_row if self.data.packing == "document" else 1

    @property
    def zero_stage(self) -> int:
        return int(self.deepspeed.get("zero_optimization", {}).get("stage", DEFAULT_STAGE))

    def resolved(self) -> Self:
        """With the encoder's size and LoRA's alpha in numbers: what a run writes down must not depend on a later
        version's defaults."""
        size = {"encoder_layers": self.encoder_layers, "encoder_width": self.encoder_width}
        changed: dict[str, Section] = {"latent": self.latent.model_copy(update=size)}
        if (lora := self.training.lora) is not None:
            lora = lora.model_copy(update={"alpha": lora.scale * lora.rank})
            changed["training"] = self.training.model_copy(update={"lora": lora})
        return self.model_copy(update=changed)

    def publishable(self) -> dict[str, Any]:
        """All of it but where files lie on this machine. Data sets (hf:) and tokenizers of a hub keep their names."""
        values = self.model_dump(mode="json")
        for number, corpus in enumerate((values["data"], *values["data"]["mixture"])):
            source = corpus["source"]
            names = source.values() if isinstance(source, dict) else [source]
            if not all(str(name).startswith("hf:") for name in names):
                corpus["source"] = None
            corpus["shards"] = f"shards-{number}" if number else "shards"  # a folder of its own, as is required
        values["data"] |= {"cache": None, "tokenizer": _without_folders(self.data.tokenizer)}
        values["training"]["init_from"] = None
        return values

    def to_json(self) -> str:
        return json.dumps(self.model_dump(mode="json"), indent=2) + "\n"
