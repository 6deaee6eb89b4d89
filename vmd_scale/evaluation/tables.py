"""Results as text tables for people. What does not compare is not put into one table without saying so."""

import math
from collections.abc import Sequence

from vmd_scale.errors import UserError
from vmd_scale.evaluation.perplexity import Result
from vmd_scale.evaluation.published import figures_of

COMPARED = ("protocol", "data", "split", "interval", "caveat")  # must be the same in one table
FINE_PRINT = ("protocol", "data", "split", "tokens", "interval", "weights", "precision", "step", "draws", "seed")


def table(results: Sequence[Result], note: str | None = None) -> str:
    """One line a result, under the fine print that they share; where they differ in it, each line has its own.

    Args:
        note: why results of different protocols, splits or intervals stand together; it is printed below them.

    Raises:
        UserError: they differ in one of these, and there is no note.
    """
    if not results:
        return "no results"
    check_comparable(results, note)
    # What older versions did not write down is not said at all, unless a newer result stands beside theirs.
    told = [key for key in FINE_PRINT if key != "precision" or any(r.precision for r in results)]
    shared = [key for key in told if len({getattr(r, key) for r in results}) == 1]
    apart = [key for key in told if key not in shared]
    lines = [", ".join(f"{key} {_shown(getattr(results[0], key))}" for key in shared)]
    head = ("T", "z", "paths", "K", "bound", "bits/token", "+-", "perplexity", "+-", "rows")
    lines.append(
        "{:>6} {:>6} {:>9} {:>4} {:>6} {:>11} {:>7} {:>11} {:>8} {:>7}".format(*head)
        + "".join(f"  {key}" for key in apart)
    )
    for r in results:
        lines.append(
            f"{r.steps:>6} {r.latent:>6} {r.paths:>9} {r.k:>4} {r.bound:>6} {r.bits_per_token:>11.4f} "
            f"{r.standard_error / math.log(2):>7.4f} {r.perplexity:>11.4f} {r.perplexity * r.standard_error:>8.4f} "
            f"{r.rows:>7}" + "".join(f"  {_shown(getattr(r, key))}" for key in apart)
        )
    if any(r.bound == "compat" for r in results):
        lines.append("compat: an estimate of published code; it bounds nothing")
    of_all = all(r.caveat for r in results)
    for caveat in dict.fromkeys(r.caveat for r in results if r.caveat):
        whose = [f"line {n}" for n, r in enumerate(results, 1) if r.caveat == caveat]
        lines.append(f"caveat{'' if of_all else ' of ' + ', '.join(whose)}: {caveat}")
    return "\n".join([*lines, *([f"note: {note}"] if note else [])])


def check_comparable(results: Sequence[Result], note: str | None) -> None:
    """`UserError` naming what differs, unless there is a note that says why."""
    if note:
        return
    for key, values in differing(results).items():
        raise UserError(
            f"these results cannot be compared: {key} differs, {' and '.join(map(repr, values))}; "
            "put them into tables of their own, or say with --note why they stand together"
        )


def differing(results: Sequence[Result]) -> dict[str, list[str]]:
    """What must be the same in one table or picture and is not, with its values as they are shown."""
    found = {key: list(dict.fromkeys(_shown(getattr(r, key)) for r in results)) for key in COMPARED}
    return {key: values for key, values in found.items() if len(values) > 1}


def beside_published(results: Sequence[Result]) -> str:
    """The published figures of the results' protocol, with where they come from, below the best of ours.

    An empty text where nothing was published.
    """
    protocol = results[0].protocol
    figures = figures_of(protocol)
    if not figures:
        return ""
    unit = figures[0].unit
    best = min(results, key=lambda r: r.nats_per_token)
    value, error = best.bits_per_token, best.standard_error / math.log(2)
    if unit == "perplexity":
        value, error = best.perplexity, best.perplexity * best.standard_error
    named = f"T = {best.steps}, K = {best.k}" + (", not comparable: see the caveat" if best.caveat else "")
    lines = [f"published for {protocol}, {unit} (* is not a bound):"]
    lines += [f"  {f.value:>9.2f}{' ' if f.is_bound else '*'} {f.model}  [{f.source}]" for f in figures]
    lines.append(f"  {value:>9.2f}{'*' if best.bound == 'compat' else ' '} this run, +- {error:.2f} ({named})")
    return "\n".join(lines)


def _shown(value: object) -> str:
    return "none" if value is None else f"{value:,}" if isinstance(value, int) and value > 9999 else str(value)
