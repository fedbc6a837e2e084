"""Health of FP8 training: what each cast lost, a module at a time, and an alarm that names the module before the loss goes.

Of the input (x), the weight (w) and the output's gradient (dy) of every FP8 module:

    amax        the largest magnitude
    error       |x - x8| / |x| in the Frobenius norm; 2.6% for normally distributed values, whatever their size
    saturated   share of values at the largest code, 448: one in 128 when one value leads each tile
    flushed     share of values other than zero that became zero: what lies 2^18 below its tile's largest

An alarm is raised when something is not finite, when a cast loses more than ERROR or flushes more than FLUSHED, or when an
amax is GROWTH times the median of what it was before. Looked at on the steps that log expert counts, first micro-batch.
Source: spec 6.2 (error of a cast). Does not: stop a run; a loss that is not finite does that.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dsv3.kernels.quant import E4M3_MAX, Fp8, cast_tiles, dequantize_blocks, dequantize_tiles
from dsv3.model.fp8 import Fp8Experts, Fp8Linear, fp8_modules

ERROR, FLUSHED, GROWTH = 0.06, 0.25, 32.0
MOST = 3  # alarms told at a look
ROWS = 1024  # of an activation that are looked at
_MEMORY = 50  # looks back for the median of an amax
_LEAST_LOOKS = 5  # before growth is judged: the first steps of a run move fast

Health = dict[str, dict[str, dict[str, float]]]  # module -> x, w or dy -> counter


@torch.no_grad()
def counters(values: Tensor, cast: Fp8 | None = None) -> dict[str, float]:
    """amax, error, saturated and flushed of values (R, K) in 1x128 tiles, all but amax of at most ROWS of them, evenly spaced; or
    of a weight (..., O, I) whose 128x128 blocks are `cast`."""
    amax = values.abs().max().float()
    if cast is None:
        values = values[:: -(-values.shape[0] // ROWS)]
        cast = Fp8(*cast_tiles(values))
        back = dequantize_tiles(*cast, torch.float32)
    else:
        back = dequantize_blocks(*cast, torch.float32)
    exact, size = values.float(), cast.codes.float().abs()
    used = exact != 0
    found = torch.stack([
        amax, (exact - back).norm() / exact.norm().clamp_min(1e-38), (size == E4M3_MAX).float().mean(),
        ((size == 0) & used).sum() / used.sum().clamp_min(1),
    ])  # fmt: skip
    return dict(zip(("amax", "error", "saturated", "flushed"), found.tolist()))


class HealthMonitor:
    """Watches the FP8 modules of a model, or of its parts, while `watching()`; `health` is what the last watched step showed."""

    def __init__(self, *parts: nn.Module) -> None:
        swapped = {module for part in parts for module in fp8_modules(part)}
        self._modules = {name: m for part in parts for name, m in part.named_modules() if m in swapped}
        self._amax: dict[tuple[str, str], deque[float]] = {}
        self.health: Health = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Look at the first forward and backward inside; a module's second run, in a checkpoint's backward, is not counted."""
        self.health = {}
        handles = [handle for name, m in self._modules.items() for handle in self._hooks(name, m)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hooks(self, name: str, module: Fp8Linear | Fp8Experts) -> list[RemovableHandle]:
        weights: dict[str, dict[str, float]] = {}

        def before(_module: nn.Module, _inputs: tuple[Tensor, ...]) -> None:
            if name in self.health or weights or not torch.is_grad_enabled():
                return
            if module.stale:
                module.refresh()
            # Now, for behind the forward a shard may be all that is left (parallel/fsdp.py).
            weights.update({part: counters(weight.detach(), cast) for part, weight, cast in _weights(module)})

        def behind(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if name in self.health or not output.requires_grad:
                return
            found = self.health[name] = {"x": counters(inputs[0].detach().flatten(0, -2)), **weights}
            output.register_hook(lambda dy: found.__setitem__("dy", counters(dy.detach().flatten(0, -2))))

        return [module.register_forward_pre_hook(before), module.register_forward_hook(behind)]

    def join(self, everyone: Sequence[Health]) -> None:
        """Of all processes' looks, one look: every stage's modules, and of each value the process where the cast lost most."""
        joined: Health = {}
        for health in everyone:
            for name, parts in health.items():
                mine = joined.setdefault(name, {})
                for part, found in parts.items():
                    if part not in mine or _worse(found) > _worse(mine[part]):
                        mine[part] = found
        self.health = joined

    def alarms(self) -> list[str]:
        """Up to MOST sentences about the last watched step, the most telling first; and remember its sizes."""
        said = []
        for name, parts in self.health.items():
            for part, found in parts.items():
                seen = self._amax.setdefault((name, part), deque(maxlen=_MEMORY))
                cause = _cause(found, seen)
                if cause:
                    said.append((not math.isfinite(found["amax"]), found["error"], f"FP8: {part} of {name} {cause}"))
                if math.isfinite(found["amax"]):
                    seen.append(found["amax"])
        sentences = [sentence for *_, sentence in sorted(said, key=lambda s: s[:2], reverse=True)]
        return sentences[:MOST] + ([f"FP8: and {len(said) - MOST} more, see metrics.jsonl"] if len(said) > MOST else [])


def _weights(module: nn.Module) -> list[tuple[str, Tensor, Fp8]]:
    """Name, master and codes of a module's matrices."""
    assert isinstance(module, (Fp8Linear, Fp8Experts))
    named = list(module.named_parameters(recurse=False))
    names = ["w"] if len(named) == 1 else [f"w_{name.removesuffix('_proj')}" for name, _ in named]
    return [(name, parameter, cast) for name, (_, parameter), cast in zip(names, named, module.casts())]


def _worse(found: dict[str, float]) -> tuple[bool, float, float]:
    return not math.isfinite(found["amax"]), found["error"], found["amax"]


def _cause(found: dict[str, float], seen: deque[float]) -> str | None:
    if not math.isfinite(found["amax"]):
        return "is not finite"
    if found["error"] > ERROR:
        return f"loses {found['error']:.1%} in its cast (normal: 2.6%)"
    if found["flushed"] > FLUSHED:
        return f"has {found['flushed']:.1%} of its values flushed to zero"
    usual = statistics.median(seen) if len(seen) >= _LEAST_LOOKS else math.inf
    if found["amax"] > GROWTH * usual:
        return f"reaches {found['amax']:.3g}, {found['amax'] / usual:.0f} times its usual {usual:.3g}"
    return None
