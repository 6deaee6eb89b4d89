"""Small runs to be planned, and what a micro-batch of them is made of."""

import torch

from vmd_scale.build import build_objective
from vmd_scale.config_file import parse_config

VOCABULARY = 600
PACKED = {"packing": "document", "documents_per_row": 4}


def config_of(**changes):
    values = {
        "data": {"corpus": "text", "tokenizer": "text8", "row_length": 128, "shards": "s"},
        "model": {"layers": 2, "width": 128, "heads": 2, "attention": "reference"},
        "latent": {"width": 8},
        "diffusion": {"objective": "nelbo", "steps": ["inf"]},
        "training": {"steps": 100, "global_batch": 8, "micro_batch": 8, "learning_rate": 1.0, "warmup_steps": 10},
    }
    for section, keys in changes.items():
        values[section] = {**values.get(section, {}), **keys}
    return parse_config(values, "test")


def inputs_of(config, vocabulary=VOCABULARY):
    """The objective, and a micro-batch for it."""
    rows, length = config.training.micro_batch, config.data.row_length
    clean = torch.randint(0, vocabulary, (rows, length), generator=torch.Generator().manual_seed(0))
    everything = torch.ones_like(clean, dtype=torch.bool)
    objective, attend = build_objective(config, vocabulary), None
    if config.documents > 1:
        of_each = torch.arange(1, config.documents + 1).repeat_interleave(length // config.documents)
        attend = of_each.int().expand(rows, -1)
    return objective, objective.prepare(clean, everything, attend, 0, torch.arange(rows), rows)
