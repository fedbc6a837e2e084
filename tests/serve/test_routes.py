"""The routes: every base path, every error's shape, every field honoured or refused by name."""

import json

import httpx
import pytest

from dsv3.data.chat import CHAT_TEMPLATE
from tests.serve.small import post, small_tokenizer

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4, "seed": 1}
TEXT = {"model": "tiny", "prompt": "hello", "max_tokens": 4, "seed": 1}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}


@pytest.mark.parametrize("base", ["", "/v1", "/beta"])
def test_every_base_path_answers_alike(url, base):
    chat, text = post(url, f"{base}/chat/completions", CHAT).json(), post(url, f"{base}/completions", TEXT).json()
    assert chat["object"] == "chat.completion"
    assert text["object"] == "text_completion"
    assert chat["choices"][0]["message"] == post(url, "/v1/chat/completions", CHAT).json()["choices"][0]["message"]
    assert text["choices"] == post(url, "/v1/completions", TEXT).json()["choices"]
    assert [m["id"] for m in httpx.get(f"{url}{base}/models").json()["data"]] == [
        "tiny", "deepseek-chat", "deepseek-reasoner",
    ]  # fmt: skip
    assert httpx.get(f"{url}{base}/models/tiny").json()["object"] == "model"
    assert httpx.get(f"{url}{base}/models/nobody").status_code == 404
    assert httpx.get(f"{url}{base}/user/balance").json()["is_available"] is True
    prefix = {**CHAT, "messages": [*CHAT["messages"], {"role": "assistant", "content": "x", "prefix": True}]}
    assert post(url, f"{base}/chat/completions", prefix).status_code == 200
    assert post(url, f"{base}/completions", {**TEXT, "suffix": "world"}).status_code == 200


REFUSED = {
    "temperature": [2.1, -0.1],
    "top_p": [0, 1.5],
    "frequency_penalty": [3],
    "presence_penalty": [-3],
    "max_tokens": [0, -1],
    "stop": [["x"] * 17, ""],
    "n": [0, 1000],
    "logit_bias": [{"no": 1}, {"1": 101}, {"99999": 1}],
    "response_format": [
        {"type": "json_schema"},
        {"type": "json_schema", "json_schema": {"name": "x"}},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "none such"}}},
        {"type": "regex"},
        {"type": "regex", "regex": "("},
        {"type": "grammar", "grammar": "no grammar"},
    ],
    "top_k": [-2],
    "min_p": [2],
    "repetition_penalty": [0],
    "min_tokens": [5],
    "stream_options": [{"include_usage": True}],
    "functions": [[{"name": "f"}]],
    "function_call": [{"name": "f"}],
    "audio": [{"voice": "x"}],
    "modalities": [["text", "audio"]],
    "web_search_options": [{"x": 1}],
    "chat_template": ["{{ x }}"],
    "guided_json": [{}, {"type": "object"}],
    "best_of": [3],
}
CHAT_REFUSED = {
    "top_logprobs": [3],
    "logprobs": [],
    "tool_choice": ["required", {"type": "function", "function": {"name": "f"}}],
    "max_completion_tokens": [5],
    "continue_final_message": [True],
    "add_generation_prompt": [False],
    "thinking": [],
}


@pytest.mark.parametrize(
    ("path", "body", "field", "value"),
    [
        *(("/chat/completions", CHAT, f, v) for f, values in {**REFUSED, **CHAT_REFUSED}.items() for v in values if v != {}),
        *(("/completions", TEXT, f, v) for f, values in REFUSED.items() for v in values if v != {}),
        ("/completions", TEXT, "logprobs", 21),
        ("/completions", TEXT, "prompt", [[]]),
        ("/completions", TEXT, "prompt", [[1, 99999]]),
        ("/chat/completions", {**CHAT, "logprobs": True}, "top_logprobs", 21),
    ],
)  # fmt: skip
def test_a_value_that_is_not_honoured_is_refused_by_name_with_a_cure(url, path, body, field, value):
    answer = post(url, path, {**body, field: value})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"].replace("[", ".").split(".")[0] in (field, "messages", "max_tokens"), error
    assert ":" in error["message"]  # what is wrong: how to cure it


HARMLESS = {
    "user": "me",
    "user_id": "me",
    "metadata": {"a": "b"},
    "store": True,
    "service_tier": "auto",
    "prompt_cache_key": "k",
    "safety_identifier": "s",
    "stop": None,
    "functions": None,
    "function_call": "none",
    "best_of": 1,
    "stream_options": None,
    "response_format": {"type": "text"},
    "logit_bias": {},
    "seed": -5,
    "top_k": -1,
    "ignore_eos": True,
    "modalities": ["text"],
}
CHAT_HARMLESS = {
    "parallel_tool_calls": True,
    "tools": None,
    "tool_choice": "none",
    "reasoning_effort": "none",
    "prediction": {"type": "content", "content": "x"},
    "max_completion_tokens": 4,
    "thinking": {"type": "disabled"},
    "logprobs": False,
    "top_logprobs": None,
}


@pytest.mark.parametrize(
    ("path", "body", "field", "value"),
    [
        *(("/chat/completions", CHAT, field, value) for field, value in {**HARMLESS, **CHAT_HARMLESS}.items()),
        *(("/completions", TEXT, field, value) for field, value in HARMLESS.items()),
    ],
)
def test_what_clients_send_along_is_never_refused(url, path, body, field, value):
    assert post(url, path, {**body, field: value}).status_code == 200


def test_the_examples_of_deepseeks_documentation_are_accepted_with_all_their_nulls(url):
    messages = [
        {"content": "You are a helpful assistant", "role": "system"},
        {"content": "Hi", "role": "user", "name": "me"},
    ]
    nulls = {
        "stop": None,
        "stream_options": None,
        "top_p": 1,
        "temperature": 1,
        "frequency_penalty": 0,
        "presence_penalty": 0,
    }
    chat = {
        **nulls, "messages": messages, "model": "deepseek-chat", "max_tokens": 8, "response_format": {"type": "text"},
        "stream": False, "tools": None, "tool_choice": "none", "logprobs": False, "top_logprobs": None,
    }  # fmt: skip
    answer = post(url, "/chat/completions", chat).json()
    assert answer["model"] == "deepseek-chat"
    assert answer["choices"][0]["logprobs"] is None
    fim = {
        **nulls,
        "model": "deepseek-chat",
        "prompt": "Once upon a time,",
        "echo": False,
        "logprobs": 0,
        "max_tokens": 8,
    }
    answer = post(url, "/beta/completions", {**fim, "suffix": None, "stream": False}).json()
    assert set(answer["choices"][0]["logprobs"]) == {"text_offset", "token_logprobs", "tokens", "top_logprobs"}


@pytest.mark.parametrize(
    ("message", "status"),
    [
        ({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, 200),
        ({"role": "user", "content": "a", "type": "text", "more": 1}, 200),
        ({"role": "developer", "content": "a"}, 200),
        ({"role": "assistant", "content": "a"}, 200),
        ({"role": "assistant", "content": "a", "prefix": False}, 200),
        ({"role": "assistant", "content": None, "reasoning_content": "r"}, 200),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, 400),
        ({"role": "user", "content": None}, 400),
        ({"role": "user", "content": "a", "prefix": True}, 400),
        ({"role": "tool", "content": "a", "tool_call_id": "1"}, 400),
        ({"role": "nobody", "content": "a"}, 422),
        ({"role": "user", "content": 5}, 422),
        ({"content": "a"}, 422),
    ],
)
def test_messages(url, message, status):
    answer = post(url, "/chat/completions", {**CHAT, "messages": [{"role": "user", "content": "hi"}, message]})
    assert answer.status_code == status, answer.text
    if status != 200:
        assert answer.json()["error"]["param"].startswith("messages")


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b"{", "application/json", 400),
        (b'{"model": NaN}', "application/json", 400),
        (b"\xff\xfe", "application/json", 400),
        (b'{"model": "tiny", "prompt": "\\ud800"}', "application/json", 400),
        (b"[" * 10000, "application/json", 400),
        (b'{"model": "tiny", "seed": ' + b"9" * 5000 + b"}", "application/json", 400),
        (b"", "application/json", 400),
        (b"[]", "application/json", 422),
        (b"5", "application/json", 422),
        (b"{}", "application/json", 422),
        (b'{"model": "tiny", "prompt": {"a": 1}}', "application/json", 422),
        (b'{"model": "tiny", "prompt": [1, "a"]}', "application/json", 422),
        (b'{"model": "tiny", "prompt": [true]}', "application/json", 422),
        (b'{"model": "tiny", "temperature": "1"}', "application/json", 422),
        (b'{"model": "tiny", "n": 1.5}', "application/json", 422),
        (b'{"model": "tiny", "nonsense": 1}', "application/json", 400),
        (b'{"model": "nobody"}', "application/json", 404),
        (b"model=tiny", "application/x-www-form-urlencoded", 422),
    ],
)
def test_bodies_that_are_none(url, content, kind, status):
    answer = httpx.post(f"{url}/v1/completions", content=content, headers={"content-type": kind})
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["message"]


def test_paths_and_methods_that_do_not_exist(url):
    assert httpx.get(f"{url}/v1/nothing").json()["error"]["type"] == "not_found_error"
    assert httpx.post(f"{url}/v1/nothing", json={}).status_code == 404
    answer = httpx.get(f"{url}/v1/chat/completions")
    assert answer.status_code == 405
    assert answer.json()["error"]["message"]


def test_the_context_bounds_prompts_and_answers(url):
    long = post(url, "/v1/completions", {**TEXT, "prompt": [5] * 2048})
    assert long.status_code == 400
    assert long.json()["error"]["code"] == "context_length_exceeded"
    huge = post(url, "/v1/completions", {**TEXT, "prompt": "a" * 300_000})
    assert huge.json()["error"]["code"] == "context_length_exceeded"
    capped = post(url, "/v1/completions", {**TEXT, "prompt": [5] * 2040, "max_tokens": 100, "ignore_eos": True}).json()
    assert capped["choices"][0]["finish_reason"] == "length"
    assert capped["usage"]["total_tokens"] == 2048


def test_tokenize_and_detokenize_are_vllms(url):
    tokenizer = small_tokenizer()
    info = httpx.get(f"{url}/tokenizer_info").json()
    assert (info["bos_token"], info["eos_token"]) == (tokenizer.decode([0]), tokenizer.decode([1]))
    assert info["chat_template"] == CHAT_TEMPLATE
    for text in ("hello 你好", info["eos_token"]):
        answer = post(url, "/tokenize", {"prompt": text, "add_special_tokens": False}).json()
        assert answer["tokens"] == tokenizer.encode(text, special=True)
        assert answer["count"] == len(answer["tokens"])
        assert post(url, "/detokenize", {"tokens": answer["tokens"]}).json() == {"prompt": text}
    assert post(url, "/tokenize", {"prompt": info["eos_token"], "add_special_tokens": False}).json()["tokens"] == [1]
    chat = post(url, "/tokenize", {"messages": CHAT["messages"]}).json()["tokens"]
    assert chat[0] == tokenizer.bos_id
    assert chat[-1] == tokenizer.assistant_id
    assert post(url, "/tokenize", {}).status_code == 400
    assert post(url, "/detokenize", {"tokens": [-1]}).status_code == 422
    assert post(url, "/detokenize", {"tokens": [10**9]}).json() == {"prompt": ""}


def test_health_ready_and_metrics(url):
    post(url, "/v1/chat/completions", CHAT)
    assert httpx.get(f"{url}/health").json() == {"status": "ok"}
    assert httpx.get(f"{url}/ready").json()["model"] == "tiny"
    text = httpx.get(f"{url}/metrics").text
    for name in (
        "waiting", "running", "pages_held", "rows_total", "cached_prompt_tokens_total", "accepted_tokens_total{place=\"0\"}",
        "expert_tokens_total{expert=\"0\",layer=\"0\"}", "time_to_first_token_seconds_bucket", "inter_token_seconds_count",
        "http_requests_total{path=\"/v1/chat/completions\",status=\"200\"}",
    ):  # fmt: skip
        assert f"dsv3_{name}" in text, name


def test_the_openapi_document_names_every_field(url):
    document = httpx.get(f"{url}/openapi.json").json()
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/health"} <= set(document["paths"])
    fields = document["components"]["schemas"]["ChatRequest"]["properties"]
    assert {"messages", "tools", "response_format", "thinking", "details"} <= set(fields)
    assert "/v1/chat/completions" in json.dumps(document)


NO_SCHEMA = {"type": "function", "function": {"name": "f", "parameters": {"type": "none such"}}}
FREE = {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "none such"}}}}


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("completions", {**TEXT, "prompt": [5] * 3000}, "prompt"),
        ("chat/completions", {**CHAT, "messages": [{"role": "user", "content": "hello " * 3000}]}, "messages"),
        ("chat/completions", {**CHAT, "tools": [NO_SCHEMA], "tool_choice": "required"}, "tools"),
        ("chat/completions", {**CHAT, "tools": [TOOL], **FREE}, "response_format"),
        ("chat/completions", {**CHAT, "max_tokens": None, "max_completion_tokens": -1}, "max_completion_tokens"),
        ("chat/completions", {**CHAT, "max_tokens": None, "max_completion_tokens": 0}, "max_completion_tokens"),
        ("tokenize", {"prompt": "a" * (2**20 + 1)}, "prompt"),
        ("detokenize", {"tokens": [5] * (2**20 + 1)}, "tokens"),
    ],
)
def test_the_field_that_is_named_is_the_one_that_was_sent(url, path, body, field):
    refused = post(url, f"/v1/{path}", body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, field)
    assert field in refused.json()["error"]["message"] or "prompt" in refused.json()["error"]["message"]
