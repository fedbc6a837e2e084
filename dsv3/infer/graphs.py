"""Decoding on a GPU: a step of single tokens as one recorded CUDA graph.

A decode step is a few dozen small kernels a layer; started one by one by Python, they take longer to start than to run. So

    rows     the tokens of sequences that decode, and their drafts, a row each; a step is padded to 1, 2, 4, ... rows
    inputs   tokens, positions, whose table, tables: one flat tensor at the address that the graph reads, one copy a step
    graph    one for a number of rows, a width of the tables, and which layers run; recorded when it is first needed
    prompts  segments of more than MOST_TOKENS tokens go through the model's own forward, as in Runner

Attention is always in the absorbed form, over pages (kernels.attention.attend_pages), each row to its own position: rows of one
sequence lie in the same step, since a layer writes all its latents before it reads any. Padding repeats the first row: it writes
what that row writes, and no expert is read for it alone. What a graph makes is copied to tensors outside its memory, so all graphs
share one memory and run in any order. Nothing recorded waits for the device or copies from the host: RoPE's table is made once.
In-place changes of the weights are seen by the next step; replaced weights (`model.to`) are not.
Source: torch.cuda.graph's documentation. Legend: N rows, D model, H heads, C latent, R rope, W pages of a table, K top-k.
Does not: record logits and sampling, or run float32 (its expert products ask the device for the rows' counts).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dsv3.infer.pages import PAGE
from dsv3.infer.runner import Runner, Segment
from dsv3.kernels.attention import attend_pages
from dsv3.kernels.triton import use_triton
from dsv3.model.fp8 import fp8_modules
from dsv3.model.rope import rope_table
from dsv3.model.transformer import Attention, Context, DecoderLayer, DeepseekV3, MTPLayer, Routed

MOST_TOKENS = 16  # of a segment that runs as rows
MOST_ROWS = 256
MAIN = -1  # in the place of an MTP layer's number: the main layers

Capture = Callable[[Callable[[], None]], Callable[[], None]]


class Recorder:
    """Makes CUDA graphs that share one memory."""

    def __init__(self) -> None:
        self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        """Run once as it is, so that kernels are compiled and libraries have their workspaces; record the second run."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            run()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            run()
        return graph.replay


def run_again(run: Callable[[], None]) -> Callable[[], None]:
    """In the place of a Recorder: nothing is recorded, every step runs anew, on any device."""
    return run


class Shape(NamedTuple):
    """What a graph is made for. mtp: which MTP layer, or MAIN."""

    rows: int
    width: int
    mtp: int


class Step:
    """The tensors that a graph reads and writes, and what replays it.

    Attributes:
        tokens, positions, rows: (N,) int64; rows: of `tables`. tables: (N, W) int64. previous: (N, D), for MTP layers.
        states: (N, D). experts: (MoE layers, N, K) int64.
    """

    def __init__(self, shape: Shape, like: Tensor, experts: Tensor) -> None:
        count, width, mtp = shape
        self._host = torch.zeros(count * (3 + width), dtype=torch.int64)
        self._inputs = self._host.to(like.device, copy=True)
        self.tokens, self.positions, self.rows = self._inputs[: 3 * count].view(3, count)
        self.tables = self._inputs[3 * count :].view(count, width)
        self.previous = like.new_zeros(0 if mtp == MAIN else count, like.shape[-1])
        self.states = like.new_zeros(count, like.shape[-1])
        self.experts = experts.new_zeros(experts.shape[0] if mtp == MAIN else 0, count, experts.shape[-1])
        self.replay: Callable[[], None] | None = None

    def fill(self, segments: Sequence[Segment], previous: Tensor | None) -> None:
        """previous: (n, D) states before the segments' n tokens."""
        count, width = self.tables.shape
        tokens = [token for s in segments for token in s.tokens]
        positions = [s.start + j for s in segments for j in range(len(s.tokens))]
        rows = [i for i, s in enumerate(segments) for _ in s.tokens]
        tables = self._host[3 * count :].view(count, width)
        for values, place in zip((tokens, positions, rows), self._host[: 3 * count].view(3, count)):
            place.copy_(torch.tensor([*values, *values[:1] * (count - len(values))]))
        for table, segment in zip(tables, segments):
            used = -(-(segment.start + len(segment.tokens)) // PAGE)
            table[:used] = torch.tensor(segment.pages[:used])
        self._inputs.copy_(self._host)  # waits, so the host's copy may change afterwards
        if previous is not None:
            self.previous[: len(previous)] = previous
            self.previous[len(previous) :] = previous[0]


class RowCache:
    """The pages of a step's rows, as the cache of one run through the layers.

    Args:
        latents: the store's, (L, P, 64, C + R). offset: of its layers. first: slots before it are never read.
    """

    def __init__(self, latents: Tensor, step: Step, *, offset: int, first: int) -> None:
        self._latents, self._step, self._offset, self._first = latents, step, offset, first
        self._pages, self._slots = step.tables[step.rows, step.positions // PAGE], step.positions % PAGE

    def attend(self, layer: int, q: Tensor, latent: Tensor, *, rank: int, scale: float) -> Tensor:
        """Write latent (N, C + R); then q (N, H, C + R) reads all that its rows' sequences hold up to it -> (N, H, C)."""
        held, step = self._latents[self._offset + layer], self._step
        held[self._pages, self._slots] = latent.to(held.dtype)
        q = q.to(held.dtype)
        return attend_pages(q, held, step.tables, step.rows, step.positions, rank, scale, self._first)


class GraphRunner(Runner):
    """The absorbed form of the model over rows, recorded.

    Args:
        capture: makes of a run what replays it; None: CUDA graphs.
    """

    def __init__(self, model: DeepseekV3, pages: int, *, mtp: bool, capture: Capture | None = None) -> None:
        super().__init__(model, pages, mtp=mtp)
        self._capture = Recorder() if capture is None else capture
        longest = min(model.config.max_position_embeddings, pages * PAGE)
        self._widest = -(-longest // PAGE)
        self._cos, self._sin = rope_table(model.config, torch.arange(longest, device=self.store.device))  # (S, R/2)
        self._steps: dict[Shape, Step] = {}

    @torch.inference_mode()
    def forward(self, segments: Sequence[Segment]) -> Tensor:
        """Final states (N, D) of all segments' tokens in order; their latents are in the pages."""
        rows: list[Tensor] = [torch.empty(0)] * len(segments)
        experts: list[Tensor] = [self.experts] * len(segments)
        batches, others = plan(segments)
        if others:
            _place(super().forward([segments[i] for i in others]), segments, others, rows)
            if self.counts.numel():
                _place(self.experts, segments, others, experts, dim=1)
        for members in batches:
            states, chosen = self._run([segments[i] for i in members], MAIN, None)
            _place(states, segments, members, rows)
            if self.counts.numel():
                _place(chosen, segments, members, experts, dim=1)
                self.counts.scatter_add_(1, chosen.flatten(1), torch.ones_like(chosen.flatten(1)))
        if self.counts.numel():
            self.experts = torch.cat(experts, dim=1)
        return torch.cat(rows)

    @torch.inference_mode()
    def draft(self, segments: Sequence[Segment], states: Tensor, layer: int = 0) -> Tensor:
        rows: list[Tensor] = [torch.empty(0)] * len(segments)
        before = states.split([len(s.tokens) for s in segments])
        batches, others = plan(segments)
        if others:
            made = super().draft([segments[i] for i in others], torch.cat([before[i] for i in others]), layer)
            _place(made, segments, others, rows)
        for members in batches:
            previous = torch.cat([before[i] for i in members])
            _place(self._run([segments[i] for i in members], layer, previous)[0], segments, members, rows)
        return torch.cat(rows)

    def _run(self, segments: Sequence[Segment], mtp: int, previous: Tensor | None) -> tuple[Tensor, Tensor]:
        """States (n, D) and experts (MoE layers, n, K) of the segments' n tokens."""
        count = sum(len(s.tokens) for s in segments)
        pages = -(-max(s.start + len(s.tokens) for s in segments) // PAGE)
        shape = Shape(_round_up(count, 1, 2, MOST_ROWS), _round_up(pages, 4, 4, self._widest), mtp)
        step = self._steps.get(shape)
        if step is None:
            step = Step(shape, self.model.lm_head.weight, self.experts)
        step.fill(segments, previous)
        if step.replay is None:
            step.replay = self._capture(lambda: self._compute(step, mtp))
            self._steps[shape] = step
        step.replay()
        return step.states[:count].clone(), step.experts[:, :count].clone()

    def _compute(self, step: Step, mtp: int) -> None:
        """What is recorded: from the step's inputs to its states and experts, by tensors' addresses alone."""
        backbone, main = self.model.model, mtp == MAIN
        cos, sin = self._cos[step.positions], self._sin[step.positions]
        context = Context(cos.unsqueeze(0), sin.unsqueeze(0))
        offset = 0 if main else self.model.config.num_hidden_layers
        cache = RowCache(self.store.latents, step, offset=offset, first=0 if main else 1)
        x, seen = self.model.embed(step.tokens.unsqueeze(0)), list[Tensor]()  # (1, N, D): all rows share each product
        if main:
            for layer in backbone.main_layers:
                x = _run_layer(layer, x, context, cache, seen)
            step.states.copy_(backbone.norm(x)[0])
            if seen:
                step.experts.copy_(torch.stack(seen))
        else:
            layer = backbone.mtp_layers[mtp]
            assert isinstance(layer, MTPLayer)
            x = _run_layer(layer, layer.mix(step.previous.unsqueeze(0), x), context, cache, seen)
            step.states.copy_(layer.shared_head.norm(x)[0])


def fits(model: DeepseekV3) -> bool:
    """Whether steps of this model can be recorded: bfloat16, or kept in FP8, on CUDA with Triton."""
    weight = model.lm_head.weight
    kept = all(type(x.self_attn).forward is Attention.forward for x in model.modules() if isinstance(x, DecoderLayer))
    return use_triton(weight) and weight.dtype == torch.bfloat16 and kept and not fp8_modules(model)


def plan(segments: Sequence[Segment]) -> tuple[list[list[int]], list[int]]:
    """Indices of segments: batches of at most MOST_ROWS rows, and those too long to be rows."""
    batches: list[list[int]] = []
    others: list[int] = []
    room = 0
    for i, segment in enumerate(segments):
        count = len(segment.tokens)
        if count > MOST_TOKENS:
            others.append(i)
            continue
        if count > room:
            batches.append([])
            room = MOST_ROWS
        batches[-1].append(i)
        room -= count
    return batches, others


def _place(made: Tensor, segments: Sequence[Segment], members: list[int], rows: list[Tensor], dim: int = 0) -> None:
    """What was made for the members, to each one's place."""
    for i, part in zip(members, made.split([len(segments[i].tokens) for i in members], dim)):
        rows[i] = part


def _round_up(count: int, start: int, factor: int, most: int) -> int:
    """The first of start, start·factor, start·factor², ... that is not below count; most instead of one above it."""
    size = start
    while size < count:
        size *= factor
    return min(size, most)


def _run_layer(layer: torch.nn.Module, x: Tensor, context: Context, cache: RowCache, seen: list[Tensor]) -> Tensor:
    """DecoderLayer.forward with attention over pages: x (1, N, D) -> (1, N, D)."""
    assert isinstance(layer, DecoderLayer)
    x = x + _attend(layer.self_attn, layer.input_layernorm(x), context, cache)
    y, routed = layer.mlp_block(x, context)
    if isinstance(routed, Routed):
        seen.append(routed.experts)
    return x + y


def _attend(attention: Attention, x: Tensor, context: Context, cache: RowCache) -> Tensor:
    """Attention.forward in the absorbed form: x (1, N, D) -> (1, N, D)."""
    config = attention.config
    q_nope, q_pe = attention.queries(x, context)  # (1, N, H, ...)
    q = torch.cat((attention.absorb_keys(q_nope.transpose(1, 2)).transpose(1, 2), q_pe), dim=-1)
    latent = attention.latent(x, context)
    out = cache.attend(attention.slot, q[0], latent[0], rank=config.kv_lora_rank, scale=config.softmax_scale)
    values = attention.expand_values(out.to(x.dtype).transpose(0, 1).unsqueeze(0))  # (1, H, N, V)
    return attention.o_proj(values.transpose(1, 2).flatten(-2))
