"""Runs are resumed without asking twice, counted honestly, and compared item by item."""

import dataclasses
import json
import math
from types import SimpleNamespace

import pytest

from dsv3.evals.models import Answer, EngineModel, Failure, Sampling, Scored
from dsv3.evals.run import compare, read_log, run, table
from dsv3.evals.sandbox import IsolationError
from dsv3.evals.tasks import Item, Task, Tools, open_task
from tests.evals.data import OWN_CODE, OWN_GSM8K
from tests.infer.letters import engine


@pytest.fixture(scope="module", autouse=True)
def one_set_of_tools():
    """One maths helper and sandbox for all runs of this file: starting sympy takes a second."""
    import dsv3.evals.run as module

    tools, real = Tools(), module.Tools
    module.Tools = lambda: SimpleNamespace(judge=tools.judge, sandbox=tools.sandbox, close=lambda: None)
    yield
    module.Tools = real
    tools.close()


class Script:
    """A model that says what it was told to, item by item, and stops dead after `lasts` items."""

    name = "script"

    def __init__(self, says, lasts=10**9):
        self.says, self.lasts, self.asked = says, lasts, []

    def ask(self, items, sampling):
        for item in items:
            if len(self.asked) >= self.lasts:
                raise KeyboardInterrupt
            self.asked.append(item.id)
            said = self.says(item)
            yield item, [Answer(said, "stop", 3)] * sampling.samples if isinstance(said, str) else said


def gsm8k(tmp_path, name="test.jsonl", records=OWN_GSM8K):
    path = tmp_path / name
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return open_task("gsm8k", path, shots=0)


def right(item):
    return f"The answer is {item.gold.rsplit('####', 1)[1].strip()}."


def test_a_run_scores_by_every_convention_and_keeps_prompt_and_hash(tmp_path):
    task = gsm8k(tmp_path)
    told = run(Script(lambda i: right(i) if i.id != "gsm8k/1" else "#### 9"), [task], tmp_path / "out")
    entry = told["tasks"]["gsm8k"]
    assert (entry["score"], entry["items"], entry["errors"]) == (0.75, 4, 0)
    assert entry["stderr"] == pytest.approx(0.25)
    assert entry["conventions"]["lm-eval strict"]["mean"] == 0
    assert entry["spread"] == 0.75
    assert told == json.loads((tmp_path / "out" / "results.json").read_text())
    head, rows = read_log(tmp_path / "out" / "gsm8k.jsonl")
    assert head["settings"]["shots"] == 0
    for item, row in zip(task.items, rows):
        assert (row["prompt"], row["prompt_sha256"], row["gold"]) == (item.prompt, item.prompt_hash, item.gold)
        assert row["samples"][0]["text"]
    (line,) = table(told)
    assert (line["task"], line["score"], line["±"], line["by"], line["spread"]) == (
        "gsm8k",
        "75.0",
        "25.0",
        "ours",
        "75.0",
    )


def test_a_killed_run_goes_on_and_asks_nothing_twice(tmp_path):
    task, out = gsm8k(tmp_path), tmp_path / "out"
    whole = run(Script(right), [task], tmp_path / "whole")
    asked = []
    for lasts in (1, 2):
        script = Script(right, lasts)
        with pytest.raises(KeyboardInterrupt):
            run(script, [task], out)
        asked += script.asked
    with (out / "gsm8k.jsonl").open("a") as log:
        log.write('{"id": "gsm8k/3", "half')  # killed in the middle of a line
    script = Script(right)
    assert run(script, [task], out)["tasks"] == whole["tasks"]
    assert sorted(asked + script.asked) == [item.id for item in task.items]
    again = Script(right)
    run(again, [task], out)
    assert again.asked == []


def test_what_failed_is_asked_again_and_nothing_else(tmp_path):
    task, out = gsm8k(tmp_path), tmp_path / "out"
    away = Script(lambda i: Failure("no connection") if i.id in ("gsm8k/1", "gsm8k/3") else right(i))
    assert run(away, [task], out)["tasks"]["gsm8k"]["errors"] == 2
    back = Script(right)
    told = run(back, [task], out)["tasks"]["gsm8k"]
    assert back.asked == ["gsm8k/1", "gsm8k/3"]
    assert (told["errors"], told["score"]) == (0, 1.0)
    assert sorted(row["id"] for row in read_log(out / "gsm8k.jsonl")[1]) == [item.id for item in task.items]


def test_a_grader_that_crashes_costs_an_item_and_its_answer_is_kept(tmp_path):
    task = gsm8k(tmp_path)

    def grade(item, text, tools):
        if item.id == "gsm8k/2":
            raise ZeroDivisionError("oh")
        return task.grade(item, text, tools)

    told = run(Script(right), [dataclasses.replace(task, grade=grade)], tmp_path / "out")["tasks"]["gsm8k"]
    assert (told["errors"], told["score"]) == (1, 0.75)
    assert told["first_error"] == "the grader failed (ZeroDivisionError: oh)"
    row = next(row for row in read_log(tmp_path / "out" / "gsm8k.jsonl")[1] if row["id"] == "gsm8k/2")
    assert row["ungraded"][0]["text"] == right(task.items[2])


def test_where_nothing_can_be_graded_the_run_stops(tmp_path):
    def grade(item, text, tools):
        raise IsolationError("none here")

    with pytest.raises(IsolationError):
        run(Script(right), [dataclasses.replace(gsm8k(tmp_path), grade=grade)], tmp_path / "out")


def test_a_folder_of_another_run_is_refused(tmp_path):
    task, out = gsm8k(tmp_path), tmp_path / "out"
    run(Script(right), [task], out)
    with pytest.raises(ValueError, match=r"its sampling is .*give another folder"):
        run(Script(right), [task], out, sampling=Sampling(seed=1))
    other = gsm8k(tmp_path, records=[{**OWN_GSM8K[0], "question": "else?"}, *OWN_GSM8K[1:]])
    with pytest.raises(ValueError, match="prompt of gsm8k/0 is not the one"):
        run(Script(right), [other], out)
    shorter = open_task("gsm8k", tmp_path / "test.jsonl", shots=0, max_tokens=4)
    with pytest.raises(ValueError, match="its settings is"):
        run(Script(right), [shorter], tmp_path / "out")
    named = Script(right)
    named.name = "another"
    with pytest.raises(ValueError, match='its model is "script", this one\'s "another"'):
        run(named, [task], out)
    log = out / "gsm8k.jsonl"
    log.write_text(log.read_text().replace('{"id": "gsm8k/1"', '{"id" "gsm8k/1"'))
    with pytest.raises(ValueError, match="line 3 is damaged"):
        run(Script(right), [task], out)


def test_failures_count_as_wrong_and_unreadable_golds_do_not_count(tmp_path):
    records = [*OWN_GSM8K, {"question": "broken", "answer": "#### "}]
    task = gsm8k(tmp_path, records=records)
    told = run(Script(lambda i: Failure("too long") if i.id == "gsm8k/0" else right(i)), [task], tmp_path / "out")[
        "tasks"
    ]["gsm8k"]
    assert (told["items"], told["errors"], told["unreadable"], told["score"]) == (5, 1, 1, 0.75)
    assert told["first_error"] == "too long"
    assert "1 errors, 1 unreadable" in table({"tasks": {"gsm8k": told}})[0]["remarks"]


def test_samples_give_pass_at_k(tmp_path):
    task = gsm8k(tmp_path)

    class Half(Script):
        def ask(self, items, sampling):
            for item in items:
                yield item, [Answer(right(item) if i % 2 else "no", "length") for i in range(sampling.samples)]

    told = run(Half(right), [task], tmp_path / "out", sampling=Sampling(samples=4, temperature=1.0))["tasks"]["gsm8k"]
    assert told["pass@k"] == {"1": 0.5, "2": pytest.approx(1 - 1 / 6), "4": 1.0}
    assert (told["score"], told["cut_short"]) == (0.5, 1.0)


def test_code_is_run_in_the_sandbox(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in OWN_CODE))
    solutions = {r["task_id"]: r["canonical_solution"] for r in OWN_CODE}
    says = lambda i: solutions[i.id] if i.id == "Own/0" else "    import os; os._exit(0)\n"  # noqa: E731
    told = run(Script(says), [open_task("humaneval", path)], tmp_path / "out")["tasks"]["humaneval"]
    assert told["score"] == 0.5


def test_choices_and_text_on_the_engine(tmp_path):
    rows = [
        {"question": f"q{i}", "choices": ["w", "x", "y", "z"], "answer": i % 4, "subject": f"s{i % 2}"}
        for i in range(6)
    ]
    path = tmp_path / "mmlu.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "text.txt").write_text("a text of some length, and no more")
    tasks = [open_task("mmlu", path, shots=0), open_task("bpb", tmp_path / "text.txt")]
    told = run(EngineModel(engine()), tasks, tmp_path / "out")["tasks"]
    _, log = read_log(tmp_path / "out" / "mmlu.jsonl")
    picked = [max(range(4), key=lambda k, r=row: r["logprobs"][k]) for row in sorted(log, key=lambda r: r["id"])]
    assert told["mmlu"]["score"] == pytest.approx(sum(p == i % 4 for i, p in enumerate(picked)) / 6)
    assert set(told["mmlu"]["groups"]) == {"s0", "s1"}
    row = read_log(tmp_path / "out" / "bpb.jsonl")[1][0]
    assert told["bpb"]["score"] == pytest.approx(-row["logprob"] / math.log(2) / 34)
    assert math.isnan(told["bpb"]["stderr"])
    assert len(table({"tasks": told})) == 2


def test_bits_per_byte_weigh_documents_by_their_bytes(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "aaaa"}\n{"text": "bb"}\n')
    says = lambda i: [Scored(-len(i.prompt) * (1.0 if "a" in i.prompt else 4.0), 1, False)]  # noqa: E731
    told = run(Script(says), [open_task("bpb", path)], tmp_path / "out")["tasks"]["bpb"]
    assert told["score"] == pytest.approx((4 * 1 + 2 * 4) / 6 / math.log(2))
    assert told["stderr"] > 0


def test_two_runs_are_compared_on_the_same_items(tmp_path):
    records = [{"question": f"{i}?", "answer": f"#### {i}"} for i in range(40)]
    task = gsm8k(tmp_path, records=records)
    run(Script(lambda i: right(i) if int(i.id[6:]) % 4 == 0 else "no"), [task], tmp_path / "a")
    run(Script(lambda i: right(i) if int(i.id[6:]) % 2 == 0 else "no"), [task], tmp_path / "b")
    told = compare(tmp_path / "a", tmp_path / "b")["gsm8k"]
    assert (told.items, told.a, told.b, told.better, told.worse) == (40, 0.25, 0.5, 10, 0)
    assert told.mcnemar == pytest.approx(2 / 2**10)
    assert told.significant
    other = gsm8k(tmp_path, records=[{**records[0], "question": "changed"}, *records[1:]])
    run(Script(right), [other], tmp_path / "c")
    with pytest.raises(ValueError, match="prompts of 1 items differ"):
        compare(tmp_path / "a", tmp_path / "c")


def test_ids_that_come_twice_are_refused(tmp_path):
    task = Task(name="x", items=[Item(id="a", prompt="p")] * 2, grade=lambda *a: {}, reported="ours", settings={})
    with pytest.raises(ValueError, match="1 item ids twice"):
        run(Script(right), [task], tmp_path)
