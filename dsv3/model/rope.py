"""Rotary positions in interleaved pairs, with YaRN.

    pair i of a head turns by  position · f_i,   f_i = theta^(-2i/R)
    YaRN: f'_i = f_i·(1 - ramp_i) + f_i/factor·ramp_i,  ramp from pairs turning beta_fast times to beta_slow times in the
    original context; the temperature is in ModelConfig.softmax_scale, and here only what `mscale_all_dim` leaves of it.

Pairs are (x0, x1), (x2, x3), ... as on disk and stay so in the cache; the rotation runs in float32 and is rounded once.
Source: arXiv 2104.09864, 2309.00071; V3 report section 4.3; spec 3.3-3.4.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dsv3.model.config import ModelConfig, YarnConfig, yarn_mscale


def frequencies(config: ModelConfig) -> Tensor:
    """The angle per position of each pair: (R/2,) float64."""
    dim = config.qk_rope_head_dim
    freqs = config.rope_theta ** -(torch.arange(0, dim, 2, dtype=torch.float64, device="cpu") / dim)
    yarn = config.rope_scaling
    if yarn is None:
        return freqs
    low, high = _ramp_bounds(yarn, dim, config.rope_theta)
    ramp = ((torch.arange(dim // 2, dtype=torch.float64, device="cpu") - low) / (high - low)).clamp(0, 1)
    return freqs * (1 - ramp) + freqs / yarn.factor * ramp


def _ramp_bounds(yarn: YarnConfig, dim: int, theta: float) -> tuple[float, float]:
    def pair_turning(turns: float) -> float:
        return dim * math.log(yarn.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_turning(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_turning(yarn.beta_slow)), dim - 1)
    return low, high if high != low else high + 0.001  # as everywhere: no division by zero


def rope_table(config: ModelConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin, each (..., T, R/2) float32, of integer positions (..., T). Built per forward: a table kept in a module
    would be lost when the module is moved off the meta device."""
    angles = positions.unsqueeze(-1).float() * frequencies(config).to(positions.device, torch.float32)
    scale = 1.0
    if config.rope_scaling is not None:
        yarn = config.rope_scaling
        if yarn.mscale and yarn.mscale_all_dim:
            scale = yarn_mscale(yarn.factor, yarn.mscale) / yarn_mscale(yarn.factor, yarn.mscale_all_dim)
        else:  # one alone says nothing, as in transformers: the plain YaRN temperature
            scale = yarn_mscale(yarn.factor, 1.0)
    return angles.cos() * scale, angles.sin() * scale


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (..., R) by cos, sin broadcastable to (..., R/2)."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)
