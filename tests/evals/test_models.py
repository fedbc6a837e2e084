"""Engine and server give the numbers that the model's own forward gives."""

import dataclasses
import json
import math

import httpx
import pytest
import torch

from dsv3.data.tokenizer import Tokenizer
from dsv3.evals.models import ApiModel, EngineModel, Failure, Sampling, windows
from dsv3.evals.tasks import Item
from dsv3.infer.engine import Engine
from tests.infer.letters import engine
from tests.model.tiny import TINY, random_model


def direct(model, ids, start):
    """Log-probability of ids[start:] by one whole forward, and whether each is the likeliest."""
    with torch.no_grad():
        logp = model(torch.tensor([ids]))[0].float().log_softmax(-1)
    rows = range(max(start, 1), len(ids))
    return sum(float(logp[i - 1, ids[i]]) for i in rows), all(int(logp[i - 1].argmax()) == ids[i] for i in rows)


def test_choices_have_the_log_probabilities_of_a_whole_forward():
    model = EngineModel(engine(), batch=2)
    items = [
        Item(id=str(i), prompt=f"Question {i}: pick.", kind="choose", choices=(" A", " B", " longer one"))
        for i in range(5)
    ]
    replies = {item.id: reply for item, reply in model.ask(items, Sampling())}
    assert set(replies) == {str(i) for i in range(5)}
    for item in items:
        for choice, scored in zip(item.choices, replies[item.id]):
            context = [0, *model.engine.tokenizer.encode(item.prompt)]
            ids = context + model.engine.tokenizer.encode(choice)
            value, greedy = direct(model.engine.model, ids, len(context))
            assert scored.logprob == pytest.approx(value, abs=1e-4)
            assert (scored.tokens, scored.greedy) == (len(choice), greedy)


def test_a_space_at_the_end_of_the_context_belongs_to_the_choice():
    model = EngineModel(engine())
    assert model.split("ab ", "c") == model.split("ab", " c")
    with pytest.raises(ValueError, match="nothing to score"):
        model.split("ab", "")


def test_rolling_scores_each_token_once_with_what_came_before():
    e = engine()
    text = "the quick brown fox jumps over the lazy dog, twice over"
    ids = e.tokenizer.encode(text)
    for limit in (16, 200):
        ((_, reply),) = EngineModel(e, max_length=limit).ask([Item(id="x", prompt=text, kind="roll")], Sampling())
        expected = sum(direct(e.model, a + b, len(a))[0] for a, b in windows(ids, [0], limit))
        assert sum(part.tokens for part in reply) == len(ids)
        assert sum(part.logprob for part in reply) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("start", [[0], []])
@pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 15, 16, 40])
def test_windows_cover_every_token_once(n, start):
    ids = list(range(100, 100 + n))
    made = windows(ids, start, 8)
    assert (
        [t for _, piece in made for t in piece] == ids if start else [t for _, piece in made for t in piece] == ids[1:]
    )
    assert all(len(a) + len(b) <= 8 for a, b in made)
    for context, piece in made:
        if context != start:
            assert context[-1] == piece[0] - 1
    with pytest.raises(ValueError, match="hold nothing"):
        windows(ids, start, 1)


def test_answers_are_the_engines_and_samples_are_many():
    e = engine()
    items = [Item(id=str(i), prompt=f"say {i}", max_tokens=9) for i in range(7)]
    model = EngineModel(e, batch=3)
    greedy = {item.id: reply for item, reply in model.ask(items, Sampling())}
    for item in items:
        assert greedy[item.id][0].text == next(e.generate([item.prompt], _params(9))).text
        assert greedy[item.id][0].tokens <= 9
    many = {item.id: reply for item, reply in model.ask(items, Sampling(samples=3, temperature=1.0))}
    assert all(len(reply) == 3 for reply in many.values())
    assert len({a.text for a in many["0"]}) > 1
    with pytest.raises(ValueError, match="samples=4 at temperature 0"):
        Sampling(samples=4)


def _params(n):
    from dsv3.infer.sampling import SamplingParams

    return SamplingParams(max_tokens=n)


def test_a_prompt_that_is_too_long_fails_alone():
    items = [Item(id="long", prompt="x" * 300), Item(id="short", prompt="x", max_tokens=1000)]
    replies = {item.id: reply for item, reply in EngineModel(engine()).ask(items, Sampling())}
    assert isinstance(replies["long"], Failure)
    assert "no room for an answer" in replies["long"].error
    assert replies["short"][0].tokens <= 254


def test_chat_items_are_rendered_by_the_one_renderer():
    tokenizer = Tokenizer.train(["user says hello and the assistant answers"] * 4, 320)
    model = random_model(dataclasses.replace(TINY, vocab_size=tokenizer.vocab_size, bos_token_id=0, eos_token_id=1))
    asked = EngineModel(Engine(model, tokenizer, cache_gb=0.01))
    ids = asked.prompt_ids(Item(id="x", prompt="hello", chat=True))
    assert ids == [tokenizer.bos_id, tokenizer.user_id, *tokenizer.encode("hello"), tokenizer.assistant_id]
    with pytest.raises(ValueError, match="role tokens"):
        EngineModel(engine()).prompt_ids(Item(id="x", prompt="hello", chat=True))


class Server:
    """An OpenAI-compatible server by hand: a character a token, log-probability -1 each, 'e' never the likeliest."""

    def __init__(self, faults=0, status=500):
        self.faults, self.status, self.bodies = faults, status, []

    def __call__(self, request):
        body = json.loads(request.content)
        self.bodies.append((request.url.path, body))
        if self.faults:
            self.faults -= 1
            return httpx.Response(self.status, text="not now")
        if body.get("echo"):
            text = body["prompt"] + "!"
            top = [None] + [{"?": -0.5} if c == "e" else {c: -1.0} for c in text[1:]]
            logprobs = {
                "text_offset": list(range(len(text))),
                "token_logprobs": [None] + [-1.0] * (len(text) - 1),
                "top_logprobs": top,
            }
            return httpx.Response(200, json={"choices": [{"text": text, "logprobs": logprobs}]})
        if "messages" in body:
            message = {"role": "assistant", "content": body["messages"][0]["content"].upper()}
            return httpx.Response(
                200,
                json={"choices": [{"message": message, "finish_reason": "stop"}], "usage": {"completion_tokens": 5}},
            )
        return httpx.Response(
            200, json={"choices": [{"text": f" {body['prompt']} {body['seed']}", "finish_reason": "length"}]}
        )


def api(server, **options):
    return ApiModel("http://server/v1/", "m", client=httpx.Client(transport=httpx.MockTransport(server)), **options)


def test_a_server_answers_and_scores():
    server = Server()
    items = [
        Item(id="g", prompt="hi", stop=("x",), max_tokens=7),
        Item(id="c", prompt="hi", chat=True),
        Item(id="m", prompt="ab", kind="choose", choices=(" c", " dee")),
        Item(id="r", prompt="one two three four five", kind="roll"),
    ]
    replies = {i.id: r for i, r in api(server, window=9).ask(items, Sampling(samples=2, temperature=0.5, seed=3))}
    assert [a.text for a in replies["g"]] == [" hi 3", " hi 4"]
    assert (replies["c"][0].text, replies["c"][0].tokens) == ("HI", 5)
    assert [(s.logprob, s.tokens, s.greedy) for s in replies["m"]] == [(-2, 2, True), (-4, 4, False)]
    assert len(replies["r"]) > 1
    assert (
        sum(s.tokens for s in replies["r"]) == len("one two three four five") - 1
    )  # before the first there is nothing
    sent = next(b for p, b in server.bodies if b.get("prompt") == "hi")
    assert (sent["stop"], sent["max_tokens"], sent["temperature"]) == (["x"], 7, 0.5)


def test_a_server_that_fails_is_asked_again_and_then_said(monkeypatch):
    monkeypatch.setattr("time.sleep", lambda s: None)
    item = Item(id="g", prompt="hi")
    for server, tries in ((Server(2, 503), 3), (Server(9, 429), 4), (Server(1, 400), 1)):
        ((_, reply),) = api(server).ask([item], Sampling())
        assert len(server.bodies) == tries
        if tries == 3:
            assert reply[0].text == " hi 0"
        else:
            assert "not now" in reply.error
    refuses = httpx.Client(
        transport=httpx.MockTransport(lambda r: httpx.Response(200, json={"choices": [{"text": "x"}]}))
    )
    model = ApiModel("http://server/v1", "m", client=refuses)
    ((_, reply),) = model.ask([dataclasses.replace(item, kind="choose", choices=(" a",))], Sampling())
    assert "cannot score" in reply.error
    assert math.isfinite(model.concurrency)


def test_answers_that_are_not_taken_hold_back_further_requests():
    server = Server()
    replies = api(server, concurrency=3).ask([Item(id=str(i), prompt="hi") for i in range(40)], Sampling())
    for _ in range(5):
        next(replies)
    assert len(server.bodies) <= 5 + 3
    replies.close()
    replies = api(server, concurrency=3).ask([Item(id=str(i), prompt="hi") for i in range(40)], Sampling())
    assert sorted(int(item.id) for item, _ in replies) == list(range(40))


@pytest.mark.parametrize("told", [{}, {"choices": []}, {"choices": [{"text": 5, "logprobs": {"tokens": []}}]}, []])
@pytest.mark.parametrize("kind", ["generate", "choose", "roll"])
def test_a_server_that_lies_costs_an_item_and_not_the_run(told, kind):
    lies = httpx.Client(transport=httpx.MockTransport(lambda r: httpx.Response(200, json=told)))
    item = Item(id="g", prompt="hi", kind=kind, choices=(" a",))
    ((_, reply),) = ApiModel("http://server/v1", "m", client=lies).ask([item], Sampling())
    assert isinstance(reply, Failure)
    assert "no completion" in reply.error or "cannot score" in reply.error


def test_our_own_server_gives_what_the_engine_gives():
    from tests.serve.small import running, small_app, small_engine

    items = [
        Item(id="g", prompt="once upon a time", max_tokens=8, stop=("zz",)),
        Item(id="c", prompt="hello", chat=True, max_tokens=8),
        Item(id="m", prompt="the quick", kind="choose", choices=(" brown fox", " user", " 你好")),
    ]
    here = {item.id: reply for item, reply in EngineModel(small_engine()[0]).ask(items, Sampling())}
    with running(small_app()) as url:
        there = {item.id: reply for item, reply in ApiModel(f"{url}/v1", "tiny").ask(items, Sampling())}
    assert [a.text for k in "gc" for a in there[k]] == [a.text for k in "gc" for a in here[k]]
    assert [s.logprob for s in there["m"]] == pytest.approx([s.logprob for s in here["m"]], abs=1e-4)
    assert [(s.tokens, s.greedy) for s in there["m"]] == [(s.tokens, s.greedy) for s in here["m"]]
