"""What a step descends: an Objective. Pre-training's is L = CE(main) + lambda/M · sum_k CE(MTP k) + alpha · balance
(V3 report 2.1.2, 2.2); supervised fine-tuning (train/sft.py) and reinforcement learning (post/) bring their own.

A step's loss is the mean over all its rows, whatever micro-batches they are read in: micro-batch m counts by its share

    L = sum_m share_m · L_m,     share_m = sum of shares(batch) over the rows of m / the sum over all rows

Pre-training's rows are equal. Where rows have unequal numbers of trained targets, these are the shares.
Legend: B batch, T tokens, D model, V vocabulary, M MTP depth. Does not: know the model's inside or the optimizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from dsv3.kernels.cross_entropy import head_cross_entropy
from dsv3.model.transformer import DeepseekV3, Hidden, Routing, Steer
from dsv3.parallel.workers import Workers


class Losses(NamedTuple):
    """Means over the targets, in nats; detached except `total`."""

    total: Tensor
    main: Tensor
    mtp: tuple[Tensor, ...]
    balance: Tensor


class Step(NamedTuple):
    """What an objective makes of a micro-batch, and the trainer of a whole step."""

    losses: Losses
    counts: Tensor
    """(L_moe, E) int64: tokens sent to each expert, for the router bias. Added up over micro-batches."""
    extras: dict[str, Tensor]
    """More means for the step's record, float64 scalars, each weighted as the loss is. The same names from every micro-batch."""


class Rows(Protocol):
    """A batch: whatever the loader makes and the objective reads, B rows of it."""

    @property
    def tokens(self) -> Tensor:
        """(B, T + M) int64."""
        ...


class RowLoader(Protocol):
    """Where batches come from (data.loader.Loader and its like). A pure function of its state."""

    def next_batch(self, rows: int) -> Any:
        """The next batch (Rows), of about `rows` rows: the trainer counts those that came."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """JSON-able; `rows` in it, if any, is told in error messages."""
        ...

    def load_state_dict(self, state: Any) -> None: ...


class Objective:
    """The loss of one micro-batch of a step. Called with the compute copy of the model, under autograd."""

    def shares(self, batch: Any) -> Tensor:
        """(B,) float64: how much each row counts in the step's mean. Only their proportion matters."""
        raise NotImplementedError

    def rows(self, batch: Any) -> int:
        """Rows of the batch that are no filling."""
        return batch.tokens.shape[0]

    def begin(self, workers: Workers, batch: Any, micros: Sequence[slice]) -> None:
        """Before a step's micro-batches; all processes at once."""

    def settle(self, workers: Workers, batch: Any) -> None:
        """Behind them, before the optimizer moves anything; all processes at once, and they raise together or not at all."""

    def __call__(
        self,
        model: DeepseekV3,
        batch: Any,
        rows: slice,
        *,
        depth: int,
        mtp_weight: float,
        alpha: float,
        device: torch.device,
    ) -> Step:
        """The mean over `rows` of the batch, in the sense of `shares`; `losses.total` is what the trainer differentiates.

        Args:
            depth: MTP layers to train. mtp_weight, alpha: lambda and the balance loss's factor at this step.
        """
        raise NotImplementedError


class SplitObjective(Objective):
    """An Objective in pieces around the model's forward, so that a pipeline can run the forward in stages."""

    def inputs(self, batch: Any, rows: slice, *, depth: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Tokens (B, T + M) and mask (B, T, T) of `DeepseekV3.hidden`."""
        raise NotImplementedError

    def around(
        self, model: DeepseekV3, batch: Any, rows: slice, *, depth: int, device: torch.device
    ) -> AbstractContextManager[Steer | None]:
        """Open while the model, or a stage of it, runs the rows forward; what steers its routers then."""
        return nullcontext()

    def routed(self, routing: Routing, batch: Any, rows: slice, steer: Any, *, alpha: float) -> Routing:
        """What is to be counted, and the balance loss, of some layers' routers; see Feed.routed.

        Args:
            steer: what `around` gave.
        """
        return routing

    def losses(
        self,
        hidden: Hidden,
        head: Tensor,
        batch: Any,
        rows: slice,
        steer: Any,
        *,
        mtp_weight: float,
        alpha: float,
    ) -> Step:
        """What the states (B, T, D), the head (V, D) and the routing as `routed` has it make of the rows; see Objective."""
        raise NotImplementedError

    def __call__(
        self,
        model: DeepseekV3,
        batch: Any,
        rows: slice,
        *,
        depth: int,
        mtp_weight: float,
        alpha: float,
        device: torch.device,
    ) -> Step:
        tokens, mask = self.inputs(batch, rows, depth=depth, device=device)
        with self.around(model, batch, rows, depth=depth, device=device) as steer:
            hidden = model.hidden(tokens, depth=depth, mask=mask, balance=alpha > 0, steer=steer)
        hidden = hidden._replace(routing=self.routed(hidden.routing, batch, rows, steer, alpha=alpha))
        head = model.lm_head.weight
        return self.losses(hidden, head, batch, rows, steer, mtp_weight=mtp_weight, alpha=alpha)


class Portions:
    """A step's micro-batches as a pipeline asks for them (parallel.stage.Feed)."""

    def __init__(
        self,
        objective: SplitObjective,
        batch: Any,
        micros: Sequence[slice],
        *,
        depth: int,
        mtp_weight: float,
        alpha: float,
        device: torch.device,
    ) -> None:
        self.objective, self.batch, self.micros = objective, batch, micros
        self.depth, self.mtp_weight, self.alpha, self.device = depth, mtp_weight, alpha, device
        shares = objective.shares(batch)
        self.shares = [float(shares[micro].sum() / shares.sum()) for micro in micros]

    def inputs(self, micro: int) -> tuple[Tensor, Tensor | None]:
        return self.objective.inputs(self.batch, self.micros[micro], depth=self.depth, device=self.device)

    def around(self, micro: int, stage: DeepseekV3) -> AbstractContextManager[Steer | None]:
        return self.objective.around(stage, self.batch, self.micros[micro], depth=self.depth, device=self.device)

    def routed(self, micro: int, routing: Routing, steer: Steer | None) -> Routing:
        return self.objective.routed(routing, self.batch, self.micros[micro], steer, alpha=self.alpha)

    def loss(self, micro: int, hidden: Hidden, head: Tensor, steer: Steer | None) -> tuple[Tensor, Step]:
        weights = {"mtp_weight": self.mtp_weight, "alpha": self.alpha}
        step = self.objective.losses(hidden, head, self.batch, self.micros[micro], steer, **weights)
        losses = step.losses._replace(total=step.losses.total.detach())
        return step.losses.total * self.shares[micro], step._replace(losses=losses)


@dataclass(frozen=True, kw_only=True)
class PretrainObjective(SplitObjective):
    """Next-token prediction at every position of full rows (data.loader.Batch)."""

    mask_documents: bool = False
    """Keep attention inside a document."""

    def shares(self, batch: Any) -> Tensor:
        return torch.ones(batch.tokens.shape[0], dtype=torch.float64)

    def inputs(self, batch: Any, rows: slice, *, depth: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
        tokens = batch.tokens[rows].to(device)
        if not self.mask_documents:
            return tokens, None
        return tokens, document_mask(batch.doc_ids[rows, : tokens.shape[1] - depth].to(device))

    def losses(
        self,
        hidden: Hidden,
        head: Tensor,
        batch: Any,
        rows: slice,
        steer: Any,
        *,
        mtp_weight: float,
        alpha: float,
    ) -> Step:
        targets = batch.targets[rows].to(hidden.main.device)
        balance = hidden.routing.balance
        losses = training_losses(hidden.main, hidden.mtp, balance, head, targets, mtp_weight=mtp_weight, alpha=alpha)
        return Step(losses, hidden.routing.counts, {})


def places(mask: Tensor) -> Tensor:
    """Where a mask (B, T) on the CPU is True, (n,) int64 in its flattened form: a device that selects by a mask asks the host how
    many there are, and one that selects by places does not."""
    return mask.flatten().nonzero().squeeze(1)


def document_mask(doc_ids: Tensor) -> Tensor:
    """doc_ids (B, T) -> (B, T, T) boolean: causal, and among equal ids only."""
    causal = torch.ones(doc_ids.shape[1], doc_ids.shape[1], dtype=torch.bool, device=doc_ids.device).tril()
    return (doc_ids.unsqueeze(1) == doc_ids.unsqueeze(2)) & causal


def training_losses(
    main: Tensor,
    mtp: tuple[Tensor, ...],
    balance: Tensor,
    head: Tensor,
    targets: Tensor,
    *,
    mtp_weight: float,
    alpha: float,
) -> Losses:
    """States (B, T, D) of the main model and of each MTP depth, targets (B, T + M): depth k is scored on targets k to k + T.

    The loader supplies M more tokens a row, so that every depth has T exact targets up to the row's end.
    """
    length = main.shape[1]
    loss = head_cross_entropy(main, head, targets[:, :length])
    depths = tuple(head_cross_entropy(state, head, targets[:, k : k + length]) for k, state in enumerate(mtp, start=1))
    return join_losses(loss, depths, balance, mtp_weight=mtp_weight, alpha=alpha)


def join_losses(
    main: Tensor, depths: tuple[Tensor, ...], balance: Tensor, *, mtp_weight: float, alpha: float
) -> Losses:
    """The parts, scalars, and their weighted sum."""
    total = main + alpha * balance
    if depths:
        total = total + mtp_weight / len(depths) * torch.stack(depths).sum()
    return Losses(total, main.detach(), tuple(d.detach() for d in depths), balance.detach())
