"""Decoding by recorded steps: all of it but CUDA's own recording runs here, with a recorder of operations in its place; on a GPU
(mark gpu) the graphs themselves."""

import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from dsv3.infer import engine as engines
from dsv3.infer import graphs
from dsv3.infer.engine import Engine
from dsv3.infer.graphs import MAIN, GraphRunner, Shape, Step, fits, plan, run_again
from dsv3.infer.runner import Runner, Segment
from dsv3.infer.sampling import SamplingParams
from dsv3.kernels.moe import sort_by_expert
from dsv3.model import transformer
from dsv3.model.fp8 import swap_fp8
from dsv3.model.rope import rope_table
from dsv3.model.stored import keep_fp8
from tests.infer.letters import Letters
from tests.kernels.distance import distance
from tests.model.tiny import TINY, random_model

lacking = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


class Recording(TorchDispatchMode):
    """Operations in the order they ran; `replay` runs them again on the same tensors, as a CUDA graph does: what Python decided
    while it was recorded stays decided."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self):
        made = {}
        for func, args, kwargs, out in self.calls:
            now = func(*tree_map(lambda x: made.get(id(x), x), args), **tree_map(lambda x: made.get(id(x), x), kwargs))
            made.update(zip(map(id, tree_leaves(out)), tree_leaves(now)))


def record(run):
    run()
    recording = Recording()
    with recording:
        run()
    return recording.replay


def tokens(count: int, seed: int = 0) -> list[int]:
    return torch.randint(0, TINY.vocab_size, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


A, B, C = tokens(150), tokens(9, 1), tokens(40, 2)
STEPS = (
    [Segment([1, 2, 4], 0, A[:60]), Segment([3], 0, B[:5])],
    [Segment([3], 5, B[5:7]), Segment([1, 2, 4], 60, A[60:130]), Segment([5], 0, C[:30])],
    [Segment([3], 7, B[7:8]), Segment([1, 2, 4], 130, A[130:133]), Segment([5], 30, C[30:31])],
    [Segment([5], 31, C[31:33]), Segment([3], 8, B[8:9]), Segment([1, 2, 4], 133, A[133:135])],
)


@torch.inference_mode()
@pytest.mark.parametrize("capture", [run_again, record])
@pytest.mark.parametrize("change", [{}, {"first_k_dense_replace": 3}, {"q_lora_rank": None, "n_shared_experts": 0}])
def test_states_experts_and_pages_are_those_of_the_plain_runner(capture, change):
    """In float32; the absorbed form adds in another order than the expanded one."""
    model = random_model(dataclasses.replace(TINY, **change))
    plain, ours = Runner(model, 12, mtp=True), GraphRunner(model, 12, mtp=True, capture=capture)
    for segments in STEPS:
        states = [r.forward(segments) for r in (plain, ours)]
        assert distance(*states) < 5e-6
        assert torch.equal(*(r.experts.sort(-1).values for r in (plain, ours)))
        lengths = [len(s.tokens) for s in segments]
        firsts = [Segment(s.pages, s.start + 1, [*s.tokens[1:], 7]) for s in segments]
        drafts = [r.draft(firsts, s) for r, s in zip((plain, ours), states)]
        assert distance(*drafts) < 5e-6
        ends = torch.tensor(lengths).cumsum(0) - 1
        chained = [Segment(s.pages, s.start + len(s.tokens), [3]) for s in firsts]
        assert distance(*(r.draft(chained, d[ends]) for r, d in zip((plain, ours), drafts))) < 5e-6
        assert distance(*(r.logits(d) for r, d in zip((plain, ours), drafts))) < 5e-6
    assert torch.equal(plain.counts, ours.counts)
    assert distance(plain.store.latents, ours.store.latents) < 5e-6
    assert not ours.store.latents[:, 0].any()  # padding wrote where its row writes


@torch.inference_mode()
def test_a_graph_serves_all_steps_that_round_up_to_it():
    made = []

    def counting(run):
        made.append(run)
        return run

    runner = GraphRunner(random_model(), 12, mtp=True, capture=counting)
    for rows in (3, 4, 1, 2, 4, 3):
        runner.forward([Segment([i + 1], 0, [5]) for i in range(rows)])
    assert set(runner._steps) == {Shape(4, 4, MAIN), Shape(1, 4, MAIN), Shape(2, 4, MAIN)}
    runner.draft([Segment([1], 1, [5])], torch.randn(1, TINY.hidden_size))
    assert Shape(1, 4, 0) in runner._steps
    assert len(made) == 4
    assert graphs._round_up(5, 4, 4, 12) == 12
    assert graphs._round_up(17, 4, 4, 100) == 64


@torch.inference_mode()
def test_results_outlive_the_next_step():
    runner = GraphRunner(random_model(), 4, mtp=False, capture=run_again)
    first = runner.forward([Segment([1], 0, [5])])
    kept, experts = first.clone(), runner.experts.clone()
    held = runner.experts
    runner.forward([Segment([2], 0, [9])])
    assert torch.equal(first, kept)
    assert torch.equal(held, experts)


def test_long_segments_are_no_rows_and_batches_are_bounded():
    ones = [Segment([1], 0, [0] * n) for n in (1, 17, 16, 3, 500)]
    assert plan(ones) == ([[0, 2, 3]], [1, 4])
    many = [Segment([1], 0, [0] * 3) for _ in range(100)]
    batches, others = plan(many)
    assert [len(b) for b in batches] == [85, 15]
    assert sorted(i for b in batches for i in b) == list(range(100))
    assert not others


def test_padding_repeats_the_first_row():
    step = Step(Shape(4, 4, 0), torch.empty(96, 8), torch.empty(2, 0, 3, dtype=torch.int64))
    step.fill([Segment([9, 8], 64, [5]), Segment([7, 3, 2, 1], 6, [4, 3])], torch.arange(24.0).view(3, 8))
    assert step.tokens.tolist() == [5, 4, 3, 5]
    assert step.positions.tolist() == [64, 6, 7, 64]
    assert step.rows.tolist() == [0, 1, 1, 0]
    assert step.tables[:2].tolist() == [[9, 8, 0, 0], [7, 0, 0, 0]]  # as many pages as the rows reach
    assert torch.equal(step.previous[3], step.previous[0])


class OnDevice(TorchDispatchMode):
    """Fails where anything asks for a value, or touches a tensor that is not on the meta device, which here stands for a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves((args, kwargs, out)):
            assert not isinstance(x, torch.Tensor) or x.is_meta, func
        return out


@torch.inference_mode()
@pytest.mark.parametrize("kept", [False, True])
def test_nothing_recorded_waits_for_the_device_or_copies_to_it(monkeypatch, kept):
    """Of dsv3's own operations the fakes run, which would hide a wait within: the sort by expert is run by its body here, the
    others are Triton kernels (tests/kernels) or a line of torch."""
    monkeypatch.setattr(transformer, "sort_by_expert", sort_by_expert._init_fn)
    model = random_model().bfloat16()
    if kept:
        keep_fp8(model)
    runner = GraphRunner(model, 12, mtp=True, capture=run_again)
    model.to("meta")
    runner.store.latents = runner.store.latents.to("meta")
    runner._cos, runner._sin = runner._cos.to("meta"), runner._sin.to("meta")
    for mtp in (MAIN, 0):
        step = Step(Shape(8, 4, mtp), model.lm_head.weight, runner.experts.to("meta"))
        with OnDevice():
            runner._compute(step, mtp)


def test_the_check_above_sees_a_wait_and_a_copy():
    x = torch.zeros(4, device="meta")
    for wrong in (lambda: x.sum().item(), lambda: torch.zeros(4).to("meta"), lambda: rope_table(TINY, x)):
        with pytest.raises((AssertionError, RuntimeError)), OnDevice():
            wrong()


def test_what_fits(monkeypatch):
    assert not fits(random_model().bfloat16())  # on the CPU
    monkeypatch.setattr(graphs, "use_triton", lambda *tensors: True)
    models = [random_model().bfloat16(), random_model(), random_model().bfloat16(), random_model().bfloat16()]
    swap_fp8(models[2])
    keep_fp8(models[3])
    assert [fits(model) for model in models] == [True, False, False, True]


def answers(model, kind, **options):
    """Every answer's tokens of requests that begin apart, greedy and sampled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines, "open_runner", lambda model, cache_gb, *, mtp: kind(model, 24, mtp=mtp))
        e = Engine(model, Letters(), **options)
    kinds = [
        SamplingParams(max_tokens=14, ignore_eos=True, temperature=t, seed=i) for i, t in enumerate((0, 0.8, 0, 0))
    ]
    requests, said = [], {}
    for prompt, params in zip((A[:70], B, C, A[:100]), kinds):
        requests.append(e.add(prompt, params))
        for _ in range(3):
            for delta in e.step():
                said.setdefault(delta.request, []).extend(delta.token_ids)
    while e.busy:
        for delta in e.step():
            assert delta.error is None
            said.setdefault(delta.request, []).extend(delta.token_ids)
    assert e.scheduler.book.held == 0
    return [said[r.id] for r in requests], e


@pytest.mark.parametrize("drafts", [0, 2])
def test_the_engine_says_the_same(drafts):
    def ours(model, pages, *, mtp):
        return GraphRunner(model, pages, mtp=mtp, capture=record)

    plain, _ = answers(random_model(TINY), Runner, drafts=drafts, step_tokens=32, max_running=4)
    got, e = answers(random_model(TINY), ours, drafts=drafts, step_tokens=32, max_running=4)
    assert got == plain
    assert {shape.mtp for shape in e.runner._steps} == ({MAIN, 0} if drafts else {MAIN})


each_device = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, lacking])]
)  # on the CPU a recorder of operations records


@torch.inference_mode()
@each_device
@pytest.mark.parametrize("kept", [False, True])
def test_recorded_or_not_the_bits_are_the_same_in_bfloat16_and_fp8(device, kept):
    """And near the plain runner's, whose forms round at other places: 0.008 in the norm on the CPU. Every expert is chosen, so that
    none is by a near-tie."""
    config = dataclasses.replace(
        TINY,
        hidden_size=128,
        kv_lora_rank=64,
        qk_nope_head_dim=128,
        v_head_dim=128,
        num_experts_per_tok=8,
        topk_group=4,
    )
    model = random_model(config).bfloat16().to(device)
    if kept:
        keep_fp8(model)
        for name, tensor in model.state_dict().items():
            if tensor.dtype == torch.float8_e4m3fn:
                tensor.copy_(torch.randn(tensor.shape).to(tensor.dtype))
            elif name.endswith("scale_inv"):
                tensor.fill_(0.1)
    plain, once = Runner(model, 12, mtp=True), GraphRunner(model, 12, mtp=True, capture=run_again)
    ours = GraphRunner(model, 12, mtp=True, capture=record if device == "cpu" else None)
    for _ in range(2):  # the second time every graph is there
        for segments in STEPS:
            states = [r.forward(segments) for r in (plain, once, ours)]
            assert torch.equal(*states[1:])
            assert distance(states[2], states[0]) < 0.02
            firsts = [Segment(s.pages, s.start + 1, [*s.tokens[1:], 7]) for s in segments]
            drafts = [r.draft(firsts, states[0]) for r in (plain, once, ours)]
            assert torch.equal(*drafts[1:])
            assert distance(drafts[2], drafts[0]) < 0.02
    assert torch.equal(once.counts, ours.counts)
    assert not ours.store.latents[:, 0].any()


@each_device
def test_a_model_in_bfloat16_says_the_same_recorded_or_not(device):
    model = random_model().bfloat16().to(device)

    def once(model, pages, *, mtp):
        return GraphRunner(model, pages, mtp=mtp, capture=run_again)

    def ours(model, pages, *, mtp):
        return GraphRunner(model, pages, mtp=mtp, capture=record if device == "cpu" else None)

    said = [answers(model, kind, drafts=1, step_tokens=32, max_running=4)[0] for kind in (once, ours)]
    assert said[0] == said[1]
