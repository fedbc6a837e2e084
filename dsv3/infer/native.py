"""A model as the kernels of generation read it (dsv3.kernels.decode): its weights by their addresses.

The model may be in float32, bfloat16 or kept in FP8 (dsv3.model.stored), on the CPU. Nothing is copied: weights that change in
place, as in training, are seen by the next step; weights that are replaced (`model.to`) are not.
Does not: run anything (dsv3.infer.runner does).
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor, nn

from dsv3.kernels import decode
from dsv3.model.config import ModelConfig
from dsv3.model.rope import frequencies, rope_table
from dsv3.model.stored import StoredAttention, StoredExperts, StoredLinear
from dsv3.model.transformer import (
    MLP,
    Attention,
    Backbone,
    DecoderLayer,
    DeepseekV3,
    Experts,
    MoE,
    MTPLayer,
    RMSNorm,
    Router,
    SharedHead,
)

_MODULES = frozenset((
    DeepseekV3, Backbone, DecoderLayer, MTPLayer, SharedHead, Attention, StoredAttention, MLP, MoE, Router, Experts,
    StoredExperts, RMSNorm, StoredLinear, nn.Linear, nn.Embedding, nn.ModuleList,
))  # fmt: skip


def fits(model: DeepseekV3) -> bool:
    """Whether the kernels can run this model: on the CPU, of kinds of weights that they know, and a library to call."""
    if any(type(module) not in _MODULES for module in model.modules()):
        return False  # trained in FP8, or someone's own
    for tensor in (*model.parameters(), *model.buffers()):
        plain = type(tensor) in (Tensor, nn.Parameter) and tensor.is_contiguous()
        if tensor.device.type != "cpu" or tensor.dtype not in decode.KINDS or not plain:
            return False
    return decode.library() is not None


def describe(model: DeepseekV3) -> tuple[decode.Model, object]:
    """The model as the kernels read it, and what must live as long as that does."""
    config = model.config
    layers = (decode.Layer * config.num_layers_with_mtp)(*(_layer(x) for x in model.model.layers))
    freqs = frequencies(config).float()
    at_zero, _ = rope_table(config, torch.zeros(1, 1))  # cos 0 = 1, times YaRN's factor
    shared = config.n_shared_experts * config.moe_intermediate_size
    described = decode.Model(
        dim=config.hidden_size, heads=config.num_attention_heads, nope=config.qk_nope_head_dim,
        rope=config.qk_rope_head_dim, value=config.v_head_dim, rank=config.kv_lora_rank,
        experts=config.n_routed_experts, top_k=config.num_experts_per_tok, groups=config.n_group,
        top_groups=config.topk_group, normalise=config.norm_topk_prob, main_layers=config.num_hidden_layers,
        all_layers=config.num_layers_with_mtp, q_rank=config.q_lora_rank or 0,
        mlp_width=max(config.intermediate_size, shared), expert_width=config.moe_intermediate_size,
        eps=config.rms_norm_eps, scale=config.softmax_scale, routed_scale=config.routed_scaling_factor,
        rope_scale=float(at_zero[0, 0, 0]), frequencies=freqs.data_ptr(),
        embedding=decode.Matrix.of(model.model.embed_tokens.weight), head=_matrix(model.lm_head),
        norm=decode.Vector.of(model.model.norm.weight), layers=ctypes.addressof(layers),
    )  # fmt: skip
    return described, (layers, freqs, list(model.parameters()), list(model.buffers()))


def _layer(module: nn.Module) -> decode.Layer:
    assert isinstance(module, DecoderLayer)
    attention, out = module.self_attn, decode.Layer()
    out.input_norm = decode.Vector.of(module.input_layernorm.weight)
    out.post_norm = decode.Vector.of(module.post_attention_layernorm.weight)
    if attention.config.q_lora_rank is None:
        out.q = _matrix(attention.q_proj)
    else:
        out.q_a, out.q = _matrix(attention.q_a_proj), _matrix(attention.q_b_proj)
        out.q_norm = decode.Vector.of(attention.q_a_layernorm.weight)
    out.kv_a, out.kv_b = _matrix(attention.kv_a_proj_with_mqa), _matrix(attention.kv_b_proj)
    out.kv_norm, out.o = decode.Vector.of(attention.kv_a_layernorm.weight), _matrix(attention.o_proj)
    if isinstance(module.mlp, MoE):
        gate = module.mlp.gate
        out.router, out.bias = decode.Matrix.of(gate.weight), gate.e_score_correction_bias.data_ptr()
        out.experts = _experts(module.mlp.experts, attention.config)
        if module.mlp.shared_experts is not None:
            out.mlp = _mlp(module.mlp.shared_experts)
    else:
        out.mlp = _mlp(module.mlp)
    if isinstance(module, MTPLayer):
        out.e_norm, out.h_norm = decode.Vector.of(module.enorm.weight), decode.Vector.of(module.hnorm.weight)
        out.head_norm, out.eh = decode.Vector.of(module.shared_head.norm.weight), _matrix(module.eh_proj)
    return out


def _matrix(module: nn.Module) -> decode.Matrix:
    if isinstance(module, StoredLinear):
        return decode.Matrix.of(module.weight, module.weight_scale_inv)
    assert isinstance(module, nn.Linear)
    return decode.Matrix.of(module.weight)


def _mlp(module: nn.Module) -> decode.Mlp:
    return decode.Mlp(*(_matrix(getattr(module, f"{name}_proj")) for name in ("gate", "up", "down")))


def _experts(module: nn.Module, config: ModelConfig) -> decode.Mlp:
    width = config.moe_intermediate_size
    gate_up, down = module.gate_up_proj, module.down_proj
    assert isinstance(gate_up, Tensor)
    assert isinstance(down, Tensor)
    if not isinstance(module, StoredExperts):
        halves = decode.Matrix.of(gate_up[:, :width]), decode.Matrix.of(gate_up[:, width:])
        return decode.Mlp(*halves, decode.Matrix.of(down))
    scales = module.gate_up_proj_scale_inv
    blocks = scales.shape[1] // 2
    gate = decode.Matrix.of(gate_up[:, :width], scales[:, :blocks])
    up = decode.Matrix.of(gate_up[:, width:], scales[:, blocks:])
    return decode.Mlp(gate, up, decode.Matrix.of(down, module.down_proj_scale_inv))
