"""Bodies: a stream's pieces joined are the whole, wherever the engine cut; reasoning, calls and log-probabilities are in place."""

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.data.chat import CALL_BEGIN, CALL_END, CALLS_BEGIN, CALLS_END, TOOL_SEP
from dsv3.data.tokenizer import THINK_END
from dsv3.infer.engine import Delta, Request
from dsv3.infer.sampling import SamplingParams
from dsv3.infer.scores import TokenScore
from dsv3.serve.errors import dump
from dsv3.serve.plan import Plan
from dsv3.serve.replies import ChatBody, CompletionBody
from tests.serve.small import small_tokenizer

TOKENIZER = small_tokenizer()


def call(name: str, arguments: str) -> str:
    return f"{CALL_BEGIN}function{TOOL_SEP}{name}\n```json\n{arguments}\n```{CALL_END}"


def score(token: int) -> TokenScore:
    return TokenScore(token, -1.0 - token, ((token, -1.0 - token), (7, -float("inf"))))


def plan(**changes) -> Plan:
    fields = dict(model="tiny", prompts=[[0, 5]], params=SamplingParams(max_tokens=99), stream=True, tools=True)
    return Plan(**{**fields, **changes})


def body(made: Plan, kind=ChatBody):
    requests = [Request(at, prompt, made.params) for at, prompt in enumerate(made.prompts)]
    for request in requests:
        request.sequences = [type("Sequence", (), {"cached": 1, "work": None})()]
    return kind(made, TOKENIZER, requests, "fp_test")


def deltas(text: str, cuts: list[int], finish: str) -> list[Delta]:
    """The text's tokens in steps of several; the text of a step is what its tokens complete."""
    ids, stream, made = TOKENIZER.encode(text, special=True), TOKENIZER.stream(), []
    edges = [0, *sorted({cut % (len(ids) + 1) for cut in cuts}), len(ids)]
    for at, (a, b) in enumerate(itertools.pairwise(edges)):
        last = at == len(edges) - 2
        piece = stream.push(ids[a:b]) + (stream.finish() if last else "")
        made.append(Delta(0, 0, ids[a:b], piece, [score(i) for i in ids[a:b]], finish if last else None))
    return made


PARTS = st.sampled_from(
    ["hello ", "你好", "\n", "<", call("f", '{"a": "```"}'), f"{CALLS_BEGIN}{call('g', '{}')}\n{call('h', '[1]')}{CALLS_END}",
     CALL_BEGIN, CALLS_END, THINK_END, "\n\n", "{", '"', "x"]
)  # fmt: skip


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.lists(PARTS, max_size=8),
    st.lists(st.integers(0, 300), max_size=12),
    st.booleans(),
    st.sampled_from(["stop", "length"]),
)
def test_a_stream_joined_is_the_whole_answer(parts, cuts, thinking, finish):
    made = deltas("".join(parts), cuts, finish)
    streamed = body(plan(thinking=thinking, reasoning=thinking, logprobs=1))
    whole = body(plan(thinking=thinking, reasoning=thinking, logprobs=1, stream=False))
    chunks = streamed.starts()
    for delta in made:
        chunks += streamed.add(0, delta)
        assert whole.add(0, delta) == []
    [choice] = whole.whole()["choices"]
    message = choice["message"]
    said = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(d.get("content") or "" for d in said) == message["content"]
    assert "".join(d.get("reasoning_content") or "" for d in said) == message.get("reasoning_content", "")
    calls: dict[int, list[str]] = {}
    for delta in said:
        for piece in delta.get("tool_calls", []):
            function = piece["function"]
            calls.setdefault(piece["index"], [function.get("name", ""), ""])
            calls[piece["index"]][1] += function["arguments"]
    told = [[c["function"]["name"], c["function"]["arguments"]] for c in message.get("tool_calls", [])]
    assert [calls[at] for at in range(len(calls))] == told
    logprobs = [lp for chunk in chunks for lp in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert logprobs == choice["logprobs"]["content"]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks].count(None) == len(chunks) - 1
    assert chunks[-1]["choices"][0]["finish_reason"] == choice["finish_reason"]
    assert chunks[-1]["usage"]["completion_tokens"] == sum(len(delta.token_ids) for delta in made)


def test_a_finished_call_makes_the_reason_tool_calls_and_a_cut_one_does_not():
    called = f"{CALLS_BEGIN}{call('f', '{}')}"
    for text, finish, reason in ((called, "stop", "tool_calls"), (called, "length", "length"), ("hi", "stop", "stop")):
        made = body(plan(stream=False))
        for delta in deltas(text, [], finish):
            made.add(0, delta)
        assert made.whole()["choices"][0]["finish_reason"] == reason


def test_a_second_call_is_left_out_when_one_is_allowed():
    text = f"{CALLS_BEGIN}{call('f', '{}')}\n{call('g', '{}')}{CALLS_END}"
    made = body(plan(stream=False, single_call=True))
    for delta in deltas(text, [3, 9], "stop"):
        made.add(0, delta)
    assert [c["function"]["name"] for c in made.whole()["choices"][0]["message"]["tool_calls"]] == ["f"]


def test_reasoning_tokens_count_up_to_the_end_of_thinking():
    text = f"one two{THINK_END}\n\nthree"
    made = body(plan(thinking=True, reasoning=True, stream=False))
    for delta in deltas(text, [2, 4], "stop"):
        made.add(0, delta)
    inside = len(TOKENIZER.encode(f"one two{THINK_END}", special=True))
    assert made.usage()["completion_tokens_details"]["reasoning_tokens"] == inside
    message = made.whole()["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("one two", "three")


def test_infinite_logprobs_are_deepseeks_minus_9999():
    made = body(plan(logprobs=2, stream=False))
    for delta in deltas("a", [], "stop"):
        made.add(0, delta)
    [token] = made.whole()["choices"][0]["logprobs"]["content"]
    assert token["top_logprobs"][1]["logprob"] == -9999.0
    assert token["bytes"] == [97]
    dump(made.whole())  # JSON knows no infinity


def test_usage_has_a_chunk_of_its_own_when_asked_for():
    made = body(plan(usage=True))
    chunks = [*made.starts(), *(chunk for delta in deltas("ab", [1], "stop") for chunk in made.add(0, delta))]
    assert all(chunk["usage"] is None for chunk in chunks)
    [last] = made.ends()
    assert last["choices"] == []
    assert last["usage"]["total_tokens"] == 2 + last["usage"]["completion_tokens"]


def test_details_tell_tokens_drafts_and_experts():
    made = body(plan(details=True))
    delta = Delta(0, 0, [70, 71], "ab", [score(70), score(71)], "stop", None, [((1, 2),), ((0, 3),)], 2, 1)
    [chunk] = made.add(0, delta)
    assert [token["id"] for token in chunk["dsv3"]["tokens"]] == [70, 71]
    assert chunk["dsv3"]["tokens"][0]["experts"] == [[1, 2]]
    assert chunk["dsv3"]["tokens"][1]["top"][0][1] == -72.0
    assert (chunk["dsv3"]["drafted"], chunk["dsv3"]["accepted"]) == (2, 1)
    totals = chunk["dsv3"]["totals"]
    assert totals["places"] == [[1, 1], [1, 0]]
    assert totals["cached_tokens"] == 1


def test_completions_echo_offsets_and_unique_token_names():
    ids = TOKENIZER.encode("hello 你")
    made = body(plan(prompts=[ids], echo=[TOKENIZER.decode(ids)], logprobs=1, stream=False), CompletionBody)
    made.requests[0].prompt_scores = [None, *map(score, ids[1:])]
    half = TOKENIZER.encode("鱼")[:1]
    made.add(0, Delta(0, 0, half, "", [score(half[0])], None))
    made.add(0, Delta(0, 0, [], "\ufffd", [], "length"))
    [choice] = made.whole()["choices"]
    logprobs = choice["logprobs"]
    assert choice["text"] == "hello 你\ufffd"
    assert len({len(values) for values in logprobs.values()}) == 1
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["tokens"][-1].startswith("bytes:\\x")
    assert logprobs["text_offset"][0] == 0
    assert logprobs["top_logprobs"][1][logprobs["tokens"][1]] == logprobs["token_logprobs"][1]
    assert json.loads(dump(made.whole()))["usage"]["prompt_tokens"] == len(ids)


@pytest.mark.parametrize("n", [1, 2])
def test_the_index_of_a_completion_counts_prompts_first(n):
    made = body(plan(prompts=[[5], [6]], params=SamplingParams(max_tokens=9, n=n)), CompletionBody)
    seen = [
        made.add(prompt, Delta(prompt, choice, [70], "a", [], "stop"))[0]["choices"][0]["index"]
        for prompt in range(2)
        for choice in range(n)
    ]
    assert seen == list(range(2 * n))
