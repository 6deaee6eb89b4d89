"""Who says how likely a sample is: a causal language model of Hugging Face's, or an n-gram model of the corpus."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from vmd_scale.data.cache import ShardCache
from vmd_scale.data.loader import evaluation_batches
from vmd_scale.data.order import SampleOrder
from vmd_scale.data.roles import Role
from vmd_scale.data.shards import ShardReader
from vmd_scale.errors import UserError, first_line
from vmd_scale.evaluation.ngram import NGram, n_grams_fit
from vmd_scale.tokenization import Tokenizer

LONGEST = 1024  # tokens that are judged, at most
NGRAM_ORDER = 5  # unless the vocabulary is too large for it
NGRAM_TOKENS = 5_000_000  # that an n-gram judge is trained on, at most
READ_ROWS = 1024
SEPARATOR = "[SEP]"  # ends a sentence of a row, where other end tokens end a text


@dataclass(frozen=True)
class Sample:
    """One sample as it is judged: the ids that count, their text, and whether an end of text follows it."""

    ids: np.ndarray  # int64 [n]
    text: str
    ended: bool


class Judge(Protocol):
    name: str

    def score(self, samples: Sequence[Sample]) -> tuple[np.ndarray, np.ndarray]:
        """Nats and judged tokens of each sample, float64 and int64 [n]."""

    def features(self, samples: Sequence[Sample]) -> np.ndarray | None:
        """A vector for each text, for MAUVE; None where the judge has none."""


class NGramJudge:
    """Trained on the corpus' own train split, in the model's own tokens; every token is judged, the first one too.

    Args:
        text_end: appended to samples that ended; None where the tokenizer has no such token.

    Raises:
        UserError: an order that is too high for the vocabulary; no train split.
    """

    def __init__(self, reader: ShardReader, order: int, text_end: int | None) -> None:
        manifest = reader.manifest
        rows = min(reader.rows, max(1, NGRAM_TOKENS // manifest.row_length))
        chosen = np.sort(SampleOrder(reader.rows, seed=0).row_numbers(np.arange(rows, dtype=np.int64)))
        parts = [(b.tokens.numpy(), b.roles) for b in evaluation_batches(reader, chosen, READ_ROWS)]
        tokens = np.concatenate([part[0] for part in parts])
        counted = np.concatenate(
            [np.ones(t.shape, dtype=bool) if roles is None else roles.numpy() != Role.PADDING for t, roles in parts]
        )
        try:
            self._model = NGram(tokens, counted, manifest.vocab_size, order)
        except ValueError as error:
            raise UserError(f"--judge ngram:{order}: {error}") from None
        self._text_end = text_end
        self.name = f"{order}-gram of {int(counted.sum()):,} tokens of {manifest.corpus}"

    def score(self, samples: Sequence[Sample]) -> tuple[np.ndarray, np.ndarray]:
        nats, tokens = np.zeros(len(samples)), np.zeros(len(samples), dtype=np.int64)
        for n, sample in enumerate(samples):
            end = [self._text_end] if sample.ended and self._text_end is not None else []
            ids = np.append(sample.ids, np.array(end, dtype=np.int64))[:LONGEST]
            if len(ids):
                nats[n], tokens[n] = self._model.nll(ids[None]).sum(), len(ids)
        return nats, tokens

    def features(self, samples: Sequence[Sample]) -> np.ndarray | None:
        return None


class HuggingFaceJudge:
    """Any causal language model in a local folder; texts are tokenized again, and the first token is only context.

    Raises:
        UserError: no transformers, or no such model in the folder.
    """

    def __init__(self, folder: str, device: torch.device, micro_batch: int = 8) -> None:
        try:
            import transformers
        except ImportError:
            raise UserError(
                "--judge FOLDER needs transformers: pip install -e '.[transformers]'; or use ngram"
            ) from None
        if not Path(folder).is_dir():
            raise UserError(f"--judge {folder}: no such folder; expected a Hugging Face model folder, or ngram")
        try:
            self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
            model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"--judge {folder}: not a causal language model: {first_line(error)}") from None
        self._model, self._device, self._micro_batch = model.to(device).float().eval(), device, micro_batch
        self._longest = min(LONGEST, getattr(model.config, "max_position_embeddings", LONGEST))
        self.name = Path(folder).resolve().name

    def score(self, samples: Sequence[Sample]) -> tuple[np.ndarray, np.ndarray]:
        nats, tokens = np.zeros(len(samples)), np.zeros(len(samples), dtype=np.int64)
        for start in range(0, len(samples), self._micro_batch):
            ids, attend = self._batch(samples[start : start + self._micro_batch])
            logits, _ = self._forward(ids, attend)
            counted = attend[:, 1:]
            log_p = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
            some = slice(start, start + len(ids))
            nats[some] = -(log_p.double() * counted).sum(-1).cpu().numpy()
            tokens[some] = counted.sum(-1).cpu().numpy()
        return nats, tokens

    def features(self, samples: Sequence[Sample]) -> np.ndarray | None:
        """The last hidden state of each text's last token, as MAUVE is published with (arXiv 2102.01454)."""
        vectors = [np.zeros((0, self._model.config.hidden_size), dtype=np.float32)]  # ranks may have no text
        for start in range(0, len(samples), self._micro_batch):
            ids, attend = self._batch(samples[start : start + self._micro_batch])
            _, hidden = self._forward(ids, attend)
            last = attend.sum(-1).clamp(min=1) - 1
            vectors.append(hidden[torch.arange(len(ids)), last].float().cpu().numpy())
        return np.concatenate(vectors)

    def _batch(self, samples: Sequence[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and attention mask [n, L], padded on the right."""
        end = self._tokenizer.eos_token_id
        listed = []
        for sample in samples:
            ids = self._tokenizer.encode(sample.text, add_special_tokens=False)
            listed.append((ids + ([end] if sample.ended and end is not None else []))[: self._longest])
        longest = max(1, max(map(len, listed)))
        ids = torch.zeros(len(listed), longest, dtype=torch.int64)
        attend = torch.zeros(len(listed), longest, dtype=torch.int64)
        for n, one in enumerate(listed):
            ids[n, : len(one)] = torch.tensor(one, dtype=torch.int64)
            attend[n, : len(one)] = 1
        return ids.to(self._device), attend.to(self._device)

    @torch.no_grad()
    def _forward(self, ids: torch.Tensor, attend: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [n, L, V] and last hidden states [n, L, D]."""
        output = self._model(input_ids=ids, attention_mask=attend, output_hidden_states=True)
        return output.logits.float(), output.hidden_states[-1]


def parse_judge(spec: str) -> int | None:
    """The order of ``ngram:ORDER``, 0 for a bare ``ngram``; None for anything else, which is a folder.

    Raises:
        UserError: an order that is none.
    """
    kind, _, order = spec.partition(":")
    if kind != "ngram":
        return None
    if order and not (order.isdigit() and int(order) > 0):
        raise UserError(f"--judge {spec}: expected ngram, ngram:ORDER such as ngram:5, or the folder of a causal model")
    return int(order or 0)


def load_judge(
    spec: str, shards: str, tokenizer: Tokenizer, device: torch.device, cache: ShardCache | None = None
) -> Judge:
    """The judge of ``ngram:ORDER``, trained on the train split of `shards`, or of a folder. Raises what they raise.

    `cache` is as in `ShardReader`.
    """
    order = parse_judge(spec)
    if order is None:
        return HuggingFaceJudge(spec, device)
    highest = max(n for n in range(1, NGRAM_ORDER + 1) if n_grams_fit(tokenizer.vocab_size, n))
    return NGramJudge(ShardReader(shards, "train", cache=cache), order or highest, end_of_text(tokenizer))


def end_of_text(tokenizer: Tokenizer) -> int | None:
    """The id that ends a text; None where there is none, or only one that ends a sentence."""
    if tokenizer.end_id is None or tokenizer.decode([tokenizer.end_id]) == SEPARATOR:
        return None
    return tokenizer.end_id
