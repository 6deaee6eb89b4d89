"""The T-step sampler, the very model whose likelihood `likelihood` bounds; and forms of it that have no likelihood.

Which positions a step draws is decided on the host, where the noise is: a random law knows it from the noise alone, and
its steps wait for nothing that a GPU computes. Laws of confidence wait for the predictions, masking again for what was
drawn, once a step.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vmd_scale.diffusion.noise import Noise, Stream
from vmd_scale.diffusion.paths import CONFIDENCE_LAWS, LAWS, finite_steps, highest, masked_before
from vmd_scale.diffusion.tokens import confidence_of, draw_from
from vmd_scale.model import VMD
from vmd_scale.model.layers import KeyValues


@dataclass(frozen=True)
class Sampler:
    """A generative model by name.

    The last four change what is drawn for the sake of quality; only at their defaults has it a likelihood here
    (`is_plain`). Raises `ValueError` for a sampler that does not exist.
    """

    steps: float  # T, math.inf allowed
    latent: str = "fixed"  # fixed: one z for the whole path; fresh: a new z at every step
    law: str = "balanced"  # of the paths: bernoulli | balanced | top_prob | margin | entropy
    temperature: float = 1.0  # of the tokens; 0 takes the most probable one
    nucleus: float = 1.0  # tokens are drawn from the smallest set that holds so much probability (arXiv 1904.09751)
    order_noise: float = 0.0  # Gumbel noise on the log of the confidence, fading with the steps (arXiv 2202.04200)
    remask: float = 0.0  # at most this share of the revealed tokens is masked again after a step (arXiv 2503.00307)

    def __post_init__(self) -> None:
        allowed = {
            "steps": (math.isinf(self.steps) or (self.steps >= 1 and self.steps % 1 == 0), "a whole number, or inf"),
            "latent": (self.latent in ("fixed", "fresh"), "fixed or fresh"),
            "law": (self.law in LAWS, ", ".join(LAWS)),
            "temperature": (self.temperature >= 0, "at least 0"),
            "nucleus": (0 < self.nucleus <= 1, "more than 0, at most 1"),
            "order_noise": (
                self.order_noise == 0 or (self.order_noise > 0 and self.by_confidence),
                f"0, or more with a law of confidence ({', '.join(CONFIDENCE_LAWS)}); the law is {self.law}",
            ),
            "remask": (
                0 <= self.remask < 1 and (self.remask == 0 or self.law != "bernoulli"),
                f"at least 0, less than 1, and 0 with law bernoulli; the law is {self.law}",
            ),
        }
        for name, (good, what) in allowed.items():
            if not good:
                raise ValueError(f"{name} {getattr(self, name)!r}: expected {what}")

    @property
    def by_confidence(self) -> bool:
        return self.law in CONFIDENCE_LAWS

    @property
    def is_plain(self) -> bool:
        return (self.temperature, self.nucleus, self.order_noise, self.remask) == (1, 1, 0, 0)


def substep(draw: int, step: int) -> int:
    """A number of its own for each (draw, step of the path), for noise that is drawn afresh at every step."""
    return (draw + 1) << 32 | step


@torch.no_grad()
def sample(
    model: VMD,
    sampler: Sampler,
    noise: Noise,
    numbers: Tensor,
    given: Tensor | None = None,
    maskable: Tensor | None = None,
    attend: Tensor | None = None,
) -> Tensor:
    """Draw rows. Row number n of a seed is always the same row, whatever it is batched with. Tensors are on the host.

    Args:
        numbers: int64 [B], which rows of this seed.
        given: int64 [B, L], tokens to keep where `maskable` is false (infilling); None starts from all masks. With
            blocks, which are drawn one after the other, those of later blocks are kept but not looked at.
        maskable: bool [B, L], positions to draw; None draws all.
        attend: bool [B, L], false at padding.

    Returns:
        int64 [B, L].
    """
    a = model.architecture
    shape = (len(numbers), a.row_length)
    if maskable is None:
        maskable = torch.ones(shape, dtype=torch.bool)
    x = torch.full(shape, a.mask_id) if given is None else given.masked_fill(maskable, a.mask_id)
    walk = _Walk(model, sampler, noise, numbers, x, maskable, attend)
    for group in range(a.groups):  # block after block; a plain row is one block
        walk.block(group)
        if group < a.groups - 1:
            walk.remember(group)
    return walk.x.cpu()


class _Walk:
    """A batch of rows on their way from masks to tokens.

    On the model's device are the tokens, `x`, what may be attended and z; on the host the noise and which positions are
    still masked.
    """

    def __init__(
        self,
        model: VMD,
        sampler: Sampler,
        noise: Noise,
        numbers: Tensor,
        x: Tensor,
        maskable: Tensor,
        attend: Tensor | None,
    ) -> None:
        a = model.architecture
        self.model, self.sampler, self.maskable, self.masked = model, sampler, maskable, maskable.clone()
        self.noise, self.numbers, self.device = noise, numbers, next(model.parameters()).device
        self.x, self.attend = self._sent(x), None if attend is None else self._sent(attend)
        self.mask_id, self.size = a.mask_id, a.row_length // a.groups
        self.past = [KeyValues() for _ in range(a.layers)] if a.groups > 1 else None
        self.order = self._uniform(Stream.SAMPLE_PATH, 0)
        self.u = self._uniform(Stream.SAMPLE_TOKEN, 0)  # enough as long as a position is drawn only once
        self._draw_latent(0)

    def block(self, group: int) -> None:
        """Draw one block; those before it are complete."""
        sampler, inside = self.sampler, slice(group * self.size, (group + 1) * self.size)
        maskable, masked = self.maskable[:, inside], self.masked[:, inside]  # the latter changes in place
        count = maskable.sum(-1)
        drawn_with = torch.zeros(maskable.shape, dtype=torch.float64)
        total = self._total(count)
        for k in range(total, 0, -1):
            left = self._masked_after(k, count, maskable, self.order[:, inside])
            again = torch.minimum((sampler.remask * (count - masked.sum(-1))).long(), left)
            number = masked.sum(-1) + again - left  # of positions to draw
            # Rows that reveal nothing in this step need no forward; a cache of it could spare no more.
            rows = number.nonzero().squeeze(-1)
            if not len(rows):
                continue
            if sampler.latent == "fresh":
                self._draw_latent(substep(group, k))
            if sampler.remask or sampler.order_noise:
                self.order = self._uniform(Stream.SAMPLE_PATH, substep(group, k))
                self.u = self._uniform(Stream.SAMPLE_TOKEN, substep(group, k))
            ratio = (masked.sum(-1) / count.clamp(min=1))[rows, None]
            hidden = self._hidden(rows, group, self._sent(ratio))
            priority = self.order[rows, inside]
            if sampler.by_confidence:
                # By the row's own number of steps, not that of the rows beside it.
                own = torch.full_like(count, total) if self._masks_again else count.clamp(min=1, max=total)
                fade = (k - 1) / own[rows]
                priority = self._sureness(hidden, masked[rows], priority, fade.unsqueeze(-1))
            drawn = highest(priority, masked[rows], number[rows])
            row, place = drawn.nonzero().unbind(-1)
            tokens, probability = draw_from(
                hidden[self._sent(row), self._sent(place)],
                self.model.denoiser.logits,
                self.model.architecture.vocab_size,
                self._sent(self.u[rows, inside][drawn]),
                sampler.temperature,
                sampler.nucleus,
                with_probability=sampler.remask > 0,
            )
            row, known = rows[row], maskable & ~masked
            self._write(row, place + inside.start, tokens)
            masked[row, place] = False
            if probability is not None:
                forgotten = highest(-drawn_with, known, again)
                masked |= forgotten
                drawn_with[row, place] = probability.cpu()
                row, place = forgotten.nonzero().unbind(-1)
                self._write(row, place + inside.start, self.mask_id)

    def remember(self, group: int) -> None:
        """Keep keys and values of a complete block for those after it."""
        assert self.past is not None
        block = self.x[:, group * self.size : (group + 1) * self.size]
        self.model.denoiser.forward_block(block, group, self.past, None, self.attend, clean=True)

    def _total(self, count: Tensor) -> int:
        """Steps to walk: T, but no more than could change something."""
        all_needed = self._by_coin or self._masks_again
        return int(self.sampler.steps) if all_needed else finite_steps(self.sampler.steps, count)

    @property
    def _by_coin(self) -> bool:
        return self.sampler.law == "bernoulli" and not math.isinf(self.sampler.steps)

    @property
    def _masks_again(self) -> bool:
        return self.sampler.remask > 0 and not math.isinf(self.sampler.steps)

    def _masked_after(self, k: int, count: Tensor, maskable: Tensor, order: Tensor) -> Tensor:
        """How many positions are masked after step k, int64 [B]."""
        if self._by_coin:  # revealed at step floor(u T) + 1: those before step k are left
            return (maskable & (order * self.sampler.steps < k - 1)).sum(-1)
        if self._masks_again:  # one stays masked to the end: steps beyond one a position still mask and draw again
            return torch.minimum((count * (k - 1) // int(self.sampler.steps)).clamp(min=int(k > 1)), count)
        return masked_before(k - 1, self.sampler.steps, count)

    def _hidden(self, rows: Tensor, group: int, ratio: Tensor) -> Tensor:
        """Hidden states of one block of some rows, [n, L / G, D]."""
        # Usually all rows take part and views are enough: indexing would copy them, and every layer's modulations.
        of: Tensor | slice = self._sent(rows) if len(rows) < len(self.x) else slice(None)
        attend = None if self.attend is None else self.attend[of]
        z = None if self.z is None else self.z[of, group : group + 1]
        modulations = self.modulations and [layer[of, group : group + 1] for layer in self.modulations]
        if self.past is None:
            return self.model.denoiser(self.x[of], z, attend, ratio, modulations=modulations)
        past = [layer.rows(of) for layer in self.past] if isinstance(of, Tensor) else self.past
        block = self.x[of, group * self.size : (group + 1) * self.size]
        return self.model.denoiser.forward_block(block, group, past, z, attend, ratio, modulations=modulations)

    def _sureness(self, hidden: Tensor, masked: Tensor, u: Tensor, fade: Tensor) -> Tensor:
        """The confidence by which the laws choose among masked positions, float64 [n, L / G], on the host."""
        sampler, denoiser = self.sampler, self.model.denoiser
        row, place = masked.nonzero().unbind(-1)
        hidden = hidden[self._sent(row), self._sent(place)]
        sure = confidence_of(hidden, denoiser.logits, self.model.architecture.vocab_size, sampler.law).cpu()
        if sampler.order_noise:
            on_log_scale = sure if sampler.law == "entropy" else sure.clamp(min=1e-300).log()
            scale = (sampler.order_noise * fade).expand(masked.shape)[masked]
            sure = on_log_scale - scale * (-u[masked].log()).log()
        return torch.zeros(masked.shape, dtype=torch.float64).masked_scatter(masked, sure)

    def _draw_latent(self, step: int) -> None:
        """z of every group, and what the forwards to come need of it."""
        self.z = self._latent(step)
        self.modulations = None if self.z is None else self.model.denoiser.modulations(self.z)

    def _latent(self, step: int) -> Tensor | None:
        """[B, G, d_z]; a conditional prior reads the tokens that are there already."""
        a = self.model.architecture
        if not a.latent_width:
            return None
        shape = (a.groups, a.latent_width)
        epsilon = self._sent(self.noise.normal(Stream.SAMPLE_LATENT, step, self.numbers, shape))
        prior = self.model.prior(self.x, self._sent(self.masked), self.attend)
        return epsilon if prior is None else prior.sample(epsilon)

    def _uniform(self, stream: Stream, step: int) -> Tensor:
        """Uniform in (0, 1), float64 [B, L], on the host."""
        return self.noise.uniform(stream, step, self.numbers, (self.x.shape[1],))

    def _write(self, row: Tensor, place: Tensor, tokens: Tensor | int) -> None:
        self.x[self._sent(row), self._sent(place)] = tokens

    def _sent(self, x: Tensor) -> Tensor:
        """To the device; nobody waits for its arrival. It may change here while it is on its way."""
        return (x.pin_memory() if self.device.type == "cuda" else x).to(self.device, non_blocking=True)
