"""The latent cache in pages of 64 tokens, and the prefixes that requests share.

    store    one tensor (L, P, 64, C + R) for all layers, MTP layers behind the main ones, and a state (P, D): the final
             hidden state of each full page's last token, which the MTP layer reads for the first token after the page
    book     which pages are free, held (by how many), or kept for the next request with the same beginning
    view     what a forward of the model sees: some sequences' pages as its cache

A full page is known by a hash of its tokens and all before them, and of the owner's salt: a prefix is found token for token,
and never across owners. A page that nobody holds stays until its place is needed, the longest unused first.
An MTP layer's slot j holds the pair (state j-1, token j), so what a page holds depends on the tokens up to its end alone;
slot 0 has no such pair and is never read. Page 0 stays zero: it fills up tables of unequal length.
Source: spec 3.5; DeepSeek's context caching on disk (units of 64 tokens). Legend: L layers, P pages, C latent, R rope, D model,
B batch, T new tokens, S keys.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from dsv3.kernels.attention import PAGE
from dsv3.model.config import ModelConfig


class PageStore:
    """The tensors."""

    def __init__(
        self, config: ModelConfig, pages: int, *, layers: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        width = config.kv_lora_rank + config.qk_rope_head_dim
        self.latents = torch.zeros(layers, pages, PAGE, width, dtype=dtype, device=device)
        self.states = torch.zeros(pages, config.hidden_size, dtype=dtype, device=device)

    @property
    def device(self) -> torch.device:
        return self.latents.device

    @staticmethod
    def bytes_per_page(config: ModelConfig, layers: int, dtype: torch.dtype) -> int:
        width = config.kv_lora_rank + config.qk_rope_head_dim
        return (layers * PAGE * width + config.hidden_size) * dtype.itemsize

    def read(self, page: int) -> tuple[Tensor, Tensor]:
        """A page's content: latents (L, 64, C + R) and state (D,)."""
        return self.latents[:, page], self.states[page]

    def write(self, page: int, latents: Tensor, state: Tensor) -> None:
        self.latents[:, page].copy_(latents)
        self.states[page].copy_(state)

    def clear(self, page: int) -> None:
        self.latents[:, page].zero_()
        self.states[page].zero_()


def page_keys(tokens: Sequence[int], salt: bytes, known: Sequence[bytes] = ()) -> list[bytes]:
    """A key for each full page of tokens; each covers all tokens before it. `known`: the first of them, if at hand."""
    keys = list(known)
    for start in range(len(keys) * PAGE, len(tokens) // PAGE * PAGE, PAGE):
        before = keys[-1] if keys else b"dsv3" + hashlib.blake2b(salt, digest_size=16).digest()
        content = array("q", tokens[start : start + PAGE]).tobytes()
        keys.append(hashlib.blake2b(before + content, digest_size=16).digest())
    return keys


class PageBook:
    """Who holds which page. Pure Python; never touches a tensor.

    Args:
        pages: how many there are; page 0 is never given out.
    """

    def __init__(self, pages: int) -> None:
        if pages < 2:
            raise ValueError(f"{pages} pages leave none to give out: give at least 2")
        self.total = pages - 1
        self._free = list(range(pages - 1, 0, -1))
        self._holders: dict[int, int] = {}  # page -> how many sequences hold it
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # known and held by nobody, longest unused first

    @property
    def available(self) -> int:
        """Pages that could be taken now."""
        return len(self._free) + len(self._idle)

    @property
    def held(self) -> int:
        return self.total - self.available

    def take(self) -> int:
        """A page of one's own.

        Raises:
            IndexError: all pages are held.
        """
        if self._free:
            page = self._free.pop()
        elif self._idle:
            page, _ = self._idle.popitem(last=False)
            del self._page_of[self._key_of.pop(page)]
        else:
            raise IndexError("all pages are held")
        self._holders[page] = 1
        return page

    def find(self, key: bytes) -> int | None:
        """Hold the page with this key, if there is one."""
        page = self._page_of.get(key)
        if page is None:
            return None
        self._idle.pop(page, None)
        self._holders[page] = self._holders.get(page, 0) + 1
        return page

    def knows(self, key: bytes) -> bool:
        return key in self._page_of

    def is_public(self, page: int) -> bool:
        return page in self._key_of

    def is_idle(self, key: bytes) -> bool:
        """Whether the page with this key is one of the available ones."""
        return self._page_of.get(key) in self._idle

    def publish(self, page: int, key: bytes) -> bool:
        """The page is full and will not change: others may find it. False if another page has the key already."""
        assert page in self._holders
        if key in self._page_of or page in self._key_of:
            return False
        self._page_of[key], self._key_of[page] = page, key
        return True

    def forget(self) -> None:
        """No page is found any more."""
        self._free += self._idle
        self._idle.clear()
        self._page_of.clear()
        self._key_of.clear()

    def release(self, pages: Sequence[int]) -> None:
        """Give pages back; of a prefix the end goes first."""
        for page in reversed(pages):
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            del self._holders[page]
            if page in self._key_of:
                self._idle[page] = None
            else:
                self._free.append(page)


class PagedCache:
    """Sequences' pages as the cache of one forward; does for the model what LatentCache does.

    Args:
        tables: each row's pages in order, enough for what it holds and the new tokens.
        starts: tokens that each row holds already. count: new tokens of every row.
        offset: of the store's layers: 0, or the number of main layers for the MTP layers, whose slot 0 is never read.
    """

    def __init__(
        self, store: PageStore, tables: Sequence[Sequence[int]], starts: Sequence[int], count: int, *, offset: int = 0
    ) -> None:
        self._store, self._offset = store, offset
        self.first, self.used = (1 if offset else 0), max(starts)
        width = -(-(self.used + count) // PAGE)
        padded = [[*table[:width], *[0] * (width - len(table))] for table in tables]
        self._tables = torch.tensor(padded, dtype=torch.int64, device=store.device)  # (B, pages)
        self._starts = torch.tensor(starts, dtype=torch.int64, device=store.device).unsqueeze(1)

    def positions(self, tokens: int) -> Tensor:
        """(B, T) positions of the new tokens."""
        return self._starts + torch.arange(tokens, device=self._starts.device)

    def used_after(self, tokens: int) -> int:
        return self.used + tokens

    def append(self, layer: int, latent: Tensor, positions: Tensor) -> Tensor:
        """Write latent (B, T, C + R) at positions (B, T); all rows' keys so far, (B, S, C + R) with S the longest."""
        held = self._store.latents[self._offset + layer]  # (P, 64, C + R)
        held[self._tables.gather(1, positions // PAGE), positions % PAGE] = latent.to(held.dtype)
        return held[self._tables].flatten(1, 2)[:, : self.used_after(latent.shape[1])]

    def advance(self, tokens: int) -> None:
        """The sequences themselves count their tokens."""
