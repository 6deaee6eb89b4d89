"""Rows of the tasks' corpora, as their generators yield them."""

import numpy as np

from vmd_scale.config import DataConfig
from vmd_scale.data.corpora import documents

SYMBOLS = {"two_tokens": 10, "four_tokens": 10, "toy2d": 50, "mnist": 2, "cifar10": 256}


def data(corpus: str, source: object = None, **more: object) -> DataConfig:
    tokenizer = "sudoku" if corpus == "sudoku" else f"symbols:{SYMBOLS[corpus]}"
    values = {"tokenizer": tokenizer, "row_length": 2, "shards": "unused", **more}
    return DataConfig.model_validate({"corpus": corpus, "source": source, **values})


def rows(config: DataConfig, split: str) -> np.ndarray:
    return np.stack([document.tokens for document in documents(config, split) if document.tokens is not None])
