"""The one ordered list of what is done to a model between its building and its training: compute copy -> recompute -> compile.

`compute_copy` gives the bfloat16 twin that forwards and backwards run on, while the float32 masters stay with the optimizer:
every matrix of a product is cast, and embedding, norms, router and router bias are the masters themselves (shared objects).
Expert and data parallelism take their places in this list (issue 6). Does not: start processes.
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dsv3.model.transformer import DeepseekV3, RMSNorm, Router


def compute_copy(master: DeepseekV3, dtype: torch.dtype) -> DeepseekV3:
    """A model whose matrices are `dtype` copies of the master's; what must stay float32 is shared with it."""
    if dtype == torch.float32:
        return master
    shared: dict[int, object] = {}
    for module in master.modules():
        if isinstance(module, (RMSNorm, Router, nn.Embedding)):
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                shared[id(tensor)] = tensor
    twin = copy.deepcopy(master, memo=shared)
    for module in twin.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in shared:
                setattr(module, name, nn.Parameter(parameter.detach().to(dtype)))
    return twin


@torch.no_grad()
def refresh_copy(twin: DeepseekV3, master: DeepseekV3) -> None:
    """Round the masters into the twin again, after an optimizer step."""
    pairs = [(t, m) for t, m in zip(twin.parameters(), master.parameters(), strict=True) if t is not m]
    if pairs:
        torch._foreach_copy_([t for t, _ in pairs], [m for _, m in pairs])


def prepare(model: DeepseekV3, *, recompute: bool, compile_layers: bool) -> None:
    """Wrap every decoder layer in place. Layers of one kind share one compiled graph, so depth costs no compile time."""
    for layer in model.model.layers:
        if recompute:
            forward = layer.forward
            layer.forward = lambda x, context, forward=forward: checkpoint(forward, x, context, use_reentrant=False)
        if compile_layers:
            layer.compile(dynamic=False)
