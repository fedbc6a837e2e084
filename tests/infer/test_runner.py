"""The runners: one gives what the other gives, over the same pages; what fits the kernels and what does not."""

import dataclasses

import pytest
import torch

from dsv3.infer import native
from dsv3.infer.runner import NativeRunner, Runner, Segment, open_runner
from dsv3.model.fp8 import swap_fp8
from tests.kernels.distance import distance
from tests.model.tiny import TINY, random_model


def tokens(count: int, seed: int = 0) -> list[int]:
    return torch.randint(0, TINY.vocab_size, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.inference_mode()
def test_both_runners_agree_on_ragged_steps_drafts_and_experts():
    model = random_model()
    runners = [kind(model, 12, mtp=True) for kind in (NativeRunner, Runner)]
    a, b = tokens(70), tokens(9, 1)
    steps = (
        [Segment([1, 2], 0, a[:60]), Segment([3], 0, b[:8])],
        [Segment([3], 8, b[8:]), Segment([1, 2], 60, a[60:])],
    )
    for segments in steps:
        states = [r.forward(segments) for r in runners]
        assert distance(*states) < 5e-6
        assert torch.equal(*(r.experts.sort(-1).values for r in runners))
    assert torch.equal(*(r.counts for r in runners))
    assert distance(runners[0].store.latents, runners[1].store.latents) < 5e-6
    before = [torch.cat((s[:1], s[1:10])) for s in states]
    drafts = [r.draft([Segment([3], 9, [5]), Segment([1, 2], 61, a[61:])], s) for r, s in zip(runners, before)]
    assert distance(*drafts) < 5e-6
    assert distance(*(r.logits(d) for r, d in zip(runners, drafts))) < 5e-6


@torch.inference_mode()
def test_prefix_pages_are_shared():
    """A second sequence on the first one's pages goes on as the first would."""
    runner = NativeRunner(random_model(), 8, mtp=False)
    prompt = tokens(140)
    whole = runner.forward([Segment([1, 2, 3], 0, prompt)])
    shared = runner.forward([Segment([1, 2, 5], 128, prompt[128:]), Segment([1, 6, 7], 64, prompt[64:])])
    assert torch.equal(shared, torch.cat((whole[128:], whole[64:])))


@torch.inference_mode()
def test_position_5000_is_right():
    config = dataclasses.replace(TINY, max_position_embeddings=8192, num_hidden_layers=2, num_nextn_predict_layers=0)
    model = random_model(config)
    prompt, pages = tokens(5003), list(range(1, 80))
    ours, theirs = (kind(model, 80, mtp=False) for kind in (NativeRunner, Runner))
    for start in range(0, 5000, 500):
        last = [r.forward([Segment(pages, start, prompt[start : start + 500])]) for r in (ours, theirs)]
    assert distance(*last) < 2e-5  # softmax over 5,000 keys
    ones = [ours.forward([Segment(pages, i, [prompt[i]])]) for i in (5000, 5001, 5002)]
    assert distance(torch.cat(ones), theirs.forward([Segment(pages, 5000, prompt[5000:])])) < 2e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_on_the_cpu_gets_the_kernels(dtype):
    runner = open_runner(random_model().to(dtype), 0.001, mtp=True)
    assert type(runner) is NativeRunner
    assert runner.invariant
    assert runner.store.latents.dtype == dtype
    assert runner.store.latents.shape[:2] == (4, 1_000_000 // runner.store.bytes_per_page(TINY, 4, dtype))


@pytest.mark.parametrize("change", [lambda m: m.half(), lambda m: swap_fp8(m.bfloat16()) or m, lambda m: m.to("meta")])
def test_other_models_run_by_their_own_forward(change):
    model = change(random_model())
    assert not native.fits(model)
    assert type(open_runner(model, 0.001, mtp=False)) is Runner


def test_without_a_compiler_the_model_runs_itself(monkeypatch):
    monkeypatch.setattr(native.decode, "library", lambda: None)
    assert type(open_runner(random_model(), 0.001, mtp=False)) is Runner


def test_a_cache_without_room_for_a_page_is_refused():
    with pytest.raises(ValueError, match="holds 0 pages"):
        open_runner(random_model(), 1e-6, mtp=False)
