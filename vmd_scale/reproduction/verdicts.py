"""Which goals of a task were reached: computed from the table, so that nobody need believe a sentence about it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vmd_scale.reproduction.task import Goal, Row, Task

LARGER_IS_BETTER = ("accuracy",)
SURE = 2.0  # standard errors by which one method must differ from another
SAME = ("variant", "blocks", "steps", "law", "tokens", "split", "metric", "k")  # where two methods are compared


@dataclass(frozen=True)
class Verdict:
    """What was found beside what was wanted."""

    row: Row
    wanted: str
    found: str
    reached: str  # yes | no | undecided: the difference is within its error


def verdict_table(task: Task, rows: Sequence[Row]) -> str:
    """A line for each goal that these measurements say something about; empty if there is none."""
    found = [verdict for goal in task.goals for verdict in verdicts(goal, rows)]
    if not found:
        return ""
    columns = ("variant", "method", "blocks", "split", "law", "steps")
    shown = [c for c in columns if c in ("method", "steps") or len({getattr(v.row, c) for v in found}) > 1]
    lines = ["| " + " | ".join([*shown, "measured", "wanted", "found", "reached"]) + " |"]
    lines.append("|" + " --- |" * (len(shown) + 4))
    for v in found:
        what = v.row.metric if v.row.k is None else f"{v.row.metric} (K = {v.row.k})"
        cells = [str(getattr(v.row, c)) for c in shown] + [what, v.wanted, v.found, v.reached]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*_explanation(found), *lines])


def _explanation(found: Sequence[Verdict]) -> list[str]:
    if not any(" - " in v.found for v in found):
        return []
    text = (
        "Of two methods one is better where they differ by more than two standard errors. The difference of two bounds "
        "is in nats per token, over the same rows and paths; with one seed its error is that of the paired rows, which "
        "does not know how much another training run would differ."
    )
    return [text, ""]


def verdicts(goal: Goal, rows: Sequence[Row]) -> list[Verdict]:
    """None or one; for a goal that names no split, one for each.

    Limits are for runs at full size: scaled-down ones are compared among each other only.
    """
    names = ("metric", "steps", "method", "blocks")
    named = [c for c in ("variant", "law", "tokens", "split") if getattr(goal, c) is not None]
    fitting = [r for r in rows if all(getattr(r, c) == getattr(goal, c) for c in (*names, *named))]
    fitting = [r for r in fitting if r.latent != "fresh"]
    return [v for split in dict.fromkeys(r.split for r in fitting) if (v := _verdict(goal, rows, fitting, split))]


def _verdict(goal: Goal, rows: Sequence[Row], fitting: Sequence[Row], split: str) -> Verdict | None:
    better = 1 if goal.metric in LARGER_IS_BETTER else -1
    best = max((r for r in fitting if r.split == split), key=lambda r: (r.k or 0, better * r.mean))
    if goal.better_than is not None:
        return _against(best, goal.better_than, rows, better)
    if best.scaled_down:
        return None
    slack = goal.slack * (best.standard_error or 0.0)
    low, high = goal.at_least, goal.at_most
    reached = (low is None or best.mean >= low - slack) and (high is None or best.mean <= high + slack)
    wanted = " and ".join(
        f"{sign} {limit:.4g}" for sign, limit in (("at least", low), ("at most", high)) if limit is not None
    )
    wanted += f" (within {goal.slack} standard errors)" if goal.slack else ""
    return Verdict(best, wanted, best.value + _tokens(best), "yes" if reached else "no")


def _against(row: Row, method: str, rows: Sequence[Row], better: int) -> Verdict | None:
    """Against the other method's same measurement."""
    same = [r for r in rows if r.method == method and all(getattr(r, c) == getattr(row, c) for c in SAME)]
    if not same:
        return None
    (other,) = same
    if row.row_nats and other.row_nats:
        difference, error = paired_difference(row, other)
        found = f"{row.mean:.4f} - {other.mean:.4f}: {difference:+.4f} ± {error:.4f} nats"
    else:
        difference = row.mean - other.mean
        error = math.hypot(row.spread or 0.0, other.spread or 0.0)
        found = f"{row.mean:.4f} - {other.mean:.4f} = {difference:+.4f} ± {error:.4f}"
    gain = better * difference
    reached = "undecided" if abs(gain) <= SURE * error else "yes" if gain > 0 else "no"
    return Verdict(row, f"better than {method}", found + _tokens(row), reached)


def paired_difference(row: Row, other: Row) -> tuple[float, float]:
    """Mean difference of two bounds that were measured on the same rows, and its standard error, nats per token.

    With several seeds the error is over seeds; with one over rows.
    """
    differences = np.asarray(row.row_nats) - np.asarray(other.row_nats)  # [seeds, rows]
    samples = differences.mean(1) if len(differences) > 1 else differences[0]
    return float(differences.mean()), float(samples.std(ddof=1) / math.sqrt(len(samples)))


def _tokens(row: Row) -> str:
    return f" ({row.tokens})" if row.tokens else ""
