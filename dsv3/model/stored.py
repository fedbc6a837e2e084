"""A model kept in FP8, to run and not to train: a byte a weight, multiplied as it lies.

`keep_fp8` swaps, from outside, every Linear that the published checkpoint stores as FP8, and the routed experts. The codes are
weight and scales of the checkpoint itself, so a 671B model takes about 700 GB instead of 1.4 TB and is saved bit for bit.
Rows stay bfloat16; codes are widened only inside the product (kernels/fp8_gemm.py), so results are those of the model in
bfloat16, minus that one's rounding of the weights. The absorbed form of attention multiplies each head's part of kv_b_proj's
codes; only where heads are no multiple of 128 wide, as in tests, it widens that matrix first.
Source: spec 2.3. Legend: O out, I in, E experts, W expert width, D model, H heads, C latent rank.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv3.kernels.fp8_gemm import fp8_grouped_mm, fp8_mm
from dsv3.kernels.moe import permute, unpermute
from dsv3.kernels.quant import TILE, Fp8, dequantize_blocks, tiles
from dsv3.kernels.swiglu import swiglu
from dsv3.model.fp8 import is_swapped
from dsv3.model.transformer import Attention, DeepseekV3, Experts

_CODES = torch.float8_e4m3fn


def keep_fp8(model: DeepseekV3) -> None:
    """Replace, in place, what is stored in FP8 by modules that hold codes and scales, not yet filled, on the same device."""
    for path, module in list(model.named_modules()):
        if is_swapped(path, module):
            kept = StoredLinear(module.weight) if isinstance(module, nn.Linear) else StoredExperts(module)
            model.set_submodule(path, kept)
        elif type(module) is Attention:
            module.__class__ = StoredAttention


class StoredLinear(nn.Module):
    """y = x Wᵀ with W in 128x128 blocks of e4m3."""

    weight: Tensor
    weight_scale_inv: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        rows, width = weight.shape
        self.register_buffer("weight", torch.empty(rows, width, dtype=_CODES, device=weight.device))
        scales = torch.empty(tiles(rows), tiles(width), dtype=torch.float32, device=weight.device)
        self.register_buffer("weight_scale_inv", scales)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., I) bfloat16 -> (..., O)."""
        y = fp8_mm(x.flatten(0, -2), None, self.weight, self.weight_scale_inv, x.dtype)
        return y.unflatten(0, x.shape[:-1])


class StoredAttention(Attention):
    """Attention whose kv_b_proj is codes: the absorbed form multiplies each head's part of them as a group of its own."""

    def absorb_keys(self, q_nope: Tensor) -> Tensor:
        codes, scales, size = *self._heads(), self.config.qk_nope_head_dim
        if scales is None:
            return super().absorb_keys(q_nope)
        return _by_head(q_nope, codes[:, :size].mT, scales[:, : tiles(size)].mT)

    def expand_values(self, out: Tensor) -> Tensor:
        codes, scales, size = *self._heads(), self.config.qk_nope_head_dim
        if scales is None:
            return super().expand_values(out)
        return _by_head(out, codes[:, size:], scales[:, tiles(size) :])

    def _heads(self) -> tuple[Tensor, Tensor | None]:
        """Codes (H, n + V, C) and scales (H, blocks, C blocks); None for sizes where a block spans two heads."""
        stored, config = self.kv_b_proj, self.config
        assert isinstance(stored, StoredLinear)
        codes = stored.weight.unflatten(0, (config.num_attention_heads, -1))
        if config.qk_nope_head_dim % TILE or config.v_head_dim % TILE:
            return codes, None
        return codes, stored.weight_scale_inv.unflatten(0, (config.num_attention_heads, -1))

    def _kv_b(self) -> Tensor:
        stored = self.kv_b_proj
        assert isinstance(stored, StoredLinear)
        whole = dequantize_blocks(stored.weight, stored.weight_scale_inv)
        return whole.unflatten(0, (self.config.num_attention_heads, -1))


def _by_head(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """x (B, H, T, K), codes (H, N, K) with scales a 128x128 block -> (B, H, T, N)."""
    batch, heads, length, width = x.shape
    offsets = torch.arange(heads + 1, device=x.device) * (batch * length)
    y = fp8_grouped_mm(x.transpose(0, 1).reshape(-1, width), None, codes, scales, offsets, x.dtype)
    return y.view(heads, batch, length, -1).transpose(0, 1)


class StoredExperts(nn.Module):
    """The routed experts in FP8; gate's blocks come before up's, as each was stored."""

    gate_up_proj: Tensor
    gate_up_proj_scale_inv: Tensor
    down_proj: Tensor
    down_proj_scale_inv: Tensor

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        assert isinstance(experts, Experts)
        number, dim, width = experts.down_proj.shape
        shapes = {
            "gate_up_proj": ((number, 2 * width, dim), (number, 2 * tiles(width), tiles(dim))),
            "down_proj": ((number, dim, width), (number, tiles(dim), tiles(width))),
        }
        device = experts.down_proj.device
        for name, (codes, scales) in shapes.items():
            self.register_buffer(name, torch.empty(codes, dtype=_CODES, device=device))
            self.register_buffer(f"{name}_scale_inv", torch.empty(scales, dtype=torch.float32, device=device))

    def forward(self, x: Tensor, weights: Tensor, order: Tensor, inverse: Tensor, counts: Tensor) -> Tensor:
        """x (N, D) bfloat16, weights (N, K) float32 -> (N, D), weighted and summed."""
        offsets = F.pad(counts.cumsum(0), (1, 0))
        rows = permute(x, order, inverse)
        gate, up = (fp8_grouped_mm(rows, None, *half, offsets, x.dtype) for half in self._halves())
        act = swiglu(gate, up, permute(weights.reshape(-1, 1), order, inverse))
        y = fp8_grouped_mm(act, None, self.down_proj, self.down_proj_scale_inv, offsets, x.dtype)
        return unpermute(y, order, inverse, weights.shape[-1])

    def _halves(self) -> tuple[Fp8, Fp8]:
        width, blocks = self.gate_up_proj.shape[1] // 2, self.gate_up_proj_scale_inv.shape[1] // 2
        codes, scales = self.gate_up_proj, self.gate_up_proj_scale_inv
        return Fp8(codes[:, :width], scales[:, :blocks]), Fp8(codes[:, width:], scales[:, blocks:])
