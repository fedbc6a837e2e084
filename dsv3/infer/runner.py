"""Runs the model over what a step reads: sequences' next tokens in, final states and logits out.

A step's rows are ragged: chunks of prompts beside single tokens and their drafts. `Runner` is the model's own forward, sequences
of equally many tokens together, on any device. `NativeRunner` is the kernels of dsv3.kernels.decode, where they fit the model
(a CPU, a C compiler, float32, bfloat16 or FP8): faster, and no row depends on what else runs. On a GPU dsv3.infer.graphs
replays decode steps as CUDA graphs.
Legend: N rows of a step, D model, V vocabulary, K top-k.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from dsv3.infer import native
from dsv3.infer.pages import PagedCache, PageStore
from dsv3.kernels.decode import Decoder, Segment
from dsv3.model.transformer import DeepseekV3


class Runner:
    """The model's own forward over pages.

    Attributes:
        invariant: whether a row's numbers are the same to the bit whatever other rows run beside it.
        counts: (MoE layers, E) int64 tokens that each expert got so far, MTP layers not counted.
        experts: (MoE layers, N, K) the experts of the last forward's rows.
    """

    invariant = False

    def __init__(self, model: DeepseekV3, pages: int, *, mtp: bool) -> None:
        config = model.config
        layers = config.num_layers_with_mtp if mtp else config.num_hidden_layers
        weight = model.lm_head.weight
        self.model = model
        dtype = weight.dtype if weight.dtype.itemsize > 1 else torch.bfloat16
        self.store = PageStore(config, pages, layers=layers, dtype=dtype, device=model.model.norm.weight.device)
        moe = sum(config.is_moe(i) for i in range(config.num_hidden_layers))
        self.counts = torch.zeros(
            moe, config.n_routed_experts if moe else 0, dtype=torch.int64, device=self.store.device
        )
        self.experts = torch.empty(moe, 0, config.num_experts_per_tok, dtype=torch.int64, device=self.store.device)

    def forward(self, segments: Sequence[Segment]) -> Tensor:
        """Final states (N, D) of all segments' tokens in order; their latents are in the pages."""
        rows: list[Tensor] = [torch.empty(0)] * len(segments)
        experts: list[Tensor] = [self.experts] * len(segments)
        for members in _of_one_length(segments):
            batch = [segments[i] for i in members]
            tokens = torch.tensor([list(s.tokens) for s in batch], dtype=torch.int64, device=self.store.device)
            cache = PagedCache(self.store, [s.pages for s in batch], [s.start for s in batch], tokens.shape[1])
            out = self.model.hidden(tokens, cache=cache)
            if self.counts.numel():
                self.counts += out.routing.counts
                for i, chosen in zip(members, out.routing.experts.split(tokens.shape[1], dim=1)):
                    experts[i] = chosen
            for i, states in zip(members, out.main):
                rows[i] = states
        if self.counts.numel():
            self.experts = torch.cat(experts, dim=1)
        return torch.cat(rows)

    def draft(self, segments: Sequence[Segment], states: Tensor, layer: int = 0) -> Tensor:
        """One MTP layer: slot j of a segment reads states[j] (N, D), which came before its token -> the next states (N, D)."""
        rows: list[Tensor] = [torch.empty(0)] * len(segments)
        offset = self.model.config.num_hidden_layers
        pieces = states.split([len(s.tokens) for s in segments])
        for members in _of_one_length(segments):
            batch = [segments[i] for i in members]
            tokens = torch.tensor([list(s.tokens) for s in batch], dtype=torch.int64, device=self.store.device)
            tables, starts = [s.pages for s in batch], [s.start for s in batch]
            cache = PagedCache(self.store, tables, starts, tokens.shape[1], offset=offset)
            out = self.model.draft(torch.stack([pieces[i] for i in members]), tokens, cache=cache, layer=layer)
            for i, made in zip(members, out):
                rows[i] = made
        return torch.cat(rows)

    def logits(self, states: Tensor) -> Tensor:
        """states (n, D) -> (n, V) float32 on the CPU."""
        return self.model.lm_head(states).float().cpu()


class NativeRunner(Runner):
    """The same by the kernels in C: every row alone and in one order, so its numbers do not depend on what else runs."""

    invariant = True

    def __init__(self, model: DeepseekV3, pages: int, *, mtp: bool) -> None:
        super().__init__(model, pages, mtp=mtp)
        self._decoder = Decoder(*native.describe(model), self.store.latents)

    def forward(self, segments: Sequence[Segment], *, streams: Tensor | None = None) -> Tensor:
        """Final states (N, D) float32; over bfloat16 pages they are bfloat16 numbers, as a page keeps them.

        Args:
            streams: (L, N, D) float32, filled with the stream behind each main layer.
        """
        rows = sum(len(s.tokens) for s in segments)
        moe, _, top_k = self.experts.shape
        self.experts = torch.empty(moe, rows, top_k, dtype=torch.int64)
        return self._decoder.step(segments, chosen=self.experts, counts=self.counts, streams=streams)

    def draft(self, segments: Sequence[Segment], states: Tensor, layer: int = 0) -> Tensor:
        return self._decoder.step(segments, mtp=layer, previous=states.float().contiguous())

    def logits(self, states: Tensor) -> Tensor:
        return self._decoder.logits(states.float().contiguous())


def open_runner(model: DeepseekV3, cache_gb: float, *, mtp: bool) -> Runner:
    """The runner that fits the model, with a cache of so many gigabytes (10^9 bytes).

    Raises:
        ValueError: they hold no page.
    """
    config = model.config
    layers = config.num_layers_with_mtp if mtp else config.num_hidden_layers
    dtype = model.lm_head.weight.dtype
    page = PageStore.bytes_per_page(config, layers, dtype if dtype.itemsize > 1 else torch.bfloat16)
    pages = int(cache_gb * 1e9) // page
    if pages < 2:
        raise ValueError(
            f"a cache of {cache_gb} GB holds {pages} pages of {page:,} bytes, two are the least: give more"
        )
    from dsv3.infer import graphs  # which builds on Runner

    kind = NativeRunner if native.fits(model) else graphs.GraphRunner if graphs.fits(model) else Runner
    return kind(model, pages, mtp=mtp)


def _of_one_length(segments: Sequence[Segment]) -> list[list[int]]:
    """Indices of segments, those with equally many tokens together."""
    groups: dict[int, list[int]] = defaultdict(list)
    for i, segment in enumerate(segments):
        groups[len(segment.tokens)].append(i)
    return list(groups.values())
