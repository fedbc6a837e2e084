"""DeepSeek-V3, the whole forward, top down: decoder layers of latent attention and experts, and the MTP layers behind them.

    h      = norm(layer_L(... layer_1(embed(t))))                     logits = lm_head(h)
    layer  : x += attention(norm(x));  x += mlp_or_moe(norm(x))
    MTP k  : u = eh_proj[ enorm(embed(t_{i+k})) ; hnorm(h^{k-1}_i) ];  h^k = shared_head.norm(layer(u)) -> predicts t_{i+k+1}

Module and parameter names are those of the published checkpoint; routed experts are stacked to 3-D tensors, MTP layers are
the entries of `model.layers` from num_hidden_layers on and share embedding and head. One definition trains and serves:
with a cache the same modules read the latents of earlier tokens. Parameters may be of any floating dtype; norms, router,
RoPE and softmax compute in float32 and round once.

Where sources disagree, the checkpoint wins: the MTP concatenation has the embedding first (the report's eq. 21 has it second)
and h is the state after the final norm (spec 5.2).
Source: V3 report (arXiv 2412.19437) sections 2.1, 2.2. Legend: B batch, T tokens, D model, H heads, C latent rank, R rope,
N = B·T, E experts, K top-k, I expert width, V vocabulary, M MTP depth.
Does not: know devices, processes, losses or optimizers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv3.kernels.attention import attend_full, attend_latent
from dsv3.kernels.experts import expert_mlp
from dsv3.kernels.moe import route, sequence_balance_loss, sort_by_expert
from dsv3.kernels.norm import rms_norm
from dsv3.kernels.swiglu import swiglu
from dsv3.model.cache import Cache, LatentCache
from dsv3.model.config import ModelConfig
from dsv3.model.initial import fill_initial
from dsv3.model.rope import apply_rope, rope_table


class Context(NamedTuple):
    """What a forward hands to every layer."""

    cos: Tensor  # (B or 1, T, R/2)
    sin: Tensor
    mask: Tensor | None = None  # boolean, (B or 1, T, S); None: causal from the start
    positions: Tensor | None = None  # (B, T), with a cache
    cache: Cache | None = None
    balance: bool = False  # compute the sequence-wise balance loss
    steer: Steer | None = None  # routes in the place of the routers

    def route(self, router: Router, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the router makes of x (N, D), or who steers it: an argument of every layer, so that a layer that is computed again
        is steered as it was."""
        return router(x) if self.steer is None else self.steer(router, x)


class Routed(NamedTuple):
    """What one MoE layer tells of a forward."""

    counts: Tensor  # (E,) int64
    balance: Tensor  # scalar
    experts: Tensor  # (N, K) int64


class Routing(NamedTuple):
    """What a step must know of the routers. Rows are the MoE layers in order, MTP layers last."""

    counts: Tensor  # (L_moe, E) int64: tokens sent to each expert
    balance: Tensor  # scalar: sum over layers of the sequence-wise balance loss, before alpha
    experts: Tensor  # (L_moe, N, K) int64: the experts that each token went to


class Hidden(NamedTuple):
    """States that the shared head reads."""

    main: Tensor  # (B, T, D)
    mtp: tuple[Tensor, ...]  # M times (B, T, D)
    routing: Routing


class DeepseekV3(nn.Module):
    """The model. `model(tokens)` gives logits; `hidden` gives what a loss needs; `draft` what a speculator needs."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, tokens: Tensor, *, cache: Cache | None = None) -> Tensor:
        """tokens (B, T) int64 -> logits (B, T, V). With a cache the tokens follow what it holds, and are appended to it."""
        return self.lm_head(self.hidden(tokens, cache=cache).main)

    def hidden(
        self,
        tokens: Tensor,
        *,
        depth: int = 0,
        mask: Tensor | None = None,
        cache: Cache | None = None,
        balance: bool = False,
        steer: Steer | None = None,
    ) -> Hidden:
        """Final states of tokens (B, T + depth): the main model reads the first T, MTP depth k the T from k on.

        Args:
            depth: how many MTP layers to run, at most num_nextn_predict_layers.
            mask: boolean (B, T, T), True where attention is allowed; None is causal across everything packed in the row.
            cache: continue from it, and append. Not with depth > 0: drafting has its own cache (`draft`).
            balance: compute the sequence-wise balance loss.
            steer: called in the place of each router, with it and its input. It sees the scores: no balance loss is made then.

        Raises:
            ValueError: depth exceeds the model's MTP layers.
        """
        mtp_layers = self.model.mtp_layers
        if depth > len(mtp_layers):
            raise ValueError(
                f"depth {depth} exceeds the model's {len(mtp_layers)} MTP layers: lower depth or build more"
            )
        length = tokens.shape[1] - depth
        context = self._context(length, tokens.device, mask, cache, balance, steer)
        x = self.embed(tokens[:, :length])
        seen: list[Routed] = []
        for layer in self.model.main_layers:
            x = run_layer(layer, x, context, seen)
        state = self.model.norm(x)
        main, states = state, []
        for k, layer in enumerate(mtp_layers[:depth], start=1):
            state = run_mtp(layer, state, self.embed(tokens[:, k : k + length]), context, seen)
            states.append(state)
        if cache is not None:
            cache.advance(length)
        return Hidden(main, tuple(states), join_routing(seen, x))

    def draft(self, state: Tensor, tokens: Tensor, *, cache: Cache, layer: int = 0) -> Tensor:
        """One MTP step for speculation: states (B, T, D) and the tokens (B, T) that follow them -> the next states (B, T, D).

        `lm_head` of the result predicts the token after `tokens`. The cache belongs to MTP layers alone (`mtp_cache`).
        """
        module = self.model.mtp_layers[layer]
        context = self._context(tokens.shape[1], tokens.device, None, cache, balance=False)
        out = run_mtp(module, state, self.embed(tokens), context, [])
        cache.advance(tokens.shape[1])
        return out

    def embed(self, tokens: Tensor) -> Tensor:
        return self.model.embed_tokens(tokens).to(self.lm_head.weight.dtype)

    def new_cache(self, batch: int, capacity: int, *, mtp: bool = False) -> LatentCache:
        """An empty cache for the main layers, or with `mtp` for the MTP layers."""
        layers = self.config.num_nextn_predict_layers if mtp else self.config.num_hidden_layers
        weight = self.lm_head.weight
        return LatentCache(
            self.config, layers=layers, batch=batch, capacity=capacity, dtype=weight.dtype, device=weight.device
        )

    def routers(self) -> list[Router]:
        """Every router in the order of Routing's rows."""
        return [module for module in self.modules() if isinstance(module, Router)]

    @torch.no_grad()
    def init_weights(self, seed: int = 0) -> None:
        """Normal(0, initializer_range) for every matrix, ones for norms, zero router bias (report section 4.2). A pipeline's stage
        draws what it has, the same bits (initial.py)."""
        for name, parameter in self.named_parameters():
            fill_initial(parameter, name, seed=seed, std=self.config.initializer_range)
        for router in self.routers():
            router.e_score_correction_bias.zero_()

    def _context(
        self, length: int, device: torch.device, mask: Tensor | None, cache: Cache | None, balance: bool,
        steer: Steer | None = None,
    ) -> Context:  # fmt: skip
        if cache is None:
            positions = torch.arange(length, device=device).unsqueeze(0)
            balance = balance and steer is None
            return Context(*rope_table(self.config, positions), mask=mask, balance=balance, steer=steer)
        positions = cache.positions(length)
        if cache.used:
            keys = torch.arange(cache.used_after(length), device=device)
            mask = (keys <= positions.unsqueeze(-1)) & (keys >= cache.first)
        return Context(
            *rope_table(self.config, positions), mask=mask, positions=positions, cache=cache, balance=balance
        )


class Backbone(nn.Module):
    """`model.` of the checkpoint: embedding, layers (MTP layers behind the main ones), final norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        main = config.num_hidden_layers
        layers = [
            DecoderLayer(config, i) if i < main else MTPLayer(config, i) for i in range(config.num_layers_with_mtp)
        ]
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    @property
    def main_layers(self) -> list[nn.Module]:
        return [layer for layer in self.layers if not isinstance(layer, MTPLayer)]

    @property
    def mtp_layers(self) -> list[nn.Module]:
        return [layer for layer in self.layers if isinstance(layer, MTPLayer)]


class DecoderLayer(nn.Module):
    """Pre-norm residual block. Returns the stream, and where it sent its tokens if it routes."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        # A cache holds the main layers' tokens or the MTP layers' own, each counted from zero.
        slot = index if index < config.num_hidden_layers else index - config.num_hidden_layers
        self.self_attn = Attention(config, slot)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MoE(config) if config.is_moe(index) else MLP(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor, context: Context) -> tuple[Tensor, Routed | None]:
        x = x + self.attention_block(x, context)
        y, routing = self.mlp_block(x, context)
        return x + y, routing

    def attention_block(self, x: Tensor, context: Context) -> Tensor:
        return self.self_attn(self.input_layernorm(x), context)

    def mlp_block(self, x: Tensor, context: Context) -> tuple[Tensor, Routed | None]:
        return self.mlp(self.post_attention_layernorm(x), context)


class MTPLayer(DecoderLayer):
    """A decoder layer behind the mixing of the previous depth's state with the next token's embedding (report section 2.2)."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__(config, index)
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.shared_head = SharedHead(config)

    def mix(self, state: Tensor, embedding: Tensor) -> Tensor:
        return self.eh_proj(torch.cat((self.enorm(embedding), self.hnorm(state)), dim=-1))


class SharedHead(nn.Module):
    """`shared_head.` of an MTP layer: its own final norm; the head itself is the main model's."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Attention(nn.Module):
    """Multi-head latent attention in its two equal forms (report section 2.1.1; V2 report appendix C).

    expanded   k, v = kv_b_proj(c_kv) for every key: least work when many queries read their own fresh keys
    absorbed   W_UK into the query, W_UV behind the sum: every head reads the C + R cached values themselves
    """

    def __init__(self, config: ModelConfig, slot: int) -> None:
        super().__init__()
        self.config, self.slot = config, slot
        dim, heads = config.hidden_size, config.num_attention_heads
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(dim, heads * config.qk_head_dim, bias=False)
        else:
            self.q_a_proj = nn.Linear(dim, config.q_lora_rank, bias=False)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, config.rms_norm_eps)
            self.q_b_proj = nn.Linear(config.q_lora_rank, heads * config.qk_head_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(dim, config.kv_lora_rank + config.qk_rope_head_dim, bias=False)
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, config.rms_norm_eps)
        self.kv_b_proj = nn.Linear(
            config.kv_lora_rank, heads * (config.qk_nope_head_dim + config.v_head_dim), bias=False
        )
        self.o_proj = nn.Linear(heads * config.v_head_dim, dim, bias=False)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        q_nope, q_pe = self.queries(x, context)
        latent = self.latent(x, context)
        if context.cache is not None:
            assert context.positions is not None
            latent = context.cache.append(self.slot, latent, context.positions)
            if context.mask is not None and self.prefers_absorbed(x.shape[1], latent.shape[1]):
                return self.o_proj(self.absorbed(q_nope, q_pe, latent, context.mask))
        return self.o_proj(self.expanded(q_nope, q_pe, latent, context.mask))

    def queries(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """x (B, T, D) -> q_nope (B, T, H, n), q_pe (B, T, H, R) rotated."""
        config = self.config
        q = self.q_proj(x) if config.q_lora_rank is None else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q = q.unflatten(-1, (config.num_attention_heads, config.qk_head_dim))
        q_nope, q_pe = q.split((config.qk_nope_head_dim, config.qk_rope_head_dim), dim=-1)
        return q_nope, apply_rope(q_pe, context.cos.unsqueeze(-2), context.sin.unsqueeze(-2))

    def latent(self, x: Tensor, context: Context) -> Tensor:
        """x (B, T, D) -> what the cache holds, (B, T, C + R): the normalised c_kv, and k_pe rotated but not normalised."""
        c_kv, k_pe = self.kv_a_proj_with_mqa(x).split((self.config.kv_lora_rank, self.config.qk_rope_head_dim), dim=-1)
        return torch.cat((self.kv_a_layernorm(c_kv), apply_rope(k_pe, context.cos, context.sin)), dim=-1)

    def expanded(self, q_nope: Tensor, q_pe: Tensor, latent: Tensor, mask: Tensor | None) -> Tensor:
        """-> (B, T, H·V) over keys and values rebuilt from latent (B, S, C + R)."""
        config = self.config
        c_kv, k_pe = latent.split((config.kv_lora_rank, config.qk_rope_head_dim), dim=-1)
        kv = self.kv_b_proj(c_kv).unflatten(-1, (config.num_attention_heads, -1))
        k_nope, v = kv.split((config.qk_nope_head_dim, config.v_head_dim), dim=-1)
        q = torch.cat((q_nope, q_pe), dim=-1)
        k = torch.cat((k_nope, k_pe.unsqueeze(-2).expand(*k_nope.shape[:-1], -1)), dim=-1)
        mask = None if mask is None else mask.unsqueeze(1)
        out = attend_full(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale=config.softmax_scale, mask=mask
        )
        return out.transpose(1, 2).flatten(-2)

    def absorbed(self, q_nope: Tensor, q_pe: Tensor, latent: Tensor, mask: Tensor) -> Tensor:
        """-> (B, T, H·V) straight from latent (B, S, C + R), mask (B, T, S)."""
        config = self.config
        q = torch.cat((self.absorb_keys(q_nope.transpose(1, 2)), q_pe.transpose(1, 2)), dim=-1)  # (B, H, T, C + R)
        out = attend_latent(q, latent, rank=config.kv_lora_rank, scale=config.softmax_scale, mask=mask)
        return self.expand_values(out).transpose(1, 2).flatten(-2)

    def absorb_keys(self, q_nope: Tensor) -> Tensor:
        """q_nope (B, H, T, n) -> (B, H, T, C): times W_UK of each head."""
        return q_nope @ self._kv_b()[:, : self.config.qk_nope_head_dim]

    def expand_values(self, out: Tensor) -> Tensor:
        """Sums of latents (B, H, T, C) -> (B, H, T, V): times W_UV of each head."""
        return out @ self._kv_b()[:, self.config.qk_nope_head_dim :].mT

    def _kv_b(self) -> Tensor:
        """The up-projection by heads, (H, n + V, C)."""
        return self.kv_b_proj.weight.unflatten(0, (self.config.num_attention_heads, -1))

    def prefers_absorbed(self, queries: int, keys: int) -> bool:
        """Whether the absorbed form multiplies less for so many queries against so many cached keys."""
        config = self.config
        rank, rope = config.kv_lora_rank, config.qk_rope_head_dim
        head = config.qk_nope_head_dim + config.v_head_dim
        return queries * (rank * head + keys * (2 * rank + rope)) < keys * (rank * head + queries * (head + rope))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x)). The dense layers' MLP, and the shared experts as one of n_shared times the width."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, width, bias=False)
        self.up_proj = nn.Linear(dim, width, bias=False)
        self.down_proj = nn.Linear(width, dim, bias=False)

    def forward(self, x: Tensor, context: Context | None = None) -> tuple[Tensor, None]:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x))), None


class MoE(nn.Module):
    """sum_k w_k · expert_{e_k}(x) + shared(x); every token reaches all its K experts, none is dropped (report 2.1.2)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        width = config.n_shared_experts * config.moe_intermediate_size
        self.shared_experts = MLP(config.hidden_size, width) if width else None

    def forward(self, x: Tensor, context: Context) -> tuple[Tensor, Routed]:
        flat = x.flatten(0, -2)  # (N, D)
        scores, indices, weights = context.route(self.gate, flat)
        order, inverse, counts = sort_by_expert(indices, scores.shape[-1])
        y = self.experts(flat, weights, order, inverse, counts)
        if self.shared_experts is not None:
            y = y + self.shared_experts(flat)[0]
        balance = scores.new_zeros(())
        if context.balance:
            balance = sequence_balance_loss(scores.view(*x.shape[:-1], -1), indices.shape[-1])
        return y.view_as(x), Routed(counts, balance, indices)


class Router(nn.Module):
    """The gate, in float32 whatever the model's dtype. Its bias balances the load and is moved by the optimizer step."""

    e_score_correction_bias: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts, dtype=torch.float32))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (N, D) -> scores (N, E) float32, indices (N, K) int64, weights (N, K) float32."""
        config = self.config
        scores = F.linear(x.float(), self.weight.float()).sigmoid()
        indices, weights = route(
            scores,
            self.e_score_correction_bias,
            top_k=config.num_experts_per_tok,
            n_group=config.n_group,
            topk_group=config.topk_group,
            normalise=config.norm_topk_prob,
            scale=config.routed_scaling_factor,
        )
        return scores, indices, weights

    def _apply(self, fn, recurse: bool = True):
        """Keep the bias float32 through `model.to(bfloat16)`: its values sit closer together than a bfloat16 step (spec 4.2)."""
        exact = self.e_score_correction_bias
        super()._apply(fn, recurse)
        if self.e_score_correction_bias.dtype != torch.float32:
            self.e_score_correction_bias = exact.to(self.e_score_correction_bias.device)
        return self


Steer = Callable[[Router, Tensor], tuple[Tensor, Tensor, Tensor]]
"""Router and x (N, D) -> scores, indices and weights, as `Router.forward`."""


class Experts(nn.Module):
    """All routed experts of a layer, stacked: rows 0..I-1 of gate_up_proj are the gate, I..2I-1 the up projection."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        experts, dim, width = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, dim))
        self.down_proj = nn.Parameter(torch.empty(experts, dim, width))

    def forward(self, x: Tensor, weights: Tensor, order: Tensor, inverse: Tensor, counts: Tensor) -> Tensor:
        """x (N, D) and weights (N, K) float32, with the rows' order from `sort_by_expert` -> (N, D), weighted and summed."""
        return expert_mlp(x, self.gate_up_proj, self.down_proj, weights, order, inverse, counts)


class RMSNorm(nn.Module):
    """x·rsqrt(mean x² + eps)·w, all in float32 and rounded once (spec 3.6; transformers rounds twice)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def run_layer(layer: nn.Module, x: Tensor, context: Context, seen: list[Routed]) -> Tensor:
    """x (B, T, D) through a layer; what its router did is added to `seen`."""
    x, routing = layer(x, context)
    if routing is not None:
        seen.append(routing)
    return x


def run_mtp(layer: nn.Module, state: Tensor, embedding: Tensor, context: Context, seen: list[Routed]) -> Tensor:
    """The states of the depth before, and the embeddings of the tokens behind them, through an MTP layer."""
    assert isinstance(layer, MTPLayer)
    return layer.shared_head.norm(run_layer(layer, layer.mix(state, embedding), context, seen))


def join_routing(seen: list[Routed], like: Tensor) -> Routing:
    """Of the layers that route; none, on the device of `like`, if no layer does."""
    if not seen:
        none = torch.zeros(0, 0, dtype=torch.int64, device=like.device)
        return Routing(none, torch.zeros((), device=like.device), none.unsqueeze(-1))
    counts, balances, experts = (torch.stack(part) for part in zip(*seen))
    return Routing(counts, balances.sum(), experts)
