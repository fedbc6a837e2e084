"""The engine's thread: faults stay where they are, readers that leave or dawdle free their pages, the thread lives on."""

import asyncio

import pytest

from dsv3.infer.sampling import SamplingParams
from dsv3.serve.metrics import Metrics
from dsv3.serve.worker import EngineFault, TooSlow, Worker
from tests.serve.small import small_engine

LONG = SamplingParams(max_tokens=1500, ignore_eos=True)
SHORT = SamplingParams(max_tokens=3, ignore_eos=True)


@pytest.fixture
def worker():
    engine, _ = small_engine()
    worker = Worker(engine, Metrics(lambda: engine), max_open=8)
    yield worker
    worker.stop()


async def all_of(ticket):
    deltas = []
    while sum(delta.finish_reason is not None for _, delta in deltas) < len(ticket.prompts) * ticket.params.n:
        deltas += await ticket.read()
    return deltas


async def idle(worker):
    for _ in range(2000):
        if not worker.engine.busy and not worker.engine.scheduler.book.held:
            return
        await asyncio.sleep(0.005)
    raise AssertionError("the engine is not idle")


def test_several_prompts_are_one_ticket_with_the_engines_own_answers(worker):
    async def go():
        ticket = await worker.submit([[5, 6, 7], [9, 10]], SHORT, b"")
        deltas = await all_of(ticket)
        worker.close(ticket)
        return [[t for place, d in deltas if place == p for t in d.token_ids] for p in range(2)]

    told = asyncio.run(go())
    engine, _ = small_engine()
    assert told == [sample.token_ids for sample in engine.complete([[5, 6, 7], [9, 10]], SHORT)]
    assert worker.open == 0


def test_a_prompt_that_the_engine_refuses_raises_here_and_leaves_nothing(worker):
    async def go():
        with pytest.raises(ValueError, match="vocabulary"):
            await worker.submit([[5, 6], [10**6]], LONG, b"")
        await idle(worker)

    asyncio.run(go())
    assert worker.open == 0


def test_closing_a_ticket_frees_its_pages_at_once(worker):
    async def go():
        ticket = await worker.submit([[5, 6, 7]], LONG, b"")
        await ticket.read()
        assert worker.engine.scheduler.book.held
        worker.close(ticket)
        await idle(worker)

    asyncio.run(go())


def test_leaving_before_admission_leaves_nothing(worker):
    async def go():
        task = asyncio.ensure_future(worker.submit([[5, 6, 7]], LONG, b""))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await idle(worker)

    asyncio.run(go())
    assert worker.open == 0


def test_a_reader_too_slow_loses_its_answer_and_memory_stays_bounded(worker):
    worker.max_backlog = 20

    async def go():
        ticket = await worker.submit([[5, 6, 7]], LONG, b"")
        while ticket._fault is None:
            await asyncio.sleep(0.01)
            assert len(ticket._unread) <= 21
        with pytest.raises(TooSlow):
            await ticket.read()
        worker.close(ticket)
        await idle(worker)

    asyncio.run(go())


def test_a_step_that_raises_fails_those_that_run_and_no_other(worker, monkeypatch):
    step = worker.engine.step
    broken = iter([RuntimeError("broken")])

    def once():
        for error in broken:
            raise error
        return step()

    async def go():
        monkeypatch.setattr(worker.engine, "step", once)
        ticket = await worker.submit([[5, 6, 7]], LONG, b"")
        with pytest.raises(EngineFault, match="RuntimeError"):
            await all_of(ticket)
        worker.close(ticket)
        await idle(worker)
        ticket = await worker.submit([[5, 6, 7]], SHORT, b"")
        deltas = await all_of(ticket)
        worker.close(ticket)
        return deltas

    assert asyncio.run(go())[-1][1].finish_reason == "length"


def test_the_thread_outlives_a_fault_of_its_own_and_an_abort_that_fails(worker, monkeypatch):
    def broken(*_):
        raise RuntimeError("broken")

    async def go():
        with monkeypatch.context() as patch:
            patch.setattr(worker.metrics, "first_token", broken)
            patch.setattr(worker.engine, "abort", broken)
            ticket = await worker.submit([[5, 6, 7]], LONG, b"")
            with pytest.raises(EngineFault, match="RuntimeError"):
                await all_of(ticket)
            worker.close(ticket)
            await idle(worker)
        ticket = await worker.submit([[5, 6, 7]], SHORT, b"")
        deltas = await all_of(ticket)
        worker.close(ticket)
        return deltas

    assert asyncio.run(go())[-1][1].finish_reason == "length"


def test_an_add_that_raises_fails_its_request_alone(worker, monkeypatch):
    add = worker.engine.add

    def maybe(prompt, params, *, salt):
        if 13 in prompt:
            raise RuntimeError("unlucky")
        return add(prompt, params, salt=salt)

    async def go():
        monkeypatch.setattr(worker.engine, "add", maybe)
        other = await worker.submit([[5, 6]], SHORT, b"")
        with pytest.raises(EngineFault, match="RuntimeError"):
            await worker.submit([[13]], SHORT, b"")
        deltas = await all_of(other)
        worker.close(other)
        return deltas

    assert asyncio.run(go())[-1][1].finish_reason == "length"


def test_salts_do_not_share_pages(worker):
    async def cached(salt):
        ticket = await worker.submit([list(range(5, 205))], SHORT, salt)
        await all_of(ticket)
        worker.close(ticket)
        return ticket.requests[0].cached

    async def go():
        return [await cached(salt) for salt in (b"a", b"a", b"b")]

    assert asyncio.run(go()) == [0, 192, 0]
