"""Rollouts: the trainer's own tensors, answers that end at their end token, files that come back to the bit."""

import dataclasses

import numpy as np
import pytest
import torch

from dsv3.infer.engine import Engine
from dsv3.infer.sampling import SamplingParams
from dsv3.post.rollout import (
    Answer,
    Prompt,
    Tally,
    add_reference,
    make_batch,
    read_rollouts,
    same_weights,
    sample,
    write_rollouts,
)
from dsv3.post.tasks import Arithmetic
from tests.post.small import TOKENIZER, policy, rl

EOS = TOKENIZER.eos_id


def prompts(count: int = 3) -> list[Prompt]:
    problems = [Arithmetic().problem(i) for i in range(count)]
    return [Prompt(problem=p, ids=TOKENIZER.encode(p.prompt), number=i) for i, p in enumerate(problems)]


def draw(engine, *, seed: int = 0, group: int = 4, some=None, **more) -> list[list[Answer]]:
    return sample(engine, some or prompts(), group=group, max_tokens=8, seed=seed, decode=TOKENIZER.decode, **more)


def test_an_answer_ends_at_its_end_token_and_knows_all_of_it():
    answers = [a for group in draw(Engine(policy(), TOKENIZER, cache_gb=0.01)) for a in group]
    assert {a.finish for a in answers} == {"stop", "length"}
    for a in answers:
        assert len(a.logprobs) == len(a.tokens) == len(a.routes) <= 8
        assert a.routes.shape[1:] == (2, 3)
        assert (a.tokens[-1] == EOS) == (a.finish == "stop")
        assert EOS not in a.tokens[:-1]
        assert a.finish == "stop" or len(a.tokens) == 8
        assert a.text == TOKENIZER.decode([t for t in a.tokens if t != EOS])


def test_log_probabilities_are_the_model_s_end_token_included():
    model = policy()
    for a in [a for group in draw(Engine(model, TOKENIZER, cache_gb=0.01)) for a in group]:
        with torch.no_grad():
            told = model(torch.tensor([[*a.prompt, *a.tokens]])).log_softmax(-1)[0]
        exact = [float(told[len(a.prompt) - 1 + j, t]) for j, t in enumerate(a.tokens)]
        assert a.logprobs == pytest.approx(exact, abs=1e-5)


def test_an_answer_depends_on_seed_and_question_alone():
    """Not on what else is sampled, on drafts left over, or on how many run at once."""
    model = policy()
    whole = draw(Engine(model, TOKENIZER, cache_gb=0.01))
    one = draw(Engine(model, TOKENIZER, cache_gb=0.01, max_running=2), some=prompts()[1:2])[0]
    assert [a.tokens for a in one] == [a.tokens for a in whole[1]]
    assert [a.logprobs for a in one] == [a.logprobs for a in whole[1]]
    assert all(np.array_equal(a.routes, b.routes) for a, b in zip(one, whole[1]))
    other = draw(Engine(model, TOKENIZER, cache_gb=0.01), seed=1)
    assert [a.tokens for a in other[1]] != [a.tokens for a in whole[1]]


def test_the_engine_is_free_for_the_next_and_counts_its_drafts():
    engine, tally = Engine(policy(), TOKENIZER, cache_gb=0.01), Tally()
    draw(engine, tally=tally)
    assert not engine.busy
    assert 0 <= tally.acceptance()[0] <= 1
    assert tally.drafted[0] > 0
    first = list(tally.drafted)
    draw(engine, tally=tally, seed=5)
    assert tally.drafted[0] > first[0]
    engine.forget()


def test_greedy_answers_are_the_engine_s_own():
    model = policy()
    engine = Engine(model, TOKENIZER, cache_gb=0.01)
    mine = draw(engine, group=1, temperature=0.0)
    theirs = list(engine.complete([p.ids for p in prompts()], SamplingParams(max_tokens=8)))
    assert [[t for t in g[0].tokens if t != EOS] for g in mine] == [s.token_ids for s in theirs]


def test_a_sequence_that_fails_is_left_out_and_told():
    model = policy()
    with torch.no_grad():
        model.model.embed_tokens.weight[TOKENIZER.encode("7")[0]] = float("nan")
    tally = Tally()
    some = [
        dataclasses.replace(p, ids=TOKENIZER.encode(text)) for p, text in zip(prompts(2), ("say 7", "say something"))
    ]
    groups = draw(Engine(model, TOKENIZER, cache_gb=0.01), some=some, tally=tally)
    assert groups[0] == []
    assert tally.failed >= 4
    assert "finite" in tally.last_fault


# -- weights -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_engine_reads_the_tensors_that_are_trained(tmp_path, precision):
    trainer, rounds = rl(tmp_path, precision=precision)
    assert rounds.engine.model is trainer.twin
    assert same_weights(rounds.engine, trainer.twin)
    if precision == "float32":  # the masters themselves
        assert same_weights(rounds.engine, trainer.model)
    before = [p.data_ptr() for p in rounds.engine.model.parameters()]
    trainer.step()
    assert before == [p.data_ptr() for p in rounds.engine.model.parameters()]


def test_an_update_is_in_the_next_rollout_and_old_pages_are_not(tmp_path):
    """After a change of weights the same question, found in pages before, is answered by the new ones."""
    trainer, rounds = rl(tmp_path)
    some = [dataclasses.replace(prompts()[0], ids=(TOKENIZER.encode("a long question ") * 12)[:90])]
    old = draw(rounds.engine, some=some)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.mul_(1.3)
    stale = draw(rounds.engine, some=some)[0]  # what a missing forget() would give
    rounds.engine.forget()
    new = draw(rounds.engine, some=some)[0]
    fresh = draw(Engine(trainer.twin, TOKENIZER, cache_gb=0.01), some=some)[0]
    assert [a.logprobs for a in new] == [a.logprobs for a in fresh]
    assert [a.logprobs for a in new] != [a.logprobs for a in old[0]]
    assert [a.logprobs for a in stale] != [a.logprobs for a in fresh]


# -- files and batches ---------------------------------------------------------------------------------------------------


def test_a_file_of_rollouts_comes_back_to_the_bit(tmp_path):
    answers = [a for group in draw(Engine(policy(), TOKENIZER, cache_gb=0.01)) for a in group]
    for i, a in enumerate(answers):
        a.reward, a.parts, a.note = (None if i == 0 else 0.1 * i), {"accuracy": 0.0}, "line\u2028break\n"
        a.advantage, a.reference, a.used = 0.1 + i / 3, [x - 1 / 3 for x in a.logprobs], i > 0
    write_rollouts(tmp_path / "rollouts" / "r.jsonl", answers)
    again = read_rollouts(tmp_path / "rollouts" / "r.jsonl")
    for a, b in zip(answers, again, strict=True):
        assert np.array_equal(a.routes, b.routes)
        assert dataclasses.replace(a, routes=None) == dataclasses.replace(b, routes=None)
    batches = [make_batch(x[1:], depth=1, layers=2, top_k=3, fresh=True) for x in (answers, again)]
    for field in dataclasses.fields(batches[0]):
        a, b = (getattr(batch, field.name) for batch in batches)
        assert a == b if isinstance(a, bool) else torch.equal(a, b)
    assert [p.name for p in (tmp_path / "rollouts").iterdir()] == ["r.jsonl"]  # nothing half written


def test_a_damaged_file_is_named_by_line(tmp_path):
    path = tmp_path / "r.jsonl"
    write_rollouts(path, draw(Engine(policy(), TOKENIZER, cache_gb=0.01))[0])
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match="line 4"):
        read_rollouts(path)
    with pytest.raises(ValueError, match="no rollouts"):
        read_rollouts(tmp_path / "none.jsonl")


def test_a_batch_lays_each_answer_where_its_prompt_ends():
    a = Answer(
        number=0, choice=0, problem="", question="", gold="", prompt=[5, 6, 7], tokens=[8, 1], logprobs=[-1.0, -2.0]
    )
    b = dataclasses.replace(a, prompt=[5], tokens=[9, 9, 9, 9, 1], logprobs=[-3.0] * 5, advantage=2.0)
    batch = make_batch([a, b], depth=1, layers=2, top_k=3, fresh=True)
    assert batch.tokens.tolist() == [[5, 6, 7, 8, 1, 0], [5, 9, 9, 9, 9, 1]]
    assert batch.targets.tolist() == [[6, 7, 8, 1, 0, 0], [9, 9, 9, 9, 1, 0]]
    assert batch.answer.tolist() == [[False, False, True, True, False], [True] * 5]
    assert batch.old[0].tolist() == [0, 0, -1, -2, 0]
    assert batch.lengths.tolist() == [4, 5]
    assert batch.experts is None
    assert batch.reference is None


def test_the_reference_tells_its_own_log_probabilities():
    model = policy()
    answers = [a for group in draw(Engine(model, TOKENIZER, cache_gb=0.01)) for a in group]
    add_reference(answers, model, vocabulary=TOKENIZER.vocab_size, micro_batch=5)
    for a in answers:
        assert a.reference == pytest.approx(a.logprobs, abs=1e-5)
