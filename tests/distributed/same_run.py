"""Whether two runs are the same."""

from pathlib import Path
from typing import Any

import torch

from vmd_scale.checkpoints import find_checkpoint, load_weights

LAST = 12  # step of the tiny configuration


def assert_same_run(lab: Any, folder: Path, other: Path) -> None:
    """Metrics of every step and final weights, bit for bit."""
    assert lab.metrics(folder) == lab.metrics(other)  # json keeps every bit of a float
    assert [record["step"] for record in lab.metrics(folder)] == list(range(1, LAST + 1))
    for kind in ("ema", "raw"):
        found, wanted = load_weights(find_checkpoint(folder), kind), load_weights(find_checkpoint(other), kind)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
