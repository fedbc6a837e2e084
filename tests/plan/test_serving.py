"""What a deployment serves."""

import pytest

from dsv3.model.config import ModelConfig
from dsv3.plan.hardware import hardware_named
from dsv3.plan.serving import decode_seconds, decode_unit, serving_of, weight_bytes

V3 = ModelConfig()


def test_the_cache_of_a_token_is_70_kb():
    found = serving_of(V3, hardware_named("h800"), context=1000)
    assert found.cache_bytes_per_token == 70272
    assert found.cache_bytes_per_request == 70272e3


def test_weights_on_one_device_are_the_published_bytes_less_the_duplicates():
    duplicates = 2 * 2 * V3.vocab_size * V3.hidden_size  # the MTP layer's copies on disk
    assert weight_bytes(V3, 1, hardware_named("h800")) == pytest.approx(688_574_839_360 - duplicates, rel=1e-3)


def test_a_decode_unit_keeps_each_users_rate_and_fits():
    hardware = hardware_named("h800")
    unit = decode_unit(V3, hardware, 128, context=4989, per_user=20.0)
    assert unit is not None
    assert unit.per_user >= 20.0
    assert unit.weight_bytes + unit.batch * 71424 * 4989 <= hardware.memory * hardware.usable
    assert decode_unit(V3, hardware, 1, context=4989, per_user=20.0) is None


def test_more_requests_take_longer_together_and_less_each():
    hardware = hardware_named("h800")
    few, many = (decode_seconds(V3, hardware, 64, batch, 4096)[0] for batch in (16, 128))
    assert few < many < 8 * few


def test_prefill_is_faster_a_device_than_decoding():
    found = serving_of(V3, hardware_named("h200"))
    assert found.prefill is not None
    assert found.decode is not None
    assert found.prefill.tokens_per_second > found.decode.tokens_per_second


def test_a_unit_has_no_more_devices_than_there_are():
    few = serving_of(V3, hardware_named("h200"), most=16)
    assert few.decode is not None
    assert few.decode.devices <= 16
    assert serving_of(V3, hardware_named("h200"), most=4).decode is None
    with pytest.raises(ValueError, match="context 0, tokens/s a user 20 and devices None must be positive"):
        serving_of(V3, hardware_named("h200"), context=0)
