"""`dsv3 chat`: what is typed is asked with all that was said before, and commands do what /help says."""

import dataclasses
import json

import pytest

from dsv3.data.chat import ChatFormat
from dsv3.data.reply import Content
from dsv3.data.tokenizer import Tokenizer
from dsv3.infer.engine import Engine
from dsv3.infer.sampling import SamplingParams
from dsv3.serve.terminal import Conversation, talk
from tests.model.tiny import TINY, random_model


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["hello world, how are you today? " * 3], 320)


@pytest.fixture
def conversation(tokenizer):
    config = dataclasses.replace(TINY, vocab_size=tokenizer.vocab_size, eos_token_id=1)
    engine = Engine(random_model(config), tokenizer, cache_gb=0.01)
    return Conversation(
        engine, ChatFormat.of(tokenizer), SamplingParams(max_tokens=8, temperature=1.0), system="be brief"
    )


def type_in(conversation, *lines):
    """What each kind of output was."""
    left, out = list(lines), {"content": "", "reasoning": "", "note": "", "error": ""}

    def read(prompt):
        if not left:
            raise EOFError
        return left.pop(0)

    def write(text, kind):
        out[kind] += text

    talk(conversation, read, write)
    return out


def test_an_answer_is_shown_and_remembered(conversation):
    out = type_in(conversation, "hello", "and \\", "you?")
    roles = [m["role"] for m in conversation.messages]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    assert conversation.messages[3]["content"] == "and \nyou?"
    assert out["content"] == conversation.messages[2]["content"] + conversation.messages[4]["content"]
    assert "tokens" in out["note"]
    assert not conversation.engine.busy


def test_the_same_seed_says_the_same_and_a_retry_something_else(conversation, tokenizer):
    first = type_in(conversation, "hello")["content"]
    assert type_in(conversation, "/retry")["content"] != first
    assert len(conversation.messages) == 3
    conversation._turns = 0
    assert type_in(conversation, "/reset", "hello")["content"] == first


def test_commands(conversation, tmp_path):
    path = tmp_path / "talk.jsonl"
    out = type_in(
        conversation, "/undo", "hello", f"/save {path}", "/undo", "/set temperature 0", "/system be kind", "/help"
    )
    assert json.loads(path.read_text())["messages"][1] == {"role": "user", "content": "hello"}
    assert conversation.messages == [{"role": "system", "content": "be kind"}]
    assert conversation.params.temperature == 0
    assert "nothing to forget" in out["note"]
    assert "/retry" in out["note"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/nope", "/nope is no command"),
        ("/set colour 1", "'colour'"),
        ("/set seed x", "'x'"),
        ("/set top_p 7", "top_p is 7"),
        ("/save", "name of a file"),
        ("/retry", "nothing was asked"),
        ("word " * 400, "there is room for 256"),
        ("half a character \ud800", "surrogate"),
    ],
)
def test_a_mistake_is_told_and_the_conversation_goes_on(conversation, line, said):
    before = list(conversation.messages)
    out = type_in(conversation, line, "hello")
    assert said in out["error"]
    assert len(conversation.messages) == len(before) + 2


def test_a_small_cache_bounds_answers_as_the_context_does(tokenizer):
    config = dataclasses.replace(TINY, vocab_size=tokenizer.vocab_size, eos_token_id=1)
    engine = Engine(random_model(config), tokenizer, cache_gb=0.0001)
    room = engine.scheduler.book.total * 64 - 2 * engine.drafts
    assert room < 200
    chat = Conversation(engine, ChatFormat.of(tokenizer), SamplingParams(max_tokens=200, ignore_eos=True))
    out = type_in(chat, "hello", "word " * 200)
    assert chat.told[0] > 100
    assert f"there is room for {room}" in out["error"]
    assert len(chat.messages) == 2


def test_an_interrupted_answer_stays_as_far_as_it_came(conversation):
    answer = conversation.ask("hello")
    events = [next(answer)]
    answer.close()
    assert all(isinstance(event, Content) for event in events)
    assert conversation.messages[-1]["content"] == events[0].text
    assert conversation.engine.scheduler.book.held == 0
