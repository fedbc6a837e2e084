"""rollouts.html: what the policy answered, what it was paid and why, on one page that opens anywhere.

    top      reward of each round and held-out accuracy, as curves; the last round's verdict
    rounds   the newest first; of each some groups, those with signal first
    answer   reward and why, advantage, length, how it ended; each token as dark as it was unlikely, with its probability

Everything is inline, without network or script: a Content-Security-Policy forbids both. What a model wrote is escaped and its
control characters are made visible. Reads the run's files only, so a view of an old run can be made again.
Does not: judge anything.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dsv3.post.rollout import Answer, read_rollouts
from dsv3.train.metrics import read_metrics, write_atomic

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_STYLE = """
:root{color-scheme:light dark;--ink:#24292f;--grid:#d5d9de;--page:#fff;--card:#f6f7f9;--quiet:#59636e;--good:#0d8a66;--bad:#b8326f;
--line:#2563eb;--other:#c2570c;--shade:194,87,12}
@media(prefers-color-scheme:dark){:root{--ink:#e2e6eb;--grid:#3a414a;--page:#14171b;--card:#1d2126;--quiet:#9aa4af;--good:#3ecf9f;
--bad:#f07fb2;--line:#6ea0ff;--other:#f29a55;--shade:242,154,85}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:64rem;padding:1.5rem 1rem 4rem;background:var(--page);color:var(--ink);
font:1rem/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.6rem;margin:.5rem 0 1rem}h2{font-size:1.2rem;margin:2rem 0 .6rem}.quiet{color:var(--quiet);font-size:.875rem}
details{background:var(--card);border-radius:.6rem;padding:.6rem .9rem;margin:.5rem 0}details details{background:var(--page)}
summary{cursor:pointer;font-weight:600}summary .quiet{font-weight:400}
.answer{border-top:1px solid var(--grid);padding:.5rem 0;display:grid;grid-template-columns:8rem 1fr;gap:.8rem}
.paid{font-variant-numeric:tabular-nums;font-size:.875rem}.paid b{font-size:1.05rem}.up{color:var(--good)}.down{color:var(--bad)}
pre{margin:0;white-space:pre-wrap;font:.875rem/1.5 ui-monospace,monospace}pre span{border-radius:.2rem}
svg{display:block;width:100%;height:auto;background:var(--card);border-radius:.6rem}
svg text{fill:var(--quiet);font:11px system-ui,sans-serif}
@media(max-width:36rem){.answer{grid-template-columns:1fr}}
"""


def write_view(
    folder: str | Path,
    *,
    decode: Callable[[list[int]], str] | None = None,
    rounds: int = 20,
    groups: int = 8,
) -> Path:
    """Write FOLDER/rollouts.html of a run; returns its path.

    Args:
        decode: text of token ids; with it each token is coloured. None: whole texts.
        rounds: shown at most, the first, the last and some between. groups: of each, at most.

    Raises:
        ValueError: a file of the run is damaged.
    """
    folder = Path(folder)
    paths = sorted((folder / "rollouts").glob("round-*.jsonl"))
    metrics = folder / "metrics.jsonl"
    records = read_metrics(metrics) if metrics.exists() else []
    shown = _spread(paths, rounds)
    parts = [f"<h1>Rollouts of {_text(folder.name)}</h1>", _head(records, len(paths), len(shown))]
    parts += [_round(path, decode, groups, is_open=path == paths[-1]) for path in reversed(shown)]
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>Rollouts of {_text(folder.name)}</title><style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "rollouts.html", page.encode())
    return folder / "rollouts.html"


def _spread(paths: Sequence[Path], most: int) -> list[Path]:
    """The first, the last, and evenly some between."""
    if len(paths) <= most:
        return list(paths)
    return [paths[round(i * (len(paths) - 1) / max(1, most - 1))] for i in range(most)]


def _head(records: Sequence[Mapping[str, Any]], made: int, shown: int) -> str:
    if not records:
        return '<p class="quiet">No step has been recorded yet.</p>'
    last = next((r for r in reversed(records) if "verdict" in r), {})
    alarm = next((r["alarm"] for r in reversed(records) if "alarm" in r), None)
    rows = [f"<p>Last round: {_text(last['verdict'])}.</p>"] if last else []
    rows += [f'<p class="down"><b>Alarm:</b> {_text(alarm)}</p>'] if alarm else []
    curves = [("reward", "reward", "--line"), ("heldout_accuracy", "held-out accuracy", "--other")]
    rows.append(
        _chart([(label, [(r["step"], r[key]) for r in records if key in r], colour) for key, label, colour in curves])
    )
    rows.append(f'<p class="quiet">{made} rounds, {shown} of them below. Shade: how unlikely a token was.</p>')
    return "".join(rows)


def _chart(curves: Sequence[tuple[str, Sequence[tuple[int, float]], str]]) -> str:
    """Curves over steps, on one scale from the least to the greatest value."""
    curves = [curve for curve in curves if curve[1]]
    steps = [x for _, points, _ in curves for x, _ in points]
    values = [y for _, points, _ in curves for _, y in points]
    if not values:
        return ""
    low, high = min(0.0, *values), max(*values, 1e-9) if len(values) > 1 else max(values[0], 1e-9)
    first, last = min(steps), max(steps)

    def place(x: int, y: float) -> str:
        return f"{50 + 720 * (x - first) / max(1, last - first):.1f},{150 - 120 * (y - low) / (high - low):.1f}"

    drawn = [
        f'<text x="8" y="34">{high:.2f}</text><text x="8" y="154">{low:.2f}</text>'
        f'<text x="50" y="170">step {first}</text><text x="740" y="170">{last}</text>'
    ]
    for place_in_row, (label, points, colour) in enumerate(curves):
        line = " ".join(place(x, y) for x, y in points)
        drawn.append(f'<polyline fill="none" style="stroke:var({colour})" stroke-width="2" points="{line}"/>')
        if len(points) == 1:
            x, y = line.split(",")
            drawn.append(f'<circle cx="{x}" cy="{y}" r="3" style="fill:var({colour})"/>')
        at = 60 + 160 * place_in_row
        drawn.append(f'<text x="{at}" y="16" style="fill:var({colour})">{_text(label)}</text>')
    return f'<svg viewBox="0 0 800 180" role="img" aria-label="reward and held-out accuracy over steps">{"".join(drawn)}</svg>'


def _round(path: Path, decode: Callable[[list[int]], str] | None, most: int, *, is_open: bool) -> str:
    answers = read_rollouts(path)
    groups: dict[int, list[Answer]] = {}
    for answer in answers:
        groups.setdefault(answer.number, []).append(answer)
    ordered = sorted(groups.values(), key=lambda group: (not any(a.advantage for a in group), group[0].number))
    judged = [a.reward for a in answers if a.reward is not None]
    mean = f"mean reward {sum(judged) / len(judged):.3f}" if judged else "nothing could be judged"
    number = int(path.stem.removeprefix("round-")) + 1
    more = (
        f'<p class="quiet">and {len(ordered) - most} groups more in {_text(path.name)}</p>'
        if len(ordered) > most
        else ""
    )
    body = "".join(_group(group, decode) for group in ordered[:most])
    return (
        f"<details{' open' if is_open else ''}><summary>Round {number} <span class='quiet'>{len(groups)} questions, "
        f"{len(answers)} answers, {mean}</span></summary>{body}{more}</details>"
    )


def _group(group: list[Answer], decode: Callable[[list[int]], str] | None) -> str:
    first = group[0]
    paid = [a.reward for a in group if a.reward is not None]
    signal = "no signal" if not any(a.advantage for a in group) else f"{min(paid):g} to {max(paid):g}"
    ranked = sorted(group, key=lambda a: (-math.inf if a.reward is None else a.reward, -a.choice), reverse=True)
    gold = f'<p class="quiet">right answer: {_text(first.gold)}</p>' if first.gold else ""
    return (
        f"<details><summary>{_text(first.question)} <span class='quiet'>{signal}"
        f"{'' if any(a.used for a in group) else ', not trained on'}</span></summary>{gold}"
        f"{''.join(_answer(answer, decode) for answer in ranked)}</details>"
    )


def _answer(answer: Answer, decode: Callable[[list[int]], str] | None) -> str:
    side = "up" if answer.advantage > 0 else "down" if answer.advantage < 0 else ""
    reward = "dropped" if answer.reward is None else f"{answer.reward:g}"
    parts = ", ".join(f"{name} {value:g}" for name, value in answer.parts.items())
    facts = [f"advantage {answer.advantage:+.2f}", f"{len(answer.tokens)} tokens, {answer.finish}", parts, answer.note]
    told = "".join(f"<br>{_text(fact)}" for fact in facts if fact)
    paid = f'<div class="paid"><b class="{side}">{_text(reward)}</b>{told}</div>'
    return f'<div class="answer">{paid}<pre>{_tokens(answer, decode)}</pre></div>'


def _tokens(answer: Answer, decode: Callable[[list[int]], str] | None) -> str:
    if decode is None:
        return _text(answer.text)
    spans = []
    for token, logprob in zip(answer.tokens, answer.logprobs):
        chance = math.exp(logprob)
        shade = f"background:rgba(var(--shade),{0.6 * (1 - chance):.2f})"
        spans.append(f'<span style="{shade}" title="{chance:.3f}">{_text(decode([token]))}</span>')
    return "".join(spans)


def _text(value: object) -> str:
    """Escaped, with control characters made visible."""
    visible = "".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in str(value))
    return html.escape(visible)
