"""GRPO: the objective of a step of reinforcement learning, without a critic (V3 report section 5.2.2; arXiv 2402.03300).

For a group of G answers o_i to one question q, with rewards r_i:

    A_i = (r_i - mean r) / std r          0 where all rewards are equal (the report's formula has no value there)
    J   = mean_i [ min(rho_i A_i, clip(rho_i, 1 - eps, 1 + eps) A_i) - beta D_i ],   L = -J
    D   = pi_ref / pi - ln(pi_ref / pi) - 1                                          >= 0, and 0 where pi = pi_ref  (k3)

level "token"     rho and D of each token, averaged over the answer's tokens (DeepSeekMath's form; the default)
level "sequence"  rho and D of the whole answer, as V3's equations are written: probabilities of long answers are products of
                  many numbers, and their ratios stray far from 1 after one step

The defaults are R1's published settings (arXiv 2501.12948v2): eps 10, beta 0.001, 16 answers a question, 16 minibatches of
512 answers in one pass over a round. The eps 0.2 that other code has as its default is PPO's, not R1's: with 10 the ratio is
cut above 11 only, and never from below. V3's own settings are not published.
The MTP layers go on learning the answers that were sampled, and the experts' balance is kept as in pre-training.
Legend: B rows, T tokens, M MTP depth, n answer tokens of all rows, D model, V vocabulary, L MoE layers, K top-k.
Does not: sample, reward or loop.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dsv3.kernels.moe import sequence_balance_loss
from dsv3.model.transformer import DeepseekV3, Hidden, Router, Routing, Steer
from dsv3.parallel.workers import Workers
from dsv3.post.batch import Learnt, Part, RolloutBatch, cut, longest
from dsv3.post.exact import EnginePass, Reading
from dsv3.post.replay import Gate, RouterTap, Tapped, routes
from dsv3.train.loss import SplitObjective, Step, join_losses

LEVELS = ("token", "sequence")
_FARTHEST = (
    20.0  # nats: beyond, a ratio is held there and gives no gradient; exp(89) is infinite, and its gradient no number
)
_BLOCK_VALUES = 1 << 24  # logits that exist at once, 64 MiB of float32


@dataclass(frozen=True, kw_only=True)
class GrpoConfig:
    """The objective's constants."""

    clip: float = 10.0
    """eps. R1's 10 is hardly a clip; PPO's usual value is 0.2."""
    kl: float = 0.001
    """beta; 0 keeps no reference policy."""
    level: str = "token"
    """Ratios and KL a token or a whole answer: see the header."""

    def __post_init__(self) -> None:
        if self.clip <= 0 or self.kl < 0:
            raise ValueError(f"clip {self.clip} must be above 0, kl {self.kl} at least 0")
        if self.level not in LEVELS:
            raise ValueError(f"level is {self.level!r}: give one of {', '.join(LEVELS)}")


def advantages(rewards: Sequence[float]) -> list[float]:
    """(r - mean) / std of a group, 0 for all where std is 0. std is the population's."""
    values = torch.tensor(list(rewards), dtype=torch.float64)
    if len(values) < 2 or float(values.max() - values.min()) == 0.0:
        return [0.0] * len(values)
    centred = values - values.mean()
    return (centred / centred.square().mean().sqrt()).tolist()


def k3(log_policy: Tensor, log_reference: Tensor) -> Tensor:
    """Estimates KL(policy | reference) from samples of the policy, never negative; the shape of its inputs."""
    log_ratio = (log_reference - log_policy).clamp(max=_FARTHEST)
    return log_ratio.exp() - log_ratio - 1


def surrogate(log_policy: Tensor, log_old: Tensor, advantage: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """min(rho A, clip(rho) A), to be made large, and where the clip has cut the gradient off. All of one shape."""
    ratio = (log_policy - log_old).clamp(max=_FARTHEST).exp()
    free, cut = ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage
    return torch.minimum(free, cut), cut < free


def token_logprobs(
    states: Tensor, head: Tensor, targets: Tensor, reading: Reading | None = None
) -> tuple[Tensor, Tensor]:
    """states (n, D), head (V, D), targets (n,) -> log-probabilities (n,) and entropies (n,), float32, nats.

    Args:
        reading: whose logits take the place of the product's (post/exact.py).

    The product is made in float32 whatever the model's dtype: a bfloat16 logit of 20 is off by up to 0.06, far more than
    the rollout's. Logits exist a block at a time, in the backward pass again. Entropies carry no gradient.
    """
    block = max(1, _BLOCK_VALUES // head.shape[0])
    parts = [
        checkpoint(_block_logprobs, states[i : i + block], head, targets[i : i + block], reading, use_reentrant=False)
        for i in range(0, max(1, len(targets)), block)
    ]
    logprobs, entropies = zip(*parts)
    return torch.cat(logprobs), torch.cat(entropies)


def _block_logprobs(states: Tensor, head: Tensor, targets: Tensor, reading: Reading | None) -> tuple[Tensor, Tensor]:
    product = states.float() @ head.float().t()
    if reading is not None:
        product = reading.head(product, states)
    logprobs = product.log_softmax(-1)
    entropy = -(logprobs.detach().exp() * logprobs.detach()).sum(-1)
    return logprobs.gather(-1, targets.unsqueeze(-1)).squeeze(-1), entropy


@dataclass(frozen=True)
class _Pass:
    """A forward of some rows through the model or a stage of it: what steers its routers, and what it is compared with."""

    part: Part
    tap: RouterTap
    reading: Reading | None

    def __call__(self, router: Router, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.tap(router, x)

    @property
    def gap(self) -> float | None:
        return None if self.reading is None else self.reading.gap


class GrpoObjective(SplitObjective):
    """The Objective (train/loss.py) over RolloutBatch. Every row counts alike, blank ones not at all.

    Args:
        vocabulary: ids that the tokenizer has; the rollout never draws the head's rows beyond.
        replay: send each answer's tokens to the experts of the rollout, whatever the router would choose now.
        gate: compares the pass with the rollout.

    Attributes:
        engine: reads the rows as the rollout did, whose numbers are then the pass's own (post/exact.py); None: torch's are.
    """

    def __init__(self, config: GrpoConfig, vocabulary: int, gate: Gate, *, replay: bool = False) -> None:
        self.config, self.vocabulary, self.gate, self.replay = config, vocabulary, gate, replay
        self.engine: EnginePass | None = None
        self._stages = 1  # of this process, each of which runs every micro-batch
        self._readings: dict[int, tuple[Reading, int]] = {}  # and the stages that are still to use it

    def shares(self, batch: RolloutBatch) -> Tensor:
        return (batch.lengths > 0).double()

    def rows(self, batch: RolloutBatch) -> int:
        return batch.rows

    def begin(self, workers: Workers, batch: RolloutBatch, micros: Sequence[slice]) -> None:
        self.gate.begin()
        self._stages, self._readings = len(workers.parts), {}
        if self.replay and batch.fresh and self.engine is None:
            first = micros[0]
            self._look_unreplayed(workers, batch, first if first.start < first.stop else slice(0, 1))

    def settle(self, workers: Workers, batch: RolloutBatch) -> None:
        """
        Raises:
            GateError: this pass and the rollout differ by more than the gate lets through.
        """
        if batch.fresh:
            self.gate.judge(workers.everyone, replayed=self.replay)

    def inputs(self, batch: RolloutBatch, rows: slice, *, depth: int, device: torch.device) -> tuple[Tensor, None]:
        return batch.tokens[rows, : longest(batch, rows) + depth].to(device), None

    @contextlib.contextmanager
    def around(
        self, model: DeepseekV3, batch: RolloutBatch, rows: slice, *, depth: int, device: torch.device
    ) -> Iterator[Steer]:
        part = cut(batch, rows, depth, device)
        reading = self._read(rows.start, part)
        forced = reading.experts if reading is not None else part.experts if self.replay else None
        with contextlib.nullcontext() if reading is None else reading.told(model):
            yield _Pass(part, RouterTap(model, experts=forced), reading)
        if reading is not None and rows.start not in self._readings:
            reading.forget()

    def routed(self, routing: Routing, batch: RolloutBatch, rows: slice, steer: _Pass, *, alpha: float) -> Routing:
        seen, part = steer.tap.take(), steer.part
        if part.fresh:
            told = routes(part, seen, exact=steer.reading is not None)
            self.gate.note(rows.start, told, layer_gap=steer.gap)
        balance = _balance(seen, part) if alpha > 0 and seen and part.rows else routing.balance
        return routing._replace(counts=_counts(seen, part, routing.counts), balance=balance)

    def losses(
        self,
        hidden: Hidden,
        head: Tensor,
        batch: RolloutBatch,
        rows: slice,
        steer: _Pass,
        *,
        mtp_weight: float,
        alpha: float,
    ) -> Step:
        """See Objective. losses.main is -J; extras are means over answers."""
        part, head, known = steer.part, head[: self.vocabulary], steer.part.learnt[0]
        logprobs, entropies = token_logprobs(known.of(hidden.main), head, known.targets, steer.reading)
        if part.fresh:
            self.gate.note(rows.start, gaps=(logprobs.detach() - part.old).abs(), layer_gap=steer.gap)
        main, extras = self._policy_loss(part, logprobs, entropies)
        depths = tuple(
            _mtp_loss(state, head, learnt) for state, learnt in zip(hidden.mtp, part.learnt[1:], strict=True)
        )
        losses = join_losses(main, depths, hidden.routing.balance, mtp_weight=mtp_weight, alpha=alpha)
        return Step(losses, hidden.routing.counts, extras)

    def _policy_loss(self, part: Part, logprobs: Tensor, entropies: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """-J of the rows, and what to tell."""
        known, old, reference = part.learnt[0], part.old, part.reference
        if self.config.level == "sequence":
            gain, clipped = surrogate(known.sum(logprobs), known.sum(old), part.advantages, self.config.clip)
            divergence = None if reference is None else k3(known.sum(logprobs), known.sum(reference))
            share = clipped.float()
        else:
            advantages = part.advantages.index_select(0, known.row)
            gain, clipped = surrogate(logprobs, old, advantages, self.config.clip)
            gain, share = known.mean(gain), known.mean(clipped.float())
            divergence = None if reference is None else known.mean(k3(logprobs, reference))
        loss = -known.over(gain)
        extras = {
            "entropy": known.over(known.mean(entropies)),
            "clipped": known.over(share),
            "ratio": known.over(known.mean((logprobs.detach() - old).exp())),
        }
        if divergence is not None:
            loss = loss + self.config.kl * known.over(divergence)
            extras["kl"] = known.over(divergence)
        return loss, {name: extra.detach().double() for name, extra in extras.items()}

    def _read(self, micro: int, part: Part) -> Reading | None:
        """The engine's numbers of a micro-batch: read once, kept until every stage of this process has used them."""
        if self.engine is None:
            return None
        reading, uses = self._readings.pop(micro, (None, self._stages))
        if reading is None:
            reading = self.engine.read(part.tokens[:, : part.shape[1]], part.real)
        if uses > 1:
            self._readings[micro] = reading, uses - 1
        return reading

    @torch.no_grad()
    def _look_unreplayed(self, workers: Workers, batch: RolloutBatch, rows: slice) -> None:
        """Routers and log-probabilities of the pass as it is without replay, of one micro-batch a step: what replay is for."""
        part = cut(batch, rows, 0, workers.device)
        tap, known = RouterTap(*workers.forwards), part.learnt[0]
        hidden = workers.hidden(part.tokens, steer=tap)
        self.gate.note(rows.start, routes(part, tap.take()), free=True)
        if hidden is not None:
            head = workers.forwards[-1].lm_head.weight[: self.vocabulary]
            logprobs, _ = token_logprobs(known.of(hidden.main), head, known.targets)
            self.gate.note(rows.start, gaps=(logprobs - part.old).abs(), free=True)


def _mtp_loss(state: Tensor, head: Tensor, learnt: Learnt) -> Tensor:
    """Cross entropy of a depth's tokens: of each row the mean, of the rows the mean."""
    logprobs, _ = token_logprobs(learnt.of(state), head, learnt.targets)
    return -learnt.over(learnt.mean(logprobs))


def _balance(seen: dict[int, Tapped], part: Part) -> Tensor:
    """The sequence-wise balance loss of each row without its padding, mean over rows, summed over layers."""
    losses = [
        sequence_balance_loss(tapped.scores.unflatten(0, part.shape)[row : row + 1, :length], tapped.own.shape[1])
        for _, tapped in sorted(seen.items())
        for row, length in enumerate(part.lengths[: part.rows])
    ]
    return torch.stack(losses).sum() / part.rows


def _counts(seen: dict[int, Tapped], part: Part, like: Tensor) -> Tensor:
    """(L, E) int64: tokens that each expert got, padding left out."""
    counts = torch.zeros_like(like)
    for layer, (_, tapped) in zip(counts, sorted(seen.items()), strict=True):
        chosen = tapped.experts.index_select(0, part.real).flatten()
        layer.scatter_add_(0, chosen, torch.ones_like(chosen))
    return counts
