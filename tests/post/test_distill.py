"""Distillation against a teacher that answers, errs, lies and dies: nothing is asked twice, nothing bad is kept, all is counted."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dsv3.data.chat import ChatFormat
from dsv3.data.conversations import ConversationSource, ReadingReport, read_conversations
from dsv3.data.decontaminate import Decontaminator
from dsv3.data.tokenizer import Tokenizer
from dsv3.model.weights import save_model
from dsv3.post.distill import REFLECT, DistillConfig, read_problems, run_distill
from dsv3.post.distill_filter import is_repetitive, language_of, mixes_languages
from dsv3.post.distill_teacher import HttpTeacher, Reply, Request, RequestLog, Sampling, read_reply
from tests.model.tiny import TINY, random_model
from tests.post.teacher import FakeTeacher, completion, serving

PROSE = "We add the two numbers one after the other and look at the sum again from the other side."


def problems(path: Path, count: int = 6, **more: object) -> Path:
    rows = [{"prompt": f"What is {i} plus {i + 1}?", "answer": str(2 * i + 1), **more} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def total(question: str) -> int:
    return sum(map(int, re.findall(r"\d+", question)))


def right(question: str, before: int, body: dict) -> tuple:
    return completion(f"The answer is \\boxed{{{total(question)}}}.", reasoning_content=PROSE)


def teacher_at(fake: FakeTeacher, **changes) -> HttpTeacher:
    return HttpTeacher(fake.url, "r1", **{"wait": 0.0, "concurrency": 4, "tries": 3, **changes})


def config_for(path: Path, out: Path, **changes) -> DistillConfig:
    return DistillConfig(**{"prompts": (path,), "out": out, "url": "http://unused", "model": "r1", **changes})


def samples_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "sft.jsonl").read_text().splitlines()]


# -- the two kinds of sample, and what is rejected ---------------------------------------------------------------------


def test_both_kinds_of_sample_are_made_and_sft_reads_them(tmp_path):
    path = problems(tmp_path / "p.jsonl", 3, original="We count up. The answer is 1.", system="Answer in English.")
    with serving(FakeTeacher(right)) as fake:
        told = run_distill(config_for(path, tmp_path / "out", teacher_system="Be exact."), teacher=teacher_at(fake))
    assert told["samples"] == {"r1": 3, "original": 1, "problems_with_r1": 3}  # the original is right for 0 + 1 alone
    assert told["rejected"]["original"] == {"wrong": 2}
    made = samples_of(tmp_path / "out")
    r1, original = made[0]["messages"], made[1]["messages"]
    assert r1[0] == {"role": "system", "content": f"Answer in English.\n\n{REFLECT}"}
    assert (r1[2]["reasoning_content"], r1[2]["content"]) == (PROSE, "The answer is \\boxed{1}.")
    assert original[0] == {"role": "system", "content": "Answer in English."}
    assert original[2] == {"role": "assistant", "content": "We count up. The answer is 1."}
    assert fake.requests[0]["messages"][0]["content"] == "Answer in English.\n\nBe exact."
    assert fake.requests[0]["path"] == "/v1/chat/completions"
    report = ReadingReport()
    source = ConversationSource(name="d", paths=(tmp_path / "out" / "sft.jsonl",))
    read = list(read_conversations(source, report))
    assert [c.reasoning for c in read] == [True, False, True, True]
    assert report.faults == []
    assert json.loads((tmp_path / "out" / "statistics.json").read_text()) == told


def test_each_fault_of_an_answer_is_rejected_under_its_name(tmp_path):
    circle = "and then we add them and " * 40
    says = [
        completion("\\boxed{999}"),
        completion("\\boxed{3}", finish="length"),
        completion("\\boxed{5}", reasoning_content="我们把两个数字相加然后再检查一遍结果是否正确"),
        completion(f"{circle}\\boxed{{7}}"),
        completion(f"{PROSE * 90}\\boxed{{9}}", reasoning_content="x"),
        completion(
            "\\boxed{11}",
            reasoning_content="Janet's ducks lay sixteen eggs per day and she eats three for breakfast every morning",
        ),
        completion("\\boxed{13}", reasoning_content=PROSE),
        (400, {"error": {"message": "content policy"}}),
    ]
    path = problems(tmp_path / "p.jsonl", 8)
    (tmp_path / "eval.jsonl").write_text(
        json.dumps(
            {
                "question": "Janet's ducks lay sixteen eggs per day and she eats three for breakfast every morning and bakes."
            }
        )
    )
    with serving(FakeTeacher(lambda q, before, body: says[total(q) // 2])) as fake:
        config = config_for(path, tmp_path / "out", max_characters=5000, decontaminate=(tmp_path / "eval.jsonl",))
        told = run_distill(config, teacher=teacher_at(fake))
    expected = dict.fromkeys(("wrong", "cut", "mixed", "repetitive", "too long", "contaminated", "failed"), 1)
    assert told["rejected"]["r1"] == expected
    assert told["samples"]["r1"] == 1
    assert told["right"] == {"judged": 2, "right": 1, "unjudged": 0}
    assert told["answers"]["refused"] == 1
    assert "content policy" in told["this_sitting"]["faults"][0]


def test_of_several_right_answers_the_shortest_are_kept(tmp_path):
    def long_and_short(question: str, before: int, body: dict) -> tuple:
        thought = " ".join(f"Step {i} looks at number {i * 7}." for i in range(3 + body["seed"]))
        return completion(f"\\boxed{{{total(question)}}}", reasoning_content=thought)

    path = problems(tmp_path / "p.jsonl", 2)
    with serving(FakeTeacher(long_and_short)) as fake:
        told = run_distill(config_for(path, tmp_path / "out", samples=4, keep=2), teacher=teacher_at(fake))
    assert told["samples"]["r1"] == 4
    assert told["rejected"]["r1"] == {"longer than another": 4}
    assert {r["seed"] for r in fake.requests} == {0, 1, 2, 3}
    assert all("Step 4" not in s["messages"][-1]["reasoning_content"] for s in samples_of(tmp_path / "out"))


@pytest.mark.parametrize(
    ("thoughts", "content", "kept"), [("inline", f"{PROSE}\n\n\\boxed{{1}}", False), ("drop", "\\boxed{1}", False)]
)
def test_thoughts_can_be_part_of_the_answer_or_left_out(tmp_path, thoughts, content, kept):
    path = problems(tmp_path / "p.jsonl", 1)
    with serving(FakeTeacher(lambda *_: completion(f"<think>\n{PROSE}\n</think>\n\n\\boxed{{1}}"))) as fake:
        run_distill(config_for(path, tmp_path / "out", thoughts=thoughts), teacher=teacher_at(fake))
    answer = samples_of(tmp_path / "out")[0]["messages"][-1]
    assert answer["content"] == content
    assert ("reasoning_content" in answer) == kept


def test_code_and_choice_and_unjudged_answers(tmp_path):
    rows = [
        {"id": "code", "prompt": "Write add(a, b).", "kind": "code", "tests": "assert add(1, 2) == 3"},
        {"id": "bad", "prompt": "Write sub(a, b).", "kind": "code", "tests": "assert sub(1, 2) == -1"},
        {"id": "choice", "prompt": "Which one? A) 1 B) 2", "kind": "choice", "answer": "B"},
        {"id": "free", "prompt": "Write a line about rain.", "kind": "none"},
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    says = {
        rows[0]["prompt"]: "Here it is:\n```python\ndef add(a, b):\n    return a + b\n```",
        rows[1]["prompt"]: "```python\ndef sub(a, b):\n    return a + b\n```",
        rows[2]["prompt"]: "The answer is B.",
        rows[3]["prompt"]: "It falls all night on the old tin roof.",
    }
    with serving(FakeTeacher(lambda q, before, body: completion(says[q]))) as fake:
        config = config_for(tmp_path / "p.jsonl", tmp_path / "out", isolation="best-effort")
        told = run_distill(config, teacher=teacher_at(fake))
    assert [s["source"]["id"] for s in samples_of(tmp_path / "out")] == ["code", "choice", "free"]
    assert told["right"] == {"judged": 3, "right": 2, "unjudged": 1}


def test_a_gold_that_cannot_be_read_drops_its_problem_and_says_so(tmp_path):
    (tmp_path / "p.jsonl").write_text(
        json.dumps({"prompt": "What is it?", "answer": "\\frac{", "kind": "maths"}) + "\n"
    )
    problems(tmp_path / "q.jsonl", 1)
    with serving(FakeTeacher(lambda *_: completion("\\boxed{1}"))) as fake:
        config = config_for(tmp_path / "p.jsonl", tmp_path / "out")
        told = run_distill(
            dataclasses.replace(config, prompts=(*config.prompts, tmp_path / "q.jsonl")), teacher=teacher_at(fake)
        )
    assert told["rejected"]["r1"] == {"ungradable": 1}
    assert told["samples"]["r1"] == 1
    assert "cannot be read" in told["grader_faults"][0]


def test_a_grader_that_crashes_costs_one_answer_and_is_told(tmp_path, monkeypatch):
    from dsv3.post import rewards

    def crash(gold: str, text: str) -> bool:
        if gold == "3":
            raise RuntimeError("sympy ran out of stack")
        return text.endswith(f"{gold}}}.")

    monkeypatch.setattr(rewards, "math_equal", crash)
    path = problems(tmp_path / "p.jsonl", 3)
    with serving(FakeTeacher(right)) as fake:
        told = run_distill(config_for(path, tmp_path / "out"), teacher=teacher_at(fake))
    assert told["rejected"]["r1"] == {"ungradable": 1}
    assert told["samples"]["r1"] == 2
    assert "sympy ran out of stack" in told["grader_faults"][0]


# -- a teacher that fails ----------------------------------------------------------------------------------------------


def test_faults_that_pass_are_tried_again_and_counted(tmp_path):
    faults = [
        (429, {"error": {"message": "slow down"}}), (500, b"<html>oops</html>"), (200, b"not json"), (200, {"choices": []}),
        completion(None), (200, {"choices": [{"message": {"content": 7}}]}), (503, b""),
    ]  # fmt: skip
    path = problems(tmp_path / "p.jsonl", len(faults))

    def answer(question: str, before: int, body: dict) -> tuple:
        return faults[total(question) // 2] if before == 0 else right(question, before, body)

    with serving(FakeTeacher(answer)) as fake:
        told = run_distill(config_for(path, tmp_path / "out"), teacher=teacher_at(fake))
    assert told["samples"]["r1"] == len(faults)
    assert told["this_sitting"]["retries"] == len(faults)
    assert set(fake.asked.values()) == {2}


def test_an_answer_that_never_comes_costs_that_problem_only(tmp_path):
    path = problems(tmp_path / "p.jsonl", 5)

    def answer(question: str, before: int, body: dict) -> tuple:
        return (500, b"always") if total(question) == 5 else right(question, before, body)

    with serving(FakeTeacher(answer)) as fake:
        told = run_distill(config_for(path, tmp_path / "out"), teacher=teacher_at(fake))
        assert told["this_sitting"] | {"faults": []} == {
            "answered": 4, "refused": 0, "failed": 1, "retries": 2, "stopped": None, "faults": [],
        }  # fmt: skip
        assert "answered 500: always" in told["this_sitting"]["faults"][0]
        assert told["samples"]["r1"] == 4
        fake.answer = right
        again = run_distill(config_for(path, tmp_path / "out"), teacher=teacher_at(fake))
    assert again["this_sitting"]["answered"] == 1
    assert again["samples"]["r1"] == 5


def test_an_unreachable_teacher_is_said_and_what_was_answered_is_kept(tmp_path):
    path = problems(tmp_path / "p.jsonl", 3)
    with serving(FakeTeacher(right)) as fake:
        run_distill(config_for(path, tmp_path / "out"), teacher=teacher_at(fake))
    problems(path, 30)
    said: list[str] = []
    gone = teacher_at(fake, give_up=3, tries=2, timeout=2.0)
    told = run_distill(config_for(path, tmp_path / "out"), said.append, teacher=gone)
    assert told["samples"]["r1"] == 3
    assert told["answers"]["missing"] == 27
    assert "requests in a row failed" in told["this_sitting"]["stopped"]
    assert "does not answer" in told["this_sitting"]["stopped"]
    assert told["this_sitting"]["failed"] < 12
    assert any("the same command asks for the rest" in line for line in said)


def test_a_wrong_key_ends_the_asking_at_once_and_stands_in_no_file(tmp_path):
    path = problems(tmp_path / "p.jsonl", 20)
    with serving(FakeTeacher(lambda *_: (401, {"error": {"message": "invalid api key"}}))) as fake:
        config = config_for(path, tmp_path / "out", api_key="sk-secret")
        told = run_distill(config, teacher=teacher_at(fake, key="sk-secret", concurrency=2))
    assert "401: invalid api key: check URL, model 'r1' and key" in told["this_sitting"]["stopped"]
    assert sum(fake.asked.values()) <= 2
    assert fake.authorization == {"Bearer sk-secret"}
    assert "sk-secret" not in repr(config)
    assert all("sk-secret" not in file.read_text() for file in (tmp_path / "out").iterdir())
    assert samples_of(tmp_path / "out") == []


@pytest.mark.parametrize("status", [401, 422, 503])
def test_a_key_that_the_server_repeats_stands_in_no_file(tmp_path, status):
    path = problems(tmp_path / "p.jsonl", 2)
    answer = (status, {"error": {"message": "Incorrect API key provided: sk-secret"}})
    with serving(FakeTeacher(lambda *_: answer)) as fake:
        told = run_distill(
            config_for(path, tmp_path / "out"), teacher=teacher_at(fake, key=" sk-secret\n", concurrency=1)
        )
    assert "provided: ***" in json.dumps(told)
    assert fake.authorization == {"Bearer sk-secret"}
    assert all("sk-secret" not in file.read_text() for file in (tmp_path / "out").iterdir())


def test_a_key_that_no_header_can_hold_is_refused_and_not_shown():
    with pytest.raises(ValueError, match="the key holds spaces, line breaks") as refused:
        HttpTeacher("http://unused", "r1", key="sk-secret\nsk-other")
    assert "secret" not in str(refused.value)


def test_usage_that_is_a_lie_counts_as_untold_and_the_budget_holds(tmp_path):
    path = problems(tmp_path / "p.jsonl", 6)
    lies = {1: {"prompt_tokens": -5, "completion_tokens": "many"}, 3: None, 5: [1]}

    def answer(question: str, before: int, body: dict) -> tuple:
        return completion(f"\\boxed{{{total(question)}}}", usage=lies.get(total(question), (1000, 2000)))

    with serving(FakeTeacher(answer)) as fake:
        priced = config_for(path, tmp_path / "out", price_in=1.0, price_out=10.0)
        told = run_distill(priced, teacher=teacher_at(fake))
        assert told["tokens"] == {"prompt": 3000, "answer": 6000, "untold": 3}
        assert told["cost"] == pytest.approx((3000 * 1 + 6000 * 10) / 1e6)
        poor = dataclasses.replace(priced, out=tmp_path / "poor", budget=0.03)
        told = run_distill(poor, teacher=teacher_at(fake, concurrency=1))
        assert told["this_sitting"]["stopped"] == "0.04 is spent, the budget is 0.03"
        assert told["answers"]["missing"] == 1
        before = sum(fake.asked.values())
        run_distill(poor, teacher=teacher_at(fake, concurrency=1))
        assert sum(fake.asked.values()) == before


def test_a_reply_is_read_whatever_it_is():
    for body in (
        b"",
        b"[]",
        b"null",
        b'{"choices": {}}',
        b'{"choices": [[]]}',
        b'{"choices": [{"message": []}]}',
        b"[" * 10**5,
    ):
        assert isinstance(read_reply(body), str)
    assert read_reply(b'{"choices": [{"message": {"content": "\\ud800"}}]}') == "content holds half a character"
    whole = read_reply(b'  \n{"choices": [{"message": {"content": "a"}}], "usage": {"prompt_tokens": true}}')
    assert whole == Reply(text="a", finish_reason="unknown")


# -- the log, and a killed run -----------------------------------------------------------------------------------------


def request(sample: int = 0, **changes) -> Request:
    return Request(
        **{
            "model": "m",
            "problem": "p",
            "messages": (("user", "q"),),
            "sampling": Sampling(),
            "sample": sample,
            **changes,
        }
    )


def test_keys_are_of_what_is_asked_and_of_nothing_else():
    assert request().key == request(problem="other").key
    others = [
        request(1),
        request(model="n"),
        request(messages=(("user", "r"),)),
        request(sampling=Sampling(temperature=0.7)),
    ]
    assert len({request().key, *(other.key for other in others)}) == 5


@pytest.mark.parametrize("torn", [b'{"key": "x", "rep', b'{"key": "x"}', b"\x00\x00"])
def test_a_torn_last_line_is_cut_off_and_the_log_goes_on(tmp_path, torn):
    path = tmp_path / "requests.jsonl"
    log = RequestLog(path)
    log.add(request(), Reply(text="a", finish_reason="stop"))
    log.close()
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    log = RequestLog(path)
    assert list(log.replies) == [request().key]
    log.add(request(1), Reply(text="b"))
    log.close()
    assert path.read_bytes().startswith(whole)
    assert len(RequestLog(path).replies) == 2


def test_a_log_damaged_in_the_middle_is_refused(tmp_path):
    path = tmp_path / "requests.jsonl"
    path.write_bytes(b"garbage\n{}\n")
    with pytest.raises(ValueError, match=r"requests\.jsonl line 1 of 2 is no request"):
        RequestLog(path)


SCRIPT = """
import sys
from pathlib import Path
from dsv3.post.distill import DistillConfig, run_distill
run_distill(DistillConfig(prompts=(Path(sys.argv[1]),), out=Path(sys.argv[2]), url=sys.argv[3], model="r1", concurrency=3))
"""


def test_a_killed_run_repeats_no_finished_request(tmp_path):
    path, out = problems(tmp_path / "p.jsonl", 40), tmp_path / "out"
    with serving(FakeTeacher(right, delay=0.05)) as fake:
        root = Path(__file__).parents[2]
        command = [sys.executable, "-c", SCRIPT, str(path), str(out), fake.url]
        process = subprocess.Popen(
            command, cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, stderr=subprocess.DEVNULL
        )
        log, deadline = out / "requests.jsonl", time.time() + 120
        while (
            process.poll() is None
            and time.time() < deadline
            and (not log.exists() or log.read_bytes().count(b"\n") < 7)
        ):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        finished = log.read_bytes().count(b"\n")
        assert 7 <= finished < 40
        fake.delay = 0.0
        told = run_distill(config_for(path, out), teacher=teacher_at(fake))
    assert told["samples"]["r1"] == 40
    assert told["this_sitting"]["answered"] == 40 - finished
    assert sum(fake.asked.values()) <= 40 + 3  # those under way when it was killed
    assert log.read_bytes().count(b"\n") == 40


# -- a checkpoint as the teacher ---------------------------------------------------------------------------------------


def test_a_checkpoint_teaches_through_the_engine_and_is_asked_once(tmp_path):
    tokenizer = Tokenizer.train(["what is one plus two? it is three.\n"] * 20, 320)
    config = dataclasses.replace(TINY, vocab_size=tokenizer.vocab_size, rope_scaling=None)
    save_model(random_model(config).to(torch.bfloat16), tmp_path / "model", tokenizer=tokenizer)
    path = problems(tmp_path / "p.jsonl", 3, kind="none")
    with path.open("a") as file:
        file.write(json.dumps({"prompt": "too long " * 200}) + "\n")
    settings = config_for(
        path, tmp_path / "out", url=None, model=None, checkpoint=tmp_path / "model", samples=2,
        sampling=Sampling(max_tokens=8, temperature=1.0),
    )  # fmt: skip
    told = run_distill(settings)
    assert told["answers"] == {"wanted": 8, "there": 6, "refused": 2, "missing": 0}
    assert told["tokens"]["untold"] == 0
    assert told["tokens"]["prompt"] == 2 * sum(
        len(ChatFormat(tokenizer).render([{"role": "user", "content": f"What is {i} plus {i + 1}?"}]).ids)
        for i in range(3)
    )
    assert "the model takes 256" in told["this_sitting"]["faults"][0]
    rows = [json.loads(line) for line in (tmp_path / "out" / "requests.jsonl").read_text().splitlines()]
    texts = [row["reply"]["text"] for row in rows if row["reply"]["refused"] is None]
    assert len(set(texts)) > 3
    again = run_distill(settings)
    assert again["this_sitting"]["answered"] == 0
    assert {k: again[k] for k in ("answers", "samples", "rejected")} == {
        k: told[k] for k in ("answers", "samples", "rejected")
    }


# -- problems and filters ----------------------------------------------------------------------------------------------


def test_bad_lines_of_problems_are_told_and_the_good_ones_kept(tmp_path):
    rows = [
        '{"prompt": "What is 1 plus 1?", "answer": "2"}', "{", '{"answer": "2"}', '{"prompt": "a?", "kind": "essay"}',
        '{"prompt": "a?", "kind": "code"}', '{"prompt": "a?", "answer": 2}', '{"prompt": "What is 1 plus 1?", "answer": "3"}',
        '{"prompt": "b?", "language": "English"}',
    ]  # fmt: skip
    (tmp_path / "p.jsonl").write_text("\n".join(rows))
    faults: list[str] = []
    assert len(read_problems([tmp_path / "p.jsonl"], faults)) == 1
    for number, what in ((2, "is no JSON"), (3, "prompt is missing"), (4, "kind is 'essay'"), (5, "tests is missing"),
                         (6, "answer is 2: give a string"), (7, "occurs twice"), (8, "language is 'English'")):  # fmt: skip
        assert f"line {number}" in faults[number - 2]
        assert what in faults[number - 2]
    (tmp_path / "q.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="there is no problem in"):
        read_problems([tmp_path / "q.jsonl"], [])
    with pytest.raises(ValueError, match="does not exist"):
        read_problems([tmp_path / "none.jsonl"], [])


def test_contradictions_of_a_config_are_refused(tmp_path):
    path = problems(tmp_path / "p.jsonl")
    for changes, match in (
        ({"checkpoint": tmp_path}, "both are given"),
        ({"url": None}, "none is given"),
        ({"model": None}, "needs a model's name"),
        ({"keep": 2}, "keep 2 must be from 1 to samples 1"),
        ({"samples": 2, "sampling": Sampling(temperature=0.0)}, "at temperature 0 are all alike"),
        ({"budget": 1.0}, "budget 1.0 needs prices"),
        ({"prompts": ()}, "prompts is empty"),
    ):
        with pytest.raises(ValueError, match=match):
            config_for(path, tmp_path / "out", **changes)


def test_a_problem_of_an_evaluation_set_is_never_asked(tmp_path):
    path = problems(tmp_path / "p.jsonl", 3)
    item = "A farmer has 1 hen and buys 6 more on Monday; how many hens does the farmer have now?"
    with path.open("a") as file:
        file.write(json.dumps({"prompt": f"Solve: {item}", "answer": "7"}) + "\n")
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "test.jsonl").write_text(json.dumps({"id": 1, "asked": [item]}) + "\n")
    with serving(FakeTeacher(right)) as fake:
        told = run_distill(
            config_for(path, tmp_path / "out", decontaminate=(tmp_path / "eval",)), teacher=teacher_at(fake)
        )
    assert (told["contaminated_problems"], told["evaluation_texts"], told["answers"]["wanted"]) == (1, 1, 3)
    assert not any("farmer" in question for question in fake.asked)
    with pytest.raises(ValueError, match="does not exist: give the evaluation sets' own files"):
        Decontaminator([tmp_path / "none"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (PROSE, False),
        ("Let me think. " * 30, True),
        ("a + b = c\n" * 6, True),
        (PROSE + " wait, wait, wait, wait, wait, wait, wait, wait, wait, wait,", True),
        ("\n".join(f"Step {i}: {i} * {i} = {i * i}, so the sum so far is {i * (i + 1)}." for i in range(40)), False),
        ("0000000000" * 3, False),
        ("", False),
    ],
)
def test_circles_are_told_from_work(text, expected):
    assert is_repetitive(text) == expected


def test_languages_are_told_by_their_script():
    assert [language_of(t) for t in ("What is it?", "这个数是多少", "Сколько будет два", "12 + 7")] == [
        "en",
        "zh",
        "ru",
        None,
    ]
    assert mixes_languages("We add. 然后我们把它们加起来再检查一遍", "en")
    assert not mixes_languages(PROSE, "en")
    assert not mixes_languages("$$x = 3$$ 12", "en")
    assert mixes_languages("The answer is three, and it stands.", "zh")
    assert not mixes_languages("The answer is three.", None)
