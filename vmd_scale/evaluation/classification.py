"""Which label? The probability of each as a response to its prompt, under the one-step sampler (T = 1).

All positions of the response are masked; p(label | prompt) = E_z prod_i p(label_i | prompt, z). Without a latent this
is exact and nothing is random; with one it is the mean over K draws of z from the prior, an unbiased estimate. The
label of highest probability is the answer.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vmd_scale.build import masks_of
from vmd_scale.config import Config
from vmd_scale.data.corpora import normalizer_name
from vmd_scale.data.corpora.prompts import choices_of
from vmd_scale.data.loader import Batch, evaluation_batches
from vmd_scale.data.normalize import NORMALIZERS
from vmd_scale.data.packing import fill_id
from vmd_scale.data.roles import Role
from vmd_scale.data.shards import ShardReader
from vmd_scale.diffusion.noise import Noise, Stream
from vmd_scale.errors import UserError
from vmd_scale.model import VMD
from vmd_scale.tokenization import Tokenizer

CLASSIFICATION = "classification.json"


@dataclass(frozen=True)
class Accuracy:
    """How well labels are told on one split."""

    split: str
    rows: int
    labels: int
    accuracy: float
    standard_error: float  # of the accuracy, over rows
    label_nll: float  # mean of -log p(true label | prompt), nats; the other labels share what is left, with all else
    draws: int  # K; 1 where nothing is random
    step: int | None = None  # of the weights, and which ones; by whoever loaded them
    weights: str | None = None
    checkpoint: str | None = None  # `checkpoint_id`

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def label_tokens(config: Config, tokenizer: Tokenizer) -> tuple[tuple[str, ...], Tensor]:
    """The labels, and their tokens filled up to the longest, int64 [C, W].

    Raises:
        UserError: two labels that are the same tokens: no model could tell them apart.
    """
    choices, normalize = choices_of(config.data), NORMALIZERS[normalizer_name(config.data)]
    encoded = [tokenizer.encode(normalize(choice)) for choice in choices]
    tokens = np.full((len(choices), max(map(len, encoded))), fill_id(tokenizer), dtype=np.int64)
    for row, ids in zip(tokens, encoded, strict=True):
        row[: len(ids)] = ids
    same = {row.tobytes(): choice for row, choice in zip(tokens, choices, strict=True)}
    for row, choice in zip(tokens, choices, strict=True):
        if (other := same[row.tobytes()]) != choice:
            raise UserError(
                f"data.source: labels {choice!r} and {other!r} are the same tokens by data.tokenizer "
                f"{config.data.tokenizer!r} and data.normalizer {normalizer_name(config.data)!r}; rename one"
            )
    return choices, torch.from_numpy(tokens)


@torch.no_grad()
def label_log_probabilities(model: VMD, batch: Batch, attend: Tensor | None, labels: Tensor, draws: int) -> Tensor:
    """log p_1(label | prompt) of each row and label, float64 [B, C], on the host.

    Args:
        batch: rows whose ordinary positions are W in a row: the response.
        labels: int64 [C, W].
        draws: K, of z.
    """
    a, device = model.architecture, next(model.parameters()).device
    maskable = masks_of_response(batch)
    noisy = batch.tokens.masked_fill(maskable, a.mask_id).to(device)
    device_attend, masked = None if attend is None else attend.to(device), maskable.to(device)
    prior = model.prior(noisy, masked, device_attend)
    total = torch.full((len(noisy), len(labels)), -math.inf, dtype=torch.float64, device=device)
    positions = masked.nonzero()[:, 1].view(len(noisy), -1)  # [B, W]
    wanted = labels.to(device)
    for draw in range(draws):
        z = None
        if a.latent_width:
            epsilon = Noise(0).normal(Stream.SAMPLE_LATENT, draw, batch.positions, (a.groups, a.latent_width))
            z = epsilon.to(device) if prior is None else prior.sample(epsilon.to(device))
        ratio = torch.ones(len(noisy), a.groups, device=device)
        hidden = model.denoiser(noisy, z, device_attend, ratio, noisy)
        responses = hidden.gather(1, positions.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))
        logs = model.denoiser.logits(responses).double().log_softmax(-1)  # [B, W, V]
        scores = sum(logs[:, w, wanted[:, w]] for w in range(wanted.shape[1]))
        total = torch.logaddexp(total, torch.as_tensor(scores))
    return (total - math.log(draws)).cpu()


def masks_of_response(batch: Batch) -> Tensor:
    """bool [B, L], true at the response."""
    assert batch.roles is not None
    return batch.roles == Role.ORDINARY


def classify(
    model: VMD, reader: ShardReader, labels: Tensor, split: str, draws: int = 16, micro_batch: int = 64
) -> Accuracy:
    """Accuracy on a whole split that was prepared from corpus `labels`.

    Args:
        labels: of `label_tokens`.
        draws: K, with a latent.
    """
    draws = draws if model.architecture.latent_width else 1
    right: list[Tensor] = []
    nats: list[Tensor] = []
    for batch in evaluation_batches(reader, np.arange(reader.rows, dtype=np.int64), micro_batch):
        _, attend = masks_of(batch, reader.manifest)
        response = batch.tokens[masks_of_response(batch)].view(len(batch.tokens), -1)
        truth = (response.unsqueeze(1) == labels).all(-1).long().argmax(-1)  # [B]
        logs = label_log_probabilities(model, batch, attend, labels, draws)
        right.append(logs.argmax(-1) == truth)
        nats.append(-logs.gather(1, truth.unsqueeze(-1)).squeeze(-1))
    hits = torch.cat(right).double()
    accuracy = float(hits.mean())
    return Accuracy(
        split=split,
        rows=len(hits),
        labels=len(labels),
        accuracy=accuracy,
        standard_error=math.sqrt(accuracy * (1 - accuracy) / len(hits)),
        label_nll=float(torch.cat(nats).mean()),
        draws=draws,
    )


def table(results: Sequence[Accuracy]) -> str:
    """A text table for people."""
    lines = [f"{'split':<11} {'rows':>7} {'accuracy':>9} {'+-':>7} {'label NLL':>10}"]
    for r in results:
        lines.append(f"{r.split:<11} {r.rows:>7,} {r.accuracy:>9.4f} {r.standard_error:>7.4f} {r.label_nll:>10.4f}")
    return "\n".join(lines)
