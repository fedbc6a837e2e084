"""The cores of multi-head latent attention: full (training, prefill), latent (absorbed decoding), and latent over pages.

full     softmax(scale · q kᵀ) v per head over expanded keys and values
latent   the same against the cache rows: every head reads one shared [c_kv | k_pe] of C + R values, and values
         are a view of the keys' first C; the caller has multiplied W_UK into the query and multiplies W_UV out
pages    latent for single rows, each with a position of its own, over pages of 64 cache rows (dsv3.infer.pages): in Triton for
         bfloat16 on CUDA, else by torch
Source: V2 report appendix C, V3 report section 2.1.1; spec 3.5.
Legend: B batch, H heads, T queries, S keys, C latent, R rope, K and V head sizes, N rows, P pages, W pages of a table.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3.kernels import native
from dsv3.kernels.triton import use_triton

PAGE = 64  # tokens


def attend_full(q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None = None) -> Tensor:
    """q (B, H, T, K), k (B, H, S, K), v (B, H, S, V) -> (B, H, T, V). Causal from the start unless `mask` says otherwise.

    mask: boolean, broadcastable to (B, H, T, S), True where attention is allowed.
    """
    if mask is None and q.shape[-2] == k.shape[-2] and native.fits(q, k, v):
        return _causal(q, k, v, scale)[0].transpose(1, 2)
    # torch's fused kernels want one head size; on the CPU the unfused path costs 1.4x of a whole training step.
    width = v.shape[-1]
    pad = q.shape[-1] - width
    if pad > 0:
        v = F.pad(v, (0, pad))
    elif pad < 0:
        q, k = F.pad(q, (0, -pad)), F.pad(k, (0, -pad))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)
    return out[..., :width]


@torch.library.custom_op("dsv3::causal_attention", mutates_args=())
def _causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """attend_full without a mask, in C -> out (B, T, H, V) and the scores' logsumexp (B, H, T) float32."""
    batch, heads, tokens, _ = q.shape
    out = q.new_empty(batch, tokens, heads, v.shape[-1])
    logsumexp = q.new_empty(batch, heads, tokens, dtype=torch.float32)
    inputs = [_rows(x) for x in (q, k, v)]  # held until the call is over
    views = [native.View.of(x) for x in inputs]
    native.call("attention_forward", *views, out, logsumexp, *q.shape, v.shape[-1], scale)
    return out, logsumexp


@torch.library.custom_op("dsv3::causal_attention_backward", mutates_args=())
def _causal_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (B, T, H, K), (B, T, H, K), (B, T, H, V) for d_out (B, T, H, V)."""
    grads = [x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]) for x in (q, k, v)]
    inputs = [_rows(x) for x in (q, k, v, d_out.transpose(1, 2))]
    views = [native.View.of(x) for x in inputs]
    native.call("attention_backward", *views, out, logsumexp, *grads, *q.shape, v.shape[-1], scale)
    return grads[0], grads[1], grads[2]


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@_causal.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    batch, heads, tokens, _ = q.shape
    out = q.new_empty(batch, tokens, heads, v.shape[-1])
    return out, q.new_empty(batch, heads, tokens, dtype=torch.float32)


@_causal_backward.register_fake
def _(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor, scale: float):
    grads = [x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]) for x in (q, k, v)]
    return grads[0], grads[1], grads[2]


def _save(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)  # of what backward never reads
    q, k, v, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output)


def _differentiate(ctx, d_out: Tensor, _: Tensor):
    grads = _causal_backward(d_out, *ctx.saved_tensors, ctx.scale)
    return (*(grad.transpose(1, 2) for grad in grads), None)


_causal.register_autograd(_differentiate, setup_context=_save)


def attend_full_reference(q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None = None) -> Tensor:
    """attend_full written out, softmax in float32."""
    if mask is None:
        mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    scores = (q.float() @ k.float().transpose(-1, -2)) * scale
    return (scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v.float()).to(q.dtype)


def attend_latent(q: Tensor, latent: Tensor, *, rank: int, scale: float, mask: Tensor) -> Tensor:
    """q (B, H, T, C + R) absorbed queries, latent (B, S, C + R) cache rows, mask (B, T, S) boolean -> (B, H, T, C)."""
    batch, heads, tokens, width = q.shape
    scores = q.reshape(batch, heads * tokens, width) @ latent.transpose(1, 2)
    scores = scores.view(batch, heads, tokens, -1).float() * scale
    weights = scores.masked_fill(~mask.unsqueeze(1), -torch.inf).softmax(-1).to(latent.dtype)
    out = weights.view(batch, heads * tokens, -1) @ latent[..., :rank]
    return out.view(batch, heads, tokens, rank)


@torch.library.custom_op("dsv3::attend_pages", mutates_args=())
def attend_pages(
    q: Tensor, pages: Tensor, tables: Tensor, rows: Tensor, positions: Tensor, rank: int, scale: float, first: int = 0
) -> Tensor:
    """Each row attends to its sequence's slots from `first` to its own position -> (N, H, C) in the dtype of q.

    In Triton a row's numbers are the same bits whatever other rows and however wide a table it comes with. A row that has
    nothing to read gets zeros. What lies in slots that it may not read changes nothing, be it NaN.

    Args:
        q: (N, H, C + R) absorbed queries, of the dtype of pages.
        pages: (P, 64, C + R) one layer's store.
        tables: (B, W) int64, each sequence's pages in order.
        rows: (N,) int64, of tables: whose sequence each row belongs to; several rows may share one.
        positions: (N,) int64, below 64·W. They stay on the device and are not checked.
        rank: C.
    """
    if use_triton(q, pages, tables, rows, positions) and q.dtype == pages.dtype == torch.bfloat16:
        from dsv3.kernels.triton import attention

        return attention.attend_pages(q, pages, tables, rows, positions, rank, scale, first)
    return attend_pages_reference(q, pages, tables, rows, positions, rank, scale, first)


@attend_pages.register_fake
def _(q, pages, tables, rows, positions, rank, scale, first=0):
    return q.new_empty(q.shape[0], q.shape[1], rank)


def attend_pages_reference(
    q: Tensor, pages: Tensor, tables: Tensor, rows: Tensor, positions: Tensor, rank: int, scale: float, first: int = 0
) -> Tensor:
    """The same by torch in float32 (float64 for float64): all rows against all that their tables name."""
    wide = torch.promote_types(q.dtype, torch.float32)
    keys = torch.arange(tables.shape[1] * PAGE, device=q.device)
    seen = (keys <= positions.unsqueeze(1)) & (keys >= first)  # (N, S)
    held = pages[tables[rows]].flatten(1, 2).to(wide)  # (N, S, C + R)
    held = torch.where(seen.unsqueeze(-1), held, 0.0)  # nothing times NaN would be NaN
    scores = (q.to(wide) @ held.mT * scale).masked_fill(~seen.unsqueeze(1), -torch.inf)
    weights = torch.where(seen.any(1).view(-1, 1, 1), scores.softmax(-1), 0.0)
    return (weights @ held[..., :rank]).to(q.dtype)
