"""Problems: the same for ever, on one side only, refused with line and field."""

import json

import pytest

from dsv3.post.tasks import SPLITS, Arithmetic, FileTask, Problem, ReasoningGym, Split, held_out, parse_tasks


def test_arithmetic_is_the_same_for_ever_and_right():
    task = Arithmetic(terms=3, digits=2, operators="+-*", seed=1)
    for index in range(200):
        problem = task.problem(index)
        assert problem == task.problem(index)
        assert eval(problem.prompt.removeprefix("What is ").rstrip("?")) == int(problem.answer)


def test_no_prompt_is_on_both_sides_however_few_there_are():
    task = Arithmetic(digits=1)
    train, held = Split(task, "train", seed=1), Split(task, "held-out", seed=2)
    trained = {train.problem(i).prompt for i in range(500)}
    problems = list(held.problems(60))
    asked = [p.prompt for p in problems]
    assert len(set(asked)) == len(asked) > 5
    assert not trained & set(asked)
    assert all(held_out(problem) for problem in problems)


def test_a_sum_is_on_one_side_in_whatever_words_it_is_asked():
    chain = ReasoningGym("chain_sum", min_terms=2, max_terms=2, min_digits=1, max_digits=1)
    sides = [{p.subject for p in Split({Arithmetic(digits=1): 1, chain: 1}, s).problems(150)} for s in SPLITS]
    assert not sides[0] & sides[1]
    assert min(map(len, sides)) > 10
    seven = [Problem(id="", prompt=prompt, answer="7", subject="3+4") for prompt in ("3 + 4 =", "What is 3 + 4?")]
    assert held_out(seven[0]) == held_out(seven[1])
    assert held_out(Problem(id="", prompt="3+4", answer="7")) == held_out(seven[0])


def test_tasks_are_mixed_by_weight():
    tasks = parse_tasks(["arithmetic:digits=1@3", "chain_sum:min_terms=2,max_terms=2"])
    split = Split(tasks, "train")
    names = [split.problem(i).id.split("-")[0] for i in range(400)]
    assert 0.68 < names.count("arithmetic") / 400 < 0.82


def test_a_task_with_one_prompt_cannot_be_held_out(tmp_path):
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps({"prompt": "1 + 1?", "answer": "2"}))
    side = "train" if held_out(Problem(id="", prompt="1 + 1?", answer="2")) else "held-out"
    with pytest.raises(ValueError, match="too few to hold some out"):
        Split(FileTask(path), side).problem(0)


def test_files_are_read_in_the_forms_that_data_sets_have(tmp_path):
    rows = [
        {"question": "How many?", "answer": "6 * 12 = 72\n#### 72"},
        {"prompt": "Write f.", "tests": "assert f() == 1", "language": "en"},
        {"problem": "Spell.\u2028", "answer": "a", "kind": "text", "id": 7, "system": "Be short."},
    ]
    path = tmp_path / "mixed.jsonl"
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8")
    task = FileTask(path)
    assert [p.kind for p in task.problems] == ["maths", "code", "text"]
    assert task.problems[0].answer == "72"
    assert task.problems[2].messages[0] == {"role": "system", "content": "Be short."}
    assert sorted(task.problem(i).id for i in range(3)) == ["7", "mixed-1", "mixed-2"]  # each once a time round


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("{", "line 2 is no JSON"),
        ("[1]", "line 2 is a list"),
        ('{"answer": "1"}', "line 2, field 'prompt'"),
        ('{"prompt": "a", "answer": 1}', "line 2, field 'answer'"),
        ('{"prompt": "a", "answer": " "}', "line 2, field 'answer'"),
        ('{"prompt": "a", "answer": "1", "kind": "checked"}', "line 2, field 'kind'"),
        ('{"prompt": "a", "answer": "1", "language": 3}', "line 2, field 'language'"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, match):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "a", "answer": "1"}\n' + line)
    with pytest.raises(ValueError, match=match):
        FileTask(path)


def test_what_is_no_task_is_refused(tmp_path):
    for spec in (
        "no_such_task",
        "chain_sum:bad=1",
        "arithmetic:x=1",
        "arithmetic@a",
        f"{tmp_path}/none.jsonl",
        "arithmetic:digits=0",
    ):
        with pytest.raises(ValueError):
            parse_tasks([spec])
    with pytest.raises(ValueError, match="weights"):
        Split(Arithmetic(), "train").__class__({}, "train")
    with pytest.raises(ValueError, match="checker"):
        Problem(id="p", prompt="?", answer="", kind="checked")


def test_reasoning_gym_judges_by_its_own_checker():
    problem = ReasoningGym("spell_backward", min_word_len=3, max_word_len=4).problem(5)
    assert problem.check is not None
    assert problem.check(problem.answer) == 1.0
    assert problem.check("zzz") < 1.0
