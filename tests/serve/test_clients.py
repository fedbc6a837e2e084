"""Clients that were written for DeepSeek's and OpenAI's servers, unmodified, against ours."""

import asyncio
import json

import openai
import pytest
from pydantic import BaseModel, Field

from tests.serve.small import small_tokenizer

HELLO = [{"role": "user", "content": "hello"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a place.",
        "parameters": {
            "type": "object",
            "properties": {"place": {"type": "string", "enum": ["Paris", "Rome"]}, "days": {"type": "integer", "maximum": 9}},
            "required": ["place", "days"],
            "additionalProperties": False,
        },
    },
}  # fmt: skip
CLOCK = {"type": "function", "function": {"name": "clock", "description": "The time."}}


@pytest.fixture(scope="module", params=["", "/v1", "/beta"])
def client(url, request):
    return openai.OpenAI(base_url=url + request.param, api_key="unused", max_retries=0)


# -- openai ------------------------------------------------------------------------------------------------------------


def test_openai_chat(client):
    answer = client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=6, seed=3, n=2, logprobs=True, top_logprobs=2, user="me",
        metadata={"a": "b"}, store=False, parallel_tool_calls=True, logit_bias={"7": 3},
    )  # fmt: skip
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.system_fingerprint.startswith("fp_")
    usage = answer.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_cache_hit_tokens + usage.prompt_cache_miss_tokens == usage.prompt_tokens
    assert usage.prompt_tokens_details.cached_tokens == usage.prompt_cache_hit_tokens
    assert usage.completion_tokens_details.reasoning_tokens == 0
    tokens = [token for choice in answer.choices for token in choice.logprobs.content]
    assert len(tokens) == usage.completion_tokens
    for token in tokens:
        assert bytes(token.bytes).decode("utf-8", "replace") == token.token
        assert token.logprob <= 0
        assert len(token.top_logprobs) == 2


def test_openai_stream_is_the_answer_in_pieces(client):
    asked = dict(model="tiny", messages=HELLO, max_tokens=12, seed=5, temperature=1.3)
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[0].choices[0].delta.content == ""
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    assert text == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({(chunk.id, chunk.created) for chunk in chunks}) == 1


def test_without_include_usage_the_last_chunk_has_it_as_deepseek_documents(client):
    chunks = list(client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=3, stream=True, n=2))
    assert chunks[-1].usage.completion_tokens > 0
    assert chunks[-1].choices[0].finish_reason
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_openai_async(url):
    async def ask() -> list:
        client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="unused")
        asked = [
            client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=5, seed=i, stream=i % 2 == 1)
            for i in range(8)
        ]
        answers = await asyncio.gather(*asked)
        return [[c async for c in a][-1].choices[0] if i % 2 else a.choices[0] for i, a in enumerate(answers)]

    assert all(choice.finish_reason in ("stop", "length") for choice in asyncio.run(ask()))


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
@pytest.mark.parametrize("stream", [False, True])
def test_openai_forced_tool_calls(client, choice, stream):
    asked = dict(
        model="tiny", messages=HELLO, tools=[WEATHER, CLOCK], tool_choice=choice, max_tokens=400, seed=2,
        parallel_tool_calls=False, temperature=0.7,
    )  # fmt: skip
    if stream:
        with client.chat.completions.stream(**asked) as events:
            answer = events.get_final_completion()
    else:
        answer = client.chat.completions.create(**asked)
    assert answer.choices[0].finish_reason == "tool_calls"
    [call] = answer.choices[0].message.tool_calls
    assert call.id.startswith("call_")
    arguments = json.loads(call.function.arguments)
    if choice != "required" or call.function.name == "get_weather":
        assert call.function.name == "get_weather"
        assert arguments["place"] in ("Paris", "Rome")
        assert isinstance(arguments["days"], int)
    else:
        assert arguments == {}


def test_openai_tool_deltas_have_integer_indices_and_join_to_the_whole(client):
    asked = dict(model="tiny", messages=HELLO, tools=[WEATHER], tool_choice="required", max_tokens=700, seed=4)
    whole = client.chat.completions.create(**asked)
    calls: dict[int, list[str]] = {}
    for chunk in client.chat.completions.create(**asked, stream=True):
        for delta in chunk.choices[0].delta.tool_calls or []:
            assert type(delta.index) is int
            if delta.id:
                assert delta.function.name
                assert delta.index not in calls
                calls[delta.index] = []
            calls[delta.index].append(delta.function.arguments)
    assert ["".join(parts) for parts in calls.values()] == [
        call.function.arguments for call in whole.choices[0].message.tool_calls
    ]


def test_openai_tool_round_trip(client):
    answer = client.chat.completions.create(
        model="tiny", messages=HELLO, tools=[WEATHER], tool_choice="required", max_tokens=400, parallel_tool_calls=False
    )
    message = answer.choices[0].message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "sunny"}
    answer = client.chat.completions.create(
        model="tiny", messages=[*HELLO, message.model_dump(exclude_none=True), result], tools=[WEATHER], max_tokens=4
    )
    assert answer.choices[0].finish_reason in ("stop", "length", "tool_calls")


class Reply(BaseModel):
    colour: str = Field(max_length=5)
    count: int = Field(ge=0, le=99)


def test_openai_structured_output(client):
    answer = client.chat.completions.parse(model="tiny", messages=HELLO, response_format=Reply, max_tokens=300, seed=1)
    assert isinstance(answer.choices[0].message.parsed, Reply)


@pytest.mark.parametrize("temperature", [0, 1])
def test_json_mode_is_never_empty(client, temperature):
    for seed in range(4):
        answer = client.chat.completions.create(
            model="tiny", messages=HELLO, response_format={"type": "json_object"}, max_tokens=100, seed=seed,
            temperature=temperature,
        )  # fmt: skip
        choice = answer.choices[0]
        assert choice.message.content
        if choice.finish_reason == "stop":
            assert isinstance(json.loads(choice.message.content), dict)


def test_regex_and_grammar_are_extensions_of_response_format(client):
    asked = dict(model="tiny", messages=HELLO, max_tokens=50)
    forms = [{"type": "regex", "regex": "(yes|no)!"}, {"type": "grammar", "grammar": 'start: ("yes" | "no") "!"'}]
    for form in forms:
        answer = client.chat.completions.create(**asked, extra_body={"response_format": form})
        assert answer.choices[0].message.content in ("yes!", "no!")


def test_openai_completions_fill_in_the_middle_and_chat_prefix(client):
    text = client.completions.create(
        model="tiny", prompt="def f(", suffix="return x", max_tokens=6, echo=True, temperature=0
    )
    assert text.choices[0].text.startswith("def f(")
    lines = list(client.completions.create(model="tiny", prompt=["a", "b"], max_tokens=3, stream=True, n=2, seed=1))
    assert {line.choices[0].index for line in lines} == {0, 1, 2, 3}
    prefixed = [*HELLO, {"role": "assistant", "content": "```python\n"}]
    dialects = [
        dict(messages=[*HELLO, {**prefixed[1], "prefix": True}]),
        dict(messages=prefixed),
        dict(messages=prefixed, extra_body={"continue_final_message": True, "add_generation_prompt": False}),
    ]
    said = [
        client.chat.completions.create(model="tiny", max_tokens=8, temperature=0, stop=["```"], **d) for d in dialects
    ]
    assert len({answer.choices[0].message.content for answer in said}) == 1
    plain = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=8, temperature=0)
    assert said[0].usage.prompt_tokens > plain.usage.prompt_tokens


def test_openai_errors_and_models(client):
    with pytest.raises(openai.NotFoundError, match="Model Not Exist"):
        client.chat.completions.create(model="nobody", messages=HELLO)
    with pytest.raises(openai.BadRequestError, match="temperature") as refused:
        client.chat.completions.create(model="tiny", messages=HELLO, temperature=5)
    assert refused.value.param == "temperature"
    assert refused.value.request_id.startswith("req_")
    with pytest.raises(openai.UnprocessableEntityError):
        client.chat.completions.create(model="tiny", messages=[])
    assert "tiny" in [model.id for model in client.models.list()]
    assert client.models.retrieve("deepseek-chat").id == "deepseek-chat"


def test_the_same_prompt_again_is_read_from_the_cache(client):
    asked = dict(model="tiny", messages=[{"role": "user", "content": f"{client.base_url} hello " * 40}], max_tokens=2)
    first, second = (client.chat.completions.create(**asked) for _ in range(2))
    assert second.usage.prompt_cache_hit_tokens >= 64
    assert second.usage.prompt_cache_hit_tokens % 64 == 0
    assert first.usage.prompt_tokens == second.usage.prompt_tokens


# -- LangChain ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def deepseek(url):
    from langchain_deepseek import ChatDeepSeek

    return ChatDeepSeek(
        model="tiny", base_url=f"{url}/v1", api_key="unused", max_tokens=400, temperature=0.8, seed=3, max_retries=0
    )


def test_langchain_invokes_and_streams(deepseek):
    said = deepseek.invoke("hello")
    assert said.usage_metadata["total_tokens"] == said.response_metadata["token_usage"]["total_tokens"]
    total = None
    for chunk in deepseek.stream("hello"):
        total = chunk if total is None else total + chunk
    assert total.content == said.content
    assert total.usage_metadata["output_tokens"] == said.usage_metadata["output_tokens"]


def test_langchain_tools(deepseek):
    tool = {"name": "get_weather", "description": "Weather.", "parameters": WEATHER["function"]["parameters"]}
    bound = deepseek.bind_tools([tool], tool_choice="get_weather", parallel_tool_calls=False)
    said = bound.invoke("hello")
    assert said.tool_calls[0]["name"] == "get_weather"
    total = None
    for chunk in bound.stream("hello"):
        total = chunk if total is None else total + chunk
    assert [(c["name"], c["args"]) for c in total.tool_calls] == [(c["name"], c["args"]) for c in said.tool_calls]


@pytest.mark.parametrize("method", ["function_calling", "json_schema"])
def test_langchain_structured_output(deepseek, method):
    assert isinstance(deepseek.with_structured_output(Reply, method=method).invoke("hello"), Reply)


# -- lm-eval -----------------------------------------------------------------------------------------------------------


def _instances(kind, arguments):
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=pair, idx=i) for i, pair in enumerate(arguments)]


@pytest.fixture(scope="module")
def harness(url):
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    return LocalCompletionsAPI(
        base_url=f"{url}/v1/completions", model="tiny", batch_size=3, max_retries=1, max_length=1024, max_gen_toks=8
    )


def test_lm_eval_finds_the_remote_tokenizer(harness):
    assert harness.tokenizer_backend == "remote"
    assert harness.tokenizer.eos_token_id == small_tokenizer().eos_id
    assert harness.tok_encode("hello world") == small_tokenizer().encode("hello world")


def test_lm_eval_loglikelihood_is_the_models(harness, app):
    import torch

    pairs = [("hello world", " the quick"), ("once upon", " a time"), ("a", " b"), ("hello", "<｜end▁of▁sentence｜>")]
    told = harness.loglikelihood(_instances("loglikelihood", pairs))
    model, tokenizer = app.state.service.engine.model, small_tokenizer()
    for (context, continuation), (logprob, greedy) in zip(pairs, told):
        before, ids = tokenizer.encode(context, special=True), tokenizer.encode(context + continuation, special=True)
        with torch.no_grad():
            logits = model(torch.tensor([ids]))[0, :, : tokenizer.vocab_size].log_softmax(-1)
        places = range(len(before) - 1, len(ids) - 1)
        expected = sum(float(logits[at, ids[at + 1]]) for at in places)
        assert logprob == pytest.approx(expected, abs=1e-3)
        assert greedy == all(int(logits[at].argmax()) == ids[at + 1] for at in places)


def test_lm_eval_loglikelihood_of_texts_has_bos_before_them_and_not_in_the_echo(url, app):
    import torch
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    texts = LocalCompletionsAPI(
        base_url=f"{url}/v1/completions", model="tiny", tokenized_requests=False, max_retries=1, max_length=1024
    )
    [(logprob, _)] = texts.loglikelihood(_instances("loglikelihood", [("hello world", " the quick")]))
    model, tokenizer = app.state.service.engine.model, small_tokenizer()
    before, ids = tokenizer.encode("hello world"), [tokenizer.bos_id, *tokenizer.encode("hello world the quick")]
    with torch.no_grad():
        logits = model(torch.tensor([ids]))[0, :, : tokenizer.vocab_size].log_softmax(-1)
    expected = sum(float(logits[at, ids[at + 1]]) for at in range(len(before), len(ids) - 1))
    assert logprob == pytest.approx(expected, abs=1e-3)


def test_lm_eval_generates(harness, url):
    from lm_eval.models.api_models import JsonChatStr
    from lm_eval.models.openai_completions import LocalChatCompletion

    options = {"until": ["\n\n"], "max_gen_toks": 8, "temperature": 0.0, "do_sample": False}
    texts = harness.generate_until(_instances("generate_until", [("hello world", options), ("once", dict(options))]))
    assert [type(text) for text in texts] == [str, str]
    chat = LocalChatCompletion(base_url=f"{url}/v1/chat/completions", model="tiny", max_retries=1)
    message = JsonChatStr(json.dumps([{"role": "user", "content": "hello", "type": "text"}]))
    [text] = chat.generate_until(_instances("generate_until", [(message, dict(options))]))
    assert isinstance(text, str)
