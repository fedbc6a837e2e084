"""report.html: a run on one page that opens anywhere, without network or script.

Everything is inline: the style sheet, and charts as SVG by matplotlib whose colours are replaced by CSS variables, so
the page follows the reader's light or dark mode. Text from outside (samples above all: a model wrote them) is escaped,
its control characters are made visible, and a Content-Security-Policy forbids scripts and loads.

Records are those of metrics.jsonl (`dsv3.train.metrics`); a chart appears when its fields do. Losses are nats a token.
Legend: L MoE layers (MTP layers last), E experts. Does not: measure anything.
"""

from __future__ import annotations

import html
import io
import itertools
import math
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv3.train.metrics import read_metrics, write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Records = Sequence[Mapping[str, Any]]

# What matplotlib draws in, and the CSS variable each becomes on the page (see _STYLE for both modes).
_INK, _GRID = "#24292f", "#d5d9de"
_SERIES = ("#2563eb", "#c2570c", "#0d8a66", "#b8326f", "#6d4bd1", "#7a6a10")
_VARIABLES = {_INK: "--ink", _GRID: "--grid"} | {color: f"--s{i}" for i, color in enumerate(_SERIES)}

# No script, no load; the style sheet and the picture inside a heat map are in the file.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_STYLE = """
:root{color-scheme:light dark;--ink:#24292f;--grid:#d5d9de;--page:#fff;--card:#f6f7f9;--quiet:#59636e;
--s0:#2563eb;--s1:#c2570c;--s2:#0d8a66;--s3:#b8326f;--s4:#6d4bd1;--s5:#7a6a10}
@media(prefers-color-scheme:dark){:root{--ink:#e2e6eb;--grid:#3a414a;--page:#14171b;--card:#1d2126;--quiet:#9aa4af;
--s0:#6ea0ff;--s1:#f29a55;--s2:#3ecf9f;--s3:#f07fb2;--s4:#ab90ff;--s5:#d2bd4a}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:64rem;padding:1.5rem 1rem 4rem;background:var(--page);color:var(--ink);
font:1rem/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.7rem;line-height:1.2;margin:.5rem 0 1rem}h2{font-size:1.25rem;margin:2.5rem 0 .8rem}
h3,summary{font-size:1rem;font-weight:600;margin:0 0 .4rem}p{margin:.4rem 0;max-width:46rem}
.quiet,figcaption{color:var(--quiet);font-size:.875rem}
.grid{display:grid;gap:1rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,26rem),1fr));align-items:start}
.card,figure{margin:0;padding:1rem;background:var(--card);border-radius:.6rem;min-width:0}
.tiles{display:grid;gap:.6rem;grid-template-columns:repeat(auto-fit,minmax(8.5rem,1fr));margin:0}
.tiles div{background:var(--card);border-radius:.6rem;padding:.6rem .9rem}
.tiles dt{color:var(--quiet);font-size:.8rem}.tiles dd{margin:0;font-size:1.2rem;font-weight:600}
svg{display:block;width:100%;height:auto}svg text{font-family:system-ui,sans-serif!important}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:.25rem .5rem;border-bottom:1px solid var(--grid);text-align:left;vertical-align:top}
th[scope=row]{font-weight:400;color:var(--quiet)}.number{text-align:right;white-space:nowrap}
pre{margin:.5rem 0 0;white-space:pre-wrap;font:.875rem/1.45 ui-monospace,monospace}
pre b{color:var(--s0)}
"""


def write_report(
    run_folder: str | Path,
    *,
    title: str,
    config: Mapping[str, Any],
    samples: Sequence[Mapping[str, str]],
    results: Mapping[str, Any],
    sections: Sequence[tuple[str, str]] = (),
    tables: Sequence[tuple[str, Sequence[str], Sequence[Sequence[str]]]] = (),
) -> Path:
    """Write RUN_FOLDER/report.html from its metrics.jsonl, whole or not at all; returns the path.

    Args:
        config: settings; a mapping inside it (`model`, `train`) becomes a table of its own.
        samples: `prompt`, `text` (the continuation), and any further field as a remark (`temperature`).
        results: what was measured, name to number or text.
        sections: further (heading, plain text) parts; a blank line starts a paragraph.
        tables: (heading, columns, rows), shown behind the results; the first column names the row.

    Raises:
        ValueError: the run has no metrics.jsonl, or it is damaged.
    """
    run_folder = Path(run_folder)
    records = read_metrics(run_folder / "metrics.jsonl")
    parts = [
        f"<header><h1>{_text(title)}</h1>{_tiles(records)}</header>",
        _section("Results", _table(results)) if results else "",
        *(_section(heading, _columns(columns, rows)) for heading, columns, rows in tables),
        _section("Loss", _grid(_loss_figures(records))),
        _section("Samples", _samples(samples)),
        _section("Expert load", _load(records, config)),
        _section("FP8 health", _fp8_health(looks)) if (looks := [r for r in records if r.get("fp8")]) else "",
        _section("Throughput", _grid(_throughput_figures(records))),
        _section("Schedules", _grid(_schedule_figures(records))),
        _section("Configuration", _config(config)),
        *(_section(heading, _paragraphs(text)) for heading, text in sections),
    ]
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>{_text(title)}</title><style>{_STYLE}</style></head>\n<body><main>\n" + "\n".join(filter(None, parts))
    )
    path = run_folder / "report.html"
    write_atomic(path, (page + "\n</main></body></html>\n").encode())
    return path


def plot_loss(records: Records, path: str | Path) -> None:
    """Draw the training losses (main and MTP) to a picture; the suffix of `path` chooses PNG or SVG."""
    path = Path(path)
    figure = _figure(lambda axes: _draw_loss(axes, records), size=(7.2, 3.6))
    figure.set_facecolor("white")
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix.lstrip("."), dpi=160)
    write_atomic(path, buffer.getvalue())


def human(value: Any) -> str:
    """A value for people: 1,234 · 3,212,345 (3.2 M) · 0.1235 · yes · a, b."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        size, unit = next(((s, u) for s, u in ((10**12, "T"), (10**9, "B"), (10**6, "M")) if abs(value) >= s), (1, ""))
        return f"{value:,} ({value / size:.1f} {unit})" if unit else f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if 1000 <= abs(value) < 1e15 else f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {human(v)}" for k, v in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(human(v) for v in value) or "none"
    return str(value)


# -- parts of the page ------------------------------------------------------------------------------------------------


def _text(value: object) -> str:
    """Escaped for HTML text and attributes; control characters as their Unicode pictures, lone surrogates as '?'."""
    text = re.sub(r"[\x00-\x08\x0b-\x1f]", lambda m: chr(0x2400 + ord(m[0])), str(value).replace("\r\n", "\n"))
    text = re.sub(r"[\x7f-\x9f]", "\ufffd", text)
    return html.escape(text.encode("utf-8", "replace").decode())


def _section(heading: str, body: str) -> str:
    return f"<section><h2>{_text(heading)}</h2>\n{body}</section>"


def _grid(items: Iterable[str]) -> str:
    return (
        f'<div class="grid">{"".join(items)}</div>'
        if (items := list(items))
        else '<p class="quiet">Nothing was recorded.</p>'
    )


def _paragraphs(text: str) -> str:
    return "".join(f"<p>{_text(p.strip())}</p>" for p in re.split(r"\n\s*\n", text) if p.strip())


def _tiles(records: Records) -> str:
    if not records:
        return '<p class="quiet">No step was recorded.</p>'
    last = records[-1]
    tiles = {"steps": f"{last['step']:,}"}
    if "tokens" in last:
        tiles["tokens"] = f"{last['tokens']:,}"
    if "loss" in last:
        tiles["last loss"] = f"{last['loss']:.3f}"
    if bpb := [r["heldout_bpb"] for r in records if "heldout_bpb" in r]:
        tiles["held-out bits/byte"] = f"{bpb[-1]:.3f}"
    if speeds := [r["tokens_per_s"] for r in records if "tokens_per_s" in r]:
        tiles["median speed"] = f"{statistics.median(speeds):,.0f} tok/s"
    if shares := [r["peak_share"] for r in records if "peak_share" in r]:
        tiles["of measured peak"] = f"{statistics.median(shares):.0%}"
    return '<dl class="tiles">' + "".join(f"<div><dt>{k}</dt><dd>{v}</dd></div>" for k, v in tiles.items()) + "</dl>"


def _table(rows: Mapping[str, Any]) -> str:
    cells = (
        f'<tr><th scope="row">{_text(k)}</th><td class="number">{_text(human(v))}</td></tr>' for k, v in rows.items()
    )
    return f'<div class="scroll"><table>{"".join(cells)}</table></div>'


def _columns(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col"{_right(i)}>{_text(name)}</th>' for i, name in enumerate(columns))
    body = "".join(
        "<tr>" + "".join(f"<td{_right(i)}>{_text(cell)}</td>" for i, cell in enumerate(row)) + "</tr>" for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _right(column: int) -> str:
    return ' class="number"' if column else ""


def _config(config: Mapping[str, Any]) -> str:
    groups = {name: value for name, value in config.items() if isinstance(value, Mapping) and value}
    plain = {name: value for name, value in config.items() if name not in groups}
    cards = {**({"run": plain} if plain else {}), **groups}
    return _grid(f'<div class="card"><h3>{_text(name)}</h3>{_table(rows)}</div>' for name, rows in cards.items())


def _samples(samples: Sequence[Mapping[str, str]]) -> str:
    cards = []
    for sample in samples:
        remark = ", ".join(f"{k} {human(v)}" for k, v in sample.items() if k not in ("prompt", "text"))
        caption = f"<figcaption>{_text(remark)}</figcaption>" if remark else ""
        body = f"<b>{_text(sample.get('prompt', ''))}</b>{_text(sample['text'])}"
        cards.append(f'<figure>{caption}<pre dir="auto">{body}</pre></figure>')
    return ('<p class="quiet">The prompt is bold; the model wrote the rest.</p>' if cards else "") + _grid(cards)


# -- charts -----------------------------------------------------------------------------------------------------------


def _figure(draw: Callable[[Axes], object], size: tuple[float, float] = (4.6, 2.8)) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_GRID)
    axes.tick_params(colors=_INK, length=0)
    axes.grid(color=_GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    draw(axes)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_color(_INK)
    if legend := axes.get_legend():
        legend.set_frame_on(False)
        for text in legend.get_texts():
            text.set_color(_INK)
    return figure


def _chart(name: str, caption: str, alt: str, draw: Callable[[Axes], object], **figure: Any) -> str:
    """A <figure> with the drawing as themed inline SVG; `name` keeps ids of several SVGs on a page apart."""
    import matplotlib

    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        _figure(draw, **figure).savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{_text(alt)}"', 1)
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r'(id="|url\(#|href="#)(?=[a-zA-Z])', rf"\g<1>{name}-", svg)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, f"var({variable})")
    return f"<figure><h3>{_text(caption)}</h3>{svg}</figure>"


def _series(records: Records, key: str) -> tuple[list[int], list[float]]:
    chosen = [(r["step"], r[key]) for r in records if r.get(key) is not None]
    return [s for s, _ in chosen], [v for _, v in chosen]


def _thin(points: Sequence[Any], most: int = 500) -> Sequence[Any]:
    """Every n-th point, the last kept: a page of a long run stays small."""
    return points[:: -math.ceil(len(points) / most)][::-1] if len(points) > most else points


def _line(axes: Axes, x: Sequence[int], y: Sequence[float], color: Any, label: str | None = None) -> None:
    """One measured curve: a long noisy one faint, with its centred mean over about a fiftieth of its length on top."""
    reach = len(x) // 100
    if reach:
        axes.plot(_thin(x), _thin(y), color=color, linewidth=0.7, alpha=0.35)
    mean = _thin(_centred_mean(y, reach))
    axes.plot(_thin(x), mean, color=color, linewidth=1.6, label=label, marker="." if len(x) <= 30 else None)


def _centred_mean(y: Sequence[float], reach: int) -> list[float]:
    """Mean over i-reach .. i+reach, as far as there are points."""
    sums = [0.0, *itertools.accumulate(y)]
    spans = ((max(0, i - reach), min(len(y), i + reach + 1)) for i in range(len(y)))
    return [(sums[end] - sums[start]) / (end - start) for start, end in spans]


def _draw_loss(axes: Axes, records: Records) -> None:
    depth = max((len(r.get("mtp_loss") or ()) for r in records), default=0)
    _line(axes, *_series(records, "loss"), _SERIES[0], "next token")
    for k in range(depth):
        flat = [{"step": r["step"], "loss": r["mtp_loss"][k]} for r in records if len(r.get("mtp_loss") or ()) > k]
        _line(axes, *_series(flat, "loss"), _SERIES[(1 + k) % len(_SERIES)], f"MTP {k + 1} (token +{k + 2})")
    axes.set(xlabel="step", ylabel="loss, nats a token")
    if depth:
        axes.legend()


def _curve(records: Records, key: str, caption: str, unit: str, color: str | None = None) -> list[str]:
    """A chart of one field, or none where no record has it; without a colour it is a schedule: exact, in steps."""
    from matplotlib.ticker import FuncFormatter

    x, y = _series(records, key)
    if not x:
        return []

    def draw(axes: Axes) -> None:
        if color:
            _line(axes, x, y, color)
        else:
            marker = "." if len(x) <= 30 else None
            axes.plot(_thin(x), _thin(y), color=_SERIES[0], linewidth=1.6, drawstyle="steps-post", marker=marker)
        axes.set(xlabel="step", ylabel=unit)
        if max(y) >= 1000:
            axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}"))
        elif max(y) < 0.01:
            axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.3g}"))
        if min(y) >= 0:
            axes.set_ylim(0, max(y) * 1.08 or 1)

    return [_chart(key, caption, _trend(caption, x, y), draw)]


def _trend(name: str, x: Sequence[int], y: Sequence[float]) -> str:
    if len(x) == 1:
        return f"{name}: {human(y[0])} at step {x[0]:,}"
    ends = f"from {human(y[0])} at step {x[0]:,} to {human(y[-1])} at step {x[-1]:,}"
    return f"{name}: {ends}; least {human(min(y))}, most {human(max(y))}"


def _loss_figures(records: Records) -> list[str]:
    x, y = _series(records, "loss")
    charts = (
        [_chart("loss", "Training loss", _trend("Training loss", x, y), lambda axes: _draw_loss(axes, records))]
        if x
        else []
    )
    charts += _curve(records, "heldout_bpb", "Held-out text", "bits a byte", _SERIES[2])
    charts += _curve(records, "balance_loss", "Sequence-wise balance loss", "before its weight alpha", _SERIES[3])
    return charts + _curve(records, "grad_norm", "Gradient norm before clipping", "L2 norm", _SERIES[4])


def _throughput_figures(records: Records) -> list[str]:
    speed = _curve(records, "tokens_per_s", "Speed", "tokens a second", _SERIES[2])
    percent = [{"step": r["step"], "peak": 100 * r["peak_share"]} for r in records if r.get("peak_share") is not None]
    return speed + _curve(percent, "peak", "Share of the machine's measured matmul rate", "percent", _SERIES[4])


def _schedule_figures(records: Records) -> list[str]:
    fields = {
        "lr": ("Learning rate", "rate"),
        "batch_size": ("Batch size", "rows a step"),
        "gamma": ("Speed of the router bias, gamma", "step of the bias"),
        "mtp_weight": ("Weight of the MTP loss, lambda", "weight"),
    }
    return [chart for key, words in fields.items() for chart in _curve(records, key, *words)]


# -- expert load ------------------------------------------------------------------------------------------------------


def _load(records: Records, config: Mapping[str, Any]) -> str:
    counted = next((r for r in reversed(records) if r.get("expert_counts")), None)
    loads = [r for r in records if (r.get("load") or {}).get("max_vio")]
    items = [_heat_map(counted["step"], counted["expert_counts"], config)] if counted else []
    if loads:
        items += [_max_vio_chart(loads, config), _load_table(loads[-1]["step"], loads[-1]["load"], config)]
    if not items:
        return '<p class="quiet">No expert load was recorded: a model without routed experts has none.</p>'
    words = (
        "MaxVio is how far the busiest expert lies above the mean (0 is perfect balance); entropy is 1 when all "
        "experts get equally many tokens; a dead expert got none."
    )
    return _paragraphs(words) + _grid(items)


def _load_table(step: int, load: Mapping[str, Sequence[float]], config: Mapping[str, Any]) -> str:
    names = _layer_names(len(load["max_vio"]), config)
    head = "".join(f'<th scope="col" class="number">{word}</th>' for word in ("MaxVio", "entropy", "dead experts"))
    rows = "".join(
        f'<tr><th scope="row">{name}</th><td class="number">{vio:.3f}</td><td class="number">{entropy:.4f}</td>'
        f'<td class="number">{dead:,}</td></tr>'
        for name, vio, entropy, dead in zip(names, load["max_vio"], load["entropy"], load["dead_experts"])
    )
    return (
        f'<details class="card"{" open" if len(names) <= 8 else ""}>'
        f"<summary>Balance of each layer at step {step:,}</summary>"
        f'<div class="scroll"><table><thead><tr><th scope="col">layer</th>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div></details>"
    )


def _layer_names(count: int, config: Mapping[str, Any]) -> list[str]:
    """Names of the MoE layers: their numbers in the model where the config tells, MTP layers by depth."""
    model = next((c for c in (config, *config.values()) if isinstance(c, Mapping) and "first_k_dense_replace" in c), {})
    dense, main = model.get("first_k_dense_replace", 0), model.get("num_hidden_layers", 0)
    dense = min(dense, main)
    if count not in (main - dense, main - dense + model.get("num_nextn_predict_layers", 0)):
        return [f"MoE {i}" for i in range(count)]
    return [f"layer {i}" if i < main else f"MTP {i - main + 1}" for i in range(dense, dense + count)]


def _heat_map(step: int, counts: Sequence[Sequence[int]], config: Mapping[str, Any]) -> str:
    relative = [[c * len(row) / max(sum(row), 1) for c in row] for row in counts]
    names = _layer_names(len(counts), config)
    busiest = max(max(row) for row in relative)

    def draw(axes: Axes) -> None:
        image = axes.imshow(relative, aspect="auto", cmap="RdBu_r", vmin=0, vmax=2, interpolation="nearest")
        every = math.ceil(len(names) / 16)
        axes.set_yticks(range(0, len(names), every), names[::every])
        axes.set_xlabel("expert")
        axes.grid(False)
        bar = axes.figure.colorbar(image, ax=axes, extend="max" if busiest > 2 else "neither")
        bar.set_label("load / layer's mean", color=_INK)
        bar.ax.tick_params(colors=_INK, length=0)
        bar.outline.set_visible(False)

    alt = (
        f"Heat map of {len(counts)} layers by {len(counts[0])} experts at step {step:,}; "
        f"the busiest has {busiest:.2f} times its layer's mean"
    )
    size = (4.6, min(6.0, 1.6 + 0.28 * len(counts)))
    return _chart("heat", f"Load of each expert at step {step:,}", alt, draw, size=size)


def _max_vio_chart(loads: Records, config: Mapping[str, Any]) -> str:
    from matplotlib import colormaps

    layers = len(loads[-1]["load"]["max_vio"])
    names, steps = _layer_names(layers, config), [r["step"] for r in loads]
    curves = [[r["load"]["max_vio"][layer] for r in loads] for layer in range(layers)]
    marker = "." if len(steps) <= 30 else None
    few = layers <= len(_SERIES)

    def draw(axes: Axes) -> None:
        for layer, curve in enumerate(curves):
            # The middle of the colour map is legible on white and on black.
            color = _SERIES[layer] if few else colormaps["viridis"](0.3 + 0.5 * layer / (layers - 1))
            label = names[layer] if few or layer in (0, layers - 1) else None
            mean = _centred_mean(curve, len(steps) // 100)  # the noise itself would hide the other layers
            axes.plot(_thin(steps), _thin(mean), color=color, linewidth=1.4, label=label, marker=marker)
        axes.set(xlabel="step", ylabel="MaxVio")
        axes.set_ylim(bottom=0)
        axes.legend(ncols=2)

    worst = [max(values) for values in zip(*curves)]
    return _chart("maxvio", "MaxVio of each layer", _trend("Worst layer's MaxVio", steps, worst), draw)


# -- FP8 health -------------------------------------------------------------------------------------------------------


def _fp8_health(looks: Records) -> str:
    words = (
        "Of every FP8 module's input (x), weight (w) and output gradient (dy): what its cast to e4m3 lost (normal values lose "
        "2.6%), the share of values at the largest code, and the share that became zero. The curves are the worst module's."
    )
    charts = [
        _health_chart(looks, "error", "Relative error of the worst cast"),
        _health_chart(looks, "flushed", "Flushed to zero"),
    ]
    return _paragraphs(words) + _grid(charts) + _health_table(looks[-1])


def _health_chart(looks: Records, counter: str, caption: str) -> str:
    steps = [r["step"] for r in looks]
    worst = {kind: [_worst(r["fp8"], kind, counter) for r in looks] for kind in ("x", "w", "dy")}

    def draw(axes: Axes) -> None:
        for color, (kind, values) in zip(_SERIES, worst.items()):
            _line(axes, steps, values, color, kind)
        axes.set(xlabel="step", ylabel="percent")
        axes.set_ylim(0, 1.3 * max(max(values) for values in worst.values()) or 1)
        axes.legend(ncols=3, loc="upper right")

    alt = "; ".join(_trend(kind, steps, values) for kind, values in worst.items())
    return _chart(f"fp8-{counter}", caption, f"{caption}, percent: {alt}", draw)


def _worst(health: Mapping[str, Any], kind: str, counter: str) -> float:
    """In percent, over all modules; an Experts module has two weights."""
    found = (c[counter] for parts in health.values() for part, c in parts.items() if part.split("_")[0] == kind)
    return 100 * max(found, default=0.0)


def _health_table(record: Mapping[str, Any], most: int = 12) -> str:
    rows = [(name, part, c) for name, parts in record["fp8"].items() for part, c in parts.items()]
    rows.sort(key=lambda row: row[2]["error"], reverse=True)
    head = "".join(f'<th scope="col" class="number">{word}</th>' for word in ("amax", "error", "at 448", "flushed"))
    body = "".join(
        f'<tr><th scope="row">{_text(part)} of {_text(name)}</th><td class="number">{c["amax"]:.3g}</td>'
        f'<td class="number">{c["error"]:.2%}</td><td class="number">{c["saturated"]:.2%}</td>'
        f'<td class="number">{c["flushed"]:.2%}</td></tr>'
        for name, part, c in rows[:most]
    )
    title = f"The {min(most, len(rows))} of {len(rows)} casts that lost most at step {record['step']:,}"
    table = f'<thead><tr><th scope="col">cast</th>{head}</tr></thead><tbody>{body}</tbody>'
    return f'<div class="card" style="margin-top:1rem"><h3>{title}</h3><div class="scroll"><table>{table}</table></div></div>'
