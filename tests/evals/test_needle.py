"""Needles: exact lengths, the right depth, bounded memory, and a map that shows what was found."""

import dataclasses

import pytest

from dsv3.data.tokenizer import Tokenizer
from dsv3.evals.models import Answer, EngineModel, Sampling
from dsv3.evals.needle import draw_heat_map, heat, needle_task
from dsv3.evals.run import read_log, run
from dsv3.infer.engine import Engine
from tests.infer.letters import Letters
from tests.model.tiny import TINY, random_model


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(
        ["The baker counted three lamps before noon. Question: the magic number of Oslo is"] * 3, 340
    )


def test_prompts_have_their_length_and_the_needle_its_depth(tokenizer):
    task = needle_task(tokenizer, lengths=(200, 1000, 3000), depths=(0, 0.5, 1))
    assert len(task.items) == 9
    for item in task.items:
        assert len(tokenizer.encode(item.prompt)) == item.about["length"]
        at = item.prompt.index("The magic number of") / len(item.prompt)
        assert abs(at - item.about["depth"]) < (0.45 if item.about["length"] == 200 else 0.12)
        assert item.prompt.count(item.gold) == 1
        assert item.prompt.endswith(
            f"is the magic number of {item.about['city']}?\nAnswer: The magic number of {item.about['city']} is"
        )
    assert (
        needle_task(tokenizer, lengths=(200,), depths=(0,)).items
        == needle_task(tokenizer, lengths=(200,), depths=(0,)).items
    )


def test_the_longest_prompt_of_the_report_can_be_made(tokenizer):
    (item,) = needle_task(tokenizer, lengths=(131008,), depths=(0.5,)).items
    assert len(tokenizer.encode(item.prompt)) == 131008


def test_own_filler_is_used_and_checked(tokenizer):
    (item,) = needle_task(tokenizer, lengths=(300,), depths=(0.5,), filler="Round and round it goes. ").items
    assert "Round and round it goes." in item.prompt
    assert len(tokenizer.encode(item.prompt)) == 300
    with pytest.raises(ValueError, match=r"holds \d+ itself"):
        needle_task(tokenizer, lengths=(300,), depths=(0.5,), filler=f"word {item.gold} word ")
    with pytest.raises(ValueError, match="a length of 20 tokens holds no text"):
        needle_task(tokenizer, lengths=(20,))
    with pytest.raises(ValueError, match="depths from 0 to 1"):
        needle_task(tokenizer, depths=(2,))


def test_only_the_number_itself_is_right(tokenizer):
    task = needle_task(tokenizer, lengths=(200,), depths=(0,))
    (item,) = task.items
    graded = {
        text: task.grade(item, text, None)["found"]
        for text in (f" {item.gold}.", f"1234567 {item.gold}", "", "it is 7", item.gold[:-1])
    }
    assert list(graded.values()) == [True, False, False, False, False]


def test_a_heat_map_shows_lengths_by_depths(tokenizer, tmp_path):
    task = needle_task(tokenizer, lengths=(200, 400), depths=(0, 0.5, 1))

    class Nearsighted:
        name = "nearsighted"

        def ask(self, items, sampling):
            for item in items:
                near = item.about["length"] == 200 or item.about["depth"] == 1
                yield item, [Answer(f" {item.gold if near else 1111111}.", "stop")]

    told = run(Nearsighted(), [task], tmp_path)["tasks"]["needle"]
    assert told["score"] == pytest.approx(4 / 6)
    assert told["groups"] == {"200": {"mean": 1.0, "items": 3}, "400": {"mean": pytest.approx(1 / 3), "items": 3}}
    rows = read_log(tmp_path / "needle.jsonl")[1]
    assert heat(rows) == ([200, 400], [0, 0.5, 1], [[1, 0], [1, 0], [1, 1]])
    missed = [{**row, "samples": [{"grades": {"found": False}}] * len(row["samples"])} for row in rows]
    assert heat([*rows, *missed])[2] == [[0.5, 0], [0.5, 0], [0.5, 0.5]]
    path = draw_heat_map(rows, tmp_path / "map.svg")
    assert "100%" in path.read_text() or path.stat().st_size > 5000
    assert draw_heat_map(rows, tmp_path / "map.png").read_bytes()[:4] == b"\x89PNG"


def test_long_prompts_are_read_in_chunks_of_bounded_size():
    config = dataclasses.replace(TINY, max_position_embeddings=4096, eos_token_id=95)
    engine = Engine(random_model(config), Letters(), cache_gb=0.02, step_tokens=128, max_running=4)
    seen, forward = [], engine.runner.forward
    engine.runner.forward = lambda segments: (seen.append(sum(len(s.tokens) for s in segments)), forward(segments))[1]
    task = needle_task(engine.tokenizer, lengths=(1024, 3000), depths=(0.5,), max_tokens=4)
    replies = {item.id: reply for item, reply in EngineModel(engine).ask(task.items, Sampling())}
    assert all(len(reply) == 1 for reply in replies.values())
    assert max(seen) <= 128
    assert sum(seen) >= 3000  # the shorter one shares its beginning
