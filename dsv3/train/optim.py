"""Schedules, AdamW, and the router-bias update that follows each optimizer step.

    pre-training    linear warm-up -> constant -> cosine to a tenth -> two constants            (V3 report section 4.2)
                    batch size from start to end in equal steps over the first share of the run
    after it        cosine from the first to the last rate, constant batch                      (section 5.1)
    router bias     b_i += gamma · sign(mean(c) - c_i), c the integer token counts of the whole step (arXiv 2408.15664, alg. 1)

The report's run has these as shares of 14.8T tokens; a run of any length takes the same shape. Does not: loop or log.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from dsv3.model.transformer import DeepseekV3


class Schedule(Protocol):
    """What changes over a run, by the 0-based step; a frozen dataclass."""

    @property
    def steps(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def batch_ramp_from(self) -> int | None: ...
    def lr(self, step: int) -> float: ...
    def rows(self, step: int) -> int: ...
    def bias_speed(self, step: int) -> float: ...
    def mtp_lambda(self, step: int) -> float: ...


@dataclass(frozen=True, kw_only=True)
class CosineConfig:
    """Schedule of fine-tuning: the report's SFT falls from 5e-6 to 1e-6 by a cosine (section 5.1)."""

    steps: int
    """Optimizer steps of the whole run."""
    batch_size: int
    """Rows of a step."""
    first_lr: float = 5e-6
    """Learning rate after warm-up; small models want more (about 1e-3 at 2M parameters)."""
    last_lr: float = 1e-6
    """Of the last step."""
    warmup_steps: int = 0
    gamma: float = 1e-3
    """Speed of the router bias; 0: it keeps every bit."""
    mtp_weight: float = 0.1
    """Lambda; pre-training ended with 0.1."""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1:
            raise ValueError(f"steps {self.steps} and batch_size {self.batch_size} must be at least 1")
        if not 0 <= self.warmup_steps < self.steps:
            raise ValueError(
                f"warmup_steps {self.warmup_steps} must be below steps {self.steps}: train longer or warm up less"
            )
        if not 0 <= self.last_lr <= self.first_lr:
            raise ValueError(f"last_lr {self.last_lr} must be from 0 to first_lr {self.first_lr}")

    def lr(self, step: int) -> float:
        """Learning rate of the 0-based step."""
        if step < self.warmup_steps:
            return self.first_lr * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.steps - 1 - self.warmup_steps)
        return self.last_lr + (self.first_lr - self.last_lr) * 0.5 * (1 + math.cos(math.pi * progress))

    @property
    def batch_ramp_from(self) -> None:
        """The batch is constant."""

    def rows(self, step: int) -> int:
        return self.batch_size

    def bias_speed(self, step: int) -> float:
        return self.gamma

    def mtp_lambda(self, step: int) -> float:
        return self.mtp_weight


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Shapes of everything that changes over a run; the shares are the report's, of 14.8T tokens."""

    steps: int
    """Optimizer steps of the whole run."""
    peak_lr: float = 2.2e-4
    """Learning rate after warm-up; small models want more (about 3e-3 at 5M parameters)."""
    warmup_steps: int = 2000
    constant_until: float = 10.0 / 14.8
    """Share of the run at which the cosine begins."""
    cosine_until: float = 14.3 / 14.8
    """Share at which it has fallen to peak/10; two constants follow: peak/10, then peak/30."""
    second_constant_from: float = (14.3 + 0.333) / 14.8
    batch_size: int = 15360
    """Rows of a step once the ramp is over."""
    batch_ramp_from: int | None = None
    """Rows of the first step (report: a fifth); None: no ramp."""
    batch_ramp_until: float = 0.469 / 14.8
    gamma: float = 1e-3
    """Speed of the router bias; 0 after `cosine_until`."""
    mtp_weight: float = 0.3
    """Lambda; a third of it after `constant_until`."""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1:
            raise ValueError(f"steps {self.steps} and batch_size {self.batch_size} must be at least 1")
        if not 0 <= self.warmup_steps < self.steps:
            raise ValueError(
                f"warmup_steps {self.warmup_steps} must be below steps {self.steps}: train longer or warm up less"
            )
        if not 0 <= self.constant_until <= self.cosine_until <= self.second_constant_from <= 1:
            raise ValueError(
                f"constant_until {self.constant_until}, cosine_until {self.cosine_until}, second_constant_from "
                f"{self.second_constant_from} must rise within 0 and 1"
            )
        if self.batch_ramp_from is not None and not 1 <= self.batch_ramp_from <= self.batch_size:
            raise ValueError(
                f"batch_ramp_from {self.batch_ramp_from} must be between 1 and batch_size {self.batch_size}"
            )

    def lr(self, step: int) -> float:
        """Learning rate of the 0-based step."""
        if step < self.warmup_steps:
            return self.peak_lr * (step + 1) / self.warmup_steps
        share = step / self.steps
        if share < self.constant_until:
            return self.peak_lr
        if share < self.cosine_until:
            progress = (share - self.constant_until) / (self.cosine_until - self.constant_until)
            return self.peak_lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))
        return self.peak_lr * (0.1 if share < self.second_constant_from else 7.3e-6 / 2.2e-4)

    def rows(self, step: int) -> int:
        """Batch size of the step."""
        ramp = self.batch_ramp_until * self.steps
        if self.batch_ramp_from is None or step >= ramp:
            return self.batch_size
        return self.batch_ramp_from + int((self.batch_size - self.batch_ramp_from) * step / ramp)

    def bias_speed(self, step: int) -> float:
        return self.gamma if step / self.steps < self.cosine_until else 0.0

    def mtp_lambda(self, step: int) -> float:
        return self.mtp_weight if step / self.steps < self.constant_until else self.mtp_weight / 3


class AdamW(torch.optim.AdamW):
    """torch's, with moments of a narrower dtype if asked (report section 3.3.3: bfloat16). torch's fused CPU kernel wants all
    in one dtype, so the moments of one parameter at a time are widened, stepped in float32, and rounded back."""

    def __init__(self, groups: list[dict[str, Any]], *, moments: torch.dtype, **options: Any) -> None:
        super().__init__(groups, **options)
        self.moments = moments

    def materialise(self) -> None:
        """Create the moments, as torch does at its first step."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter not in self.state:
                    self.state[parameter] = {
                        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                        "exp_avg": torch.zeros_like(parameter, dtype=self.moments),
                        "exp_avg_sq": torch.zeros_like(parameter, dtype=self.moments),
                    }

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        assert closure is None
        self.materialise()
        if self.moments == torch.float32:
            super().step()
            return
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_one(parameter, parameter.grad, group)

    def _step_one(self, parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        wide = [state[name].float() for name in ("exp_avg", "exp_avg_sq")]
        beta1, beta2 = group["betas"]
        adamw(
            [parameter], [grad], [wide[0]], [wide[1]], [], [state["step"]], fused=True, amsgrad=False,
            beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
        )  # fmt: skip
        state["exp_avg"].copy_(wide[0])
        state["exp_avg_sq"].copy_(wide[1])


def build_optimizer(
    masters: Sequence[nn.Parameter], *, weight_decay: float = 0.1, moments: torch.dtype = torch.float32
) -> AdamW:
    """AdamW (0.9, 0.95) over the float32 masters that are trained; decay on matrices only (report section 4.2)."""
    matrices, vectors = [p for p in masters if p.dim() > 1], [p for p in masters if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return AdamW(groups, moments=moments, lr=0.0, betas=(0.9, 0.95), eps=1e-8, fused=True)


@torch.no_grad()
def update_router_bias(model: DeepseekV3, counts: Tensor, gamma: float) -> None:
    """Move every router's bias against its load error. counts (L, E) int64 over all micro-batches (and ranks) of the step.

    In integers, E·c_i against the sum: a count held in bfloat16, or a rounded mean, turns the sign of a small error.
    """
    if gamma == 0.0:
        return
    assert counts.dtype == torch.int64, counts.dtype
    error = counts.sum(1, keepdim=True) - counts * counts.shape[1]
    for router, row in zip(model.routers(), error, strict=True):
        router.e_score_correction_bias += gamma * row.sign().to(torch.float32)


def non_finite(named: Sequence[tuple[str, Tensor | None]]) -> str | None:
    """The first name whose tensor holds a NaN or an infinity."""
    return next((name for name, tensor in named if tensor is not None and not bool(tensor.isfinite().all())), None)
