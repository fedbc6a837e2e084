"""Benchmarks in their own formats, prompts to the letter, and what is said of broken files."""

import csv
import gzip
import json

import pytest

from dsv3.evals.tasks import Item, Tools, open_task
from tests.evals.data import GSM8K, HUMANEVAL, OWN_CODE, OWN_GSM8K, benchmark


def jsonl(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


def test_gsm8k_has_eight_shots_of_train_in_lm_evals_words(tmp_path):
    jsonl(
        tmp_path / "train.jsonl",
        [{"question": f"q{i}?", "answer": f"1+{i}=<<1+{i}={1 + i}>>{1 + i}\n#### {1 + i}"} for i in range(9)],
    )
    task = open_task("gsm8k", jsonl(tmp_path / "test.jsonl", OWN_GSM8K))
    assert len(task.items) == 4
    first = task.items[0]
    assert first.prompt.startswith("Question: q0?\nAnswer: 1+0=1\n#### 1\n\nQuestion: q1?\n")
    assert first.prompt.endswith(
        "Question: q7?\nAnswer: 1+7=8\n#### 8\n\n" + f"Question: {OWN_GSM8K[0]['question']}\nAnswer:"
    )
    assert first.stop == ("Question:",)
    assert task.settings == {
        "task": "gsm8k",
        "file": "test.jsonl",
        "chat": False,
        "shots": 8,
        "limit": None,
        "reported": "ours",
        "max_tokens": None,
    }
    assert task.grade(first, " 3+4=7\n#### 7", Tools())["ours"]
    chat = open_task("gsm8k", tmp_path / "test.jsonl", chat=True, limit=2)
    assert len(chat.items) == 2
    assert chat.items[0].chat
    assert (
        chat.items[0].prompt
        == OWN_GSM8K[0]["question"] + "\nPlease reason step by step, and put your final answer within \\boxed{}."
    )


def test_the_real_gsm8k_opens_with_its_own_train_as_shots():
    benchmark(GSM8K)
    task = open_task("gsm8k", GSM8K)
    assert len(task.items) == 1319
    assert task.items[0].prompt.count("Question: ") == 9
    assert "<<" not in task.items[0].prompt


def test_mmlu_reads_csv_jsonl_and_parquet_alike(tmp_path):
    question, choices = "Is 2+2\n4?", ["yes", "no", 'a "b", c', "d"]
    for split, count in (("test", 2), ("dev", 5)):
        (tmp_path / split).mkdir()
        with (tmp_path / split / f"high_school_maths_{split}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([[f"{question} {split}{i}", *choices, "C"] for i in range(count)])
    task = open_task("mmlu", tmp_path / "test")
    item = task.items[1]
    assert item.prompt.startswith(
        "The following are multiple choice questions (with answers) about high school maths.\n\nIs 2+2\n4? dev0\nA. yes\nB. no\n"
        'C. a "b", c\nD. d\nAnswer: C\n\n'
    )
    assert item.prompt.endswith('Is 2+2\n4? test1\nA. yes\nB. no\nC. a "b", c\nD. d\nAnswer:')
    assert (item.kind, item.choices, item.gold, item.group) == (
        "choose",
        (" A", " B", " C", " D"),
        "C",
        "high_school_maths",
    )
    rows = [
        {"question": f"{question} test{i}", "choices": choices, "answer": 2, "subject": "high_school_maths"}
        for i in range(2)
    ]
    dev = [{**r, "question": f"{question} dev{i}"} for i, r in enumerate([rows[0]] * 5)]
    jsonl(tmp_path / "test.jsonl", rows)
    jsonl(tmp_path / "dev.jsonl", dev)
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    for name, records in (("test", rows), ("dev", dev)):
        parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / f"{name}.parquet")
    for kind in ("jsonl", "parquet"):
        assert open_task("mmlu", tmp_path / f"test.{kind}").items == task.items
    chat = open_task("mmlu", tmp_path / "test", chat=True).items[0]
    assert chat.prompt.endswith('Is 2+2\n4? test0\n\nA) yes\nB) no\nC) a "b", c\nD) d')
    assert chat.prompt_hash != item.prompt_hash


def test_math_reads_its_folder_and_jsonl(tmp_path):
    for split in ("test", "train"):
        for i in range(4):
            folder = tmp_path / split / "algebra"
            folder.mkdir(parents=True, exist_ok=True)
            record = {
                "problem": f"{split} {i}?",
                "level": "Level 1",
                "type": "Algebra",
                "solution": f"It is $\\boxed{{{i}}}$.",
            }
            (folder / f"{i}.json").write_text(json.dumps(record))
    task = open_task("math", tmp_path / "test")
    item = task.items[2]
    assert (item.id, item.gold, item.group) == ("algebra/2.json", "2", "Algebra")
    assert item.prompt.startswith(
        "Problem:\ntrain 0?\n\nSolution:\nIt is $\\boxed{0}$.\nFinal Answer: The final answer is $0$. I hope it is correct.\n\n"
    )
    assert item.prompt.endswith("Problem:\ntest 2?\n\nSolution:")
    flat = jsonl(
        tmp_path / "test.jsonl",
        [{"problem": "p", "solution": "s", "answer": "\\frac{1}{2}", "subject": "x", "unique_id": "u/1"}],
    )
    chat = open_task("math", flat, chat=True).items[0]
    assert (chat.id, chat.gold, chat.max_tokens) == ("u/1", "\\frac{1}{2}", 8192)


def test_a_hub_is_read_where_it_is_named(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(name, config, split):
        asked.append((name, config, split))
        return OWN_GSM8K * 2

    monkeypatch.setattr(datasets, "load_dataset", load)
    task = open_task("gsm8k", "hub:openai/gsm8k@main:test")
    assert asked == [("openai/gsm8k", "main", "test"), ("openai/gsm8k", "main", "train")]
    assert len(task.items) == 8
    assert task.settings["file"] == "hub:openai/gsm8k@main:test"
    with pytest.raises(ValueError, match="write hub:NAME:SPLIT"):
        open_task("gsm8k", "hub:openai/gsm8k", shots=0)


def test_humaneval_runs_what_each_convention_would(tmp_path):
    path = tmp_path / "own.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in OWN_CODE).encode()))
    task = open_task("humaneval", path)
    item, tools = task.items[0], Tools()
    assert item.prompt == OWN_CODE[0]["prompt"]
    try:
        assert task.grade(item, OWN_CODE[0]["canonical_solution"], tools)["completion"]
        graded = task.grade(item, f"```python\n{OWN_CODE[0]['prompt']}    return sum(xs)\n```", tools)
        assert graded == {"completion": False, "first block": True, "whole module": True}
        assert not any(task.grade(item, "    return None", tools).values())
    finally:
        tools.close()
    assert open_task("humaneval", path, chat=True).items[0].prompt.endswith(OWN_CODE[0]["prompt"])


def test_the_real_humaneval_opens():
    benchmark(HUMANEVAL)
    assert [i.id for i in open_task("humaneval", HUMANEVAL, limit=2).items] == ["HumanEval/0", "HumanEval/1"]


def test_bpb_rolls_over_text_files(tmp_path):
    (tmp_path / "a.txt").write_text("some text")
    assert [(i.kind, i.prompt) for i in open_task("bpb", tmp_path / "a.txt").items] == [("roll", "some text")]
    jsonl(tmp_path / "b.jsonl", [{"text": "one"}, {"text": ""}, {"text": "two"}])
    assert [i.prompt for i in open_task("bpb", tmp_path / "b.jsonl").items] == ["one", "two"]


def test_broken_files_are_named_with_line_and_field(tmp_path):
    path = tmp_path / "test.jsonl"
    cases = {
        '{"question": "a", "answer": "#### 1"}\n{"question"\n': "line 2 is not JSON",
        '{"question": "a", "answer": "#### 1"}\n\n[1]\n': "line 3 holds a list",
        '{"question": "a"}\n': "record 1 has no 'answer'",
        '{"question": "a", "answer": "1"}\n': "no '#### n'",
        "": "holds no records",
    }
    for content, said in cases.items():
        path.write_text(content)
        with pytest.raises(ValueError, match=said):
            open_task("gsm8k", path, shots=0)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="not UTF-8"):
        open_task("gsm8k", path, shots=0)
    with pytest.raises(ValueError, match="give the benchmark's own file"):
        open_task("gsm8k", tmp_path / "none.jsonl", shots=0)
    (tmp_path / "x.csv").write_text("q,a,b,c,d\n")
    with pytest.raises(ValueError, match="row 1 has 5 fields"):
        open_task("mmlu", tmp_path / "x.csv", shots=0)
    jsonl(path, [{"question": "q", "choices": ["a", "b"], "answer": 0}])
    with pytest.raises(ValueError, match="2 choices"):
        open_task("mmlu", path, shots=0)


def test_refusals_say_both_values_and_the_cure(tmp_path):
    path = jsonl(tmp_path / "test.jsonl", OWN_GSM8K)
    with pytest.raises(ValueError, match=r"8 shots need examples.*train.jsonl.*shots_path"):
        open_task("gsm8k", path)
    jsonl(tmp_path / "train.jsonl", OWN_GSM8K)
    with pytest.raises(ValueError, match="8 shots wanted of GSM8K's train, 4 are there"):
        open_task("gsm8k", path)
    with pytest.raises(ValueError, match="task is 'hellaswag'"):
        open_task("hellaswag", path)
    with pytest.raises(ValueError, match="shots=3 with chat"):
        open_task("gsm8k", path, chat=True, shots=3)
    with pytest.raises(ValueError, match="limit is 0"):
        open_task("gsm8k", path, limit=0)


def test_a_prompts_hash_tells_role_kind_and_choices_apart():
    items = [
        Item(id="x", prompt="a"),
        Item(id="x", prompt="a", chat=True),
        Item(id="x", prompt="a", kind="roll"),
        Item(id="x", prompt="b"),
    ]
    items.append(Item(id="x", prompt="a", choices=("b",)))
    assert len({i.prompt_hash for i in items}) == 5
    assert Item(id="y", prompt="a", gold="other").prompt_hash == items[0].prompt_hash
