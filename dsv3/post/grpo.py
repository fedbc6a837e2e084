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
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dsv3.kernels.moe import sequence_balance_loss
from dsv3.model.transformer import DeepseekV3
from dsv3.post.batch import RolloutBatch, cut
from dsv3.post.exact import EnginePass, Reading
from dsv3.post.replay import Gate, RouterTap, Tapped
from dsv3.train.loss import Step, join_losses

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


class GrpoObjective:
    """The Objective (train/loss.py) over RolloutBatch. Every row counts alike.

    Args:
        vocabulary: ids that the tokenizer has; the rollout never draws the head's rows beyond.
        replay: send each answer's tokens to the experts of the rollout, whatever the router would choose now.
        gate: compares the pass with the rollout.
        recompute: the model computes layers again in the backward pass.

    Attributes:
        engine: reads the rows as the rollout did, whose numbers are then the pass's own (post/exact.py); None: torch's are.
    """

    def __init__(
        self, config: GrpoConfig, vocabulary: int, gate: Gate, *, replay: bool = False, recompute: bool = False
    ) -> None:
        self.config, self.vocabulary, self.gate = config, vocabulary, gate
        self.replay, self.recompute = replay, recompute
        self.engine: EnginePass | None = None
        self._tap: RouterTap | None = None

    def release(self) -> None:
        """Give the routers back their own choice: before anything else runs the model."""
        if self._tap is not None:
            self._tap.close()
            self._tap = None

    def shares(self, batch: RolloutBatch) -> Tensor:
        return torch.ones(batch.tokens.shape[0], dtype=torch.float64)

    def __call__(
        self,
        model: DeepseekV3,
        batch: RolloutBatch,
        rows: slice,
        *,
        depth: int,
        mtp_weight: float,
        alpha: float,
        device: torch.device,
    ) -> Step:
        """See Objective. losses.main is -J; extras are means over answers.

        Raises:
            GateError: this pass and the rollout differ by more than the gate lets through.
        """
        part = cut(batch, rows, depth, device)
        free = self._unreplayed(model, part)
        reading = None if self.engine is None else self.engine.read(part.tokens[:, : part.answer.shape[1]])
        forced = reading.experts if reading is not None else part.experts if self.replay else None
        self._tap = tap = RouterTap(model, forced).open()
        try:
            with contextlib.nullcontext() if reading is None else reading.told(model):
                hidden = model.hidden(part.tokens, depth=depth)
            tap.stop()
            states, targets = hidden.main[part.answer], part.targets[:, : part.answer.shape[1]][part.answer]
            head = model.lm_head.weight[: self.vocabulary]
            logprobs, entropies = token_logprobs(states, head, targets, reading)
            if part.fresh:
                gap = None if reading is None else reading.gap
                self.gate.compare(part, tap.seen, logprobs.detach(), free, replayed=self.replay, layer_gap=gap)
            main, extras = self._policy_loss(part, logprobs, entropies)
            depths = tuple(_mtp_loss(state, head, part, k) for k, state in enumerate(hidden.mtp, start=1))
            balance = _balance(tap.seen, part.lengths, model) if alpha > 0 else main.new_zeros(())
            losses = join_losses(main, depths, balance, mtp_weight=mtp_weight, alpha=alpha)
            counts = _counts(tap.seen, part.lengths, hidden.routing.counts)
        except BaseException:
            self.release()
            raise
        held = self.replay or (self.recompute and reading is not None)
        if not held or not bool(losses.total.isfinite()):
            self.release()  # where experts are told, layers computed again in the backward pass need them still
        return Step(losses, counts, extras)

    def _policy_loss(self, part: RolloutBatch, logprobs: Tensor, entropies: Tensor) -> tuple[Tensor, dict[str, float]]:
        """-J of the rows, and what to tell."""
        spread = _Spread(part.answer)
        old = part.old[part.answer]
        reference = None if part.reference is None else part.reference[part.answer]
        if self.config.level == "sequence":
            gain, clipped = surrogate(spread.sum(logprobs), spread.sum(old), part.advantages, self.config.clip)
            divergence = None if reference is None else k3(spread.sum(logprobs), spread.sum(reference))
            share = clipped.float()
        else:
            gain, clipped = surrogate(logprobs, old, part.advantages[spread.row], self.config.clip)
            gain, share = spread.mean(gain), spread.mean(clipped.float())
            divergence = None if reference is None else spread.mean(k3(logprobs, reference))
        loss = -gain.mean()
        extras = {
            "entropy": float(spread.mean(entropies).mean()),
            "clipped": float(share.mean()),
            "ratio": float(spread.mean((logprobs.detach() - old).exp()).mean()),
        }
        if divergence is not None:
            loss = loss + self.config.kl * divergence.mean()
            extras["kl"] = float(divergence.detach().mean())
        return loss, extras

    @torch.no_grad()
    def _unreplayed(self, model: DeepseekV3, part: RolloutBatch) -> tuple[list[Tapped], Tensor] | None:
        """Routers and log-probabilities of the pass as it is without replay, of one micro-batch a step: what replay is for."""
        self.release()
        if not (self.replay and part.fresh and self.gate.wants_unreplayed and self.engine is None):
            return None
        with RouterTap(model) as tap:
            hidden = model.hidden(part.tokens[:, : part.answer.shape[1]])
        targets = part.targets[:, : part.answer.shape[1]][part.answer]
        head = model.lm_head.weight[: self.vocabulary]
        return tap.seen, token_logprobs(hidden.main[part.answer], head, targets)[0]


class _Spread:
    """Sums and means over each row's answer: (n,) values in row order -> (B,)."""

    def __init__(self, answer: Tensor) -> None:
        self.rows = answer.shape[0]
        self.row = torch.arange(self.rows, device=answer.device).unsqueeze(1).expand_as(answer)[answer]
        self.count = answer.sum(1).clamp(min=1).float()

    def sum(self, values: Tensor) -> Tensor:
        return values.new_zeros(self.rows).index_add(0, self.row, values)

    def mean(self, values: Tensor) -> Tensor:
        return self.sum(values) / self.count


def _mtp_loss(state: Tensor, head: Tensor, part: RolloutBatch, depth: int) -> Tensor:
    """Cross entropy of MTP depth k on the answers' tokens from the second on: of each row the mean, of the rows the mean."""
    length = part.answer.shape[1]
    known = part.answer.clone()
    for k in range(1, depth + 1):  # position t predicts the target k places on, which must be the answer's too
        known[:, : length - k] &= part.answer[:, k:]
        known[:, length - k :] = False
    logprobs, _ = token_logprobs(state[known], head, part.targets[:, depth : depth + length][known])
    return -_Spread(known).mean(logprobs).mean()


def _balance(seen: list[Tapped], lengths: Tensor, model: DeepseekV3) -> Tensor:
    """The sequence-wise balance loss of each row without its padding, mean over rows, summed over layers."""
    top_k = model.config.num_experts_per_tok
    layers = [layer.scores.unflatten(0, (len(lengths), -1)) for layer in seen]
    losses = [
        sequence_balance_loss(scores[row : row + 1, :length], top_k)
        for scores in layers
        for row, length in enumerate(lengths.tolist())
    ]
    return torch.stack(losses).sum() / len(lengths) if losses else lengths.new_zeros((), dtype=torch.float32)


def _counts(seen: list[Tapped], lengths: Tensor, like: Tensor) -> Tensor:
    """(L, E) int64: tokens that each expert got, padding left out."""
    counts = torch.zeros_like(like)
    for layer, tapped in zip(counts, seen, strict=True):
        experts = tapped.experts.unflatten(0, (len(lengths), -1))
        real = torch.arange(experts.shape[1], device=experts.device) < lengths.unsqueeze(1)
        chosen = experts[real].flatten()
        layer.scatter_add_(0, chosen, torch.ones_like(chosen))
    return counts
