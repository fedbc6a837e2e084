"""Weight gradients that may wait: the backward pass of products in two halves, for schedules that fill a pipeline's bubble.

    later = Later()
    with later.noted():          products of weights that are made here know it
        y = model(x)
    y.backward(dy)               the gradient of x, and of each product's weight a promise
    run = later.take()           ...; run() keeps the promises: adds to each weight's .grad

A promise holds what the weight's gradient is made of, the product's input and its output's gradient, so their memory waits too.
It is kept by the half that comes first computing nothing twice: layers that are computed again in the backward pass are so once.
What is no leaf (a weight that is cast or cut before it is multiplied) cannot wait and is computed at once, as is all that does
not ask here: norms, router, embedding, head.
Source: V3 report section 3.2.1; arXiv 2401.10241. Does not: decide when (parallel/pipeline.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_noted: ContextVar[Later | None] = ContextVar("later", default=None)


class Later:
    """Promised gradients, in the order of the backward pass.

    Args:
        dtype: that they are added up in, whatever the weights' (report section 3.3.3); None: as the weights say.
    """

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        self._dtype = dtype
        self._promises: list[tuple[list[Tensor | None], Callable[[], Sequence[Tensor]]]] = []

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        token = _noted.set(self)
        try:
            yield
        finally:
            _noted.reset(token)

    def promise(self, weights: list[Tensor | None], make: Callable[[], Sequence[Tensor]]) -> None:
        self._promises.append((weights, make))

    def take(self) -> Callable[[], None]:
        """What has been promised since the last time, to be run once."""
        promises, self._promises = self._promises, []

        @torch.no_grad()
        def run() -> None:
            while promises:
                weights, make = promises.pop(0)  # and with it goes the memory
                for weight, grad in zip(weights, make(), strict=True):
                    if weight is not None:
                        _accumulate(weight, grad, self._dtype)

        return run


def note(ctx: Any) -> None:
    """In a product's setup_context: whether its weights' gradients may wait."""
    ctx.later = _noted.get()


def weight_gradients(ctx: Any, places: Sequence[int], make: Callable[[], Sequence[Tensor]]) -> Sequence[Tensor | None]:
    """What a product's backward returns for its weights, the inputs at `places`: their gradients by `make`, or None where they
    wait or nobody wants any of them."""
    nodes = [ctx.next_functions[place][0] for place in places]
    if not any(node is not None for node in nodes):
        return [None] * len(places)
    leaves = [getattr(node, "variable", None) for node in nodes]
    if ctx.later is None or any(node is not None and leaf is None for node, leaf in zip(nodes, leaves)):
        return make()
    ctx.later.promise(leaves, make)
    return [None] * len(places)


class LateLinear(nn.Linear):
    """A Linear without bias whose weight's gradient may wait; the same bits. Modules become one by their class."""

    def forward(self, input: Tensor) -> Tensor:
        assert self.bias is None
        return late_linear(input, self.weight)


def late_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., I), weight (O, I) -> (..., O)."""
    return _LateLinear.apply(x, weight)


class _LateLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        note(ctx)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        dx = dy @ weight if ctx.needs_input_grad[0] else None
        rows = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
        (dw,) = weight_gradients(ctx, [1], lambda: [rows[0].t() @ rows[1]])
        return dx, dw


def _accumulate(weight: Tensor, grad: Tensor, dtype: torch.dtype | None) -> None:
    """As autograd does: in the dtype that the weight's gradients are kept in. FSDP's gathered weights learn it here, for they
    are made at their first use."""
    if dtype is not None and getattr(weight, "grad_dtype", dtype) != dtype:
        weight.grad_dtype = dtype
    if weight.grad is None:
        weight.grad = grad.to(getattr(weight, "grad_dtype", None) or weight.dtype)
    else:
        weight.grad += grad
