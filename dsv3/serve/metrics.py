"""What /metrics tells Prometheus: queue, batch, pages, tokens, cache hits, drafts by place, expert load, times to tokens.

Counters of the engine are read from it when asked for; times are observed by the worker. Every app has a registry of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from dsv3.infer.disk import DiskTier
from dsv3.infer.engine import Engine

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """
    Args:
        engine: gives the engine, or None while it is loading.
    """

    def __init__(self, engine: Callable[[], Engine | None]) -> None:
        self.registry = CollectorRegistry()
        self._ttft = Histogram(
            "dsv3_time_to_first_token_seconds", "From the request's admission to its first token.",
            registry=self.registry, buckets=_SECONDS,
        )  # fmt: skip
        self._between = Histogram(
            "dsv3_inter_token_seconds", "Between tokens of an answer; tokens of one step share its time.",
            registry=self.registry, buckets=_SECONDS,
        )  # fmt: skip
        self._steps = Histogram("dsv3_step_seconds", "A step of the engine.", registry=self.registry, buckets=_SECONDS)
        self._requests = Counter(
            "dsv3_http_requests", "Requests by path and status.", ["path", "status"], registry=self.registry
        )
        self._key_tokens = Counter("dsv3_key_tokens", "Tokens by API key name.", ["key"], registry=self.registry)
        self.registry.register(_EngineCollector(engine))

    def first_token(self, seconds: float) -> None:
        self._ttft.observe(seconds)

    def next_tokens(self, seconds: float, tokens: int) -> None:
        for _ in range(tokens):
            self._between.observe(seconds / tokens)

    def step(self, seconds: float) -> None:
        self._steps.observe(seconds)

    def request(self, path: str, status: int) -> None:
        self._requests.labels(path, str(status)).inc()

    def tokens(self, key: str, tokens: int) -> None:
        self._key_tokens.labels(key).inc(tokens)

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _EngineCollector:
    """The engine's own counters."""

    def __init__(self, engine: Callable[[], Engine | None]) -> None:
        self._engine = engine

    def collect(self) -> Iterable[Metric]:
        engine = self._engine()
        if engine is None:
            return
        scheduler, stats = engine.scheduler, engine.stats
        gauges = {
            "dsv3_waiting": ("Answers that wait for a place.", len(scheduler.waiting)),
            "dsv3_running": ("Answers in the batch.", len(scheduler.running)),
            "dsv3_pages_held": ("Cache pages in use.", scheduler.book.held),
            "dsv3_pages": ("Cache pages there are.", scheduler.book.total),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(name, text, value)
        counters = {
            "dsv3_steps": ("Steps of the engine.", stats.steps),
            "dsv3_rows": ("Tokens read by steps, drafts included; by dsv3_steps: the mean batch.", stats.rows),
            "dsv3_prompt_tokens": ("Prompt tokens of ended requests.", stats.prompt_tokens),
            "dsv3_cached_prompt_tokens": ("Of these, found in the cache.", stats.cached_tokens),
            "dsv3_answer_tokens": ("Tokens answered.", stats.answer_tokens),
            "dsv3_preemptions": ("Times an answer gave its pages to an older one.", stats.preemptions),
        }
        for name, (text, value) in counters.items():
            yield CounterMetricFamily(name, text, value)
        yield _labelled("dsv3_draft_tokens", "MTP drafts by place in their chain.", ["place"], enumerate(stats.drafted))
        yield _labelled("dsv3_accepted_tokens", "Of these, accepted.", ["place"], enumerate(stats.accepted))
        counts = engine.runner.counts.tolist()
        pairs = (((layer, expert), count) for layer, row in enumerate(counts) for expert, count in enumerate(row))
        yield _labelled("dsv3_expert_tokens", "Tokens by MoE layer and expert.", ["layer", "expert"], pairs)
        yield from _of_disk(engine.tier)
        load = GaugeMetricFamily("dsv3_expert_load_max", "The busiest expert's tokens over the mean.", labels=["layer"])
        for layer, row in enumerate(counts):
            load.add_metric([str(layer)], max(row) * len(row) / (sum(row) or 1))
        yield load


def _of_disk(tier: Any) -> Iterable[Metric]:
    """Of the second cache, if there is one."""
    if isinstance(tier, DiskTier):
        counts = {"hit": tier.hits, "miss": tier.misses, "written": tier.written, "failed": tier.failed}
        yield _labelled(
            "dsv3_disk_pages", "Pages of the disk cache by what became of them.", ["outcome"], counts.items()
        )
        yield GaugeMetricFamily("dsv3_disk_bytes", "Bytes that the disk cache holds.", tier.size)


def _labelled(name: str, text: str, labels: list[str], values: Iterable[tuple[Any, float]]) -> Metric:
    family = CounterMetricFamily(name, text, labels=labels)
    for at, value in values:
        places = at if isinstance(at, tuple) else (at,)
        family.add_metric([str(place) for place in places], value)
    return family
