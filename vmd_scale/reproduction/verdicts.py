"""Which goals of a task were reached: computed from the table, so that nobody need believe a sentence about it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vmd_scale.reproduction.task import Goal, Row, Task

LARGER_IS_BETTER = ("accuracy",)
# By how many standard errors one method must differ from another: Student's t, 95 %, by degrees of freedom from 1 on.
SURE = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13, 2.12, 2.11, 2.10)
MANY = 2.09  # degrees of freedom: more than those, or all that rows give
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
        "After ± of a difference: its standard error, over seeds where there are several. Of two methods one is better "
        "where the 95 % interval of their difference (Student's t) leaves out zero. The difference of two bounds is in "
        "nats per token, over the same rows and paths; with one seed its error is that of the paired rows and "
        "leaves out how much another training run would differ."
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
    same = [r for r in same if r.latent != "fresh"]
    if not same:
        return None
    (other,) = same
    freedom: int | None  # None: many
    if row.row_nats and other.row_nats:
        difference, error, freedom = paired_difference(row, other)
        found = f"{row.mean:.4f} - {other.mean:.4f}: {difference:+.4f} ± {error:.4f} nats"
    else:
        difference = row.mean - other.mean
        error = math.hypot(_error_of_mean(row), _error_of_mean(other))
        freedom = row.seeds + other.seeds - 2 or None
        found = f"{row.mean:.4f} - {other.mean:.4f} = {difference:+.4f} ± {error:.4f}"
    gain = better * difference
    sure = SURE[freedom - 1] if freedom is not None and freedom <= len(SURE) else MANY
    reached = "undecided" if not abs(gain) > sure * error else "yes" if gain > 0 else "no"
    return Verdict(row, f"better than {method}", found + _tokens(row), reached)


def paired_difference(row: Row, other: Row) -> tuple[float, float, int]:
    """Mean difference of two bounds that were measured on the same rows, nats per token.

    Returns:
        The difference, its standard error, and the degrees of freedom of that: over seeds where there are several, else
        over rows.
    """
    differences = np.asarray(row.row_nats) - np.asarray(other.row_nats)  # [seeds, rows]
    samples = differences.mean(1) if len(differences) > 1 else differences[0]
    return float(differences.mean()), float(samples.std(ddof=1) / math.sqrt(len(samples))), len(samples) - 1


def _error_of_mean(row: Row) -> float:
    """Not a number, which decides nothing, where one seed gave a value without an error."""
    if row.std is not None:
        return row.std / math.sqrt(row.seeds)
    return math.nan if row.standard_error is None else row.standard_error


def _tokens(row: Row) -> str:
    return f" ({row.tokens})" if row.tokens else ""
