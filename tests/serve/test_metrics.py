"""/metrics: what the engine counts and what the worker observes, each app on its own."""

from dsv3.infer.disk import DiskTier
from dsv3.infer.sampling import SamplingParams
from dsv3.serve.metrics import Metrics
from tests.serve.small import small_engine


def lines(metrics: Metrics) -> dict[str, float]:
    rows = [line.rsplit(" ", 1) for line in metrics.text().decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in rows}


def test_counters_are_the_engines():
    engine, _ = small_engine()
    metrics = Metrics(lambda: engine)
    prompt, params = list(range(5, 105)), SamplingParams(max_tokens=20, ignore_eos=True)
    list(engine.complete([prompt, prompt], params))
    told = lines(metrics)
    assert told["dsv3_prompt_tokens_total"] == 200
    assert told["dsv3_cached_prompt_tokens_total"] == engine.stats.cached_tokens
    assert told["dsv3_answer_tokens_total"] == 40
    assert told['dsv3_draft_tokens_total{place="0"}'] == engine.stats.drafted[0] > 0
    assert told['dsv3_accepted_tokens_total{place="0"}'] == engine.stats.accepted[0]
    assert told["dsv3_pages"] == engine.scheduler.book.total
    config = engine.model.config
    by_layer = [
        sum(told[f'dsv3_expert_tokens_total{{expert="{e}",layer="{layer}"}}'] for e in range(config.n_routed_experts))
        for layer in range(config.num_hidden_layers - config.first_k_dense_replace)
    ]
    assert by_layer == [engine.stats.rows * config.num_experts_per_tok] * len(by_layer)
    assert told['dsv3_expert_load_max{layer="0"}'] >= 1


def test_times_and_requests_are_observed():
    metrics = Metrics(lambda: None)
    metrics.first_token(0.2)
    metrics.next_tokens(0.4, 4)
    metrics.request("/v1/models", 200)
    metrics.tokens("ann", 5)
    told = lines(metrics)
    assert told["dsv3_time_to_first_token_seconds_sum"] == 0.2
    assert told["dsv3_inter_token_seconds_count"] == 4
    assert abs(told["dsv3_inter_token_seconds_sum"] - 0.4) < 1e-9
    assert told['dsv3_http_requests_total{path="/v1/models",status="200"}'] == 1
    assert told['dsv3_key_tokens_total{key="ann"}'] == 5
    assert "dsv3_waiting" not in told  # no engine yet
    assert lines(Metrics(lambda: None)) != told


def test_the_disk_cache_is_counted(tmp_path):
    tier = DiskTier(tmp_path, "model", 0.1)
    engine, _ = small_engine(tier=tier)
    list(engine.complete([range(5, 105)], SamplingParams(max_tokens=4, ignore_eos=True)))
    tier.close()
    told = lines(Metrics(lambda: engine))
    assert told['dsv3_disk_pages_total{outcome="written"}'] == 1
    assert told['dsv3_disk_pages_total{outcome="miss"}'] == 1
    assert told["dsv3_disk_bytes"] == tier.size > 0
