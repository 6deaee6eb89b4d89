"""Small models that nothing trained, as they come out of a run: for what is done with them afterwards."""

from pathlib import Path

import torch

from vmd_scale.build import build_model
from vmd_scale.checkpoints import TrainedModel
from vmd_scale.config_file import parse_config
from vmd_scale.tokenization import load_tokenizer

CHECKPOINT = Path("runs/mine/checkpoints/step-1")


def untrained(seed: int = 0, checkpoint: Path = CHECKPOINT, **sections: dict) -> TrainedModel:
    """`sections` change those of the configuration."""
    values = {
        "data": {"corpus": "text", "tokenizer": "text8", "row_length": 8, "shards": "unused"},
        "model": {"layers": 1, "width": 16, "heads": 2},
        "latent": {"width": 3, "encoder_layers": 1},
        "training": {"steps": 1, "global_batch": 1, "micro_batch": 1, "precision": "fp32"},
    }
    config = parse_config({k: values.get(k, {}) | sections.get(k, {}) for k in values | sections}, "test")
    tokenizer = load_tokenizer(config.data.tokenizer)
    torch.manual_seed(seed)
    return TrainedModel(build_model(config, tokenizer.vocab_size), config, tokenizer, 1, "ema", checkpoint)
