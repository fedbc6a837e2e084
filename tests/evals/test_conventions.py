"""Each convention does what its source does, and the references of the benchmarks pass under it."""

import ast

import pytest

from dsv3.evals.conventions import (
    choose,
    gsm8k_grades,
    humaneval_programs,
    humaneval_tests,
    math_gold,
    math_grades,
    mmlu_grades,
    mmlu_letter,
    spread,
)
from dsv3.evals.grade import UnreadableGold
from dsv3.evals.sandbox import Limits, Program, Sandbox
from tests.evals.data import HUMANEVAL, OWN_CODE, benchmark


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("3+4 = 7\n#### 7", "ours strict flexible math-verify report"),
        ("The answer is 7.", "ours flexible math-verify report"),
        ("Answer: 7", "ours flexible simple-evals math-verify report"),
        ("\\boxed{7}", "ours flexible math-verify report"),
        ("#### 7\n\nQuestion: next?\nAnswer: 1+1\n#### 2", "ours strict report"),
        ("It is seven", ""),
        ("#### 7 and then 8 more", "strict"),
        ("", ""),
    ],
)
def test_one_response_under_every_gsm8k_convention(text, right):
    graded = gsm8k_grades("3 + 4 = <<3+4=7>>7\n#### 7", text)
    names = {name.removeprefix("lm-eval ") for name, ok in graded.items() if ok}
    assert names == set(right.split())


def test_gsm8k_conventions_agree_with_lm_eval_on_its_own_filters():
    pytest.importorskip("lm_eval")
    from lm_eval.filters.extraction import RegexFilter

    strict = RegexFilter(r"#### (\-?[0-9\.\,]+)")
    flexible = RegexFilter("(-?[$0-9.,]{2,})|(-?[0-9]+)", group_select=-1)
    texts = [
        "#### 1,200.",
        "#### -3 #### 4",
        "cost $1,200.",
        "it is 5",
        "none",
        "....",
        "#### .",
        "Answer: $ 12.50 each",
        "1,200 or 7",
    ]
    for gold in ("1,200", "-3", "5", "12.50"):
        for text in texts:
            graded = gsm8k_grades(f"x\n#### {gold}", text)
            for name, filter in (("lm-eval strict", strict), ("lm-eval flexible", flexible)):
                found = filter.apply([[text]], [{}])[0][0]
                assert graded[name] is (_normal(found) == _normal(f"x\n#### {gold}")), (gold, text, name)


def _normal(text: str) -> str:
    """As lm-eval's exact_match does with gsm8k.yaml's settings."""
    import numpy as np
    from lm_eval.api.metrics import exact_match_hf_evaluate

    ignore = [",", "\\$", "(?s).*#### ", "\\.$"]
    for guess in (text, text.lower()):
        out = exact_match_hf_evaluate(
            predictions=[text], references=[guess], regexes_to_ignore=ignore, ignore_case=True
        )
        assert np.isclose(out["exact_match"], 1.0)
    import re

    for pattern in ignore:
        text = re.sub(pattern, "", text)
    return text.lower()


def test_spread_is_the_gap_between_conventions():
    graded = [gsm8k_grades("#### 7", t) for t in ("#### 7", "The answer is 7.", "Answer: 7", "8")]
    told = spread(graded)
    assert (told["ours"], told["lm-eval strict"], told["simple-evals"], told["spread"]) == (0.75, 0.25, 0.25, 0.5)
    assert spread([]) == {}


def test_math_conventions():
    gold = math_gold(r"So $x=\boxed{\frac{1}{2}}$.")
    assert gold == r"\frac{1}{2}"
    said = {
        r"Final Answer: The final answer is $\frac12$. I hope it is correct.": {"ours", "lm-eval", "math-verify"},
        r"ANSWER: 1/2": {"ours", "simple-evals", "math-verify"},
        r"It is \boxed{0.5}.": {"ours", "math-verify"},
        r"It is \boxed{0.6}.": set(),
    }
    for text, names in said.items():
        assert {name for name, ok in math_grades(gold, text).items() if ok} == names, text
    with pytest.raises(UnreadableGold, match="no \\\\boxed"):
        math_gold("none")


def test_mmlu_letters():
    assert mmlu_letter("So...\nanswer: $C$") == "C"
    assert mmlu_letter("I choose C") is None
    assert mmlu_grades("C", "Answer: C") == {"ours": True, "simple-evals": True}
    assert mmlu_grades("C", "\\boxed{C}") == {"ours": True, "simple-evals": False}
    assert mmlu_grades("C", "Answer: B") == {"ours": False, "simple-evals": False}
    with pytest.raises(UnreadableGold):
        mmlu_grades("E", "Answer: E")
    assert choose([-3.0, -1.0, -2.0]) == 1
    assert choose([-3.0, -2.9], [10, 2]) == 0


def written(item: dict) -> dict[str, str]:
    """A solution in the form that each convention expects."""
    whole = item["prompt"] + item["canonical_solution"]
    return {
        "completion": item["canonical_solution"] + "\n\ndef unrelated(:\n    pass",
        "first block": f"Sure!\n```python\n{whole}```\nThat adds. ```python\nbroken(\n```",
        "whole module": f"Sure! Run\n```bash\npython a.py\n```\nor\n```python\nprint(1)\n```\n```python\n{whole}```\nIt works.",
    }


def broken(item: dict) -> str:
    """The canonical solution, each of its own returns wrapped: right nowhere."""
    tree = ast.parse(item["prompt"] + item["canonical_solution"])
    function = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == item["entry_point"])

    class Wrap(ast.NodeTransformer):
        def visit_FunctionDef(self, node):
            return self.generic_visit(node) if node is function else node

        def visit_Lambda(self, node):
            return node

        def visit_Return(self, node):
            node.value = ast.Tuple([node.value or ast.Constant(None), ast.Constant("wrong")], ast.Load())
            return node

    return ast.unparse(ast.fix_missing_locations(Wrap().visit(tree)))


def programs_of(item: dict) -> list[Program]:
    tests = humaneval_tests(item["test"], item["entry_point"])
    made = [
        Program(code=humaneval_programs(item["prompt"], item["entry_point"], text)[name], tests=tests)
        for name, text in written(item).items()
    ]
    return [*made, Program(code=broken(item), tests=tests)]


def test_solutions_pass_under_each_extraction_and_broken_ones_fail():
    with Sandbox(Limits(seconds=10), workers=2) as box:
        for item in OWN_CODE:
            assert [r.ok for r in box.run_all(programs_of(item))] == [True, True, True, False]


def test_all_canonical_humaneval_solutions_pass_and_mutated_ones_fail():
    items = benchmark(HUMANEVAL)
    assert len(items) == 164
    tests = [humaneval_tests(item["test"], item["entry_point"]) for item in items]
    right = [humaneval_programs(i["prompt"], i["entry_point"], i["canonical_solution"])["completion"] for i in items]
    with Sandbox(Limits(seconds=20), workers=2) as box:
        results = box.run_all(Program(code=code, tests=test) for code, test in zip(right, tests))
        assert [i["task_id"] for i, r in zip(items, results) if not r.ok] == []
        results = box.run_all(Program(code=broken(i), tests=test) for i, test in zip(items, tests))
        assert [i["task_id"] for i, r in zip(items, results) if r.ok] == []
