"""The one ordered list of what is done to a model between its building and its training.

    one process     compute copy (bfloat16, or FP8 as well) -> recompute -> compile
    a mesh          FP8 -> experts spread -> recompute -> compile -> sharded

`compute_copy` gives the twin that forwards and backwards run on, while the float32 masters stay with the optimizer: every
matrix of a product is cast, and embedding, norms, router and router bias are the masters themselves (shared objects).
On a mesh shards are the masters, and FSDP's gathered weights the copy. Does not: start processes.
"""

from __future__ import annotations

import copy
import functools

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dsv3.model.fp8 import fp8_modules, is_swapped, keeping, swap_fp8
from dsv3.model.transformer import DeepseekV3, RMSNorm, Router
from dsv3.parallel.expert import spread_experts
from dsv3.parallel.fsdp import shard
from dsv3.parallel.mesh import Mesh

PRECISIONS = ("bfloat16", "float32", "fp8")


def compute_copy(master: DeepseekV3, precision: str) -> DeepseekV3:
    """A model whose matrices are copies of the master's as wide as they are multiplied; the rest is shared with it, and so are
    weights that are not trained and have that width (under adapters, see model/lora.py).

    Args:
        precision: "float32" (the master itself), "bfloat16", or "fp8": FP8 codes beside the shared float32 masters for
            what `model.fp8` swaps, bfloat16 for the rest.
    """
    if precision == "float32":
        return master
    fp8 = precision == "fp8"
    shared: dict[int, object] = {}
    for path, module in master.named_modules():
        whole = isinstance(module, (RMSNorm, Router, nn.Embedding)) or (fp8 and is_swapped(path, module))
        for tensor in module.parameters(recurse=False):
            if whole or (not tensor.requires_grad and tensor.dtype == torch.bfloat16):
                shared[id(tensor)] = tensor
        shared |= {id(tensor): tensor for tensor in module.buffers(recurse=False)}
    twin = copy.deepcopy(master, memo=shared)
    for module in twin.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in shared:
                narrow = nn.Parameter(parameter.detach().to(torch.bfloat16), requires_grad=parameter.requires_grad)
                setattr(module, name, narrow)
    if fp8:
        swap_fp8(twin)
    return twin


@torch.no_grad()
def refresh_copy(twin: DeepseekV3, master: DeepseekV3) -> None:
    """Round the masters that are trained into the twin again, after an optimizer step."""
    for module in fp8_modules(twin):
        module.refresh()
    both = zip(twin.parameters(), master.parameters(), strict=True)
    pairs = [(t, m) for t, m in both if t is not m and m.requires_grad]
    if pairs:
        torch._foreach_copy_([t for t, _ in pairs], [m for _, m in pairs])


def parallelize(model: DeepseekV3, mesh: Mesh, *, precision: str, recompute: bool, compile_layers: bool) -> None:
    """Turn a model, or a pipeline's stage of it, into this rank's part of it, in place.

    Args:
        model: float32 masters, the same on every rank of a stage.
        mesh: of this process. precision, recompute, compile_layers: as in one process.
    """
    if precision == "fp8":
        swap_fp8(model)
    if mesh.expert.size() > 1:
        spread_experts(model, mesh.way, fp8=mesh.config.dispatch == "fp8")
    prepare(model, recompute=recompute, compile_layers=compile_layers)
    shard(model, mesh, precision)


def prepare(model: DeepseekV3, *, recompute: bool, compile_layers: bool) -> None:
    """Wrap every decoder layer in place. Layers of one kind share one compiled graph, so depth costs no compile time. What is put
    before a layer's own methods is bound to the layer, so that a deep copy of the model runs the copy's layers."""
    for layer in model.model.layers:
        if fp8_modules(layer) and not recompute:
            for block in ("attention_block", "mlp_block"):
                setattr(layer, block, keeping(getattr(layer, block)))
        if recompute:
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
        if compile_layers:
            layer.compile(dynamic=False)
