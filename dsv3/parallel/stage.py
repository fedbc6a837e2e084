"""A stage of the pipeline: the part of DeepSeek-V3 between two cuts, under the names that it has in the whole model.

    stage 0     embedding, layers 0 .. a-1                        (x, balance) ->
    stage s     layers a .. b-1                -> (x, balance)    (x, balance) ->
    the last    layers z .. L-1, norm, MTP layers, head -> loss   and a replica of the embedding, for the MTP layers

What crosses a cut is the stream x (B, T, D) and the sequence-wise balance loss so far, a scalar that the backward pass goes
through, so that every stage's routers get its gradient as in one process. `state_dict()` of a stage holds the checkpoint's
names (`model.layers.7.self_attn...`), so a checkpoint by name is read by any other cut; the embedding is in two stages.

The report (section 3.2.1) shares embedding and head with the MTP module physically: DualPipe puts first and last layers on
one rank. Here head and MTP are in one stage whatever the schedule, and the embedding is a replica with the summed gradient
(pipeline.py); it costs V·D parameters once more.
Legend: B batch, T tokens, D model, V vocabulary, E experts, L main layers, M MTP depth.
Does not: communicate, or know schedules' order.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from dsv3.kernels.later import Later
from dsv3.model.census import layer_of, memory_shapes
from dsv3.model.config import ModelConfig
from dsv3.model.transformer import DeepseekV3, Hidden, Routed, Routing, Steer, join_routing, run_layer, run_mtp

STAGES_A_RANK = {"1f1b": 1, "zero-bubble": 2, "dualpipev": 2}
"""Schedules, and how many stages each rank holds. With two the stages lie in a V: rank r holds r and 2·ranks - 1 - r."""
TYPICAL_LENGTH = 4096  # tokens a row at which attention is weighed against the matrices when layers are dealt out


@dataclass(frozen=True, kw_only=True)
class Part:
    """What a stage holds."""

    index: int
    stages: int
    rank: int
    """Of the pipeline's ranks, the one that holds the stage."""
    layers: range
    """Indices of main and MTP layers."""
    embedding: bool
    """The first stage has the embedding; the last a replica, if there are MTP layers."""

    @property
    def first(self) -> bool:
        return self.index == 0

    @property
    def last(self) -> bool:
        return self.index == self.stages - 1

    def holds(self, name: str) -> bool:
        """Whether a parameter or buffer of the whole model is here."""
        layer = layer_of(name)
        if layer is not None:
            return layer in self.layers
        return self.embedding if "embed_tokens" in name else self.last


def split(config: ModelConfig, ranks: int, schedule: str) -> tuple[Part, ...]:
    """Deal the layers out: contiguous, so that the slowest rank is as fast as can be, then the slowest stage, then evenly.

    The cost is multiplications a token (matrices of the experts used, attention at 4,096 tokens a row, the head once for
    the main model and once a depth). Embedding, and with norm, MTP layers and head the last stage's end, stay where they are.

    Raises:
        ValueError: no such schedule, or more stages than layers; the message names the degrees that work.
    """
    if schedule not in STAGES_A_RANK:
        raise ValueError(f"pipeline schedule is {schedule!r}: choose one of {', '.join(STAGES_A_RANK)}")
    each, main = STAGES_A_RANK[schedule], config.num_hidden_layers
    stages, most = ranks * each, (main + 1) // each
    if ranks < 1 or stages > main + 1:
        raise ValueError(
            f"a pipeline of {ranks} ranks has {stages} stages under {schedule!r}, and the model has {main} layers and a "
            f"head to deal out: give 1 to {most} ranks"
            + (f", or 1 to {main + 1} under '1f1b'" if each > 1 and 1 <= ranks <= main + 1 else "")
        )
    cuts = _cuts(*_costs(config), stages) if each == 1 else _folded(*_costs(config), ranks)
    parts = []
    for index, (start, stop) in enumerate(itertools.pairwise(cuts)):
        last = index == stages - 1
        layers = range(start, config.num_layers_with_mtp if last else stop)
        rank = index if index < ranks else 2 * ranks - 1 - index
        embedding = index == 0 or (last and config.num_nextn_predict_layers > 0)
        parts.append(Part(index=index, stages=stages, rank=rank, layers=layers, embedding=embedding))
    return tuple(parts)


def _costs(config: ModelConfig) -> tuple[list[float], float, float]:
    """Multiplications a token: of each main layer, of the embedding, and of all that must be in the last stage."""
    heads = config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
    layers = [heads * TYPICAL_LENGTH / 2.0] * config.num_layers_with_mtp
    for name, shape in memory_shapes(config):
        layer, used = layer_of(name), math.prod(shape)
        if ".mlp.experts." in name:
            used = used // config.n_routed_experts * config.num_experts_per_tok
        if layer is not None:
            layers[layer] += used
    head = config.vocab_size * config.hidden_size * (1 + config.num_nextn_predict_layers)
    main = config.num_hidden_layers
    return layers[:main], float(config.hidden_size), sum(layers[main:]) + head


def _cuts(costs: list[float], embedding: float, tail: float, stages: int) -> list[int]:
    """Borders 0 = c_0 < c_1 < ... <= c_S = L that minimise (the largest stage, the sum of squares), by dynamic programming."""
    layers, done = len(costs), [0.0]
    for cost in costs:
        done.append(done[-1] + cost)
    best: dict[int, tuple[float, float, list[int]]] = {0: (0.0, 0.0, [0])}
    for stage in range(stages):
        after: dict[int, tuple[float, float, list[int]]] = {}
        last = stage == stages - 1
        for start, (largest, squares, cuts) in best.items():
            # Every stage has a layer, but the last may have the head alone.
            for stop in range(layers if last else start + 1, layers + 1):
                cost = done[stop] - done[start] + embedding * (stage == 0) + tail * last
                found = (max(largest, cost), squares + cost * cost, [*cuts, stop])
                if stop not in after or found < after[stop]:
                    after[stop] = found
        best = after
    return best[layers][2]


def _folded(costs: list[float], embedding: float, tail: float, ranks: int) -> list[int]:
    """Borders of the 2·ranks stages of a V that minimise (the most loaded rank, the largest stage, the sum of squares).

    Ranks are dealt to from the V's ends inwards, each the next layers of both sides: first for the most loaded rank alone, then
    for the rest among the deals that load none more than that.
    """
    done = list(itertools.accumulate(costs, initial=0.0))
    even = _cuts(costs, embedding, tail, 2 * ranks)
    stages = [done[b] - done[a] for a, b in itertools.pairwise(even)]
    stages[0], stages[-1] = stages[0] + embedding, stages[-1] + tail
    limit = max(first + second for first, second in zip(stages, reversed(stages)))
    for only_ranks in (True, False):
        best: dict[tuple[int, int], _Deal] = {(0, len(costs)): ((0.0, 0.0), [0], [len(costs)])}
        for rank in range(ranks):
            best = _deal(best, done, (embedding, tail) if rank == 0 else None, rank == ranks - 1, limit, only_ranks)
        ((limit, _), front, back) = min(best.values())
        limit = limit if only_ranks else 0.0
    return [*front, *reversed(back)]


_Deal = tuple[tuple[float, float], list[int], list[int]]
"""What has been minimised so far, and the borders dealt from the front and from the back."""


def _deal(
    best: dict[tuple[int, int], _Deal], done: list[float], ends: tuple[float, float] | None, inmost: bool, limit: float,
    only_ranks: bool,
) -> dict[tuple[int, int], _Deal]:  # fmt: skip
    """One rank more. Keys: the layers [low, high) that are left. ends: of the first rank, what its two stages have besides."""
    after: dict[tuple[int, int], _Deal] = {}
    more = ends or (0.0, 0.0)
    for (low, high), ((largest, squares), front, back) in best.items():
        for up in range(low + 1, high + 1):
            first = done[up] - done[low] + more[0]
            if first > limit:
                break
            # Every stage has a layer, but the last may have the head alone. The inmost rank takes all that is left.
            for down in [up] if inmost else range(high, up, -1):
                second = done[high] - done[down] + more[1]
                if first + second > limit and not inmost:
                    break
                if (down == high and ends is None) or first + second > limit:
                    continue
                now = first + second if only_ranks else max(first, second)
                found = (max(largest, now), squares + first * first + second * second)
                if (up, down) not in after or found < after[up, down][0]:
                    after[up, down] = (found, [*front, up], back if inmost else [*back, down])
    return after


class Feed(Protocol):
    """What a step's micro-batches are, and what their states are worth. All ranks of the pipeline read the same ones."""

    def inputs(self, micro: int) -> tuple[Tensor, Tensor | None]:
        """Tokens (B, T + M) and mask (B, T, T) of a micro-batch, as `DeepseekV3.hidden` reads them, on the stage's device."""
        ...

    def around(self, micro: int, stage: Stage) -> AbstractContextManager[Steer | None]:
        """Open while the stage runs a micro-batch forward: what is to steer its routers then, and where layers are computed
        again; None: they choose for themselves."""
        ...

    def routed(self, micro: int, routing: Routing, steer: Steer | None) -> Routing:
        """After it: what is to be counted, (L_stage, E), and the balance loss of a stage's routers, in the place of what the
        model made of all positions. A steered model makes no balance loss: who steers has seen the scores."""
        ...

    def loss(self, micro: int, hidden: Hidden, head: Tensor, steer: Steer | None) -> tuple[Tensor, Any]:
        """What to differentiate, a scalar already multiplied by the micro-batch's share of the step, and a record (a pytree
        of detached tensors and plain values) that `Pipeline.step` gives to every rank. Called in the last stage.

        `hidden.routing.balance` is that of all stages; its counts and experts are the last stage's own.
        """
        ...


class Run:
    """One step as the stages of a rank see it: what to read, and what they leave behind."""

    def __init__(
        self,
        feed: Feed,
        config: ModelConfig,
        *,
        shape: torch.Size,
        stream: torch.dtype,
        balance: bool,
        device: torch.device,
    ) -> None:
        self.feed, self.shape, self.stream, self.balance = feed, shape, stream, balance
        routers = len(moe_layers(config))
        self.counts = torch.zeros(routers, config.n_routed_experts, dtype=torch.int64, device=device)
        self.records: dict[int, Any] = {}


def moe_layers(config: ModelConfig) -> list[int]:
    """Layers that route, in the order of Routing's rows."""
    return [layer for layer in range(config.num_layers_with_mtp) if config.is_moe(layer)]


def router_rows(config: ModelConfig, part: Part) -> slice:
    """Rows of the whole model's Routing that are a stage's."""
    inside = [row for row, layer in enumerate(moe_layers(config)) if layer in part.layers]
    return slice(inside[0], inside[-1] + 1) if inside else slice(0, 0)


class Stage(DeepseekV3):
    """A DeepseekV3 of which only `part` exists. Modules that are elsewhere are missing (layers) or None, indices stay.

    Args:
        device: of the parameters, uninitialised: `init_weights` or `load_state_dict` fills them. "meta" holds no memory.
    """

    def __init__(self, config: ModelConfig, part: Part, device: torch.device | str = "meta") -> None:
        with torch.device("meta"):
            super().__init__(config)
        self.part = part
        self.rows = router_rows(config, part)
        self.run: Run | None = None  # during a step
        self.later: Later | None = None  # where its weights' gradients wait
        for layer in set(range(config.num_layers_with_mtp)) - set(part.layers):
            del self.model.layers._modules[str(layer)]  # deleting by index would number the rest anew
        if not part.embedding:
            self.model.register_module("embed_tokens", None)
        if not part.last:
            self.model.register_module("norm", None)
            self.register_module("lm_head", None)
        if torch.device(device).type != "meta":
            self.to_empty(device=device)

    @classmethod
    def cut(cls, model: DeepseekV3, part: Part) -> Stage:
        """The part as copies of a whole model's modules, adapters and FP8 swaps included."""
        stage = cls(model.config, part)
        for layer in part.layers:
            stage.model.layers._modules[str(layer)] = copy.deepcopy(model.model.layers[layer])
        for owner, source, name in (
            (stage.model, model.model, "embed_tokens"),
            (stage.model, model.model, "norm"),
            (stage, model, "lm_head"),
        ):
            if getattr(owner, name) is not None:
                setattr(owner, name, copy.deepcopy(getattr(source, name)))
        return stage

    def forward(self, *received: Tensor, micro: Tensor) -> Tensor | tuple[Tensor, Tensor]:  # type: ignore[override]
        """One micro-batch: x (B, T, D) and balance () of the stage before, nothing in the first -> the same for the next.

        The last stage returns the scalar that the backward pass starts from.

        Args:
            micro: int64 (1,) on the CPU, which micro-batch of `run`: the library's schedules hand out slices of tensors alone.
        """
        assert self.run is not None, "only Pipeline.step runs a stage"
        run, number = self.run, int(micro)
        tokens, mask = run.feed.inputs(number)
        assert tokens.shape == run.shape, f"micro-batch {number} is {tuple(tokens.shape)}, the first {tuple(run.shape)}"
        x, carried = received or (None, torch.zeros((), device=tokens.device))
        depth = self.config.num_nextn_predict_layers
        later = contextlib.nullcontext() if self.later is None else self.later.noted()
        with later, run.feed.around(number, self) as steer:
            out, routing = self._advance(
                x, tokens, mask, depth=depth, stream=run.stream, balance=run.balance, steer=steer
            )
        routing = run.feed.routed(number, routing, steer)
        if len(routing.counts):
            run.counts[self.rows] += routing.counts
        if isinstance(out, Tensor):
            return out, carried + routing.balance
        hidden = out._replace(routing=routing._replace(balance=carried + routing.balance))
        loss, run.records[number] = run.feed.loss(number, hidden, self.lm_head.weight, steer)
        return loss + 0.0 * hidden.routing.balance  # the library sends a gradient of all that came in

    def advance(
        self, x: Tensor | None, tokens: Tensor, mask: Tensor | None = None, *, depth: int, stream: torch.dtype,
        steer: Steer | None = None,
    ) -> Tensor | Hidden:  # fmt: skip
        """This stage's share of `DeepseekV3.hidden`, on its own: for a look, not for a step.

        Args:
            x: (B, T, D) of the stage before; None in the first. tokens: (B, T + depth). mask: (B, T, T).

        Returns:
            x for the next stage, or in the last the states.
        """
        return self._advance(x, tokens, mask, depth=depth, stream=stream, balance=False, steer=steer)[0]

    def _advance(
        self, x: Tensor | None, tokens: Tensor, mask: Tensor | None, *, depth: int, stream: torch.dtype, balance: bool,
        steer: Steer | None,
    ) -> tuple[Tensor | Hidden, Routing]:  # fmt: skip
        """The same, and with the routing of this stage's layers."""
        length = tokens.shape[1] - depth
        context = self._context(length, tokens.device, mask, None, balance, steer)
        if x is None:
            x = self.model.embed_tokens(tokens[:, :length]).to(stream)
        seen: list[Routed] = []

        for layer in self.model.main_layers:
            x = run_layer(layer, x, context, seen)
        if not self.part.last:
            return x, join_routing(seen, x)
        main = state = self.model.norm(x)
        states = []
        for k, layer in enumerate(self.model.mtp_layers[:depth], start=1):
            embedding = self.model.embed_tokens(tokens[:, k : k + length]).to(stream)
            state = run_mtp(layer, state, embedding, context, seen)
            states.append(state)
        routing = join_routing(seen, x)
        return Hidden(main, tuple(states), routing), routing


def as_placed(whole: Tensor, parameter: Tensor) -> Tensor:
    """This rank's piece of a tensor that every rank has whole."""
    if not isinstance(parameter, DTensor):
        return whole
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
