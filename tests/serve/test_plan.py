"""From requests to prompts and parameters; whole requests with reasoning, whose grammars let the model think first."""

import dataclasses
import json

import pytest

from dsv3.data.tokenizer import THINK_BEGIN
from dsv3.serve.errors import ApiError
from dsv3.serve.plan import Planner
from dsv3.serve.protocol import ChatRequest, CompletionRequest
from dsv3.serve.settings import ServeSettings
from tests.serve.small import post, running, small_app, small_engine, small_tokenizer

ENGINE, TOKENIZER = small_engine()
HELLO = [{"role": "user", "content": "hello"}]
TOOL = {
    "type": "function",
    "function": {"name": "f", "parameters": {"type": "object", "properties": {}}, "strict": True},
}


def planner(**settings) -> Planner:
    return Planner(ENGINE, TOKENIZER, ServeSettings(model="tiny", **settings))


def chat(planner_=None, messages=HELLO, **fields):
    return (planner_ or planner()).chat(ChatRequest.model_validate({"model": "tiny", "messages": messages, **fields}))


def text(planner_=None, **fields):
    return (planner_ or planner()).completion(CompletionRequest.model_validate({"model": "tiny", **fields}))


def test_defaults_are_deepseeks():
    params = chat().params
    assert params.temperature == 1.0
    assert params.top_p == 1.0
    assert params.max_tokens == 2048 - len(chat().prompts[0])  # 4,096, capped by the context
    assert chat(planner(default_max_tokens=7)).params.max_tokens == 7
    assert text().prompts == [[TOKENIZER.bos_id, *TOKENIZER.encode("Once upon a time, ")]]
    assert chat().params.seed != chat().params.seed


@pytest.mark.parametrize(("asked", "used"), [(0, 0), (0.5, 0.15), (1, 0.3), (None, 0.3), (1.5, 0.8), (2, 1.3)])
def test_deepseeks_temperature_map(asked, used):
    assert chat(planner(temperature_map=True), temperature=asked).params.temperature == pytest.approx(used)
    if asked is not None:
        assert chat(temperature=asked).params.temperature == asked


def test_the_cache_bounds_answers_like_the_context():
    engine, tokenizer = small_engine(cache_gb=0.0001)
    limit = Planner(engine, tokenizer, ServeSettings(model="tiny")).limit
    assert limit == engine.scheduler.book.total * 64 - 2 * engine.drafts < 2048
    engine.add([5] * (limit - 3), dataclasses.replace(text(prompt=[5]).params, max_tokens=3))


def test_fields_reach_the_engine():
    params = chat(
        top_p=0.5, top_k=3, min_p=0.1, frequency_penalty=1, presence_penalty=-1, repetition_penalty=1.5, seed=9, n=2,
        stop=["a", None, "b"], logit_bias={"7": -100}, min_tokens=2, max_completion_tokens=5, ignore_eos=True,
    ).params  # fmt: skip
    assert (params.top_p, params.top_k, params.min_p, params.seed, params.n) == (0.5, 3, 0.1, 9, 2)
    assert (params.frequency_penalty, params.presence_penalty, params.repetition_penalty) == (1, -1, 1.5)
    assert (params.stop, params.logit_bias, params.min_tokens, params.max_tokens) == (("a", "b"), {7: -100}, 2, 5)
    assert params.ignore_eos


def test_text_in_a_prompt_never_becomes_a_control_token():
    assert TOKENIZER.eos_id not in text(prompt=TOKENIZER.decode([TOKENIZER.eos_id])).prompts[0]
    said = chat(messages=[{"role": "user", "content": "<｜Assistant｜>"}]).prompts[0]
    assert said.count(TOKENIZER.assistant_id) == 1


def test_scoring_always_tells_the_token_it_drew():
    plan = text(prompt=[5, 6], echo=True, logprobs=1, max_tokens=1)
    assert plan.scoring
    assert plan.params.ignore_eos
    assert plan.params.prompt_logprobs == 1
    assert not text(prompt=[5, 6], echo=True, logprobs=1, max_tokens=2).scoring


def test_log_probabilities_of_a_request_are_bounded():
    small = planner(max_scores=1000)
    assert text(small, prompt=[5] * 400, echo=True, logprobs=1, max_tokens=0).params.prompt_logprobs == 1
    for fields in (
        dict(prompt=[5] * 501, echo=True, logprobs=1, max_tokens=0),
        dict(prompt=[5], logprobs=1, max_tokens=501),
    ):
        with pytest.raises(ApiError, match="1,000 may be told"):
            text(small, **fields)
    with pytest.raises(ApiError, match="fewer"):
        chat(small, logprobs=True, top_logprobs=20, n=2, max_tokens=100)


def test_fill_in_the_middle_is_rendered_with_its_tokens():
    [ids] = text(prompt="a", suffix="b").prompts
    marks = [TOKENIZER.fim_begin_id, TOKENIZER.fim_hole_id, TOKENIZER.fim_end_id]
    assert ids == [0, marks[0], *TOKENIZER.encode("a"), marks[1], *TOKENIZER.encode("b"), marks[2]]
    with pytest.raises(ApiError, match="one prompt of text"):
        text(prompt=["a"], suffix="b")


def test_tools_are_told_unless_the_choice_is_none():
    plain, told = len(chat().prompts[0]), len(chat(tools=[TOOL]).prompts[0])
    assert told > plain
    assert len(chat(tools=[TOOL], tool_choice="none").prompts[0]) == plain
    assert chat(tools=[TOOL]).params.grammar is not None  # strict
    loose = {"type": "function", "function": {**TOOL["function"], "strict": False}}
    assert chat(tools=[loose]).params.grammar is None
    assert chat(tools=[loose], tool_choice="required").params.grammar is not None


def test_reasoning_is_switched_by_thinking_by_effort_and_by_settings():
    def opens(plan):
        return TOKENIZER.token_id(THINK_BEGIN) in plan.prompts[0]

    assert not opens(chat())
    assert opens(chat(thinking={"type": "enabled"}))
    assert chat(thinking={"type": "enabled"}).thinking
    assert opens(chat(planner(reasoning=True)))
    assert not opens(chat(planner(reasoning=True), reasoning_effort="none"))
    assert not opens(chat(planner(reasoning=True), thinking={"type": "disabled"}))


@pytest.fixture(scope="module")
def thinker():
    with running(small_app(ServeSettings(model="tiny", reasoning=True))) as url:
        yield url


def ask(url, **fields):
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 1500, "logit_bias": {str(end): 6}, **fields}
    return post(url, "/v1/chat/completions", body).json()


end = small_tokenizer().token_id("</think>")  # the random model needs a nudge to stop thinking


def test_json_comes_after_the_reasoning(thinker):
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    answer = ask(thinker, response_format=form, seed=1)
    message, usage = answer["choices"][0]["message"], answer["usage"]
    assert json.loads(message["content"])["a"] in (1, 2)
    assert usage["completion_tokens_details"]["reasoning_tokens"] > 0
    assert isinstance(message["reasoning_content"], str)


def test_a_forced_call_comes_after_the_reasoning(thinker):
    answer = ask(thinker, tools=[TOOL], tool_choice="required", parallel_tool_calls=False, seed=2)
    assert answer["choices"][0]["finish_reason"] == "tool_calls"
    assert answer["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "f"
    refused = ask(thinker, response_format={"type": "regex", "regex": "a"})
    assert "cannot stand after reasoning" in refused["error"]["message"]


def test_strict_tools_beside_a_schema_give_one_or_the_other(url):
    form = {"type": "json_object"}
    for seed in range(6):
        body = {"model": "tiny", "messages": HELLO, "tools": [TOOL], "response_format": form, "seed": seed}
        choice = post(url, "/v1/chat/completions", {**body, "max_tokens": 200}).json()["choices"][0]
        if choice["finish_reason"] == "stop":
            assert isinstance(json.loads(choice["message"]["content"]), dict)
        elif choice["finish_reason"] == "tool_calls":
            assert json.loads(choice["message"]["tool_calls"][0]["function"]["arguments"]) == {}
