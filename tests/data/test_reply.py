"""The parser of replies: the same events whatever the split, nothing lost, and the renderer's inverse."""

import itertools
import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.data.chat import CALL_BEGIN, CALL_END, CALLS_BEGIN, CALLS_END, TOOL_SEP, ChatFormat, with_template
from dsv3.data.reply import Call, CallArguments, CallBegin, CallEnd, Content, Reasoning, Reply, ReplyParser, parse
from dsv3.data.tokenizer import EOS, THINK_BEGIN, THINK_END, Tokenizer

HEAD = f"{CALL_BEGIN}function{TOOL_SEP}f\n```json\n"
END = f"\n```{CALL_END}"
ONE = f"{CALLS_BEGIN}{HEAD}{{}}{END}{CALLS_END}"
SMALL = Tokenizer.train(["hello world, 你好 {}\n" * 9], 400)
REASONER = ChatFormat.of(with_template(SMALL, reasoning=True))

# What replies are made of: whole markup, halves of it, JSON's own characters, text.
MARKUP = [CALLS_BEGIN, CALLS_END, CALL_BEGIN, CALL_END, TOOL_SEP, HEAD, END, ONE, THINK_BEGIN, THINK_END]
PIECES = [*MARKUP, CALLS_BEGIN[:7], CALL_END[3:], "<", "</thi", "function", "f", "\n", "\n\n", "```", "\n```json\n"]
PIECES += ['"', "\\", '{"a": "b"}', "x", "é😀", "a" * 65]
REPLIES = st.lists(st.sampled_from(PIECES), max_size=12).map("".join)
FLAGS = st.fixed_dictionaries({"tools": st.booleans(), "reasoning": st.booleans(), "thinking": st.booleans()})


def events_of(pushes, **flags) -> list:
    """Events of a stream, neighbouring texts of one kind joined."""
    parser, out = ReplyParser(**flags), []
    for event in itertools.chain(*map(parser.push, pushes), parser.finish()):
        text = getattr(event, "text", None)
        assert text != ""
        if text and out and type(out[-1]) is type(event):
            last = out.pop()
            joined = last.text + text
            event = type(event)(event.index, joined) if isinstance(event, CallArguments) else type(event)(joined)
        out.append(event)
    assert parser.finish() == []
    return out


def written(events) -> str:
    """What the events say, in order."""
    return "".join(getattr(event, "text", getattr(event, "name", "")) for event in events)


# -- any split ---------------------------------------------------------------------------------------------------------

SAMPLES = [
    f"hi{ONE}",
    f"a\n{CALLS_BEGIN}{HEAD}" + '{"s": "```' + CALL_END + '\\n"}' + f"{END}\n{HEAD}[1]{END}{CALLS_END} b",
    f"r\n{THINK_END}\n\nc{CALLS_BEGIN}{HEAD}{{}}\n``",
    f"{THINK_BEGIN}\nr\n\n{THINK_END}\n\n\nc",
    f"{CALLS_BEGIN}{CALL_BEGIN}function{TOOL_SEP}f g\n```json\n{{}}{END}{CALLS_END}",
    f"{CALLS_BEGIN}{HEAD}{{}}{CALL_END}\n\n{CALLS_END}",
    f"{CALLS_BEGIN}{HEAD}1{CALL_END}\n{CALLS_BEGIN}{CALL_BEGIN}function{TOOL_SEP}{'f' * 64}\n```json\n{CALL_END}",
]


@pytest.mark.parametrize("text", SAMPLES)
@pytest.mark.parametrize("flags", [(True, False, False), (True, True, False), (True, True, True)])
def test_every_split_in_up_to_three_and_every_chunk_size_give_the_same_events(text, flags):
    flags = dict(zip(("tools", "reasoning", "thinking"), flags))
    whole = events_of([text], **flags)
    assert events_of(text, **flags) == whole  # a character a push
    for size in range(2, 12):
        assert events_of([text[at : at + size] for at in range(0, len(text), size)], **flags) == whole
    for i, j in itertools.combinations_with_replacement(range(0, len(text) + 1), 2):
        assert events_of([text[:i], text[i:j], text[j:]], **flags) == whole


@settings(max_examples=600, deadline=None)
@given(REPLIES, FLAGS, st.randoms(use_true_random=False))
def test_random_and_malformed_replies_are_the_same_for_any_split(text, flags, rng: random.Random):
    whole = events_of([text], **flags)
    assert events_of(text, **flags) == whole
    cuts = sorted(rng.sample(range(len(text) + 1), min(4, len(text) + 1)))
    assert events_of([text[i:j] for i, j in itertools.pairwise([0, *cuts, len(text)])], **flags) == whole


@settings(max_examples=600, deadline=None)
@given(REPLIES, FLAGS)
def test_no_byte_is_lost_doubled_or_moved(text, flags):
    """The events' text is the reply's with nothing but markup missing: walking along the reply, each skip is markup."""
    events = events_of([text], **flags)
    calls = sum(isinstance(event, CallBegin) for event in events)
    assert [e.index for e in events if isinstance(e, CallBegin)] == list(range(calls))
    assert [e.index for e in events if isinstance(e, CallEnd)] == list(range(calls))
    if not flags["tools"]:
        assert calls == 0
    skippable = [
        HEAD[: HEAD.index("f\n")],
        "\n```json\n",
        f"\n```{CALL_END}",
        f"\n```{CALLS_END}",
        "\n```",
        CALLS_BEGIN,
    ]
    skippable += [CALLS_END, CALL_END, CALL_END[:7], THINK_BEGIN, THINK_END, "\n"]
    said = written(events)
    ways = [{0}, *(set() for _ in text)]  # where in `said` the walk can be, at each place of the text
    for at in range(len(text)):
        for place in ways[at]:
            if place < len(said) and said[place] == text[at]:
                ways[at + 1].add(place + 1)
            for markup in skippable:
                if text.startswith(markup, at):
                    ways[at + len(markup)].add(place)
    assert len(said) in ways[len(text)]
    if not any(markup in text for markup in (HEAD, THINK_BEGIN, THINK_END)) and calls == 0:
        assert said == text


@settings(max_examples=200, deadline=None)
@given(REPLIES)
def test_without_tools_and_reasoning_all_is_content(text):
    assert parse(text, tools=False) == Reply(content=text)


# -- the rules ---------------------------------------------------------------------------------------------------------


def test_arguments_stream_as_soon_as_the_head_is_whole():
    parser = ReplyParser(tools=True)
    assert parser.push(f"hi{CALLS_BEGIN}{HEAD[:-1]}") == [Content("hi")]
    assert parser.push("\n") == [CallBegin(0, "f")]
    assert parser.push('{"a"') == [CallArguments(0, '{"a"')]
    assert parser.push(": 1}\n``") == [CallArguments(0, ": 1}")]
    assert parser.push(f"`{CALL_END}") == [CallEnd(0)]
    assert parser.push(f"\n{HEAD}") == [CallBegin(1, "f")]
    assert parser.finish() == [CallEnd(1, complete=False)]


def test_begin_and_end_may_come_in_one_push():
    assert ReplyParser(tools=True).push(ONE) == [CallBegin(0, "f"), CallArguments(0, "{}"), CallEnd(0)]


@pytest.mark.parametrize(
    "text",
    [
        CALLS_BEGIN,
        f"see {CALLS_BEGIN} and {CALL_END}",
        f"{CALLS_BEGIN}{CALL_BEGIN}function{TOOL_SEP}f g\n```json\n{{}}{END}{CALLS_END}",
        f"{CALLS_BEGIN}{CALL_BEGIN}function{TOOL_SEP}\n```json\n{{}}{END}{CALLS_END}",
        f"{CALLS_BEGIN}{CALL_BEGIN}function{TOOL_SEP}{'a' * 65}\n```json\n{{}}{END}{CALLS_END}",
        f"{CALLS_BEGIN}{CALL_BEGIN}tool{TOOL_SEP}f\n```json\n{{}}{END}{CALLS_END}",
        f"{CALLS_BEGIN}{HEAD[:-1]}",
        f"{CALLS_BEGIN}{CALL_BEGIN}f{TOOL_SEP}{{}}{CALL_END}{CALLS_END}",
    ],
)
def test_a_malformed_head_is_content_verbatim(text):
    assert parse(text) == Reply(content=text)


def test_a_good_call_beside_a_malformed_one_is_kept():
    bad = f"{CALL_BEGIN}function{TOOL_SEP}!\n```json\n{{}}{END}"
    good = Call(name="f", arguments="{}", complete=True)
    assert parse(f"{CALLS_BEGIN}{bad}\n{HEAD}{{}}{END}{CALLS_END}") == Reply(
        content=f"{CALLS_BEGIN}{bad}\n", calls=[good]
    )
    assert parse(f"{CALLS_BEGIN}{HEAD}{{}}{END}\n{bad}{CALLS_END}") == Reply(content=f"\n{bad}", calls=[good])
    assert parse(f"{CALLS_BEGIN}{CALLS_BEGIN}{HEAD}{{}}{END}") == Reply(content=CALLS_BEGIN, calls=[good])


def test_text_between_and_after_calls_is_content():
    reply = parse(f"a{CALLS_BEGIN}{HEAD}1{END}b\n{HEAD}2{END}\n{CALLS_END}c{CALLS_END}{ONE}")
    assert reply.content == f"ab\nc{CALLS_END}"
    assert [call.arguments for call in reply.calls] == ["1", "2", "{}"]


@pytest.mark.parametrize(
    ("tail", "arguments"),
    [
        ("{}", "{}"),
        ("{}\n```", "{}"),
        (f"{{}}\n```{CALL_END[:-1]}", "{}"),
        ("{}\n``", "{}\n``"),
        ('{"a": "```', '{"a": "```'),
        (f"{{}}{CALL_END[:-1]}", f"{{}}{CALL_END[:-1]}"),
    ],
)
def test_a_call_cut_by_the_end_is_kept_as_it_is(tail, arguments):
    assert parse(f"{CALLS_BEGIN}{HEAD}{tail}").calls == [Call(name="f", arguments=arguments, complete=False)]


def test_a_forgotten_fence_or_end_swallows_nothing():
    for end in (CALL_END, END):
        reply = parse(f"{CALLS_BEGIN}{HEAD}{{}}{end}\n{HEAD}[]{end}{CALLS_END}")
        assert [call.arguments for call in reply.calls] == ["{}", "[]"]
        assert reply.content == ""
    assert parse(f"{HEAD}{{}}\n```{CALLS_END}x") == Reply(
        content="x", calls=[Call(name="f", arguments="{}", complete=True)]
    )


def test_a_call_tells_nothing_of_the_next():
    reply = parse(f'{CALLS_BEGIN}{HEAD}{{"a{END}\n{HEAD}{{}}{CALL_END}{CALLS_END}')
    assert [call.arguments for call in reply.calls] == ['{"a', "{}"]
    assert parse(f"{HEAD}{{}}{CALLS_END}{CALLS_END}").content == CALLS_END


def test_markup_and_fences_inside_json_strings_survive():
    arguments = json.dumps({"a": f'"{CALL_END}', "b": f'\\"{CALL_END}'}, ensure_ascii=False)
    assert parse(f"{CALLS_BEGIN}{HEAD}{arguments}{CALL_END}").calls[0].arguments == arguments
    arguments = json.dumps(
        {"code": f'```json\n{{}}\n```{CALL_END}{CALLS_END}"\\', "x": f"\\{CALL_END}"}, ensure_ascii=False
    )
    assert parse(f"{CALLS_BEGIN}{HEAD}{arguments}{END}{CALLS_END}").calls[0].arguments == arguments


def test_reasoning_has_its_own_part():
    text = f"a\n\n{THINK_END}\n\n\nb {THINK_END}"
    assert parse(text, reasoning=True, thinking=True) == Reply(reasoning="a\n", content=f"\nb {THINK_END}")
    assert parse(text, reasoning=True) == Reply(content=text)  # not opened, neither by prompt nor by reply
    assert parse(f"{THINK_BEGIN}\n{text}", reasoning=True) == Reply(reasoning="a\n", content=f"\nb {THINK_END}")
    assert parse("never ends", reasoning=True, thinking=True) == Reply(reasoning="never ends")
    assert parse(f"{ONE}{THINK_END}{ONE}", reasoning=True, thinking=True).reasoning == ONE
    assert ReplyParser(tools=True, thinking=True).push("so\n") == [Reasoning("so")]


def test_the_work_grows_with_the_length_only():
    """What is held back is bounded, whatever the model writes."""
    for piece in ("<", CALLS_BEGIN, CALL_BEGIN, "\n", "\n```", '"', f"{CALL_BEGIN}function{TOOL_SEP}{'a' * 70}"):
        for start in ("", f"{CALLS_BEGIN}{HEAD}", ONE):
            parser = ReplyParser(tools=True)
            parser.push(start)
            for _ in range(40):
                parser.push(piece)
                assert len(parser._held) < 200


# -- the renderer's inverse --------------------------------------------------------------------------------------------

PLAIN = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
TEXT = st.one_of(
    PLAIN, st.lists(st.sampled_from(["<", "\n", "```", CALLS_BEGIN, CALL_BEGIN, "a"]), max_size=5).map("".join)
)
VALUE = st.one_of(TEXT, st.sampled_from([*MARKUP, '"', "\\"]), st.integers(), st.none())
ARGUMENTS = st.dictionaries(TEXT, st.one_of(VALUE, st.lists(VALUE, max_size=2)), max_size=3)


@settings(max_examples=300, deadline=None)
@given(
    TEXT.filter(lambda text: THINK_END not in text and not text.startswith(THINK_BEGIN) and HEAD not in text),
    TEXT.filter(lambda text: THINK_END not in text),
    st.lists(st.tuples(st.from_regex(r"\A[A-Za-z0-9_-]{1,64}\Z"), ARGUMENTS), max_size=3),
    st.booleans(),
)
def test_a_rendered_turn_parses_to_the_same_message(content, reasoning, calls, thinking):
    made = [{"function": {"name": name, "arguments": arguments}} for name, arguments in calls]
    question = [{"role": "user", "content": "q"}]
    answer = {"role": "assistant", "content": content, "reasoning_content": reasoning, "tool_calls": made}
    prompt = REASONER.text(question, reasoning=thinking)
    text = REASONER.text([*question, answer], generate=False, reasoning=thinking)
    opened = thinking and bool(reasoning)
    prompt = prompt if opened or not thinking else REASONER.text(question, reasoning=False)
    assert text.startswith(prompt)
    assert text.endswith(EOS)
    reply = parse(text[len(prompt) : -len(EOS)], reasoning=thinking, thinking=opened)
    assert reply.content == content
    assert reply.reasoning == (reasoning if thinking else "")
    assert [(call.name, json.loads(call.arguments)) for call in reply.calls] == calls
    assert all(call.complete for call in reply.calls)
