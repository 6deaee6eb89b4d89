"""A result of an evaluation, for the tests of what is made of results."""

import math
from typing import Any

from vmd_scale.evaluation.perplexity import Result


def example_result(**changes: Any) -> Result:
    values = {
        "protocol": "rows",
        "split": "validation",
        "steps": 8,
        "latent": "fixed",
        "k": 1,
        "bound": "elbo",
        "nats_per_token": 1.0,
        "bits_per_token": 1 / math.log(2),
        "perplexity": math.e,
        "standard_error": 0.01,
        "tokens": 640,
        "rows": 10,
        "weights": "ema",
        "step": 20,
        "paths": "balanced",
        "interval": "full",
        "draws": 1,
        "seed": 0,
    }
    return Result(**{**values, **changes})
