"""Generation: the cache changes nothing, speculation changes nothing, sampled speculation has the right distribution."""

import dataclasses

import pytest
import torch

from dsv3.infer.engine import Engine
from dsv3.infer.sampling import SamplingParams, accept, distribution
from tests.model.tiny import TINY, random_model


class Ids:
    """A codec of a letter an id."""

    bos_id = 0

    def encode(self, text: str) -> list[int]:
        return [ord(c) - 32 for c in text]

    def decode(self, ids) -> str:
        return "".join(chr(i + 32) for i in ids)


def engine(**changes) -> Engine:
    return Engine(random_model(dataclasses.replace(TINY, **changes)), Ids())


def test_greedy_equals_the_argmax_of_full_forwards():
    e, ids = engine(), [5, 9, 33, 2]
    sample = e.complete(ids, SamplingParams(max_tokens=20, ignore_eos=True), speculate=False)
    for _ in range(20):
        with torch.no_grad():
            ids.append(int(e.model(torch.tensor([ids]))[0, -1].argmax()))
    assert sample.token_ids == ids[4:]
    assert sample.finish_reason == "length"


@pytest.mark.parametrize("seed", range(4))
def test_speculation_gives_the_same_greedy_text(seed):
    e = Engine(random_model(seed=seed), Ids())
    params = SamplingParams(max_tokens=33, ignore_eos=True)
    plain, fast = (next(e.generate(["hello"], params, speculate=flag)) for flag in (False, True))
    assert plain.token_ids == fast.token_ids
    assert len(fast.token_ids) == 33
    assert fast.drafted > 0
    assert plain.drafted == 0


def test_a_perfect_draft_is_always_accepted():
    """MTP layer made to copy the main model's next answer: a model whose logits do not depend on its input."""
    e = engine()
    with torch.no_grad():
        for name, tensor in e.model.named_parameters():
            if "norm" not in name:
                tensor.zero_()
    sample = e.complete([3], SamplingParams(max_tokens=16, ignore_eos=True))
    assert sample.acceptance == 1.0
    assert sample.drafted <= 8


def test_stops_at_eos_and_leaves_it_out():
    e = engine(eos_token_id=None)
    free = e.complete([5, 9], SamplingParams(max_tokens=12), speculate=False).token_ids
    e = engine(eos_token_id=(free[4], 999))
    for speculate in (False, True):
        sample = e.complete([5, 9], SamplingParams(max_tokens=12), speculate=speculate)
        assert sample.token_ids == free[: free.index(free[4])]
        assert sample.finish_reason == "stop"


def test_rejection_keeps_the_distribution():
    torch.manual_seed(0)
    p, q = torch.rand(5).softmax(0), torch.rand(5).mul(3).softmax(0)
    generator, counts, n = torch.Generator().manual_seed(0), torch.zeros(5), 6000
    for _ in range(n):
        draft = int(torch.multinomial(q, 1, generator=generator))
        counts[accept(draft, p, q, generator)[1]] += 1
    # Standard error of a share is below 0.5/sqrt(n) = 0.0065; four of them.
    assert (counts / n - p).abs().max() < 0.026


def test_top_p_keeps_the_smallest_set():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    p = distribution(logits, SamplingParams(temperature=1.0, top_p=0.7))
    assert p.tolist() == pytest.approx([0.625, 0.375, 0, 0])


def test_refusals_name_both_values():
    with pytest.raises(ValueError, match="3 prompt tokens and max_tokens 300 exceed max_position_embeddings 256"):
        engine().complete([1, 2, 3], SamplingParams(max_tokens=300))
    with pytest.raises(ValueError, match="num_nextn_predict_layers 0"):
        engine(num_nextn_predict_layers=0).complete([1], SamplingParams(), speculate=True)
    with pytest.raises(ValueError, match="max_tokens is 0"):
        SamplingParams(max_tokens=0)
