"""The grader of mathematics: right in every honest writing, and hard to fool."""

import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.evals.grade import UnreadableGold, clean, find_answer, math_equal, number
from dsv3.evals.symbolic import Judge
from tests.evals.data import GSM8K, OWN_GSM8K, benchmark


@pytest.mark.parametrize(
    ("gold", "text"),
    [
        ("2\\sqrt{3}", r"\boxed{\sqrt{12}}"),
        ("\\frac{1}{2}", r"\boxed{0.5}"),
        ("\\frac12", r"so $x = \frac{1}{2}$"),
        ("-\\frac{1}{3}", r"\boxed{-1/3}"),
        ("1\\frac{1}{2}", r"\boxed{\frac{3}{2}}"),
        ("(1,2)", r"\boxed{(1, 2)}"),
        ("[2,5)", r"\boxed{[2,5)}"),
        ("1,-2", r"\boxed{-2, 1}"),
        ("1,2", r"The roots are \boxed{1} and \boxed{2}."),
        ("\\{1,2,3\\}", r"\boxed{\{3, 2, 1\}}"),
        ("\\text{Evelyn}", "The answer is Evelyn."),
        ("C", r"\boxed{\text{(C)}}"),
        ("x^2+1", r"\boxed{1+x^2}"),
        ("y=2x+3", r"\boxed{y=3+2x}"),
        ("2x", r"\boxed{y=2x}"),
        ("25", "The answer is 25%."),
        ("0.25", r"\boxed{25\%}"),
        ("5 \\text{ m}", r"\boxed{5\ \text{meters}}"),
        ("5 \\text{ m}", r"\boxed{5}"),
        ("90^\\circ", r"\boxed{90}"),
        ("1000000", r"\boxed{10^6}"),
        ("4", r"First I get \boxed{3}. Wait, that is wrong: \boxed{4}"),
        ("4", "<think>It could be \\boxed{5}.</think>\nIt is \\boxed{4}."),
        ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", r"\boxed{\begin{pmatrix} 1 \\ 2 \end{pmatrix}}"),
        ("\\frac{\\pi}{2}", r"\boxed{\pi/2}"),
        ("18", "She sells 9 eggs.\nThat makes 9 * 2 = 18"),
        ("18", "#### 18\n\nQuestion: another one?\nAnswer: 5\n#### 5"),
        ("18", "答案是18。"),
        ("9", "Final Answer: The final answer is $9$. I hope it is correct."),
        ("\\$36", "The answer is $\\$36$."),
        ("2516_8", "The answer is $2516_8$."),
        ("0.\\overline{3}", "\\boxed{\\frac{1}{3}}"),
        ("2", "\\boxed{\\boxed{2}}"),
        ("(-\\infty,0)\\cup(0,\\infty)", "\\boxed{(-\\infty, 0) \\cup (0, \\infty)}"),
        ("1 \\pm \\sqrt{19}", "\\boxed{1\\pm\\sqrt{19}}"),
        ("x \\in [-2,7]", "\\boxed{[-2,7]}"),
    ],
)
def test_right_answers(gold, text):
    assert math_equal(gold, text)


@pytest.mark.parametrize(
    ("gold", "text"),
    [
        ("3", r"\boxed{3} or \boxed{4}"),
        ("4", r"\boxed{3} or \boxed{4}"),
        ("4", r"\boxed{3} \boxed{4}"),
        ("3", r"\boxed{3} ... no, wait: \boxed{4}"),
        ("4", r"\boxed{3,4}"),
        ("4", r"\boxed{3 \text{ or } 4}"),
        ("3", "#### 3\n#### 4"),
        ("4", "#### 3\n#### 4"),
        ("4", r"\boxed{3} #### 4"),
        ("5", "The answer is 3 or 5."),
        ("5", "The answer is 3. The answer is 5."),
        ("5", "5 or 6"),
        ("4", ""),
        ("4", "   \n"),
        ("4", r"\boxed{}"),
        ("4", r"Reason step by step and put your final answer within \boxed{}. 4"),
        ("4", r"\boxed{4"),
        ("4", r"<think>so it is \boxed{4}"),
        ("4", r"<think>two and two</think><think>so it is \boxed{4}"),
        ("408", r"What is 12*34? \boxed{12*34}"),
        ("408", r"\boxed{12 \times 34}"),
        ("4", "What is 2+2, is it 4?"),
        ("5 \\text{ m}", r"\boxed{5 \text{ km}}"),
        ("\\$5", r"\boxed{5 \text{ cents}}"),
        ("5", r"\boxed{5 \text{ million}}"),
        ("5", r"\boxed{5x}"),
        ("5", r"\boxed{5\pi}"),
        ("5\\%", r"\boxed{5 \text{ kg}}"),
        ("1000", "10,00"),
        ("1000", r"\boxed{1,00,0}"),
        ("[2,5)", r"\boxed{(2,5)}"),
        ("(1,2)", r"\boxed{(2,1)}"),
        ("1,2", r"\boxed{1,2,3}"),
        ("2x", r"\boxed{x+x=2x=3}"),
        ("2\\sqrt{3}", r"\boxed{9^{9^{9^{9}}}}"),
        ("x+1", r"\boxed{True}"),
        ("A", r"\boxed{A, B, C, D}"),
        ("A", "A B C D"),
        ("16", "16 17 18"),
        ("7", "answer"),
        ("42", "The answer is not 42."),
        ("42", "The answer isn't 42."),
        ("42", "I don't know. Maybe 42?"),
        ("42", r"\boxed{42 \pm 1}"),
        ("42", r"\boxed{>42}"),
        ("42", r"\boxed{[42]}"),
        ("1/3", r"\boxed{0.33333333}"),
        ("1.5", r"\boxed{1,5}"),
        ("1000", r"\boxed{1.000}"),
        ("-5", r"\boxed{5}"),
        ("5", r"\boxed{|-5|}"),
        ("7", r"\boxed{\text{the answer}}"),
        ("7", r"\boxed{nan}"),
        ("7", r"\boxed{__import__('os')._exit(0)}"),
    ],
)
def test_wrong_answers_and_tricks(gold, text):
    assert not math_equal(gold, text)


@pytest.mark.parametrize("gold", ["", "  ", "$$", "\\boxed{}", "\\frac{", "???", "#### ", "}{", "x" * 1000])
def test_a_gold_that_cannot_be_read_is_never_right(gold):
    for text in ("\\boxed{1}", "", gold, f"\\boxed{{{gold}}}"):
        with pytest.raises(UnreadableGold, match="cannot be read"):
            math_equal(gold, text)


def writings(gold: str) -> list[str]:
    """Ten ways and more to write a number of GSM8K."""
    plain = gold.replace(",", "")
    sign, digits = ("-", plain[1:]) if plain.startswith("-") else ("", plain)
    comma = sign + (f"{int(digits):,}" if digits.isdigit() else digits)
    decimal = plain + ".0" if digits.isdigit() else plain + "0"
    return [
        f"Some steps.\n#### {gold}",
        f"Thus $3 + 4$. The answer is {comma}.",
        f"\\boxed{{{plain}}}",
        f"so the total is $\\boxed{{{comma.replace(',', '{,}')}}}$.",
        f"The final answer is ${decimal}$. I hope it is correct.",
        f"Answer: {sign}${comma.lstrip('-')}",
        f"**Answer:** {plain}",
        f"2 + 5 is no matter.\nIn all she has {comma} apples.",
        f"x = {decimal}",
        f"\\boxed{{{sign}\\${comma.lstrip('-').replace(',', chr(92) + ',')}}}",
        f"<think>maybe 12</think>The answer is {comma} dollars.",
        f"\\[ \\boxed{{{plain}\\text{{ miles}}}} \\]",
    ]


def check_writings(items):
    items = {item["answer"].rsplit("####", 1)[1].strip(): item for item in items}.values()  # a number once
    for item in items:
        gold = item["answer"].rsplit("####", 1)[1].strip()
        value = number(gold)[0]
        other = str(float(value) + 1) if value.denominator > 1 else str(value + 1)
        for right, wrong in zip(writings(gold), writings(other)):
            assert math_equal(gold, right), (gold, right)
            assert not math_equal(gold, wrong), (gold, wrong)
        assert math_equal(item["answer"], item["answer"])  # the benchmark's own solution


def test_gold_answers_are_right_in_ten_writings_and_others_wrong():
    check_writings(OWN_GSM8K)


def test_all_gsm8k_answers_are_right_in_ten_writings_and_others_wrong():
    items = benchmark(GSM8K)
    check_writings(items)
    assert all(math_equal(item["answer"].rsplit("####", 1)[1], item["answer"]) for item in items)


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet="0123456789\\{}boxed$#.,-+*/^() \nansweris%", max_size=60))
def test_any_text_gets_a_verdict_and_only_texts_with_the_number_are_right(text):
    if math_equal("7319", text):
        assert "7319" in clean(text).replace(",", "").replace("+", "").replace(" ", "")


@settings(max_examples=100, deadline=None)
@given(st.fractions(max_denominator=1000), st.fractions(max_denominator=1000))
def test_two_fractions_are_equal_exactly_if_they_are(a, b):
    written = f"\\boxed{{\\frac{{{b.numerator * 3}}}{{{b.denominator * 3}}}}}"
    assert math_equal(str(a), written) is (a == b)


def test_long_and_nasty_texts_take_no_time():
    for text in (
        "\\boxed{" * 20_000,
        "the answer is " * 20_000,
        "(" * 50_000,
        "\nQuestion:" * 20_000,
        "1," * 50_000,
        "#### " * 30_000,
    ):
        assert not math_equal("7319", text)
        assert not math_equal("1,2", text)


def test_it_works_off_the_main_thread():
    said = []
    thread = threading.Thread(target=lambda: said.append(math_equal("2\\sqrt{3}", r"\boxed{\sqrt{12}}")))
    thread.start()
    thread.join()
    assert said == [True]


def test_a_question_that_takes_too_long_is_wrong_and_the_next_is_answered():
    judge = Judge(seconds=3)
    try:
        assert not judge.equal("x", r"\sum_{n=1}^{10^{9}} \frac{1}{n^n}" + "^{9^{9^{9}}}")
        assert judge.equal("x+1", "1+x")
        process = judge._process
        process.kill()
        process.wait()
        assert not judge.equal("x+1", "1+x")
        assert judge.equal("x+1", "1+x")
    finally:
        judge.close()


def test_the_answer_is_found_where_it_stands():
    assert find_answer(r"\boxed{\frac{1}{\boxed{2}}}") == r"\frac{1}{\boxed{2}}"
    assert find_answer("so 5 = 5") == "5"
    assert find_answer("no number here") is None
    with pytest.raises(TypeError, match="not a string"):
        math_equal("3", None)
