"""The training pass on the rollout's own numbers, to the bit: values by the kernels of generation, gradients by torch.

    engine   one reading of the rows by kernels/decode: the stream behind each layer, the final states, the experts
    torch    x_l = layer_l(x_{l-1}) with the engine's experts; the value of x_l is then the engine's, its gradient torch's own
    so       the loss is of the very log-probabilities that the answer was drawn by, and so are ratios and gradients' inputs

A row's numbers in those kernels are the same bits however it is cut and whatever runs beside it, so decoding over pages with
drafts and reading whole rows agree to the last bit. Two orders of float32 sums would not: by up to 5e-5 nats where a sharp policy
drew an unlikely token. Each layer starts from equal inputs, so how far torch's output is from the engine's is measured layer by
layer (`gap`, `other`): that is what tells that both are one model, and the gate looks at it.
Legend: B rows, T tokens, D model, V vocabulary, L layers, K top-k. Does not: MTP layers, whose log-probabilities no rollout is
drawn by; devices but the CPU; models that are swapped from outside (FP8, adapters, shards).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsv3.infer import native
from dsv3.infer.runner import NativeRunner
from dsv3.kernels.decode import PAGE, Segment
from dsv3.model.transformer import DeepseekV3

_ROUNDING = {torch.float32: 2.0**-20, torch.bfloat16: 2.0**-7}  # some units in the last place of a stream


@dataclass
class Reading:
    """The engine's numbers of some rows."""

    streams: Tensor  # (L, B, T, D) float32
    states: Tensor  # (B, T, D) float32
    experts: Tensor  # (B, T, L_moe, K) int64
    logits: Callable[[Tensor], Tensor]  # states (n, D) -> (n, V) float32
    rounding: float
    """Of a stream's length: what rounding alone may make of it in a layer."""
    real: Tensor
    """Places in the flattened (B, T) that are no padding: those that are compared."""
    gap: float = 0.0
    """The largest distance of torch's output from the engine's, given equal inputs and beyond rounding, as a share of what the
    layer adds to the stream; and of what the norm and the head make."""

    @contextlib.contextmanager
    def told(self, model: DeepseekV3) -> Iterator[None]:
        """While open, the forward of the model, or of a stage of it, over these rows has these values."""
        layers = [(int(name), layer) for name, layer in model.model.layers.named_children()]
        pairs = [(layer, self.streams[at]) for at, layer in layers if at < len(self.streams)]
        pairs += [] if model.model.norm is None else [(model.model.norm, self.states)]
        modules = [module for module, _ in pairs]
        before = [vars(module).get("forward") for module in modules]
        for module, value in pairs:
            vars(module)["forward"] = functools.partial(self._forward, module.forward, value)
        try:
            yield
        finally:
            for module, forward in zip(modules, before):
                if forward is None:
                    del vars(module)["forward"]
                else:
                    vars(module)["forward"] = forward

    def forget(self) -> None:
        """What no forward needs any more: backward passes hold on to the rest."""
        self.streams, self.states = self.streams[:0].clone(), self.states[:0].clone()

    def _forward(self, forward: Callable, value: Tensor, *inputs: object):
        made = forward(*inputs)
        if not isinstance(made, tuple):
            return self._take(made, value, value, self.real)
        (before, *_), (x, *rest) = inputs, made
        assert isinstance(before, Tensor)
        return (self._take(x, value, value - before.detach().float(), self.real), *rest)

    def head(self, product: Tensor, states: Tensor) -> Tensor:
        """Logits (n, V') of states (n, D): torch's product for the gradient, the engine's value."""
        value = self.logits(states.detach())[:, : product.shape[1]]
        return self._take(product, value, value, torch.arange(len(value)))

    def _take(self, x: Tensor, value: Tensor, made: Tensor, places: Tensor) -> Tensor:
        """The engine's value in the place of x; how far they are apart is remembered, no number above all."""
        with torch.no_grad():
            far = (x.float() - value).norm(dim=-1) - self.rounding * value.norm(dim=-1)
            far = (far / made.norm(dim=-1).clamp(min=1e-30)).flatten().index_select(0, places)
            gap = float(far.max()) if len(far) else 0.0
        if not gap <= self.gap and self.gap == self.gap:
            self.gap = gap
        return with_value(x, value)


class EnginePass:
    """Reads rows as the engine does. Weights are read where they lie, as they are at each call.

    Args:
        model: the policy whose tensors are trained and sampled from; see `fits`.
    """

    def __init__(self, model: DeepseekV3) -> None:
        self._model = model
        self._runner: NativeRunner | None = None

    @staticmethod
    def fits(model: DeepseekV3) -> bool:
        """Whether the kernels of generation run this model."""
        return native.fits(model)

    def read(self, tokens: Tensor, real: Tensor | None = None) -> Reading:
        """tokens (B, T) int64; real: see Reading, None: all of them."""
        rows, length = tokens.shape
        config, each = self._model.config, -(-length // PAGE)
        runner = self._open(rows * each)
        streams = torch.empty(config.num_hidden_layers, rows * length, config.hidden_size)
        segments = [Segment(range(i * each, (i + 1) * each), 0, row) for i, row in enumerate(tokens.tolist())]
        states = runner.forward(segments, streams=streams)
        return Reading(
            streams.unflatten(1, (rows, length)),
            states.unflatten(0, (rows, length)),
            runner.experts.unflatten(1, (rows, length)).permute(1, 2, 0, 3),
            runner.logits,
            _ROUNDING[self._model.lm_head.weight.dtype],
            torch.arange(tokens.numel()) if real is None else real,
        )

    def _open(self, pages: int) -> NativeRunner:
        if self._runner is None or pages > self._runner.store.latents.shape[1]:
            self._runner = NativeRunner(self._model, pages, mtp=False)
        return self._runner


def with_value(x: Tensor, value: Tensor) -> Tensor:
    """`value`, rounded to the dtype of x, as far as anyone reads it; x to whoever asks for the gradient."""
    return _WithValue.apply(x, value)


class _WithValue(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        assert value.shape == x.shape, (value.shape, x.shape)
        return value.to(x.dtype, copy=True)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None
