"""Masters and moments sharded over the data ranks, by FSDP2 (`torch.distributed.fsdp.fully_shard`).

What a rank holds for good is a float32 shard of each parameter. For a step it gathers them as wide as they are multiplied:
matrices in bfloat16, and embedding, norms, router (and what FP8 casts itself) in float32, the same widths as `compute_copy`
gives one process. Gradients are summed in float32 over the micro-batches and then over the ranks, once a step.

    zero1   gathered weights stay until the step's last backward pass: one gather a step         (the report's, section 3.2)
    fsdp    gathered a layer at a time, again in the backward pass: least memory

Experts' weights are this rank's already (expert.py) and are sharded over the replicas of its expert group.
Does not: know pipelines (their stages are sharded alike, one by one) or optimizers.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard

from dsv3.model.transformer import DeepseekV3, MoE, MTPLayer, RMSNorm, Router
from dsv3.parallel.mesh import Mesh


def shard(model: DeepseekV3, mesh: Mesh, precision: str) -> None:
    """Shard every parameter in place; `model.hidden`, `model(...)` and `lm_head.weight` then work as before.

    Args:
        model: the whole, or a pipeline's stage of it.
        precision: "float32", "bfloat16" or "fp8", as for `compute_copy`.
    """
    # Norms return views of their outputs, which matters where these are written in place: nothing here does.
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")
    again = mesh.config.sharding == "fsdp"
    wide = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    outer = wide if precision == "float32" else half
    inner = half if precision == "bfloat16" else wide  # in FP8 a layer casts its float32 weights itself

    def cut(modules: nn.Module | list[nn.Module], policy: MixedPrecisionPolicy) -> None:
        if modules:
            fully_shard(modules, mesh=mesh.data, mp_policy=policy, reshard_after_forward=again)

    def cut_experts(module: nn.Module) -> None:
        # The first dimension, experts, may be spread over ranks already and be shorter than the replicas are many.
        over = (lambda _: Shard(1)) if mesh.expert.size() > 1 else None
        fully_shard(module, mesh=mesh.replica, mp_policy=inner, reshard_after_forward=again, shard_placement_fn=over)

    for layer in model.model.layers:
        if isinstance(layer, MTPLayer):  # these are called before and after the layer's own forward
            cut([layer.enorm, layer.hnorm], wide)
            cut(layer.eh_proj, outer)
            cut(layer.shared_head.norm, wide)
        for module in layer.modules():
            if isinstance(module, MoE):
                cut_experts(module.experts)
        if inner is not wide:
            cut([m for m in layer.modules() if _is_wide(m)], wide)
        cut(layer, inner)
    for name, module in model.model.named_children():
        if name != "layers":
            cut(module, wide)
    fully_shard(model, mesh=mesh.data, mp_policy=outer, reshard_after_forward=False)
    for method in ("hidden", "draft", "advance"):  # the last is a stage's
        if hasattr(model, method):
            register_fsdp_forward_method(model, method)
    for module in sharded(model):
        module.set_force_sum_reduction_for_comms(True)  # gloo knows no scaled sums
        module.set_gradient_divide_factor(1.0)  # the loss is a share of the step's mean already: shares are summed


def sharded(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def before_backward(model: FSDPModule, mesh: Mesh, last: bool) -> None:
    """Say before a backward pass whether it is the step's last: zero1 sums gradients over the ranks and lets the weights go then,
    fsdp does so every time."""
    now = last or mesh.config.sharding == "fsdp"
    model.set_requires_gradient_sync(now)
    model.set_reshard_after_backward(now)
    model.set_is_last_backward(last)


def sum_every_time(stage: FSDPModule) -> None:
    """Of a pipeline's stage under fsdp: sum gradients and let weights go at each micro-batch, as FSDP does unless told. The
    library's stages tell it to keep both, whole, to the step's end."""
    for name in ("set_requires_gradient_sync", "set_reshard_after_backward"):
        setattr(stage, name, _as_it_is)


def _as_it_is(_value: bool, *, recurse: bool = True) -> None:
    """In the place of a setter."""


def settle(model: nn.Module) -> None:
    """Let go of gathered weights: before the optimizer changes the shards, and before anyone reads them by name."""
    for module in sharded(model):
        module.reshard()


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a shard, the very storage."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_view(name: str, tensor: Tensor, mesh: Mesh) -> Tensor:
    """What a checkpoint stores under a parameter's name: a shard of the whole parameter, over every rank that holds some of it.

    An expert's shard knows of its replicas only; here it becomes one of all experts, (E, ...) over expert and replica ranks.
    """
    ranks = mesh.expert.size()
    if ".mlp.experts." not in name or not isinstance(tensor, DTensor) or ranks == 1:
        return tensor
    shape = torch.Size((tensor.shape[0] * ranks, *tensor.shape[1:]))
    return DTensor.from_local(
        tensor.to_local(), mesh.experts, (Shard(1), Shard(0)), run_check=False, shape=shape, stride=tensor.stride()
    )


def _is_wide(module: nn.Module) -> bool:
    """Norms and routers multiply in float32 whatever the precision. Of an MTP layer some are grouped already."""
    return isinstance(module, (RMSNorm, Router)) and not getattr(module, "_is_fsdp_managed_module", False)
