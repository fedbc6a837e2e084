"""The examples: their own logic against scripted answers, and each against a real server over a random model."""

import importlib.util
import json
import sys
from pathlib import Path

import httpx
import pytest
from openai import OpenAI

from tests.serve.small import running, small_app

ROOT = Path(__file__).parents[1]


def example(name):
    path = ROOT / "examples" / f"{name}.py"
    assert len(path.read_text(encoding="utf-8").splitlines()) < 100
    spec = importlib.util.spec_from_file_location(f"examples_{name}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def scripted(*answers):
    """A client whose server gives these, one a request (text, texts for n answers, or {tool: arguments}), and what was asked."""
    left, asked = list(answers), []

    def handle(request):
        asked.append(json.loads(request.content))
        choices = []
        answer = left.pop(0)
        for i, one in enumerate(answer if isinstance(answer, list) else [answer]):
            if request.url.path.endswith("/chat/completions"):
                calls = [
                    {"id": f"call_{i}", "type": "function", "function": {"name": name, "arguments": arguments}}
                    for name, arguments in (one.items() if isinstance(one, dict) else ())
                ]
                message = {"role": "assistant", "content": None if calls else one} | (
                    {"tool_calls": calls} if calls else {}
                )
                choices.append({"index": i, "message": message, "finish_reason": "tool_calls" if calls else "stop"})
            else:
                choices.append({"index": i, "text": one, "finish_reason": "stop", "logprobs": None})
        body = {"id": "x", "object": "chat.completion", "created": 1, "model": "m", "choices": choices}
        return httpx.Response(200, json=body)

    transport = httpx.MockTransport(handle)
    client = OpenAI(base_url="http://127.0.0.1/v1", api_key="x", http_client=httpx.Client(transport=transport))
    return client, asked


@pytest.fixture(scope="module")
def real():
    with running(small_app(context=4096)) as url:
        yield OpenAI(base_url=f"{url}/v1", api_key="unused")


def test_the_support_desk_looks_up_and_remembers_across_conversations(tmp_path):
    support = example("support")
    client, asked = scripted(
        {"look_up_order": '{"order": "1001"}', "remember": '{"fact": "likes maps"}'},
        "It arrives on Thursday.",
        {"remember": "no json"},
        "Hello again.",
    )
    desk = support.Desk(client, "m", "ada", tmp_path / "memory.json")
    assert desk.say("where is 1001?") == "It arrives on Thursday."
    results = [m["content"] for m in asked[1]["messages"] if m["role"] == "tool"]
    assert results == [support.ORDERS["1001"], "kept"]
    again = support.Desk(client, "m", "ada", tmp_path / "memory.json")
    assert again.say("hello") == "Hello again."
    assert "likes maps" in asked[2]["messages"][0]["content"]
    assert "do not fit" in asked[3]["messages"][-1]["content"]
    other = support.Desk(client, "m", "bob", tmp_path / "memory.json")
    assert "likes maps" not in other.messages[0]["content"]


def test_a_desk_that_only_calls_is_made_to_answer(tmp_path):
    client, asked = scripted(*[{"look_up_order": '{"order": "7"}'}] * 2, "enough")
    assert example("support").Desk(client, "m", "ada", tmp_path / "m.json").say("hm", most_calls=2) == "enough"
    assert [a["tool_choice"] for a in asked] == ["auto", "auto", "none"]


def test_the_coder_fills_the_hole():
    client, asked = scripted("a + b")
    assert (
        example("coder").fill(client, "m", "def add(a, b):\n    return <HOLE>\n")
        == "def add(a, b):\n    return a + b\n"
    )
    assert (asked[0]["prompt"], asked[0]["suffix"]) == ("def add(a, b):\n    return ", "\n")
    with pytest.raises(ValueError, match="no <HOLE>"):
        example("coder").fill(client, "m", "x = 1")


def test_the_coder_finds_the_program_behind_other_blocks():
    answer = "Run\n```bash\npython a.py\n```\non\n```python\nx = 1\n```\nto see\n```text\n1\n```\n"
    assert example("coder").code_in(answer) == "x = 1\n"
    assert example("coder").code_in("no block") is None


def test_the_coder_mends_until_the_tests_pass_and_no_longer():
    good = "def add(a, b):\n    return a + b\n"
    client, asked = scripted(
        "```python\ndef add(a, b):\n    return a - b\n```", f"So:\n```python\n{good}```", "never asked"
    )
    mended, passes = example("coder").mend(client, "m", "def add(a, b)\n", "assert add(2, 1) == 3")
    assert (mended, passes) == (good, True)
    assert len(asked) == 2
    assert "SyntaxError" in asked[0]["messages"][-1]["content"]
    assert "AssertionError" in asked[1]["messages"][-1]["content"]
    client, asked = scripted(*["I do not know"] * 3)
    assert example("coder").mend(client, "m", "x", "assert False", tries=3) == ("x", False)
    assert len(asked) == 3


def test_the_tutor_takes_what_solutions_agree_on_and_doubts_the_rest():
    tutor = example("tutor")
    solutions = ["long way: \\boxed{42.0}", "\\boxed{42}", "\\boxed{41}", "no idea", "so \\boxed{\\frac{84}{2}}"]
    client, asked = scripted(solutions, "\\boxed{42}", solutions, "\\boxed{41}", ["none"] * 5)
    lesson = tutor.teach(client, "m", "12 + 30?")
    assert (lesson.agreed, lesson.asked, lesson.checked, lesson.sure) == (3, 5, True, True)
    assert lesson.explanation == "\\boxed{42}"
    assert asked[0]["n"] == 5
    assert not tutor.teach(client, "m", "12 + 30?").sure
    with pytest.raises(ValueError, match="none of 5 solutions"):
        tutor.teach(client, "m", "?")


def test_the_writers_article_has_the_form_that_was_asked_for():
    plan = '{"title": "Press", "headings": ["Ink", "Paper"]}'
    section = '{"text": "Words.", "key_points": ["black"]}'
    client, asked = scripted(plan, section, section)
    article = example("writer").Writer(client, "m").write("a press", 2)
    assert example("writer").markdown(article) == "# Press\n\n## Ink\n\nWords.\n\n## Paper\n\nWords.\n"
    assert "Ink: black" in asked[2]["messages"][0]["content"]


def test_each_example_runs_against_a_real_server(real, tmp_path):
    """The model is random: what it says is noise, in the right form."""
    assert isinstance(example("support").Desk(real, "deepseek-chat", "ada", tmp_path / "m.json").say("hello"), str)
    filled = example("coder").fill(real, "deepseek-chat", "x = <HOLE>\n")
    assert filled.startswith("x = ")
    assert filled.endswith("\n")
    with pytest.raises(ValueError, match="solutions came to an answer"):
        example("tutor").teach(real, "deepseek-chat", "1 + 1?", samples=2)
    article = example("writer").Writer(real, "deepseek-chat").write("a press", 2)
    assert len(article["sections"]) == 2
    assert all(1 <= len(section["key_points"]) <= 3 for section in article["sections"])
