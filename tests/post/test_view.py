"""The view: whole, inline, and nothing that a model wrote can be more than text."""

import re
from html.parser import HTMLParser

import pytest

from dsv3.post.rollout import Answer, write_rollouts
from dsv3.post.view import write_view

EVIL = "</pre><script>alert(1)</script>\x00\u202e<img src=x onerror=1>&amp;\"'"


def answer(number: int, choice: int, reward: float | None, text: str = "fine", **more) -> Answer:
    plain = dict(problem="p", question=f"Question {number}?", gold="42", prompt=[1, 2], tokens=[5, 6], logprobs=[-0.1, -3.0],
                 finish="stop", text=text, reward=reward, parts={"accuracy": reward or 0.0}, note="right" if reward else "not 42",
                 advantage=0.0 if reward is None else reward - 0.5, used=reward is not None)  # fmt: skip
    return Answer(number=number, choice=choice, **(plain | more))


def run(folder, rounds: int = 2, **changes) -> str:
    for index in range(rounds):
        group = [answer(index, i, float(i % 2), **changes) for i in range(4)]
        write_rollouts(folder / "rollouts" / f"round-{index:08d}.jsonl", [*group, answer(99, 0, None)])
    return write_view(folder).read_text(encoding="utf-8")


class Page(HTMLParser):
    """Tags and text of a page; every tag must be closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        assert not any(name.startswith("on") or name in ("src", "href") for name, _ in attrs)
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_well_formed_and_loads_nothing(tmp_path):
    page = Page(run(tmp_path))
    assert "script" not in page.tags
    assert "link" not in page.tags
    text = (tmp_path / "rollouts.html").read_text()
    assert "default-src 'none'" in text
    assert not re.search(r"https?://|url\(", text)


def test_what_a_model_wrote_is_text(tmp_path):
    text = run(tmp_path, text=EVIL, question=EVIL, gold=EVIL, note=EVIL)
    page = Page(text)
    assert "script" not in page.tags
    assert "img" not in page.tags
    assert "\x00" not in text
    assert "\u202e" not in text
    assert "&lt;script&gt;" in text


def test_answers_show_reward_reason_advantage_and_gold(tmp_path):
    text = run(tmp_path)
    rows = (
        "Round 1",
        "Round 2",
        "Question 1?",
        "right answer: 42",
        "advantage +0.50",
        "not 42",
        "dropped",
        "no signal",
    )
    for shown in (*rows, "not trained on"):
        assert shown in text
    assert text.index("Round 2") < text.index("Round 1")  # the newest first
    assert text.count("<details open>") == 1


def test_tokens_are_shaded_by_how_unlikely_they_were(tmp_path):
    run(tmp_path)
    text = write_view(tmp_path, decode=lambda ids: f"<{ids[0]}>").read_text()
    shades = [float(x) for x in re.findall(r"rgba\(var\(--shade\),([\d.]+)\)\" title", text)]
    assert shades[:2] == [0.06, 0.57]
    assert "&lt;5&gt;" in text


def test_many_rounds_and_groups_are_cut_and_said(tmp_path):
    for index in range(9):
        write_rollouts(tmp_path / "rollouts" / f"round-{index:08d}.jsonl", [answer(n, 0, 1.0) for n in range(5)])
    text = write_view(tmp_path, rounds=3, groups=2).read_text()
    assert re.findall(r"Round (\d+)", text) == ["9", "5", "1"]
    assert "and 3 groups more" in text


def test_curves_alarm_and_verdict_come_from_the_metrics(tmp_path):
    import json

    records = [{"step": i + 1, "reward": i / 10, "verdict": "learning"} for i in range(5)]
    records[4] |= {"heldout_accuracy": 0.5, "alarm": "reward <rose>"}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    text = run(tmp_path)
    assert "reward &lt;rose&gt;" in text
    assert len(re.search(r'points="([^"]*)"', text)[1].split()) == 5
    assert "<circle" in text  # one evaluation is a point


def test_a_run_without_rollouts_has_a_page(tmp_path):
    assert "No step" in write_view(tmp_path).read_text()
    (tmp_path / "rollouts").mkdir()
    (tmp_path / "rollouts" / "round-00000000.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="line 1"):
        write_view(tmp_path)
