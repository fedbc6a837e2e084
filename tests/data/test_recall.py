"""Recall: rules for code and maths, and a classifier that finds more of what its seeds are."""

import bisect
import heapq
import inspect
import random
import re
from pydoc_data.topics import topics

import numpy as np
import pytest

from dsv3.data.recall import CODE, MATHS, PROSE, Classifier, kind_of, widen
from tests.data.planted import CHINESE, PROGRAM
from tests.data.planted import MATHS as FORMULAS

PAGES = [text[:2000] for _, text in sorted(topics.items()) if len(text) > 600][:40]


SHOP = """Anna buys apples at the market. Each bag of apples costs her three dollars. Bela pays twice as much for pears.
How many dollars do they spend in all? The shop sells a dozen eggs for four dollars. She has ten dollars left in her purse.
How much change does Bela get back? He buys half as many pears as apples."""
TRAIN = """A train leaves the station at noon. It travels sixty miles in an hour. Carl drives to the station at half the speed.
How far apart are they after three hours? The second train is twenty miles behind. How long does the trip take him?
Dora walks the last two miles home. What is the average speed of the trip?"""


def word_problem(seed: int, *pools: str) -> str:
    """Six sentences out of the pools."""
    sentences = [part for pool in pools for part in re.findall(r"[^.?]+[.?]", " ".join(pool.split()))]
    return "".join(random.Random(seed).sample(sentences, 6)).strip()


@pytest.mark.parametrize(
    "text",
    [
        PROGRAM,
        inspect.getsource(heapq),
        inspect.getsource(bisect),
        "#include <stdio.h>\n\nint main(void) {\n  printf(\"hi\\n\");\n  return 0;\n}\n",
        "SELECT name,\n  count(*)\nFROM people\nWHERE age > 3;\n",
        "const f = (x) => {\n  return x * 2;\n};\nconsole.log(f(2));\n",
        "fn main() {\n    let x = 5;\n    println!(\"{}\", x);\n}\n",
        "#!/bin/sh\nset -e\nif [ -f x ]; then\n  echo done\nfi\nexport PATH=/bin\n",
        '{\n  "name": "x",\n  "values": [1, 2],\n  "inner": {\n    "a": 1\n  }\n}\n',
    ],
)  # fmt: skip
def test_code_of_many_languages_is_code(text):
    assert kind_of(text) == CODE


def test_formulas_and_calculations_are_maths_and_prose_is_neither():
    assert kind_of(FORMULAS) == MATHS
    assert kind_of("We know 3 + 4 = 7 and 7 * 2 = 14, so 14 - 4 = 10 is left.") == MATHS
    assert (
        kind_of("It costs $5 or, with a bag, $6. They paid $11 in all, and came back the week after that for more.")
        == PROSE
    )
    assert kind_of(CHINESE) == PROSE
    assert sum(kind_of(page) == PROSE for page in PAGES) >= 0.9 * len(PAGES)


def test_a_classifier_knows_its_seeds_kind_and_is_the_same_every_time(tmp_path):
    seeds = [word_problem(n, SHOP) for n in range(20)]
    classifier = Classifier.train(seeds, PAGES[:20])
    assert classifier.score(word_problem(77, SHOP)) > 0.7
    assert max(classifier.score(page) for page in PAGES[20:]) < 0.3
    again = Classifier.train(seeds, PAGES[:20])
    assert np.array_equal(classifier.weights, again.weights)
    classifier.save(tmp_path / "c.npz")
    assert Classifier.load(tmp_path / "c.npz").score(PAGES[0]) == classifier.score(PAGES[0])


def test_widening_finds_what_is_like_what_was_found():
    """Seeds speak of shops; of the rare word problems in the sample some speak of both, some of trains alone."""
    seeds = [word_problem(n, SHOP) for n in range(20)]
    hidden = [word_problem(n, SHOP, TRAIN) for n in range(8)] + [word_problem(n, TRAIN) for n in range(8)]
    pages = [text[at : at + 400] for text in topics.values() for at in range(0, len(text), 600)]
    unseen = [word_problem(n, TRAIN) for n in range(100, 120)]
    found = {}
    for rounds in (1, 4):
        classifier, recalled = widen(seeds, [*hidden, *pages], rounds=rounds)
        assert recalled == sorted(recalled)
        assert not any(classifier.score(page) >= 0.5 for page in pages)
        found[rounds] = sum(classifier.score(text) >= 0.5 for text in unseen)
    assert found[1] < 10 < found[4]


def test_too_few_seeds_and_files_that_are_no_classifier_are_refused(tmp_path):
    with pytest.raises(ValueError, match="9 seeds and 20 other texts: a classifier needs at least 10"):
        Classifier.train(PAGES[:9], PAGES[9:29])
    (tmp_path / "x.npz").write_bytes(b"PK no zip")
    with pytest.raises(ValueError, match=r"x\.npz is no classifier"):
        Classifier.load(tmp_path / "x.npz")
    with pytest.raises(ValueError, match="is no classifier"):
        Classifier.load(tmp_path / "gone.npz")
