"""The forward against itself: cache and absorbed form, dtype rules, MTP, documents, the published size on meta."""

import dataclasses

import pytest
import torch

from dsv3.model.config import ModelConfig
from dsv3.model.rope import frequencies
from dsv3.model.transformer import Attention, Context, DeepseekV3, Router
from tests.model.tiny import TINY, random_model


@pytest.mark.parametrize("q_lora_rank", [20, None])
def test_absorbed_equals_expanded(q_lora_rank):
    config = dataclasses.replace(TINY, q_lora_rank=q_lora_rank, v_head_dim=20)
    model = random_model(config)
    attention = model.model.layers[1].self_attn
    assert isinstance(attention, Attention)
    x = torch.randn(2, 17, config.hidden_size)
    context = model._context(17, x.device, None, None, balance=False)
    q_nope, q_pe = attention.queries(x, context)
    latent = attention.latent(x, context)
    mask = torch.ones(1, 17, 17, dtype=torch.bool).tril()
    expanded = attention.expanded(q_nope, q_pe, latent, mask)
    absorbed = attention.absorbed(q_nope, q_pe, latent, mask)
    assert latent.shape[-1] == config.kv_lora_rank + config.qk_rope_head_dim
    assert (expanded - absorbed).abs().max() <= 1e-5 * expanded.abs().max()


@pytest.mark.parametrize("cuts", [[40], [1] * 40, [13, 1, 1, 20, 5], [1, 39]])
def test_cached_pieces_equal_the_whole(cuts):
    model, tokens = random_model(), torch.randint(0, 96, (2, 40))
    with torch.no_grad():
        cache = model.new_cache(2, 64)
        pieces = [model(piece, cache=cache) for piece in tokens.split(cuts, dim=1)]
        torch.testing.assert_close(torch.cat(pieces, 1), model(tokens), atol=1e-5, rtol=1e-4)


def test_both_forms_are_reached():
    attention = random_model().model.layers[0].self_attn
    assert attention.prefers_absorbed(1, 100)
    assert not attention.prefers_absorbed(100, 100)


def test_cache_rewinds_and_names_its_capacity():
    model, tokens = random_model(), torch.randint(0, 96, (1, 12))
    with torch.no_grad():
        cache = model.new_cache(1, 12)
        model(tokens[:, :8], cache=cache)
        model(torch.zeros(1, 3, dtype=torch.int64), cache=cache)  # a draft that is rejected
        cache.rewind(torch.tensor([8]))
        torch.testing.assert_close(model(tokens[:, 8:], cache=cache), model(tokens)[:, 8:], atol=1e-5, rtol=1e-4)
        with pytest.raises(ValueError, match="13 tokens do not fit a cache of capacity 12"):
            model(tokens[:, :1], cache=cache)


def test_router_bias_stays_float32():
    model = random_model().to(torch.bfloat16)
    for router in model.routers():
        assert router.weight.dtype == torch.bfloat16
        assert router.e_score_correction_bias.dtype == torch.float32
    before = random_model().routers()[0].e_score_correction_bias
    assert torch.equal(model.routers()[0].e_score_correction_bias, before)


def test_routing_sends_every_token_to_all_its_experts():
    model = random_model()
    hidden = model.hidden(torch.randint(0, 96, (2, 31)), depth=1, balance=True)
    assert hidden.routing.counts.dtype == torch.int64
    assert hidden.routing.counts.sum(1).tolist() == [2 * 30 * 3] * 3
    assert len(model.routers()) == 3
    assert hidden.routing.balance.item() > 0


def test_mtp_reads_the_next_token_behind_the_normed_state():
    """Depth 1 written out by hand from the spec: embedding first, state after the final norm, own last norm."""
    model, tokens = random_model(), torch.randint(0, 96, (2, 20))
    hidden = model.hidden(tokens, depth=1)
    layer, main = model.model.layers[3], model.hidden(tokens[:, :19]).main
    mixed = (
        torch.cat((layer.enorm(model.model.embed_tokens(tokens[:, 1:])), layer.hnorm(main)), -1)
        @ layer.eh_proj.weight.T
    )
    context = model._context(19, tokens.device, None, None, balance=False)
    expected = layer.shared_head.norm(layer(mixed, context)[0])
    torch.testing.assert_close(hidden.mtp[0], expected)
    torch.testing.assert_close(hidden.main, main)


def test_two_depths_chain_and_draft_agrees():
    model = random_model(dataclasses.replace(TINY, num_nextn_predict_layers=2))
    tokens = torch.randint(0, 96, (2, 22))
    with torch.no_grad():
        hidden = model.hidden(tokens, depth=2)
        assert [s.shape[1] for s in (hidden.main, *hidden.mtp)] == [20, 20, 20]
        cache = model.new_cache(2, 32, mtp=True)
        parts = [
            model.draft(hidden.main[:, s], tokens[:, 1:21][:, s], cache=cache) for s in (slice(0, 9), slice(9, 20))
        ]
        torch.testing.assert_close(torch.cat(parts, 1), hidden.mtp[0], atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="depth 3 exceeds the model's 2 MTP layers"):
        model.hidden(tokens, depth=3)


def test_document_mask_hides_the_other_document():
    model, tokens = random_model(), torch.randint(0, 96, (1, 20))
    ids = torch.tensor([[0] * 8 + [1] * 12])
    mask = (ids.unsqueeze(1) == ids.unsqueeze(2)) & torch.ones(20, 20, dtype=torch.bool).tril()
    changed = tokens.clone()
    changed[0, :8] = (changed[0, :8] + 1) % 96
    with torch.no_grad():
        a, b = (model.hidden(t, mask=mask).main[:, 8:] for t in (tokens, changed))
        torch.testing.assert_close(a, b)
        assert not torch.allclose(model(tokens)[:, 8:], model(changed)[:, 8:])


def test_initialisation_follows_the_config():
    model = DeepseekV3(dataclasses.replace(TINY, initializer_range=0.006))
    model.init_weights(0)
    assert model.lm_head.weight.std().item() == pytest.approx(0.006, rel=0.1)
    assert bool((model.model.norm.weight == 1).all())


def test_v3_builds_on_meta_with_the_published_counts():
    with torch.device("meta"):
        model = DeepseekV3(ModelConfig())
    bias = sum(r.e_score_correction_bias.numel() for r in model.routers())
    total = sum(p.numel() for p in model.parameters()) + bias
    mtp = sum(t.numel() for n, t in model.state_dict().items() if n.startswith("model.layers.61."))
    assert mtp == 11_610_068_224
    assert total - mtp == 671_026_419_200
    assert sum(isinstance(m, Router) for m in model.modules()) == 59


def test_yarn_frequencies_of_v3():
    freqs = frequencies(ModelConfig()).tolist()
    expected = {0: 1.0, 10: 0.05623413251903491, 11: 0.03900692656714386, 16: 0.0055, 22: 1.778279410038922e-4}
    expected |= {23: 3.33380358040831e-5, 31: 3.3338035804083097e-6}
    assert {i: freqs[i] for i in expected} == pytest.approx(expected, rel=1e-7)


def test_context_defaults_to_causal():
    assert Context(torch.zeros(1), torch.zeros(1)).mask is None
