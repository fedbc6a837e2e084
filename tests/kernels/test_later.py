"""A backward pass in two halves gives the bits of one, computes nothing twice, and asks for nothing that nobody wants."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dsv3.kernels import gemm, later
from dsv3.kernels.experts import expert_mlp
from dsv3.kernels.gemm import grouped_linear
from dsv3.kernels.later import LateLinear, Later, late_linear
from dsv3.kernels.moe import sort_by_expert
from dsv3.parallel.apply import compute_copy, prepare
from tests.model.tiny import TINY, random_model


def leaves(*shapes, dtype=torch.bfloat16):
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=draw).to(dtype).requires_grad_() for shape in shapes]


def routed(dtype=torch.bfloat16):
    """Of the experts, with one that gets no token: inputs of expert_mlp."""
    x, gate_up, down = leaves((37, 48), (5, 32, 48), (5, 48, 16), dtype=dtype)
    (weights,) = leaves((37, 2), dtype=torch.float32)
    indices = torch.randint(4, (37, 2), generator=torch.Generator().manual_seed(1))
    return [x, gate_up, down, weights], sort_by_expert(indices, 5)


CASES = {
    "linear": (lambda: leaves((3, 7, 48), (33, 48)), lambda i: late_linear(*i)),
    "linear, float32": (lambda: leaves((3, 7, 48), (33, 48), dtype=torch.float32), lambda i: late_linear(*i)),
    "grouped": (lambda: leaves((9, 48), (3, 16, 48)), lambda i: grouped_linear(*i, torch.tensor([4, 0, 5]))),
    "experts": (lambda: routed()[0], lambda i: expert_mlp(*i, *routed()[1])),
    "experts, float32": (lambda: routed(torch.float32)[0], lambda i: expert_mlp(*i, *routed(torch.float32)[1])),
}


@pytest.mark.parametrize("name", CASES)
def test_two_halves_are_one(name):
    make, run = CASES[name]
    whole, halves, waiting = make(), make(), Later()
    for _ in range(2):  # gradients are added to
        y = run(whole)
        y.backward(torch.ones_like(y))
        with waiting.noted():
            y = run(halves)
        before = [None if i.grad is None else i.grad.clone() for i in halves]
        y.backward(torch.ones_like(y))
        matrices = halves[1:3] if "experts" in name else halves[1:2]
        for leaf, old in zip(halves, before):
            if any(leaf is m for m in matrices):
                assert (leaf.grad is None) if old is None else torch.equal(leaf.grad, old)
            else:
                assert old is None or not torch.equal(leaf.grad, old)
        waiting.take()()
    for a, b in zip(whole, halves):
        assert torch.equal(a.grad, b.grad)
        assert a.grad.dtype == b.grad.dtype


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "fp8"])
def test_a_models_backward_in_halves(precision, recompute):
    """Every Linear and all experts of the layers wait; what is computed again in the backward pass is so once."""
    tokens = torch.randint(0, TINY.vocab_size, (2, 25), generator=torch.Generator().manual_seed(0))
    grads, calls = [], []
    for halves in (False, True):
        model, waiting = compute_copy(random_model(TINY), precision), Later()
        prepare(model, recompute=recompute, compile_layers=False)
        for module in model.model.layers.modules():
            if type(module) is nn.Linear and halves:
                module.__class__ = LateLinear
        ran: list[int] = []
        for layer in model.model.layers:
            layer.mlp.register_forward_pre_hook(lambda *_, ran=ran: ran.append(1))
        with waiting.noted() if halves else contextlib.nullcontext():
            out = model.hidden(tokens, depth=1)
        (model.lm_head(out.main).float().square().mean() + out.mtp[0].float().square().mean()).backward()
        if halves:
            missing = {n.rpartition(".")[0] for n, p in model.named_parameters() if p.grad is None}
            kinds = ("LateLinear", "Fp8Linear", "Experts", "Fp8Experts")
            assert missing == {n for n, module in model.named_modules() if type(module).__name__ in kinds}
            assert len(missing) > 20
        waiting.take()()
        grads.append({name: p.grad for name, p in model.named_parameters()})
        calls.append(len(ran))
    again = recompute or precision == "fp8"
    assert calls == [len(model.model.layers) * (1 + again)] * 2
    for name, grad in grads[0].items():
        assert torch.equal(grad, grads[1][name]), name


def test_gradients_that_nobody_wants_are_not_made(monkeypatch):
    x, w = leaves((9, 48), (3, 16, 48))
    made = []
    monkeypatch.setattr(gemm, "_wgrad", lambda *a: made.append(1))
    grouped_linear(x, w.detach(), torch.tensor([4, 0, 5])).sum().backward()
    assert x.grad is not None
    assert made == []


def test_a_weight_that_is_no_leaf_does_not_wait():
    x, w = leaves((9, 48), (3, 16, 48))
    waiting = Later()
    with waiting.noted():
        y = grouped_linear(x, w * 2, torch.tensor([4, 0, 5]))
    y.sum().backward()
    assert w.grad is not None
    waiting.take()()


def test_a_product_outside_knows_nothing_of_it():
    x, w = leaves((9, 48), (33, 48))
    waiting = Later()
    with waiting.noted():
        assert later._noted.get() is waiting
    y = late_linear(x, w)
    y.sum().backward()
    assert torch.equal(w.grad, torch.autograd.grad(F.linear(x, w).sum(), w)[0])


def test_gradients_are_kept_as_wide_as_the_weights_say():
    x, w = leaves((9, 48), (33, 48))
    w.grad_dtype = torch.float32
    waiting = Later()
    with waiting.noted():
        y = late_linear(x, w)
    y.sum().backward()
    waiting.take()()
    assert w.grad.dtype == torch.float32


def test_gradients_are_added_up_as_wide_as_told():
    """FSDP's gathered bfloat16 weights, between whose second halves nobody widens them."""
    x, w = leaves((9, 48), (33, 48))
    waiting, sums = Later(torch.float32), torch.zeros(33, 48)
    for i in range(3):
        with waiting.noted():
            y = late_linear(x * (1 + i / 7), w)
        y.sum().backward()
        waiting.take()()
        sums += torch.autograd.grad(F.linear(x * (1 + i / 7), w).sum(), w)[0].float()
    assert w.grad.dtype == torch.float32
    assert torch.equal(w.grad, sums)
