"""What is read and what is left out, said with file, line and field; packed rows; an order that resumes anywhere."""

import gzip
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.data.chat import ChatFormat
from dsv3.data.conversations import (
    ConversationSource,
    ReadingReport,
    Samples,
    conversation_of,
    parse_conversation_sources,
    read_conversations,
    render_conversations,
)
from dsv3.data.packing import PADDING, PackedLoader, PackingConfig, held_out_batches, pack
from dsv3.data.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def chat() -> ChatFormat:
    return ChatFormat(Tokenizer.train(["what is two plus three? it is five, of course.\n"] * 20, 300))


def pair(question: str, answer: str, **more: object) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **more}


def write(path, rows) -> ConversationSource:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return ConversationSource(name="made", paths=(path,))


def render(chat: ChatFormat, source: ConversationSource, report: ReadingReport, **changes):
    settings = {"seq_len": 100, "held_out": 0.0, "seed": 0, **changes}
    conversations = read_conversations(source, report)
    return render_conversations(conversations, chat, name=source.name, weight=source.weight, report=report, **settings)


# -- reading -----------------------------------------------------------------------------------------------------------


def test_each_bad_line_is_told_with_its_number_and_field_and_the_good_ones_are_kept(chat, tmp_path):
    source = write(
        tmp_path / "a.jsonl",
        [
            pair("two plus three?", "five"),
            '{"messages": [',
            "",
            [1, 2],
            {"text": "plain"},
            {"prompt": "two?", "response": 2},
            {"messages": [{"role": "assistant", "content": "five"}, {"role": "user", "content": "two?"}]},
            {"messages": [{"role": "user", "content": "two?"}]},
            {"messages": [{"role": "user", "content": "two?"}, {"role": "helper", "content": "no"}]},
            {"messages": "two?"},
            pair("two plus two?", "four", reasoning="yes"),
            {"prompt": "three plus two?", "response": "five", "system": "be brief"},
            pair("two?", "\ud800"),
        ],
    )
    report = ReadingReport()
    train, _ = render(chat, source, report)
    assert len(train) == report.read == 2
    said = "\n".join(report.faults)
    assert len(report.faults) == 10
    for expected in (
        "line 2 is no JSON (Expecting value",
        "line 4 is a list, not an object",
        "line 5 has the fields ['text']: give messages, or prompt and response",
        "line 6: response is a int (2)",
        "line 7: messages[0].role is 'assistant' after 'system'",
        "line 8: messages have no role 'assistant'",
        "line 9: messages have no role 'assistant'",
        "line 10: messages is a str ('two?')",
        "line 11: reasoning is 'yes'",
        "line 13",
    ):
        assert expected in said
    lines = report.lines()
    assert lines[0] == "2 conversations read"
    assert lines[1].startswith("left out: 10 lines are no conversation")
    assert lines[1].endswith(", and 5 more")


def test_a_file_without_a_good_line_is_an_error_that_says_why(chat, tmp_path):
    report = ReadingReport()
    with pytest.raises(ValueError, match=r"source 'made' has no sample to train on \(nothing could be read\).*no JSON"):
        render(chat, write(tmp_path / "a.jsonl", ["nonsense"]), report)
    with pytest.raises(ValueError, match=r"seq_len 3 is too short for them.*line 1 has \d+ tokens"):
        render(chat, write(tmp_path / "b.jsonl", [pair("two?", "two")]), ReadingReport(), seq_len=3)


def test_a_long_sample_is_left_out_whole_and_counted(chat, tmp_path):
    source = write(tmp_path / "a.jsonl", [pair("two?", "five " * 200), pair("two?", "four")])
    report = ReadingReport()
    train, _ = render(chat, source, report, seq_len=50)
    assert len(train) == 1
    assert report.longest > 200
    assert "1 samples are too long" in report.lines()[1]
    assert "line 1 has" in report.lines()[1]


def test_pairs_and_messages_render_alike_and_the_end_token_is_learnt(chat, tmp_path):
    rows = [
        {"prompt": "two plus two?", "response": "four", "system": "be brief"},
        {
            "prompt": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "two plus two?"}],
            "response": "four",
        },
    ]
    train, _ = render(chat, write(tmp_path / "a.jsonl", rows), ReadingReport())
    first, second = (train.ids[train.offsets[i] : train.offsets[i + 1]] for i in range(2))
    assert np.array_equal(first, second)
    assert train.learn[train.offsets[1] - 1]
    assert train.ids[train.offsets[1] - 1] == chat.stop_ids[0]


def test_a_line_reasons_when_its_last_answer_does(chat):
    plain = conversation_of(pair("two?", "two"), "x")
    thought = {"role": "assistant", "content": "two", "reasoning_content": "one and one"}
    reasoned = conversation_of({"messages": [{"role": "user", "content": "two?"}, thought]}, "x")
    raw = conversation_of(pair("two?", "<think>\none and one\n</think>\n\ntwo"), "x")
    told = conversation_of({**pair("two?", "two"), "reasoning": True}, "x")
    assert [c.reasoning for c in (plain, reasoned, raw, told)] == [False, True, True, True]
    both = [chat.render(c.messages, generate=False, reasoning=c.reasoning).ids for c in (reasoned, raw)]
    assert both[0] == both[1]


def test_sources_are_parsed_or_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text("")
    (tmp_path / "b.jsonl").write_text("")
    both = parse_conversation_sources([f"r=3:{tmp_path}/a.jsonl", f"chat=1:{tmp_path}/b.jsonl"])
    assert [(s.name, s.weight, len(s.paths)) for s in both] == [("r", 3.0, 1), ("chat", 1.0, 1)]
    assert len(parse_conversation_sources([str(tmp_path)])[0].paths) == 2
    for texts, match in (
        ([f"r=x:{tmp_path}/a.jsonl"], "is not NAME=WEIGHT:PATH"),
        ([f"r=0:{tmp_path}/a.jsonl"], "weight 0.0: give a positive number"),
        ([f"{tmp_path}/c.jsonl"], "does not exist"),
        ([f"a=1:{tmp_path}/a.jsonl", f"a=1:{tmp_path}/b.jsonl"], "share the name 'a'"),
        ([f"a=1:{tmp_path}/a.jsonl", f"{tmp_path}/b.jsonl"], "some have a weight and some have none"),
    ):
        with pytest.raises(ValueError, match=match):
            parse_conversation_sources(texts)


def test_gzip_is_read_and_a_torn_one_keeps_what_came_before(chat, tmp_path):
    rows = "".join(json.dumps(pair("two?", f"five {i}")) + "\n" for i in range(2000)).encode()
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(rows)[:-600])
    report = ReadingReport()
    kept = list(read_conversations(ConversationSource(name="a", paths=(path,)), report))
    assert 0 < len(kept) < 2000
    assert f"a.jsonl.gz is damaged after line {len(kept)}" in report.faults[-1]


def test_what_is_held_out_depends_on_the_question_alone(chat, tmp_path):
    rows = [pair(f"two plus {i}?", f"answer {j}") for i in range(60) for j in range(2)]
    train, held = render(chat, write(tmp_path / "a.jsonl", rows), ReadingReport(), held_out=0.3)
    assert len(train) + len(held) == 120
    assert 15 < len(held) < 60
    questions = []
    for part in (train, held):
        samples = [part.ids[part.offsets[i] : part.offsets[i + 1]] for i in range(len(part))]
        masks = [part.learn[part.offsets[i] : part.offsets[i + 1]] for i in range(len(part))]
        questions.append({tuple(ids[: mask.argmax()]) for ids, mask in zip(samples, masks)})
    assert not questions[0] & questions[1]


def test_a_question_is_on_one_side_whatever_the_system_says(chat, tmp_path):
    """Distillation makes two samples of a problem, one under a system prompt."""
    sides = []
    for system in ({}, {"system": "Think before you answer."}):
        rows = [pair(f"two plus {i}?", f"answer {i}") | system for i in range(60)]
        _, held = render(chat, write(tmp_path / "a.jsonl", rows), ReadingReport(), held_out=0.3)
        parts = [slice(*held.offsets[i : i + 2]) for i in range(len(held))]
        sides.append({tuple(held.ids[part][held.learn[part]]) for part in parts})
    assert sides[0] == sides[1]
    assert len(sides[0]) > 7


# -- packing -----------------------------------------------------------------------------------------------------------


def made(lengths: list[int], name: str = "a", weight: float | None = None, start: int = 1) -> Samples:
    """Sample i is the number start + i repeated; its first token is not learnt."""
    learn = [[False] + [True] * (n - 1) for n in lengths]
    return Samples(
        name=name,
        weight=weight,
        ids=np.repeat(np.arange(start, start + len(lengths)), lengths).astype(np.int32),
        learn=np.concatenate([np.array(part) for part in learn]),
        offsets=np.concatenate(([0], np.cumsum(lengths))).astype(np.int64),
    )


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(2, 9), min_size=1, max_size=30), st.integers(0, 5), st.integers(0, 2))
def test_every_sample_is_in_every_epoch_once_and_no_row_overflows(lengths, seed, depth):
    samples = made(lengths)
    config = PackingConfig(seq_len=10, extra_tokens=depth, epochs=2, seed=seed)
    loader = PackedLoader([samples], config)
    for epoch in range(2):
        rows = loader.rows_of(epoch)
        assert sorted(i for row in rows for _, i in row) == list(range(len(lengths)))
        batch = pack(rows, [samples], config)
        assert batch.tokens.shape == (len(rows), 10 + depth)
        used = batch.doc_ids != PADDING
        assert int(used.sum()) == sum(n - 1 for n in lengths)
        assert not used[:, 10:].any()
        assert (batch.tokens[used] == batch.targets[used]).all()  # a sample is one number, so no target is of another
        for k in range(depth + 1):
            valid = batch.valid(k, 10)
            assert int(valid.sum()) == sum(max(0, n - 1 - k) for n in lengths)
            here, there = batch.tokens[:, :10][valid], batch.targets[:, k : k + 10][valid]
            assert (here == there).all()


def test_first_fit_fills_the_holes():
    loader = PackedLoader([made([6, 6, 4, 4, 3, 3, 3, 3])], PackingConfig(seq_len=10, epochs=1))
    assert len(loader.rows_of(0)) == 3
    assert loader.summary()[-1].startswith("3 rows an epoch, 2.7 samples a row, 80.0% filled")


def test_the_first_row_is_shown_sample_by_sample():
    loader = PackedLoader([made([6, 6])], PackingConfig(seq_len=10, epochs=1))
    ids, mask = loader.first_row(20)
    assert sorted(set(ids)) == [1, 2]
    assert mask == ([False] + [True] * 5) * 2
    assert len(loader.first_row(7)[0]) == 6
    assert len(loader.first_row(1)[0]) == 6


def test_any_split_into_batches_and_any_resume_gives_the_same_rows():
    sources = [made([3, 4, 5] * 7), made([2, 8] * 4, "b", start=50)]
    config = PackingConfig(seq_len=12, epochs=3, seed=1)
    whole = PackedLoader(sources, config)
    rows = whole.next_batch(whole.total_rows).tokens
    again, at = PackedLoader(sources, config), 0
    for size in [1, 3, 2, 5, 1, 4] * 4:
        if at == whole.total_rows:
            break
        resumed = PackedLoader(sources, config)
        resumed.load_state_dict(json.loads(json.dumps(again.state_dict())))
        batch, same = again.next_batch(size), resumed.next_batch(size)
        assert (batch.tokens == same.tokens).all()
        assert (batch.tokens == rows[at : at + size]).all()
        at += len(batch.tokens)
    assert at == whole.total_rows
    with pytest.raises(ValueError, match=f"row {at} of {at}: 1 more were asked for"):
        again.next_batch(1)
    assert [whole.rows_of(0), whole.rows_of(1)] == [again.rows_of(0), again.rows_of(1)]
    assert whole.rows_of(0) != whole.rows_of(1)


def test_resuming_on_other_samples_or_another_config_is_refused():
    state = PackedLoader([made([3, 4])], PackingConfig(seq_len=12)).state_dict()
    with pytest.raises(ValueError, match="state is of conversations"):
        PackedLoader([made([3, 5])], PackingConfig(seq_len=12)).load_state_dict(state)
    with pytest.raises(ValueError, match="state is of packing config"):
        PackedLoader([made([3, 4])], PackingConfig(seq_len=13)).load_state_dict(state)
    with pytest.raises(ValueError, match="at row 99 of 2: damaged"):
        PackedLoader([made([3, 4])], PackingConfig(seq_len=12)).load_state_dict({**state, "rows": 99})


def test_weights_share_an_epoch_and_starve_no_sample():
    """60 samples at 3:1: 45 and 15 an epoch. The small source repeats, the large one goes on where it stopped."""
    sources = [made([3] * 12, "small", 3.0), made([3] * 48, "large", 1.0, start=100)]
    loader = PackedLoader(sources, PackingConfig(seq_len=8, epochs=4))
    assert loader.quotas == [45, 15]
    seen = [[i for e in range(4) for row in loader.rows_of(e) for s, i in row if s == source] for source in (0, 1)]
    small, large = (np.bincount(part, minlength=n) for part, n in zip(seen, (12, 48)))
    assert small.min() == small.max() == 15
    assert (large.min(), large.max()) == (1, 2)
    assert "weight 3: 45 an epoch" in loader.summary()[0]


def test_held_out_rows_come_in_batches_or_not_at_all():
    config = PackingConfig(seq_len=10, extra_tokens=1)
    batches = held_out_batches([made([6] * 10), made([5] * 3, "b")], config, rows=2, max_rows=5)
    assert [len(b.tokens) for b in batches] == [2, 2, 1]
    assert held_out_batches([], config, rows=2, max_rows=5) == []


def test_a_sample_longer_than_a_row_never_reaches_the_loader():
    with pytest.raises(ValueError, match="a sample has 12 tokens, a row takes 11"):
        PackedLoader([made([12])], PackingConfig(seq_len=10))
