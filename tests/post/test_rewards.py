"""Rewards: what an answer could do to be paid without being right; graders that fail; the alarm."""

import pytest

from dsv3.evals.sandbox import SandboxError
from dsv3.post.rewards import (
    Monitor,
    MonitorConfig,
    RewardConfig,
    Rewarder,
    after_thought,
    find,
    in_form,
    language_share,
    without_echo,
)
from dsv3.post.tasks import Problem, ReasoningGym


def maths(gold: str, **more) -> Problem:
    return Problem(id="m", prompt=more.pop("prompt", "How much is it?"), answer=gold, kind="maths", **more)


def text(gold: str, **more) -> Problem:
    return Problem(id="t", prompt="Spell it backward, please: abc", answer=gold, **more)


def total(problem: Problem, said: str, *, finished: bool = True, **config) -> float | None:
    return Rewarder(RewardConfig(**config)).score(problem, said, finished=finished).total


@pytest.mark.parametrize("gold", ["", "   ", r"\frac{1}{", "{{{{"])
@pytest.mark.parametrize("answer", ["", r"\boxed{1}", r"\boxed{}"])
def test_a_gold_that_cannot_be_read_drops_the_sample_whatever_the_answer(gold, answer):
    rewarder = Rewarder()
    reward = rewarder.score(maths(gold), answer)
    assert reward.total is None
    assert "dropped" in reward.note
    assert rewarder.counts["unreadable_gold"] == 1
    assert rewarder.score(maths(gold), answer, finished=False).total is None  # else half a group would be dropped


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "   \n",
        r"\boxed{}",
        r"\boxed{3} or \boxed{4}",
        r"\boxed{4} \boxed{3}",
        r"\boxed{3, 4}",
        r"\boxed{3 \text{ or } 4}",
        r"\boxed{3}\boxed{4}\boxed{5}",
        r"\boxed{x}",
        r"\boxed{1+3}",
        r"\boxed{\le 4}",
        r"\boxed{4 \pm 1}",
        r"\boxed{4",
        "<think>the answer is 4",
        r"<think>\boxed{4}</think> I do not know.",
    ],
)
def test_an_answer_that_hedges_or_is_none_earns_nothing(answer):
    assert total(maths("4"), answer) == 0.0


def test_a_right_answer_earns_all():
    assert total(maths("4"), r"<think>2 and 2</think>It is \boxed{4}.") == 1.0
    assert total(maths("1000"), r"\boxed{1,000}") == 1.0
    assert total(text("cba"), " cba ") == 1.0


@pytest.mark.parametrize("answer", [r"\boxed{5000 m}", r"\boxed{5 m}", r"\boxed{5 million km}", r"\boxed{5\%}"])
def test_units_do_not_change_an_answer_into_another(answer):
    assert total(maths("5 km"), answer) == 0.0


def test_a_unit_beside_the_right_number_is_right():
    assert total(maths("5"), r"\boxed{5\text{ km}}") == 1.0
    assert total(maths("50\\%"), r"\boxed{50\%}") == 1.0
    assert total(maths("0.5"), r"\boxed{50}") == 0.0


def test_the_prompt_handed_back_earns_nothing():
    prompt = r"Write your answer as in this example: \boxed{42}. What is 6 times 7?"
    problem = maths("42", prompt=prompt)
    assert total(problem, prompt) == 0.0
    assert total(problem, prompt + " I pass.") == 0.0
    assert total(problem, prompt + r" So \boxed{42}") == 1.0
    assert without_echo("a 12 b", "12") == "a 12 b"  # too short to be an echo


def test_an_answer_that_was_cut_off_earns_nothing():
    assert total(maths("4"), r"\boxed{4}", finished=False) == 0.0
    assert total(text("cba"), "cba", finished=False, format=0.5, only_right=False) == 0.0


def test_a_right_string_inside_a_longer_one_is_not_right():
    assert total(text("cba"), "cba abc bca") == 0.0
    assert total(text("cba"), "The answer is cba") == 0.0
    assert total(text("cba"), r"so \boxed{cba}", answer="boxed") == 1.0
    assert total(text("cba"), r"\boxed{cba} \boxed{abc}", answer="boxed") == 0.0
    assert total(text("cba"), "<answer>cba</answer>", answer="tag") == 1.0
    assert total(text("cba"), "<answer>cba</answer><answer>abc</answer>", answer="tag") == 0.0


def test_reasoning_gym_pays_shares_and_we_do_not():
    problem = ReasoningGym("chain_sum", min_terms=2, max_terms=2, min_digits=1, max_digits=1).problem(3)
    assert problem.check is not None
    padded = f"{problem.answer} {problem.answer}0"
    assert problem.check(padded) > 0
    assert total(problem, padded) == 0.0
    assert total(problem, problem.answer) == 1.0


def test_the_form_is_paid_to_right_answers_only_unless_told():
    wrong, right = "<think>x</think><answer>no</answer>", "<think>x</think><answer>cba</answer>"
    form = dict(think=True, answer="tag", format=0.5)
    assert total(text("cba"), right, **form) == 1.5
    assert total(text("cba"), "<answer>cba</answer>", **form) == 1.0
    assert total(text("cba"), wrong, **form) == 0.0
    assert total(text("cba"), wrong, **form, only_right=False) == 0.5


@pytest.mark.parametrize(
    ("answer", "kept"),
    [
        ("<think>a</think>\n\n<answer>b</answer>", True),
        ("<think> </think><answer>b</answer>", False),
        ("<think>a</think><think>c</think><answer>b</answer>", False),
        ("<answer>b</answer>", False),
        ("<think>a</think>", False),
        ("<think>a</think><answer>b</answer><answer>", False),
        ("x <think>a</think><answer>b</answer>", False),
        ("<think>a<answer>b</answer>", False),
    ],
)
def test_the_form_is_kept_once_or_not_at_all(answer, kept):
    assert in_form(answer, RewardConfig(think=True, answer="tag", format=1.0)) is kept


def test_what_follows_the_thought():
    assert after_thought("no thought") == "no thought"
    assert after_thought("<think>a</think> b") == "b"
    assert after_thought("a</think>b") == "b"
    assert after_thought("<think>a") is None
    assert after_thought("<think>a</think>b<think>c") is None
    assert find("", "whole") is None


# -- code ----------------------------------------------------------------------------------------------------------------


class Box:
    """Runs nothing: what a program would have come to is in its text."""

    workers = 1

    def run(self, code, *, tests=None):
        if "crash" in code:
            raise SandboxError("the keeper ended")
        ok = "return a + b" in code and tests == "assert add(1, 2) == 3"
        return type("Result", (), {"ok": ok, "killed": None, "stderr": "AssertionError"})()


def code(answer: str, sandbox=None) -> tuple[float | None, Rewarder]:
    rewarder = Rewarder(sandbox=sandbox or Box())
    problem = Problem(id="c", prompt="Write add(a, b).", answer="assert add(1, 2) == 3", kind="code")
    return rewarder.score(problem, answer).total, rewarder


def test_code_is_paid_for_passing_tests_alone():
    good = "def add(a, b):\n    return a + b\n"
    assert code(f"Here:\n```python\n{good}```")[0] == 1.0
    assert code(f"```python\n{good}```\nBetter:\n```python\npass\n```")[0] == 0.0  # the last block counts
    assert code(f"```bash\npython a.py\n```\nruns\n```python\n{good}```\n```text\n3\n```\nis printed")[0] == 1.0
    assert code(good)[0] == 0.0  # no block
    assert code(f"```python\n{good}")[0] == 0.0  # never closed
    assert code("")[0] == 0.0
    assert code(f"<think>```python\n{good}```</think>done")[0] == 0.0


def test_a_grader_that_crashes_costs_the_sample_and_not_the_run():
    reward, rewarder = code("```python\ncrash\n```")
    assert reward is None
    assert rewarder.counts["crashed"] == 1
    assert "keeper ended" in rewarder.last_fault

    def broken(answer: str) -> float:
        raise RecursionError("deep")

    problem = Problem(id="x", prompt="?", answer="", kind="checked", check=broken)
    assert rewarder.score(problem, "a").total is None
    assert rewarder.counts["crashed"] == 2


def test_programs_run_in_the_real_sandbox():
    from dsv3.evals.sandbox import Sandbox

    with Sandbox(isolation="best-effort", workers=2) as box:
        rewarder = Rewarder(sandbox=box)
        problem = Problem(id="c", prompt="Write add(a, b).", answer="assert add(1, 2) == 3", kind="code")
        good = "```python\ndef add(a, b):\n    return a + b\n```"
        cheat = "```python\nimport sys\nsys.exit(0)\n```"
        patched = "```python\nclass Any(int):\n    __eq__ = lambda *a: True\ndef add(a, b):\n    return 7\n```"
        rewards = rewarder.score_all([(problem, answer, True) for answer in (good, cheat, patched, good)])
    assert [r.total for r in rewards] == [1.0, 0.0, 0.0, 1.0]


def test_code_without_a_sandbox_is_refused():
    with pytest.raises(ValueError, match="sandbox"):
        Rewarder().score(Problem(id="c", prompt="?", answer="assert 1", kind="code"), "x")


# -- language ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "language", "share"),
    [
        ("the sum is two", "en", 1.0),
        ("the sum 总和", "en", 0.5),
        ("总和是二", "zh", 1.0),
        ("сумма равна two", "ru", 2 / 3),
        (r"the area is $\pi r^2$ and `código`", "en", 1.0),
        (r"\boxed{x}", "en", 0.0),
        ("", "en", 0.0),
        ("12 + 30", "zh", 0.0),
        ("x y z", "en", 0.0),  # variables are no words
    ],
)
def test_language_is_the_share_of_words_in_its_script(said, language, share):
    assert language_share(said, language) == pytest.approx(share)


def test_a_language_without_a_known_script_is_refused_and_not_rewarded():
    with pytest.raises(ValueError, match="'xx'"):
        language_share("a", "xx")
    rewarder = Rewarder(RewardConfig(language=0.1))
    assert rewarder.score(text("cba", language="xx"), "cba").total is None
    assert rewarder.counts["crashed"] == 1


def test_language_is_added_to_a_right_answer():
    problem = maths("4", language="en")
    assert total(problem, r"The answer is \boxed{4}", language=0.1) == pytest.approx(1.1)
    assert total(problem, r"答案是 \boxed{4}", language=0.1) == 1.0
    assert total(problem, r"The answer is \boxed{5}", language=0.1) == 0.0


def test_settings_that_make_no_sense_are_refused():
    for wrong in (dict(accuracy=-1.0), dict(accuracy=0.0), dict(answer="somewhere"), dict(format=float("nan"))):
        with pytest.raises(ValueError):
            RewardConfig(**wrong)


# -- the alarm -----------------------------------------------------------------------------------------------------------


def alarms(pairs, **config) -> list[int]:
    monitor = Monitor(MonitorConfig(window=2, **config))
    return [i for i, (reward, accuracy) in enumerate(pairs) if monitor.add(reward, accuracy, 200)]


def test_reward_that_rises_while_accuracy_falls_is_an_alarm():
    fine = [(0.2, 0.20), (0.3, 0.30), (0.5, 0.50), (0.6, 0.60), (0.7, 0.65), (0.8, 0.70)]
    assert alarms(fine) == []
    hacked = [*fine[:4], (0.8, 0.5), (0.9, 0.3), (1.0, 0.1)]
    assert alarms(hacked) == [5, 6]
    assert alarms([(r / 2, a) for (r, _), (_, a) in zip(reversed(fine), reversed(fine))]) == []  # both fall: no hacking


def test_noise_of_a_few_questions_is_no_alarm():
    assert alarms([(0.2, 0.50), (0.2, 0.50), (0.4, 0.49), (0.5, 0.48)]) == []


def test_the_alarm_comes_back_from_its_state():
    monitor, again = Monitor(MonitorConfig(window=1)), Monitor(MonitorConfig(window=1))
    monitor.add(0.1, 0.9, 100)
    again.load_state_dict(monitor.state_dict())
    assert again.add(0.9, 0.1, 100) == monitor.add(0.9, 0.1, 100) is not None
