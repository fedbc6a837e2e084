"""LoRA: a model that stays as it is, and small matrices beside its large ones that are trained in their place.

    y = W x + (alpha / r) · B (A x)          A (r, I) drawn at random, B (O, r) zero at first: nothing changes until it learns
    routed experts: A (E, r, I), B (E, O, r), stacked as the experts are, two grouped products more

What gets adapters is named by role, so that none of them is missed and the router never has one:

    attn      q_a, q_b (or q), kv_a, kv_b, o projections        shared    gate, up and down of the shared experts
    routed    gate_up and down of all routed experts            dense     gate, up and down of the dense layers' MLP

in the MTP layers as in the main ones. `add_lora` counts what it made against what the config says (`adapter_count`) and
asserts that they agree. Modules are swapped from outside. The frozen base may be in bfloat16, float32, or kept in FP8
(model/stored.py): gradients then pass through the codes, dx = dy W8, and no wider copy of the weights is made.

`merged_state` is the plain model's state dict, W + (alpha / r) · B A, made a tensor at a time as it is read. Merged weights are
in bfloat16 where the base was FP8: e4m3 has steps of 6% of a value, and most of what an adapter learnt would be rounded away.
Source: arXiv 2106.09685. Legend: E experts, r rank, I in, O out, D model, N tokens, R = N·K rows in expert order.
Does not: train (train/sft.py), or use dropout.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dsv3.kernels.fp8_gemm import fp8_grouped_mm, one_group
from dsv3.kernels.gemm import grouped_linear
from dsv3.kernels.moe import permute, unpermute
from dsv3.kernels.quant import dequantize_blocks
from dsv3.kernels.swiglu import swiglu
from dsv3.model.census import is_router_bias
from dsv3.model.config import ModelConfig
from dsv3.model.stored import StoredAttention, StoredExperts, StoredLinear
from dsv3.model.transformer import MLP, Attention, DeepseekV3, Experts, MoE

ROLES = ("attn", "shared", "routed", "dense")
ADAPTER_FILE = "adapter.safetensors"


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Which matrices get adapters, and how large."""

    rank: int = 16
    alpha: float = 32.0
    """The adapters' product is multiplied by alpha / rank."""
    roles: tuple[str, ...] = ("attn", "shared", "routed")
    """Of attn, shared, routed and dense."""

    def __post_init__(self) -> None:
        if self.rank < 1 or not self.alpha > 0:
            raise ValueError(f"rank {self.rank} must be at least 1 and alpha {self.alpha} above 0")
        unknown = [role for role in self.roles if role not in ROLES]
        if unknown or not self.roles:
            hint = ": the router is never adapted" if set(unknown) & {"router", "gate"} else ""
            raise ValueError(f"roles {list(self.roles)} must be some of {', '.join(ROLES)}{hint}")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


# -- modules -----------------------------------------------------------------------------------------------------------


class LoraLinear(nn.Module):
    """A frozen Linear, in whatever precision, with its adapter."""

    def __init__(self, base: nn.Linear | StoredLinear, config: LoraConfig, generator: torch.Generator) -> None:
        super().__init__()
        out, width = base.weight.shape
        if type(base) is StoredLinear:
            base.__class__ = PassingLinear
        self.base, self.scale = base, config.scale
        self.lora_a = _drawn((config.rank, width), base.weight.device, generator)
        self.lora_b = _zeros((out, config.rank), base.weight.device)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., I) -> (..., O)."""
        return self.base(x) + F.linear(F.linear(x, self.lora_a), self.lora_b) * self.scale

    @property
    def weight(self) -> Tensor:
        """The merged matrix, as the absorbed form of attention reads it."""
        return _merged(_plain_weight(self.base), self.lora_a, self.lora_b, self.scale)


class LoraExperts(nn.Module):
    """Frozen routed experts with adapters of their own, gate and up sharing their A."""

    def __init__(self, base: Experts | StoredExperts, config: LoraConfig, generator: torch.Generator) -> None:
        super().__init__()
        experts, dim, width = base.down_proj.shape
        device, rank = base.down_proj.device, config.rank
        self.base, self.scale = base, config.scale
        self.gate_up_a = _drawn((experts, rank, dim), device, generator)
        self.gate_up_b = _zeros((experts, 2 * width, rank), device)
        self.down_a = _drawn((experts, rank, width), device, generator)
        self.down_b = _zeros((experts, dim, rank), device)

    def forward(self, x: Tensor, weights: Tensor, order: Tensor, inverse: Tensor, counts: Tensor) -> Tensor:
        """x (N, D), weights (N, K) float32, with the rows' order -> (N, D), weighted and summed."""
        rows = permute(x, order, inverse)
        h = _frozen_up(self.base, rows, counts) + self._adapt(rows, self.gate_up_a, self.gate_up_b, counts)
        gate, up = h.chunk(2, dim=-1)
        act = swiglu(gate, up, permute(weights.reshape(-1, 1), order, inverse))
        y = _frozen_down(self.base, act, counts) + self._adapt(act, self.down_a, self.down_b, counts)
        return unpermute(y, order, inverse, weights.shape[-1])

    def _adapt(self, x: Tensor, a: Tensor, b: Tensor, counts: Tensor) -> Tensor:
        return grouped_linear(grouped_linear(x, a, counts), b, counts) * self.scale

    def merged(self, name: str) -> Tensor:
        """`gate_up_proj` or `down_proj` of the plain experts."""
        a, b = (self.gate_up_a, self.gate_up_b) if name == "gate_up_proj" else (self.down_a, self.down_b)
        return _merged(_plain_experts(self.base, name), a, b, self.scale)


class PassingLinear(StoredLinear):
    """A StoredLinear through which gradients pass."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        y = _Frozen8.apply(
            rows, self.weight.unsqueeze(0), self.weight_scale_inv.unsqueeze(0), one_group(len(rows), x.device)
        )
        return y.unflatten(0, x.shape[:-1])


class PassingExperts(StoredExperts):
    """StoredExperts without adapters, through which gradients pass."""

    def forward(self, x: Tensor, weights: Tensor, order: Tensor, inverse: Tensor, counts: Tensor) -> Tensor:
        gate, up = _frozen_up(self, permute(x, order, inverse), counts).chunk(2, dim=-1)
        act = swiglu(gate, up, permute(weights.reshape(-1, 1), order, inverse))
        return unpermute(_frozen_down(self, act, counts), order, inverse, weights.shape[-1])


class _Frozen8(torch.autograd.Function):
    """y[r] = W_e x[r] with W in FP8 codes; only x has a gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, codes: Tensor, scales: Tensor, offsets: Tensor) -> Tensor:
        ctx.save_for_backward(codes, scales, offsets)
        return fp8_grouped_mm(x, None, codes, scales, offsets, x.dtype)

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        (dy,) = grad_outputs
        codes, scales, offsets = ctx.saved_tensors
        return fp8_grouped_mm(dy.contiguous(), None, codes.mT, scales.mT, offsets, dy.dtype), None, None, None


def _frozen_up(base: Experts | StoredExperts, rows: Tensor, counts: Tensor) -> Tensor:
    """(R, D) -> (R, 2·I), gate then up."""
    if isinstance(base, Experts):
        return grouped_linear(rows, base.gate_up_proj, counts)
    return torch.cat([_Frozen8.apply(rows, *half, _offsets(counts)) for half in base._halves()], dim=-1)


def _frozen_down(base: Experts | StoredExperts, act: Tensor, counts: Tensor) -> Tensor:
    if isinstance(base, Experts):
        return grouped_linear(act, base.down_proj, counts)
    return _Frozen8.apply(act, base.down_proj, base.down_proj_scale_inv, _offsets(counts))


def _offsets(counts: Tensor) -> Tensor:
    return F.pad(counts.cumsum(0), (1, 0))


def _drawn(shape: tuple[int, ...], device: torch.device, generator: torch.Generator) -> nn.Parameter:
    """Normal, of variance 1 / I, so that A x is as large as x."""
    return nn.Parameter((torch.randn(shape, generator=generator) / math.sqrt(shape[-1])).to(device))


def _zeros(shape: tuple[int, ...], device: torch.device) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape, device=device))


# -- adding ------------------------------------------------------------------------------------------------------------


def adapter_count(config: ModelConfig, lora: LoraConfig) -> dict[str, int]:
    """Parameters of the adapters by role, from the sizes alone."""
    dim, rank, heads = config.hidden_size, lora.rank, config.num_attention_heads
    latent, query = config.kv_lora_rank, heads * config.qk_head_dim
    pairs = [(dim, query)] if config.q_lora_rank is None else [(dim, config.q_lora_rank), (config.q_lora_rank, query)]
    pairs += [
        (dim, latent + config.qk_rope_head_dim),
        (latent, heads * (config.qk_nope_head_dim + config.v_head_dim)),
        (heads * config.v_head_dim, dim),
    ]
    layers = config.num_layers_with_mtp
    moe = sum(config.is_moe(index) for index in range(layers))
    width, shared = config.moe_intermediate_size, config.n_shared_experts * config.moe_intermediate_size
    found = {
        "attn": layers * sum(map(sum, pairs)),
        "shared": moe * 3 * (dim + shared) if shared else 0,
        "routed": moe * config.n_routed_experts * ((dim + 2 * width) + (width + dim)),
        "dense": (layers - moe) * 3 * (dim + config.intermediate_size),
    }
    return {role: found[role] * rank for role in ROLES if role in lora.roles}


def add_lora(model: DeepseekV3, config: LoraConfig, *, seed: int = 0) -> dict[str, int]:
    """Freeze the model and put adapters on it, in place -> their parameters by role.

    Raises:
        ValueError: it has adapters already, or no module of a role asked for.
    """
    if has_lora(model):
        raise ValueError("the model has adapters already: merge them first")
    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    counts = dict.fromkeys((role for role in ROLES if role in config.roles), 0)
    for path, module in list(model.named_modules()):
        role = _role(model, path, module)
        if role in config.roles:
            kind = LoraLinear if isinstance(module, nn.Linear | StoredLinear) else LoraExperts
            adapted = kind(module, config, generator)  # type: ignore[arg-type]
            model.set_submodule(path, adapted)
            counts[role] += sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        elif type(module) is StoredLinear:
            module.__class__ = PassingLinear
        elif type(module) is StoredExperts:
            module.__class__ = PassingExperts
        elif type(module) is StoredAttention and "attn" in config.roles:
            module.__class__ = Attention  # type: ignore[assignment]  # its absorbed form reads the merged matrix
    wanted = adapter_count(model.config, config)
    assert counts == wanted, f"adapters have {counts} parameters, the config makes it {wanted}"
    if empty := [role for role, count in counts.items() if not count]:
        raise ValueError(f"the model has no {', '.join(empty)} matrices: leave the role out of {list(config.roles)}")
    return counts


def has_lora(model: nn.Module) -> bool:
    return any(isinstance(module, LoraLinear | LoraExperts) for module in model.modules())


def _role(model: DeepseekV3, path: str, module: nn.Module) -> str | None:
    """Which role a module plays, by its parent's kind; None for all that stays as it is."""
    if isinstance(module, Experts | StoredExperts):
        return "routed"
    if not isinstance(module, nn.Linear | StoredLinear):
        return None
    parent = path.rpartition(".")[0]
    owner = model.get_submodule(parent)
    if isinstance(owner, Attention):
        return "attn"
    if isinstance(owner, MLP):
        return "shared" if isinstance(model.get_submodule(parent.rpartition(".")[0]), MoE) else "dense"
    return None


# -- merging -----------------------------------------------------------------------------------------------------------


class MergedState(Mapping[str, Tensor]):
    """The plain model's state dict. Each tensor is made when it is read; the last two are remembered, as a save reads the
    experts of a layer one by one."""

    def __init__(self, makers: dict[str, Callable[[], Tensor]]) -> None:
        self._makers = makers
        self._last: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._last:
            made = self._makers[name]()
            while len(self._last) > 1:
                self._last.pop(next(iter(self._last)))
            self._last[name] = made
        return self._last[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)

    def __contains__(self, name: object) -> bool:
        return name in self._makers


def merged_state(model: DeepseekV3) -> MergedState:
    """Of a model with adapters, of one kept in FP8, or of a plain one."""
    makers: dict[str, Callable[[], Tensor]] = {}
    inside: tuple[str, ...] = ()  # of what has been taken whole
    for path, module in model.named_modules():
        if path.startswith(inside):
            continue
        if isinstance(module, LoraLinear):
            makers[f"{path}.weight"] = lambda module=module: module.weight
            inside = (*inside, f"{path}.")
        elif isinstance(module, LoraExperts):
            for name in ("gate_up_proj", "down_proj"):
                makers[f"{path}.{name}"] = lambda module=module, name=name: module.merged(name)
            inside = (*inside, f"{path}.")
        elif isinstance(module, StoredLinear):
            makers[f"{path}.weight"] = lambda module=module: _plain_weight(module)
        elif isinstance(module, StoredExperts):
            for name in ("gate_up_proj", "down_proj"):
                makers[f"{path}.{name}"] = lambda module=module, name=name: _plain_experts(module, name)
        else:
            own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
            for name, tensor in own:
                makers[f"{path}.{name}" if path else name] = lambda tensor=tensor: tensor.detach()
    return MergedState(makers)


@torch.no_grad()
def merge_lora(model: DeepseekV3) -> DeepseekV3:
    """A plain model with the adapters merged. What had none is shared with `model`."""
    state = merged_state(model)
    with torch.device("meta"):
        plain = DeepseekV3(model.config)
    plain.load_state_dict({name: state[name] for name in state}, assign=True)
    return plain.requires_grad_(True).train(model.training)


@torch.no_grad()
def _merged(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """weight (..., O, I) + scale · b a, summed in float32 and rounded once."""
    return (weight.float() + (b.float() @ a.float()) * scale).to(weight.dtype)


def _plain_weight(base: nn.Linear | StoredLinear) -> Tensor:
    return (
        dequantize_blocks(base.weight, base.weight_scale_inv)
        if isinstance(base, StoredLinear)
        else base.weight.detach()
    )


def _plain_experts(base: Experts | StoredExperts, name: str) -> Tensor:
    if isinstance(base, Experts):
        return getattr(base, name).detach()
    if name == "down_proj":
        return dequantize_blocks(base.down_proj, base.down_proj_scale_inv)
    return torch.cat([dequantize_blocks(*half) for half in base._halves()], dim=-2)


# -- adapters on disk --------------------------------------------------------------------------------------------------


def adapter_state(model: DeepseekV3) -> dict[str, Tensor]:
    """What training changes: the adapters, and the router biases."""
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return trained | {name: buffer for name, buffer in model.named_buffers() if is_router_bias(name)}


def save_adapters(model: DeepseekV3, config: LoraConfig, folder: Path) -> None:
    """adapter.safetensors, with the config in its metadata.

    Raises:
        ValueError: the model has no adapters.
    """
    if not has_lora(model):
        raise ValueError("the model has no adapters to save: use dsv3.save for a whole model")
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous().cpu() for name, tensor in adapter_state(model).items()}
    save_file(tensors, folder / ADAPTER_FILE, metadata={"lora": json.dumps(asdict(config))})


def load_adapters(model: DeepseekV3, folder: Path) -> LoraConfig:
    """Put saved adapters on a model, plain or with adapters of the same shapes.

    Raises:
        ValueError: no adapters there, or they belong to another model; the first difference is told.
    """
    path = Path(folder) / ADAPTER_FILE
    if not path.is_file():
        raise ValueError(f"{path} does not exist: give the folder that `dsv3 sft` with LoRA wrote")
    try:
        with safe_open(path, "pt") as file:
            fields = json.loads((file.metadata() or {}).get("lora", "null"))
            saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}): copy it again") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} says nothing of its LoRA config: it was not written by dsv3")
    config = LoraConfig(rank=fields["rank"], alpha=fields["alpha"], roles=tuple(fields["roles"]))
    if not has_lora(model):
        add_lora(model, config)
    own = adapter_state(model)
    for name in sorted({*own, *saved}):
        here, there = (list(state[name].shape) if name in state else "nothing" for state in (own, saved))
        if here != there:
            raise ValueError(
                f"{path}: {name} is {there} there and {here} in the model: they belong to another model or rank"
            )
    with torch.no_grad():
        for name, tensor in saved.items():
            own[name].copy_(tensor)
    return config
