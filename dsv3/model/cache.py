"""The latent cache: per token and layer the normalised c_kv and the rotated k_pe, kv_lora_rank + qk_rope_head_dim values.

One tensor for all layers; every row of the batch has its own length, so prompts of different lengths share a batch and
speculation rewinds a row by lowering its length. What lies beyond a length is never read.
Source: V3 report section 2.1.1; spec 3.5. Legend: L layers, B batch, S capacity, C latent, R rope, T new tokens.
Does not: page or share prefixes (dsv3.infer.pages does, with the same methods).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from dsv3.model.config import ModelConfig


class Cache(Protocol):
    """What a forward asks of a cache. Slots before `first` are never read; `used` bounds the tokens held by any row."""

    first: int
    used: int

    def positions(self, tokens: int) -> Tensor: ...
    def append(self, layer: int, latent: Tensor, positions: Tensor) -> Tensor: ...
    def used_after(self, tokens: int) -> int: ...
    def advance(self, tokens: int) -> None: ...


class LatentCache:
    """State of a generation, handed to the model's forward.

    Args:
        layers: how many decoder layers keep their tokens here.
        batch, capacity: rows, and tokens a row can hold.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        layers: int,
        batch: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        width = config.kv_lora_rank + config.qk_rope_head_dim
        self.rows = torch.zeros(layers, batch, capacity, width, dtype=dtype, device=device)  # (L, B, S, C + R)
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)  # (B,) tokens held by each row
        # The longest row ever written, on the host: bounds what attention reads without a synchronisation.
        self.used = 0
        self.first = 0  # slots before it are never read

    @property
    def capacity(self) -> int:
        return self.rows.shape[2]

    def positions(self, tokens: int) -> Tensor:
        """(B, T) positions that the next `tokens` tokens of each row take."""
        return self.lengths.unsqueeze(1) + torch.arange(tokens, device=self.lengths.device)

    def append(self, layer: int, latent: Tensor, positions: Tensor) -> Tensor:
        """Write latent (B, T, C + R) at positions (B, T); the rows held so far, (B, S', C + R) with S' the longest.

        Raises:
            ValueError: a position lies beyond the capacity.
        """
        last = self.used_after(latent.shape[1])
        if last > self.capacity:
            raise ValueError(
                f"{last} tokens do not fit a cache of capacity {self.capacity}: build it with capacity >= {last}"
            )
        held = self.rows[layer]
        held.scatter_(1, positions.unsqueeze(-1).expand_as(latent), latent.to(held.dtype))
        return held[:, :last]

    def used_after(self, tokens: int) -> int:
        """Rows that attention reads while `tokens` more are appended."""
        return self.used + tokens

    def advance(self, tokens: int) -> None:
        """All layers have appended `tokens` tokens to every row."""
        self.lengths += tokens
        self.used += tokens

    def rewind(self, lengths: Tensor) -> None:
        """Set each row's length to lengths (B,): rejected drafts and padding are forgotten."""
        self.lengths.copy_(lengths)
        self.used = int(lengths.max())
