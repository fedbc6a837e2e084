"""The rollout's routers against the training pass's: what each chose, how far they differ, and replay of the rollout's choice.

On a CPU the training pass takes its values from the engine's own kernels (post/exact.py): experts and log-probabilities are then
the same bits. On other devices one model definition makes both, which differ by rounding alone. Elsewhere two engines disagree
about some tenth of the routers, and runs collapse (Megatron-LM issue 4168). Here that is measured at each step, and a gate
stops the run when it is not so.

    tap      each router of a pass also tells its scores and its own choice
    replay   the rollout's experts take the place of the router's choice; their weights are still the router's own scores, so
             the router goes on learning. For when precisions differ
    tie      two experts' scores closer than rounding: there the two passes may choose differently and both be right.
             Such tokens, and those behind them in the row, are told but not gated

A pass carries its tap as an argument (model.transformer.Context.steer), so several may be in flight, and a layer that is computed
again in the backward pass goes where it went. What is found lies where its layer is: a pipeline's stages and the ranks note their
shares, and behind the step, before the optimizer, all processes judge all notes alike.
Legend: B rows, T tokens, N = B·T, n answer tokens, L MoE layers, E experts, K top-k.
Source: routing replay: arXiv 2510.11370 (R3). Does not: know MTP routers' choices in the rollout: those are never replayed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from dsv3.kernels.moe import route
from dsv3.model.transformer import DeepseekV3, Router
from dsv3.parallel.stage import Stage
from dsv3.post.batch import Part

ACTIONS = ("error", "warn", "off")
_TIE = 1e-5  # of a score in (0, 1): some ten times what the order of float32 sums moves it
_FEW, _FAR = 20, 30  # one token in so many may be beyond the limit, by so many times
# What torch's layer may be from the engine's, given equal inputs, as a share of what it adds: usual are 1e-5 and a few hundredths.
_LAYER = {"float32": 1e-3, "bfloat16": 0.3}


class GateError(ValueError):
    """Rollout and training pass differ by more than the gate allows. Nothing was updated."""


@dataclass(frozen=True, kw_only=True)
class GateConfig:
    """What the rollout and the training pass may differ by."""

    action: str = "error"
    """On more than that: stop ("error"), say so ("warn"), nothing ("off"). It is measured and logged in any case."""
    logprob: float | None = None
    """By how much an answer token's log-probability may differ, nats. None: 1e-5 in float32, and in any precision where the
    pass has the engine's own numbers (a CPU), which must then be within it to the last token; else no limit. Between two orders
    of float32 sums one token in twenty may differ by more, up to thirty times that: 3e-7 is their mean, but 5e-5 is seen where
    a sharp policy drew an unlikely token; either pass is then as far from float64. Another model moves all tokens."""
    routes: float | None = None
    """Largest share of (token, layer) with different experts; None: 0 where the log-probability has a limit, else none."""

    def __post_init__(self) -> None:
        if self.action not in ACTIONS:
            raise ValueError(f"gate action is {self.action!r}: give one of {', '.join(ACTIONS)}")
        for name in ("logprob", "routes"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"gate {name} is {value}: give at least 0, or None")

    def limits(self, precision: str) -> tuple[float, float]:
        """Of log-probability and routes."""
        exact = precision == "float32"
        logprob = (1e-5 if exact else float("inf")) if self.logprob is None else self.logprob
        routes = (0.0 if exact else float("inf")) if self.routes is None else self.routes
        return logprob, routes


class Tapped(NamedTuple):
    """What a router told of a pass."""

    scores: Tensor  # (N, E) float32, differentiable
    own: Tensor  # (N, K) int64: its own choice
    experts: Tensor  # (N, K) int64: where the tokens went
    margin: Tensor  # (N,) float32: by how much its choice was decided


class RouterTap:
    """Steers the routers of one pass (model.transformer.Context.steer) and notes what each does, until `take`.

    Args:
        parts: the model, or stages of it.
        experts: (B, T, L, K) to send tokens to instead of the routers' choice, -1 where they choose; None: nowhere.
    """

    def __init__(self, *parts: DeepseekV3, experts: Tensor | None = None) -> None:
        self._rows = {router: row for part in parts for row, router in enumerate(part.routers(), _first_row(part))}
        self._forced = () if experts is None else experts.flatten(0, 1).long().unbind(1)
        self._seen: dict[int, Tapped] | None = {}

    def take(self) -> dict[int, Tapped]:
        """What was noted, by the router's row in Routing. Nothing is from here on; layers that are computed again in the backward
        pass are steered still."""
        seen, self._seen = self._seen, None
        assert seen is not None
        return seen

    def __call__(self, router: Router, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scores, own, weights = router(x)
        indices, row = own, self._rows[router]
        if row < len(self._forced):
            theirs = self._forced[row]
            indices = torch.where(theirs >= 0, theirs, own)
            outside = torch.full_like(scores, -torch.inf).scatter(-1, indices, 0.0)
            config = router.config  # the same weights by the same rule, of a choice that leaves only these
            indices, weights = route(
                scores,
                outside,
                top_k=config.num_experts_per_tok,
                n_group=1,
                topk_group=1,
                normalise=config.norm_topk_prob,
                scale=config.routed_scaling_factor,
            )
        if self._seen is not None:
            self._seen[row] = Tapped(scores, own, indices, _margin(router, scores.detach()))
        return scores, indices, weights


def _first_row(part: DeepseekV3) -> int:
    return part.rows.start if isinstance(part, Stage) else 0


def _margin(router: Router, scores: Tensor) -> Tensor:
    """(N,): what the last chosen expert, or group, is ahead of the first one left out."""
    config, choice = router.config, scores + router.e_score_correction_bias
    margin = torch.full_like(choice[:, 0], torch.inf)
    if config.topk_group < config.n_group:
        groups = choice.unflatten(-1, (config.n_group, -1))
        ranked = groups.topk(2, dim=-1).values.sum(-1).topk(config.topk_group + 1, dim=-1)
        margin = ranked.values[:, -2] - ranked.values[:, -1]
        inside = torch.zeros(groups.shape[:2], dtype=torch.bool, device=choice.device)
        inside.scatter_(-1, ranked.indices[:, :-1], True)
        choice = groups.masked_fill(~inside.unsqueeze(-1), -torch.inf).flatten(-2)
    if config.num_experts_per_tok < config.n_routed_experts:
        best = choice.topk(config.num_experts_per_tok + 1, dim=-1).values
        margin = torch.minimum(margin, best[:, -2] - best[:, -1])
    return margin


class Routes(NamedTuple):
    """One router of a pass against the rollout's, at the answers' tokens."""

    flags: Tensor  # (n,) uint8: 1 other experts, 2 a tie here, 4 a tie here or before in the row
    others: (
        Tensor  # (2,) int64: of how many tokens would torch's router have chosen otherwise, of how many was it asked
    )


class Differences(NamedTuple):
    """Of a pass from the rollout."""

    routes: Tensor  # (n, L) boolean: other experts
    gaps: Tensor  # (n,) float32: |difference of log-probability|
    tied: Tensor  # (n, L) boolean: a tie before the layer, in this or an earlier token, may have made it so
    layer_gap: float | None = None  # with the engine's own numbers: the farthest that a layer was from them
    others: Tensor | None = None  # (2,) int64, likewise: see Routes


def routes(part: Part, seen: dict[int, Tapped], *, exact: bool = False) -> dict[int, Routes]:
    """Of the routers whose choice in the rollout is known, by their rows.

    Args:
        exact: the pass had the engine's own numbers. Its experts are those that it was told, and no tie excuses any. What is
            torch's alone is told beside them.
    """
    found, known = {}, part.learnt[0]
    for row, tapped in sorted(seen.items()):
        if part.experts is None or row >= part.experts.shape[2]:
            continue
        went, theirs = tapped.experts if exact else tapped.own, known.of(part.experts[:, :, row]).long()
        other = went.index_select(0, known.at).sort(-1).values != theirs.sort(-1).values
        other = other.any(-1) & (theirs[:, 0] >= 0)
        near = torch.zeros_like(tapped.margin, dtype=torch.bool) if exact else tapped.margin < _TIE
        behind = known.of(near.unflatten(0, part.shape).cummax(1).values)
        flags = other + 2 * near.index_select(0, known.at).byte() + 4 * behind.byte()
        own = (tapped.own.sort(-1).values != tapped.experts.sort(-1).values).any(-1) & (tapped.margin >= _TIE)
        asked = own.index_select(0, part.real)
        found[row] = Routes(flags, torch.stack((asked.sum(), torch.tensor(len(asked), device=asked.device))))
    return found


def joined(layers: list[Routes], gaps: Tensor, layer_gap: float | None = None) -> Differences:
    """Of all layers, in their order, and of the log-probabilities (n,)."""
    if not layers:
        none = torch.zeros(len(gaps), 0, dtype=torch.bool)
        return Differences(none, gaps, none, layer_gap)
    flags = torch.stack([layer.flags for layer in layers], 1)
    others = torch.stack([layer.others for layer in layers]).sum(0)
    behind = (flags & 4).bool().cummax(1).values
    tied = (flags & 2).bool()
    tied[:, 1:] |= behind[:, :-1]
    # A tie of the last layer touches the log-probability of its own token. The sign marks what a tie may have made.
    gaps = torch.where(behind[:, -1], -gaps, gaps)
    return Differences((flags & 1).bool(), gaps, tied, layer_gap, others if layer_gap is not None else None)


@dataclass
class _Notes:
    """Of one micro-batch, by this process, or joined by all."""

    routes: dict[int, Routes] = field(default_factory=dict)
    gaps: Tensor | None = None
    layer_gaps: list[float] = field(default_factory=list)

    def add(self, other: _Notes) -> None:
        """What a process has that holds other layers, or the same rows for company's sake."""
        self.routes = other.routes | self.routes
        self.gaps = other.gaps if self.gaps is None else self.gaps
        self.layer_gaps += other.layer_gaps

    def differences(self) -> Differences:
        assert self.gaps is not None
        # The largest, and no number above all.
        far = max(self.layer_gaps, key=lambda gap: float("inf") if gap != gap else gap, default=None)
        return joined([self.routes[row] for row in sorted(self.routes)], self.gaps, far)


class Gate:
    """Notes the differences of a step's micro-batches, wherever they are found, and judges them behind the step.

    Args:
        precision: of the training pass: sets the limits that the config leaves open.

    Attributes:
        seen, free: of the step's micro-batches, as trained, and without replay (the first only). Of all processes.
    """

    def __init__(self, config: GateConfig, precision: str) -> None:
        self.config, self.precision = config, precision
        self.logprob, self.routes = config.limits(precision)
        self.warnings: list[str] = []
        self.seen: list[Differences] = []
        self.free: list[Differences] = []
        self._notes: tuple[dict[int, _Notes], dict[int, _Notes]] = {}, {}

    def begin(self) -> None:
        """Forget what a step that failed has left."""
        self._notes = {}, {}

    def note(
        self,
        micro: int,
        routes: dict[int, Routes] | None = None,
        gaps: Tensor | None = None,
        *,
        layer_gap: float | None = None,
        free: bool = False,
    ) -> None:
        """What some layers' routers did with a micro-batch, or how far (n,) its log-probabilities are from the rollout's.

        Args:
            micro: its first row.
            layer_gap: the pass had the engine's own numbers, from which a layer was so far (post/exact.py). None: it had not.
            free: of a pass without replay, told as `free_...`.
        """
        far = [] if layer_gap is None else [layer_gap]
        self._notes[free].setdefault(micro, _Notes()).add(_Notes(routes or {}, gaps, far))

    def judge(self, everyone: Callable[[Any], list[Any]] = lambda mine: [mine], *, replayed: bool = False) -> None:
        """Of all processes' notes, by all of them alike: either all raise or none.

        Args:
            everyone: what all processes have, given what this one has.
            replayed: the pass sent its tokens to the rollout's experts. Its routers' own choice is then told but not gated.

        Raises:
            GateError: beyond the limits, with the action "error".
        """
        told = everyone(tree_map(lambda x: x.cpu() if isinstance(x, Tensor) else x, _plain(self._notes)))
        self.begin()
        trained, free = ({}, {})
        for theirs in told:
            for whole, notes in zip((trained, free), theirs, strict=True):
                for micro, fields in notes.items():
                    whole.setdefault(micro, _Notes()).add(_Notes(*fields))
        if free:
            self.free.append(free[min(free)].differences())
        for micro in sorted(trained):
            self._judge(trained[micro].differences(), replayed)

    def _judge(self, found: Differences, replayed: bool) -> None:
        self.seen.append(found)
        exact = found.layer_gap is not None
        limit, most = self.config.limits("float32") if exact else (self.logprob, self.routes)
        faults = self._far_layers(found)
        gated = found.gaps[found.gaps >= 0]
        beyond = int((gated > limit).sum())
        few = 0 if exact else max(1, len(gated) // _FEW)
        if beyond > few or (beyond and float(gated.max()) > _FAR * limit):
            faults.append(
                f"log-probabilities of {beyond} of {len(gated)} tokens differ by more than {limit:.2e}, the largest by "
                f"{float(gated.max()):.2e}"
            )
        share = float((found.routes & ~found.tied).float().mean()) if found.routes.numel() else 0.0
        if not replayed and share > most:
            faults.append(f"{share:.2%} of (token, layer) went to other experts, the limit is {most:.2%}")
        if faults and self.config.action != "off":
            said = (
                f"rollout and training pass are not the same model: {'; '.join(faults)}. See that the engine reads the weights "
                "that are trained, in their precision; where precisions must differ, use replay and gate limits that fit them"
            )
            if self.config.action == "error":
                raise GateError(f"{said}. Nothing was updated")
            self.warnings.append(said)

    def _far_layers(self, found: Differences) -> list[str]:
        """Whether torch's own layers and routers, which the gradient is of, are the engine's. Routers are judged in float32, where
        it is not rounding that decides."""
        faults, limit = [], _LAYER.get(self.precision, 0.0)
        if found.layer_gap is not None and not found.layer_gap <= limit:
            faults.append(
                f"from equal inputs a layer came out {found.layer_gap:.2e} of what it adds apart, the limit is {limit}"
            )
        if self.precision == "float32" and found.others is not None and int(found.others[0]):
            faults.append(f"from equal inputs routers chose otherwise at {int(found.others[0])} places")
        return faults

    def report(self) -> dict[str, float]:
        """The step's numbers; the next step begins. Empty where no fresh answers were trained on.

        route_mismatch: share of (token, layer); route_mismatch_tokens: of tokens, with any layer; near_ties: tokens that a tie
        excuses; logprob_gap, logprob_gap_p99, logprob_gap_max: mean, 99th percentile and largest difference, nats. With
        replay, free_...: the same without it. With the engine's own numbers: layer_gap, the farthest that a layer of torch's
        was from the engine's given equal inputs, as a share of what it adds, and router_gap, how often a router was.
        """
        seen, self.seen = self.seen, []
        free, self.free = self.free, []
        return {**_told(seen, ""), **_told(free, "free_")}


def _plain(notes: tuple[dict[int, _Notes], ...]) -> tuple[dict[int, tuple[Any, ...]], ...]:
    """As the fields of what is sent to others."""
    return tuple({micro: (n.routes, n.gaps, n.layer_gaps) for micro, n in some.items()} for some in notes)


def _told(found: list[Differences], prefix: str) -> dict[str, float]:
    if not found:
        return {}
    routes, gaps = torch.cat([f.routes for f in found]), torch.cat([f.gaps for f in found])
    told = {
        "logprob_gap": float(gaps.abs().mean()),
        "logprob_gap_p99": float(gaps.abs().sort().values[(len(gaps) * 99) // 100]),
        "logprob_gap_max": float(gaps.abs().max()),
        "near_ties": float((gaps < 0).sum()),
    }
    if routes.numel():
        told |= {
            "route_mismatch": float(routes.float().mean()),
            "route_mismatch_tokens": float(routes.any(1).float().mean()),
        }
    layers = [f.layer_gap for f in found if f.layer_gap is not None]
    others = [f.others for f in found if f.others is not None]
    if layers:
        told["layer_gap"] = max(layers)
    if others:
        otherwise, asked = torch.stack(others).sum(0).tolist()
        told["router_gap"] = otherwise / asked
    return {prefix + name: value for name, value in told.items()}
