"""What a curve does not show: resumes, stops, skipped steps, roll-backs, failed saves, and stretches that were slow."""

import html
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np

from vmd_scale.report.run import Run, column

MOST_SHOWN = 50
SLOW = 0.5  # of the median throughput


def events_section(run: Run) -> str:
    """HTML: a table of the newest events, and a sentence about stalls."""
    stalls = f"<p>{html.escape(stalls_of(run.metrics))}</p>" if run.metrics else ""
    if not run.events:
        return stalls + "<p>Nothing happened that a curve does not show: no resume, no skipped step, no roll-back.</p>"
    counts: dict[str, int] = {}
    for event in run.events:
        counts[_kind(event)] = counts.get(_kind(event), 0) + 1
    summary = ", ".join(f"{kind}: {count:,}" for kind, count in counts.items())
    body = "".join(_row(event) for event in run.events[-MOST_SHOWN:])
    left_out = max(0, len(run.events) - MOST_SHOWN)
    more = f"<p>The newest {MOST_SHOWN}; {left_out:,} before them are in events.jsonl.</p>" if left_out else ""
    return (
        f'<p>{html.escape(summary)}.</p>{stalls}{more}<div class="scroll"><table><thead><tr><th>time (UTC)</th>'
        f'<th class="number">step</th><th>event</th><th>details</th></tr></thead><tbody>{body}</tbody></table></div>'
    )


def stalls_of(records: Sequence[Mapping[str, Any]]) -> str:
    """How often training was slow between two logged steps, and how long it waited for data."""
    speed, waited = column(records, "tokens_per_second"), column(records, "data_wait_fraction")
    finite = np.isfinite(speed)
    if not finite.any():
        return "Throughput is not recorded."
    median = float(np.median(speed[finite]))
    slow = [int(r["step"]) for r, s in zip(records, speed, strict=True) if s < SLOW * median]
    text = f"Median throughput {median:,.0f} tokens/s"
    if np.isfinite(waited).any():
        text += f"; {np.nanmean(waited):.1%} of the time was spent waiting for data"
    if not slow:
        return text + "; never less than half of the median between two logged steps."
    shown = ", ".join(f"{step:,}" for step in slow[:10]) + (", ..." if len(slow) > 10 else "")
    return text + f"; less than half of that at {len(slow):,} of {len(speed):,} logged steps: {shown}."


def _kind(event: Mapping[str, Any]) -> str:
    return str(event.get("event", "?"))


def _row(event: Mapping[str, Any]) -> str:
    time = event.get("time")
    when = f"{datetime.fromtimestamp(time, UTC):%Y-%m-%d %H:%M:%S}" if isinstance(time, int | float) else ""
    rest = {key: value for key, value in event.items() if key not in ("event", "step", "time")}
    details = ", ".join(f"{key.replace('_', ' ')} {_shown(value)}" for key, value in rest.items())
    cells = (html.escape(when), f"{event['step']:,}", html.escape(_kind(event)), html.escape(details))
    kinds = ("", ' class="number"', "", "")
    return "<tr>" + "".join(f"<td{kind}>{cell}</td>" for kind, cell in zip(kinds, cells, strict=True)) + "</tr>"


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value[:8])) + (f" and {len(value) - 8} more" if len(value) > 8 else "")
    return f"{value:.4g}" if isinstance(value, float) else str(value)
