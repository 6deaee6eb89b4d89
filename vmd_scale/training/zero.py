"""Where DeepSpeed keeps each rank's part of the fp32 master weights.

Only this file and lean_bf16.py know its insides, those of DeepSpeed 0.19. Every private attribute is read here through
`_get`, which fails with a clear message when another version has moved it.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MUON_STATE = "momentum_buffer"  # all that DeepSpeed's Muon keeps of a matrix; all other names are Adam's


@dataclass(frozen=True)
class Fragment:
    """A run of consecutive elements of one parameter that this rank owns."""

    name: str
    shape: tuple[int, ...]  # of the whole parameter
    start: int  # first element, in the flattened parameter
    size: int
    partition: int  # which of `ShardedMaster.partitions`
    offset: int  # where in that partition


class ShardedMaster:
    """This rank's share of the fp32 master weights and of the optimizer's state, whatever the ZeRO stage.

    Attributes:
        partitions: flat fp32 tensors that the optimizer updates in place.
        fragments: what each stretch of them belongs to. Over all ranks, they cover each parameter exactly once; in
            stage 0 every rank holds, and lists, everything.
        is_replicated: stage 0.
        frozen: flat tensors of the parameters that are not trained, in the precision of the forward pass: whole ones,
            or in stage 3 this rank's part.
        frozen_fragments: what they belong to; `frozen_share` are those that this rank writes into a checkpoint.
        frozen_exact: laid out like `frozen`: fp32, on the host where the forward pass computes in less. Only the
            elements of `frozen_share` are there; checkpoints get these, so that no precision rounds them.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._optimizer = engine.optimizer
        self._stage = int(engine.zero_optimization_stage())
        self._norm: Tensor | None = None
        self._names = {id(p): name for name, p in engine.module.named_parameters()}
        self.is_replicated = self._stage == 0
        self._trained = [p for p in engine.module.parameters() if p.requires_grad]
        self.frozen: list[Tensor] = []
        self.frozen_fragments = list(self._frozen())
        dealt = self.frozen_fragments[engine.global_rank :: engine.world_size]
        self.frozen_share = self.frozen_fragments if self._stage == 3 else dealt
        share = {fragment.partition for fragment in self.frozen_share}
        self.frozen_exact = [_exact(part) if n in share else part[:0] for n, part in enumerate(self.frozen)]
        if self._stage == 0:
            self.partitions = [p.data.view(-1) for p in self._trained]
            self.fragments = list(self._replicated())
            self._guard(self._optimizer)
        elif self._stage == 3:
            self.partitions = _get(self._optimizer, "fp32_partitioned_groups_flat")
            self.fragments = list(self._stage3())
        else:
            self._bf16 = hasattr(self._optimizer, "fp32_groups_flat_partition")  # BF16_Optimizer: stage 1 in bf16
            flat = "fp32_groups_flat_partition" if self._bf16 else "single_partition_of_fp32_groups"
            self.partitions = _get(self._optimizer, flat)
            self.fragments = list(self._stage12())

    @torch.no_grad()
    def start_from(self, weights: Mapping[str, Tensor]) -> None:
        """Take masters and what is frozen from fp32 weights by parameter name, of which the model has the rounded ones.

        Nothing is to be published: the forward pass rounds to what it has. Parameters that have no weight are left.
        """
        for fragments, partitions in (
            (self.fragments, self.partitions),
            (self.frozen_share, self.frozen_exact),
        ):
            for f in fragments:
                if f.name in weights:
                    exact = weights[f.name].reshape(-1)[f.start : f.start + f.size]
                    fragment_values(f, partitions).copy_(exact)

    @torch.no_grad()
    def publish(self) -> None:
        """Make the weights that the forward pass uses follow the masters, after these were changed from outside."""
        if self._stage in (1, 2):
            _get(self._optimizer, "update_lp_params")()
        elif self._stage == 3:
            _get(self._optimizer, "_partition_all_parameters")()
            for parameter in self._engine.module.parameters():
                parameter.ds_secondary_tensor = None  # ZeRO++'s copy within a node (zero_hpz_partition_size) is stale
            for group in range(len(self.partitions)):
                _get(self._optimizer, "_reassign_or_swap_out_partitioned_parameters")(group)
            persistent = _get(self._optimizer, "persistent_parameters")
            if persistent:  # small parameters stay whole on every rank
                persistent[0].all_gather(persistent)

    def optimizer_state(self) -> dict[str, list[Tensor]]:
        """The optimizer's tensors (exp_avg, ...) by name, laid out like `partitions`; empty before the first update.

        A partition that has none of a name, as Muon's have no exp_avg, has an empty tensor there.
        """
        states = [self._inner.state.get(owner, {}) for owner in self._owners()]
        names = {name for state in states for name, value in state.items() if isinstance(value, Tensor) and value.dim()}
        nothing = torch.empty(0)
        return {name: [state.get(name, nothing).view(-1) for state in states] for name in sorted(names)}

    def optimizer_updates(self) -> int:
        """Updates that the optimizer counts, which its bias correction depends on."""
        return max((int(self._inner.state.get(owner, {}).get("step", 0)) for owner in self._owners()), default=0)

    def start_optimizer_state(self, names: Sequence[str], updates: int) -> dict[str, list[Tensor]]:
        """Zeros in place of what the optimizer would make at its first update, to be filled by a resume."""
        groups = {id(owner): group for group in self._inner.param_groups for owner in group["params"]}
        for owner in self._owners():
            self._inner.state.pop(owner, None)
            if not names:  # there was no update yet; a state without moments would not be made whole
                continue
            # Stage 3 leaves the groups empty between two steps; there all are AdamW's.
            group = groups.get(id(owner), self._inner.defaults)
            state: dict[str, Tensor] = {}
            orthogonalized = group.get("use_muon", False)
            if not orthogonalized:
                state["step"] = torch.tensor(float(updates), device=owner.device if group.get("fused") else "cpu")
            state |= {name: torch.zeros_like(owner) for name in names if (name == MUON_STATE) == orthogonalized}
            self._inner.state[owner] = state
        return self.optimizer_state()

    def resumed_at(self, step: int, skipped: int) -> None:
        """Tell DeepSpeed how many steps were made; it counts them for its own reports."""
        self._engine.global_steps, self._engine.skipped_steps = step, skipped

    @property
    def _inner(self) -> torch.optim.Optimizer:
        return self._optimizer if self._stage == 0 else _get(self._optimizer, "optimizer")

    def _owners(self) -> list[Tensor]:
        """What the optimizer's state is keyed by."""
        return self._trained if self._stage == 0 else list(self.partitions)

    def before_step(self) -> None:
        """Call before ``engine.step()``: stage 0 keeps no gradient norm, and would apply one that is not finite.

        There a step that will be skipped is counted here, as DeepSpeed counts it in the other stages.
        """
        if self._stage == 0 and self._engine.is_gradient_accumulation_boundary():
            gradients = [p.grad for p in self._trained if p.grad is not None]
            self._norm = torch.nn.utils.get_total_norm(gradients)
            self._engine.skipped_steps += not self._is_finite()

    def _is_finite(self) -> bool:
        """Whether the gradient is, in stage 0: the same on all ranks, since gradients are reduced before."""
        return self._norm is None or bool(torch.isfinite(self._norm))

    def _guard(self, optimizer: torch.optim.Optimizer) -> None:
        step = optimizer.step

        def guarded(*arguments: Any, **options: Any) -> Any:
            return step(*arguments, **options) if self._is_finite() else None

        optimizer.step = guarded  # type: ignore[method-assign]

    def gradient_norm(self) -> float | None:
        """Global norm before clipping of the last step. Waits for the device."""
        norm = self._norm if self._stage == 0 else self._engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    def _replicated(self) -> Iterator[Fragment]:
        for number, p in enumerate(self._trained):
            yield Fragment(self._names[id(p)], tuple(p.shape), 0, p.numel(), number, 0)

    def _frozen(self) -> Iterator[Fragment]:
        for name, p in self._engine.module.named_parameters():
            if p.requires_grad:
                continue
            part, shape, start = p.data, tuple(p.shape), 0
            if self._stage == 3:
                part, shape = _get(p, "ds_tensor"), tuple(p.ds_shape)
                start = self._engine.global_rank * part.ds_numel
            size = min(part.numel(), math.prod(shape) - start)  # the last rank's partition is padded
            if size > 0:
                yield Fragment(name, shape, start, size, len(self.frozen), 0)
                self.frozen.append(part.data.view(-1))

    def _stage12(self) -> Iterator[Fragment]:
        groups = _get(self._optimizer, "bf16_groups" if self._bf16 else "bit16_groups")
        for number, group in enumerate(groups):
            for p in group:
                mapping = _get(p, "_hp_mapping")
                if mapping is not None:  # some of this parameter is in this rank's partition
                    inside, address = mapping.lp_fragment_address, mapping.hp_fragment_address
                    name, shape = self._names[id(p)], tuple(p.shape)
                    yield Fragment(name, shape, inside.start, inside.numel, number, address.start)

    def _stage3(self) -> Iterator[Fragment]:
        positions = _get(self._optimizer, "grad_position")
        rank = self._engine.global_rank
        for p in self._trained:
            number, offset, size = positions[_get(self._optimizer, "get_param_id")(p)]
            start = rank * _get(p, "ds_tensor").ds_numel
            size = min(size, p.ds_numel - start)  # the last rank's partition is padded
            if size > 0:
                yield Fragment(self._names[id(p)], tuple(p.ds_shape), start, size, number, offset)


def held(fragments: Iterable[Fragment], partitions: list[Tensor]) -> Iterator[Fragment]:
    """Those that have elements in `partitions`, of which some may be empty: see `ShardedMaster.optimizer_state`."""
    return (f for f in fragments if partitions[f.partition].numel())


def fragment_values(fragment: Fragment, partitions: list[Tensor]) -> Tensor:
    """The elements of `fragment` in flat tensors laid out like `ShardedMaster.partitions` (the EMA's, say)."""
    return partitions[fragment.partition].narrow(0, fragment.offset, fragment.size)


def _exact(values: Tensor) -> Tensor:
    """The same memory if it is fp32, else a copy on the host."""
    return values if values.dtype == torch.float32 else values.to("cpu", torch.float32)


def _get(owner: Any, name: str) -> Any:
    if not hasattr(owner, name):
        import deepspeed

        raise RuntimeError(
            f"DeepSpeed {deepspeed.__version__} has no {type(owner).__name__}.{name}: this project was written "
            "against DeepSpeed 0.19 (see vmd_scale/training/zero.py)"
        )
    return getattr(owner, name)
