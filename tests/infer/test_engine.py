"""The engine: equal to full forwards, whatever is cached, shared, drafted, set aside or running beside it."""

import json
import random
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.infer.engine import Engine
from dsv3.infer.grammar import Matcher, json_schema, regex
from dsv3.infer.sampling import SamplingParams
from tests.infer.letters import Letters, engine
from tests.model.tiny import random_model

LONG = [random.Random(7).randrange(95) for _ in range(150)]


def answer(e: Engine, prompt, **params):
    return next(e.complete([prompt], SamplingParams(**{"ignore_eos": True} | params)))


def greedy(model, ids, count):
    ids = list(ids)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[-count:]


def drain(e: Engine, requests) -> dict:
    """Deltas of every answer until the engine is idle."""
    out = {(r.id, s.choice): [] for r in requests for s in r.sequences}
    while e.busy:
        for delta in e.step():
            out[delta.request, delta.choice].append(delta)
    return out


def tokens_of(deltas):
    return [token for delta in deltas for token in delta.token_ids]


@pytest.mark.parametrize("drafts", [0, 1, 3])
def test_greedy_equals_the_argmax_of_full_forwards(drafts):
    e = engine(drafts=drafts)
    assert answer(e, [5, 9, 33, 2], max_tokens=20).token_ids == greedy(e.model, [5, 9, 33, 2], 20)
    assert e.scheduler.book.held == 0


def test_a_prompt_cut_into_chunks_and_found_in_pages_reads_the_same():
    whole = greedy(engine().model, LONG, 12)
    e = engine(step_tokens=16, max_running=4)
    first, second = answer(e, LONG, max_tokens=12), answer(e, LONG, max_tokens=12)
    assert first.token_ids == second.token_ids == whole
    assert (first.cached, second.cached) == (0, 128)
    assert answer(engine(share=False), LONG, max_tokens=12).cached == 0


def test_an_answer_is_found_by_the_next_turn():
    e = engine()
    said = answer(e, LONG[:60], max_tokens=80)
    turn = [*LONG[:60], *said.token_ids, 7, 8]
    again = answer(e, turn, max_tokens=8)
    assert again.cached == 128
    assert again.token_ids == greedy(e.model, turn, 8)


def test_owners_do_not_share():
    e = engine()
    for salt, cached in ((b"a", 0), (b"b", 0), (b"a", 128)):
        request = e.add(LONG, SamplingParams(max_tokens=2), salt=salt)
        drain(e, [request])
        assert request.cached == cached


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("drafts", [0, 1, 2])
def test_requests_of_all_kinds_together_say_what_each_says_alone(dtype, drafts):
    """With pages for a few of them only, so that some are set aside and taken up again; and once more, from known pages."""
    prompts = [LONG[:n] for n in (3, 64, 65, 100, 150, 20)]
    kinds = [
        SamplingParams(
            max_tokens=40, ignore_eos=True, temperature=t, seed=i, logprobs=1, frequency_penalty=0.1 * (i % 3)
        )
        for i, t in enumerate([0, 0.8] * 3)
    ]
    alone = [next(engine(dtype=dtype, drafts=drafts).complete([p], k)) for p, k in zip(prompts, kinds)]
    e = engine(dtype=dtype, drafts=drafts, cache_gb=PAGES(8, dtype, drafts > 0), step_tokens=24, max_running=6)
    assert e.runner.invariant
    for _ in range(2):
        requests = [e.add(p, k) for p, k in zip(prompts, kinds)]
        parts = drain(e, requests)
        for request, expected in zip(requests, alone):
            assert tokens_of(parts[request.id, 0]) == expected.token_ids
            # Bit for bit: log-probabilities too.
            assert [s for d in parts[request.id, 0] for s in d.scores] == expected.scores
    assert e.stats.preemptions > 0
    assert e.stats.cached_tokens > 0
    assert e.scheduler.book.held == 0


def PAGES(count: int, dtype: torch.dtype = torch.float32, mtp: bool = True) -> float:
    """Gigabytes of so many pages of the tests' model, and page 0."""
    from dsv3.infer.pages import PageStore

    config = random_model().config
    layers = config.num_layers_with_mtp if mtp else config.num_hidden_layers
    return (count + 1) * PageStore.bytes_per_page(config, layers, dtype) / 1e9


@pytest.mark.parametrize("drafts", [1, 2])
def test_speculation_keeps_the_distribution(drafts):
    """Two tokens from a model over few ids, many seeds, with and without drafts: a chi-squared test of the pairs."""
    bias = dict.fromkeys(range(4, 95), -100.0)
    counts = []
    for d in (0, drafts):
        e = engine(drafts=d)
        requests = [
            e.add([5, 9], SamplingParams(max_tokens=4, temperature=1.5, seed=s, logit_bias=bias, ignore_eos=True))
            for s in range(d * 10**6, d * 10**6 + 700)
        ]
        parts = drain(e, requests)
        counts.append(Counter(tuple(tokens_of(parts[r.id, 0])[1:3]) for r in requests))
        if d:
            assert 0.1 < e.stats.accepted[0] / e.stats.drafted[0] < 1
    plain, fast = counts
    chi = sum((plain[k] - fast[k]) ** 2 / (plain[k] + fast[k]) for k in plain | fast)
    # Homogeneity of two samples of equal size: k-1 degrees of freedom, 99.9% below this (Wilson-Hilferty).
    free = len(plain | fast) - 1
    assert chi < free * (1 - 2 / (9 * free) + 3.09 * (2 / (9 * free)) ** 0.5) ** 3


def test_a_perfect_draft_is_always_accepted():
    """A model whose logits do not depend on its input."""
    e = engine()
    with torch.no_grad():
        for name, tensor in e.model.named_parameters():
            if "norm" not in name:
                tensor.zero_()
    e = Engine(e.model, Letters(), cache_gb=0.01)
    sample = answer(e, [3], max_tokens=16)
    assert sample.acceptance == 1.0
    assert sample.drafted == 7  # one token from the prompt, seven pairs, and the last needs no draft


def test_stops_at_an_end_token_and_leaves_it_out():
    free = answer(engine(), [5, 9], max_tokens=12).token_ids
    for drafts in (0, 1):
        e = engine(model={"eos_token_id": (free[4], 95)}, drafts=drafts)
        sample = next(e.complete([[5, 9]], SamplingParams(max_tokens=12)))
        assert sample.token_ids == free[: free.index(free[4])]
        assert sample.finish_reason == "stop"
        longer = next(e.complete([[5, 9]], SamplingParams(max_tokens=12, min_tokens=12)))
        assert len(longer.token_ids) == 12
        assert free[4] not in longer.token_ids[:11]


def test_a_stop_string_ends_the_text_before_it():
    text = answer(engine(), LONG, max_tokens=24).text
    for size in (1, 3):
        stop = text[10 : 10 + size]
        sample = answer(engine(), LONG, max_tokens=24, stop=(stop,))
        assert sample.text == text[: text.index(stop)]
        assert sample.finish_reason == "stop"


def test_several_answers_to_one_prompt_are_independent_and_share_its_pages():
    e = engine()
    request = e.add(LONG, SamplingParams(max_tokens=12, temperature=1.0, n=3, ignore_eos=True))
    parts = drain(e, [request])
    answers = [tokens_of(parts[request.id, choice]) for choice in range(3)]
    assert len({tuple(a) for a in answers}) == 3
    assert [s.cached for s in request.sequences] == [0, 128, 128]
    assert answers[0] == answer(engine(), LONG, max_tokens=12, temperature=1.0).token_ids


def test_scores_are_the_models_own():
    e = engine()
    sample = answer(e, [5, 9, 33], max_tokens=5, logprobs=3, temperature=0.7, logit_bias={4: 5.0}, seed=3)
    with torch.no_grad():
        logprobs = e.model(torch.tensor([[5, 9, 33, *sample.token_ids]])).log_softmax(-1)[0]
    for i, told in enumerate(sample.scores):
        row = logprobs[2 + i]
        assert told.token == sample.token_ids[i]
        assert told.logprob == pytest.approx(float(row[told.token]), abs=1e-4)  # float32, other order of sums
        assert [t for t, _ in told.top] == row.topk(3).indices.tolist()


def test_prompt_scores_are_those_of_a_full_forward_also_from_known_pages():
    e = engine(step_tokens=40, max_running=4)
    with torch.no_grad():
        logprobs = e.model(torch.tensor([LONG])).log_softmax(-1)[0]
    for cached in (0, 128):
        request = e.add(LONG, SamplingParams(max_tokens=0, prompt_logprobs=2))
        parts = drain(e, [request])
        assert request.cached == cached
        assert parts[request.id, 0][-1].finish_reason == "length"
        assert len(request.prompt_scores) == len(LONG)
        assert request.prompt_scores[0] is None
        for i, told in enumerate(request.prompt_scores[1:], 1):
            assert told.logprob == pytest.approx(float(logprobs[i - 1, LONG[i]]), abs=1e-4)
            assert [t for t, _ in told.top] == logprobs[i - 1].topk(2).indices.tolist()
    plain = e.add(LONG, SamplingParams(max_tokens=1))
    drain(e, [plain])
    assert plain.cached == 128


def test_routes_tell_the_experts_behind_each_token():
    e = engine()
    request = e.add([5, 9, 33], SamplingParams(max_tokens=6, routes=True, ignore_eos=True))
    deltas = drain(e, [request])[request.id, 0]
    told = [route for delta in deltas for route in delta.routes]
    tokens = tokens_of(deltas)
    assert len(told) == len(tokens) == 6
    with torch.no_grad():
        experts = e.model.hidden(torch.tensor([[5, 9, 33, *tokens]])).routing.experts
    for i, route in enumerate(told):
        assert [set(layer) for layer in route] == [set(layer) for layer in experts[:, 2 + i].tolist()]


def test_penalties_and_bias_change_the_text_and_drafts_do_not():
    asked = {"max_tokens": 24, "presence_penalty": 1.5, "frequency_penalty": 0.5, "repetition_penalty": 1.2}
    plain, fast = (answer(engine(drafts=d), [5, 9, 33], **asked) for d in (0, 2))
    assert plain.token_ids == fast.token_ids != answer(engine(), [5, 9, 33], max_tokens=24).token_ids
    assert answer(engine(), [5], max_tokens=4, logit_bias={7: 100}).token_ids == [7, 7, 7, 7]


SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "b": {"enum": ["x", "yy"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("drafts", [0, 1, 3])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_grammar_with_drafts_penalties_and_neighbours_gives_valid_json(drafts, temperature):
    e = engine(drafts=drafts)
    requests = [
        e.add(
            LONG[:i],
            SamplingParams(
                max_tokens=100,
                temperature=temperature,
                seed=i,
                grammar=json_schema(SCHEMA),
                frequency_penalty=0.2,
                logprobs=1,
            ),
        )
        for i in range(1, 7)
    ]
    e.add([3], SamplingParams(max_tokens=50, ignore_eos=True))
    parts = drain(e, [*requests, *[s.work.request for s in e.scheduler.waiting if s.work.request not in requests]])
    for request in requests:
        deltas = parts[request.id, 0]
        said = json.loads("".join(d.text for d in deltas))
        assert deltas[-1].finish_reason == "stop"
        assert 0 <= said["a"] <= 99
        assert said["b"] in ("x", "yy")


def test_a_regular_expression_is_followed_to_its_end():
    sample = next(
        engine().complete([[5]], SamplingParams(max_tokens=50, temperature=1.0, grammar=regex("[a-c]{5}-[0-9]{2}")))
    )
    assert len(sample.text) == 8
    assert sample.finish_reason == "stop"


def test_abort_frees_pages_at_once():
    e = engine()
    requests = [e.add(LONG, SamplingParams(max_tokens=50, n=2)), e.add(LONG[:70], SamplingParams(max_tokens=50))]
    for _ in range(3):
        e.step()
    assert e.scheduler.book.held > 0
    for request in requests:
        e.abort(request)
    assert e.scheduler.book.held == 0
    assert not e.busy
    assert e.step() == []


def test_one_sequence_that_breaks_fails_alone():
    e = engine()
    good, bad = (e.add([5, 9, i], SamplingParams(max_tokens=8, ignore_eos=True, logprobs=0)) for i in (1, 2))
    forward, seen = e.runner.forward, []

    def poisoned(segments):
        rows = forward(segments)
        at = 0
        for segment in segments:
            if 2 in segment.tokens and len(segment.tokens) == 3:
                rows[at : at + 3] = float("nan")
                seen.append(segment)
            at += len(segment.tokens)
        return rows

    e.runner.forward = poisoned
    parts = drain(e, [good, bad])
    assert seen
    assert parts[bad.id, 0][-1].finish_reason == "error"
    assert "finite" in parts[bad.id, 0][-1].error
    assert tokens_of(parts[good.id, 0]) == answer(engine(), [5, 9, 1], max_tokens=8).token_ids
    assert e.scheduler.book.held == 0


@pytest.mark.parametrize("drafts", [0, 1])
def test_one_set_aside_draws_nothing_twice_where_a_chunk_ends_with_its_prompt(drafts):
    """Its prompt is 32 tokens, read again by 16 beside a neighbour and its draft: a chunk ends where the answer began."""
    step = 16 + 2 * drafts
    e = engine(drafts=drafts, cache_gb=PAGES(3, mtp=drafts > 0), step_tokens=step, max_running=4, share=False)
    asked = SamplingParams(max_tokens=60, ignore_eos=True, temperature=1.0)
    older, younger = (e.add(LONG[i : i + 32], asked) for i in (0, 40))
    parts = drain(e, [older, younger])
    assert e.stats.preemptions > 0
    for request in (older, younger):
        alone = next(engine(drafts=drafts).complete([request.prompt], asked))
        assert tokens_of(parts[request.id, 0]) == alone.token_ids


def test_a_chain_cut_short_forgets_its_guesses():
    """The answer with no room for the third draft leaves the chain before its neighbour does."""
    e = engine(drafts=3)
    requests = [e.add([5, 9], SamplingParams(max_tokens=n, grammar=regex("[a-z ]{30}"))) for n in (3, 20)]
    parts = drain(e, requests)
    for request, count in zip(requests, (3, 20)):
        assert [d.error for d in parts[request.id, 0] if d.error] == []
        assert len(tokens_of(parts[request.id, 0])) == count


def test_a_grammar_that_breaks_among_guesses_costs_nobody_anything(monkeypatch):
    """Not its own answer either: what is guessed changes how fast a text comes, never which."""
    e = engine(drafts=2)
    asked = SamplingParams(max_tokens=20, grammar=regex("[a-z ]{30}"))
    first, second = e.add([5, 9], asked), e.add([5, 33], asked)
    calm = e.add([7], SamplingParams(max_tokens=20, ignore_eos=True))
    guess, broken = Matcher.guess, first.sequences[0].work.matcher

    def breaks(matcher, token):
        guess(matcher, Letters().encode("!")[0] if matcher is broken else token)  # which the grammar does not allow

    monkeypatch.setattr(Matcher, "guess", breaks)
    parts = drain(e, [first, second, calm])
    assert (first.sequences[0].work.drafted, second.sequences[0].work.drafted > 0) == (0, True)
    for request, prompt, params in ((first, [5, 9], asked), (second, [5, 33], asked), (calm, [7], calm.params)):
        alone = next(engine(drafts=0).complete([prompt], params))
        assert tokens_of(parts[request.id, 0]) == alone.token_ids


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("drafts", [0, 2])
def test_a_request_that_leaves_itself_no_token_is_refused_and_says_nothing_forbidden(drafts, temperature):
    e = engine(drafts=drafts)
    wanted = {Letters().encode("b")[0]: -100.0}
    grammars = [
        SamplingParams(max_tokens=9, temperature=temperature, grammar=regex("a{3}b"), logit_bias=wanted),
        SamplingParams(max_tokens=9, temperature=temperature, logit_bias=dict.fromkeys(range(e._vocab), -100.0)),
    ]
    requests = [e.add([5, 9], params) for params in grammars]
    calm = e.add([7], SamplingParams(max_tokens=20, ignore_eos=True))
    parts = drain(e, [*requests, calm])
    for request, said in zip(requests, (3, 0)):
        last = parts[request.id, 0][-1]
        assert (last.finish_reason, last.refused) == ("error", True)
        assert "logit_bias" in last.error
        assert len(tokens_of(parts[request.id, 0])) <= said
        with pytest.raises(ValueError, match="logit_bias"):
            next(e.complete([[5, 9]], request.params))
    assert len(tokens_of(parts[calm.id, 0])) == 20
    assert e.scheduler.book.held == 0


@pytest.mark.parametrize("wrong", [{"drafts": -1}, {"max_running": 0}, {"step_tokens": 0}])
def test_an_engine_that_would_never_answer_is_refused(wrong):
    [(name, value)] = wrong.items()
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        engine(**wrong)


def test_refusals_name_both_values():
    with pytest.raises(ValueError, match="3 prompt tokens and max_tokens 300 exceed max_position_embeddings 256"):
        engine().add([1, 2, 3], SamplingParams(max_tokens=300))
    with pytest.raises(ValueError, match="num_nextn_predict_layers 0"):
        engine(model={"num_nextn_predict_layers": 0}, drafts=1)
    with pytest.raises(ValueError, match="max_tokens is 0"):
        SamplingParams(max_tokens=0)
    with pytest.raises(ValueError, match="token 96, the vocabulary ends at 95"):
        engine().add([96], SamplingParams())
    with pytest.raises(ValueError, match="need 4 cache pages, there are 2"):
        engine(cache_gb=PAGES(2)).add([1], SamplingParams(max_tokens=200))
    with pytest.raises(ValueError, match="grammar"):
        engine().add([1], SamplingParams(grammar=regex("[a")))


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_random_lives_leave_no_page_behind(data):
    """Requests come, are aborted, share and are set aside at random; each that ends has said what it says alone."""
    e = ENGINES.setdefault("small", engine(cache_gb=PAGES(6), step_tokens=20, max_running=4))
    live, parts = [], {}
    for _ in range(data.draw(st.integers(3, 12))):
        action = data.draw(st.sampled_from(["add", "add", "abort", "step", "step", "step"]))
        if action == "add":
            start, size = data.draw(st.sampled_from([0, 0, 3])), data.draw(st.sampled_from([1, 30, 64, 90]))
            params = SamplingParams(max_tokens=data.draw(st.integers(1, 20)), ignore_eos=True)
            live.append(e.add(LONG[start : start + size], params))
        elif action == "abort" and live:
            e.abort(live.pop(data.draw(st.integers(0, len(live) - 1))))
        else:
            for delta in e.step():
                parts.setdefault(delta.request, []).append(delta)
    while e.busy:
        for delta in e.step():
            parts.setdefault(delta.request, []).append(delta)
    assert e.scheduler.book.held == 0
    for request in live:
        key = (tuple(request.prompt), request.params.max_tokens)
        if key not in ALONE:
            ALONE[key] = answer(ENGINES.setdefault("alone", engine()), request.prompt, max_tokens=key[1]).token_ids
        assert tokens_of(parts[request.id]) == ALONE[key]


ENGINES: dict = {}
ALONE: dict = {}
