"""One engine's service: loading, ready, draining, and who is admitted when."""

import asyncio
import dataclasses

import pytest

from dsv3.infer.grammar import json_object, regex
from dsv3.serve.errors import ApiError
from dsv3.serve.keys import Owner
from dsv3.serve.service import Service
from dsv3.serve.settings import ServeSettings
from tests.serve.small import small_engine


def opened(**settings) -> Service:
    service = Service(ServeSettings(model="tiny", **settings))
    service.open(*small_engine(max_running=1))
    return service


def admit(service: Service, answers: int = 1) -> None:
    with service.admit(Owner(), answers, 5):
        pass


def test_nothing_is_admitted_before_the_engine_is_there_nor_after_the_end():
    service = Service(ServeSettings())
    for use in (admit, lambda s: s.planner, lambda s: s.tokenizer):
        with pytest.raises(ApiError, match="loading") as refused:
            use(service)
        assert refused.value.status == 503
        assert refused.value.retry_after
    service.open(*small_engine())
    admit(service)
    asyncio.run(service.drain())
    with pytest.raises(ApiError, match="ending"):
        admit(service)


def test_room_is_what_runs_and_what_may_wait():
    service = opened(max_waiting=2)
    admit(service, 3)
    with pytest.raises(ApiError) as refused:
        admit(service, 4)
    assert refused.value.status == 429
    service.worker.open = 3
    with pytest.raises(ApiError, match="3 answers run or wait, 3 may"):
        admit(service)


def test_the_fingerprint_is_of_config_and_weights_unless_it_is_given():
    assert opened().fingerprint == opened().fingerprint
    other = Service(ServeSettings())
    other.open(*small_engine(seed=1))
    assert other.fingerprint != opened().fingerprint
    assert opened(fingerprint="fp_mine").fingerprint == "fp_mine"


def test_grammars_that_take_too_long_are_refused_and_those_behind_them_wait_their_turn(monkeypatch):
    service, entered = opened(), []

    def slow(grammar):
        import time

        entered.append(grammar)
        time.sleep(0.3)

    async def refusal(grammar):
        try:
            await service.check_grammar(grammar)
        except ApiError as error:
            return error.status
        return 200

    async def go():
        assert await refusal(None) == await refusal(json_object()) == 200
        assert await refusal(regex("(")) == 400
        monkeypatch.setattr(service.engine.grammars, "matcher", slow)
        service.settings = dataclasses.replace(service.settings, grammar_s=0.1)
        return await asyncio.gather(*(refusal("x") for _ in range(3)))

    assert asyncio.run(go()) == [400, 400, 503]
    assert len(entered) == 2
