"""The report page: whole, self-contained, well-formed, proof against what a model writes; runs of every size."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv3.train import metrics
from dsv3.train.metrics import MetricsLog, expert_load, read_metrics
from dsv3.train.report import human, plot_loss, write_report

_VOID = {"meta", "br", "hr", "img", "link", "input"}
_MODEL = {"first_k_dense_replace": 1, "num_hidden_layers": 3, "num_nextn_predict_layers": 1, "vocab_size": 4096}


class Page(HTMLParser):
    """Text by tag, all attributes, and a check that tags nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.setdefault(self.open[-1] if self.open else "", []).append(data)


def run(folder: Path, steps: int, *, mtp: int = 1, layers: int = 3, experts: int = 8) -> Path:
    generator = torch.Generator().manual_seed(0)
    with MetricsLog(folder, None) as log:
        for step in range(1, steps + 1):
            record: dict[str, Any] = {
                "step": step,
                "tokens": step * 512,
                "loss": 8.0 / step**0.2,
                "mtp_loss": [9.0 / step**0.2] * mtp,
                "balance_loss": 1.0,
                "grad_norm": 0.5,
                "lr": 1e-3,
                "gamma": 1e-3,
                "mtp_weight": 0.3,
                "batch_size": 8,
                "tokens_per_s": 1234.5,
                "peak_share": 0.4,
            }
            if layers:
                counts = torch.randint(0, 50, (layers, experts), generator=generator)
                record |= {"load": expert_load(counts), "expert_counts": counts.tolist()}
            if step == steps:
                record["heldout_bpb"] = 2.5
            log.write(record)
    return folder


def report(folder: Path, **changes: Any) -> str:
    arguments: dict[str, Any] = {"title": "tiny", "config": {"model": _MODEL, "seed": 7}, "samples": [], "results": {}}
    return write_report(folder, **(arguments | changes)).read_text(encoding="utf-8")


def test_the_page_holds_every_part(tmp_path: Path) -> None:
    text = report(
        run(tmp_path, 120),
        samples=[{"prompt": "def f(", "text": "x):\n    return x", "temperature": 0.8}],
        results={"parameters": 3_212_345, "held-out bits per byte": 1.91234, "MTP acceptance": "71%"},
        sections=[("What next", "Try `dsv3 chat`.\n\nThen more.")],
    )
    page = Page(text)
    assert page.text["h1"] == ["tiny"]
    headings = ["Results", "Loss", "Samples", "Expert load", "Throughput", "Schedules", "Configuration", "What next"]
    assert page.text["h2"] == headings
    load = ["Load of each expert at step 120", "MaxVio of each layer"]
    schedules = ["Learning rate", "Batch size", "Speed of the router bias, gamma", "Weight of the MTP loss, lambda"]
    for caption in ("Training loss", "Held-out text", "Speed", *load, *schedules):
        assert caption in page.text["h3"]
    assert page.tags.count("svg") == len([1 for k, v in page.attributes if k == "aria-label" and v])
    cells = page.text["td"]
    assert "3,212,345 (3.2 M)" in cells
    assert "1.912" in cells
    assert "4,096" in cells
    assert {"1,234 tok/s", "61,440", "40%"} <= set(page.text["dd"])
    assert {"layer 1", "layer 2", "MTP 1"} <= set(page.text["th"])
    assert page.text["p"][-2:] == ["Try `dsv3 chat`.", "Then more."]
    legend = " ".join(page.text["text"])
    assert "next token" in legend  # SVG text stays text
    assert "MTP 1 (token +2)" in legend


def test_the_page_loads_nothing_and_runs_nothing(tmp_path: Path) -> None:
    text = report(run(tmp_path, 40))
    page = Page(text)
    assert not {"script", "link", "iframe", "object", "embed"} & set(page.tags)
    loads = [v for k, v in page.attributes if k in ("src", "href", "xlink:href", "srcset", "data", "action", "poster")]
    assert all(v and v.startswith(("#", "data:")) for v in loads)
    assert not re.search(r"url\((?!#)|@import", text)
    assert "default-src &#x27;none&#x27;" in text or "default-src 'none'" in text
    ids = [v for k, v in page.attributes if k == "id"]
    assert len(ids) == len(set(ids))
    used = {v[1:] for v in loads if v and v.startswith("#")} | set(re.findall(r"url\(#([^)]+)\)", text))
    assert used <= set(ids)


HOSTILE = "</pre><script>alert(1)</script><img src=x onerror=alert(1)> & \" ' &lt; \x00\x1b[31m\x9b \ud800 \r\n"


def test_nothing_from_outside_becomes_markup(tmp_path: Path) -> None:
    run(tmp_path, 2)
    clean = Page(
        report(tmp_path, title="t", samples=[{"prompt": "p", "text": "t"}], results={"r": "v"}, sections=[("h", "t")])
    )
    text = report(
        tmp_path,
        title=HOSTILE,
        samples=[{"prompt": HOSTILE, "text": HOSTILE}],
        results={HOSTILE: HOSTILE},
        config={"model": _MODEL, "seed": HOSTILE},
        sections=[(HOSTILE, HOSTILE)],
    )
    page = Page(text)
    assert page.tags == clean.tags
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", text)
    assert "</pre><script>alert(1)</script><img" in "".join(page.text["pre"])
    assert "␀␛[31m\ufffd ?" in "".join(page.text["pre"])


@pytest.mark.parametrize(
    ("steps", "mtp", "layers"), [(0, 0, 0), (1, 0, 0), (1, 2, 3), (3, 0, 3), (3, 1, 0), (700, 1, 9)]
)
def test_runs_of_every_size_have_a_page(tmp_path: Path, steps: int, mtp: int, layers: int) -> None:
    page = Page(report(run(tmp_path, steps, mtp=mtp, layers=layers)))
    words = " ".join(page.text["p"]) if "p" in page.text else ""
    assert ("No step was recorded" in words) == (steps == 0)
    assert ("No expert load was recorded" in words) == (layers == 0)
    assert any("(token +2)" in t for t in page.text.get("text", [])) == (mtp > 0)


def test_a_config_without_layers_still_names_the_rows(tmp_path: Path) -> None:
    assert "MoE 2" in Page(report(run(tmp_path, 1), config={})).text["th"]


def test_a_long_run_stays_a_small_page(tmp_path: Path) -> None:
    lines = "".join(f'{{"step": {s}, "loss": {3 + (s * 7919 % 100) / 100}}}\n' for s in range(1, 50_001))
    (tmp_path / "metrics.jsonl").write_text(lines)
    assert len(report(tmp_path)) < 200_000


def test_a_failed_write_leaves_the_old_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = report(run(tmp_path, 2))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(metrics.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        report(tmp_path, title="other")
    assert (tmp_path / "report.html").read_text() == before
    assert not list(tmp_path.glob(".report*"))


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no metrics at"):
        report(tmp_path)


def test_plot_loss_draws_the_format_of_the_suffix(tmp_path: Path) -> None:
    records = read_metrics(run(tmp_path, 5) / "metrics.jsonl")
    plot_loss(records, tmp_path / "loss.png")
    plot_loss(records, tmp_path / "loss.svg")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in (tmp_path / "loss.svg").read_bytes()


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (1234, "1,234"),
        (3_212_345, "3,212,345 (3.2 M)"),
        (671_026_404_352, "671,026,404,352 (671.0 B)"),
        (12345.6, "12,346"),
        (0.123456, "0.1235"),
        (1e-6, "1e-06"),
        (True, "yes"),
        (None, "none"),
        ((1, 2), "1, 2"),
        ((), "none"),
        ("as it is", "as it is"),
    ],
)
def test_numbers_are_written_for_people(value: Any, words: str) -> None:
    assert human(value) == words
