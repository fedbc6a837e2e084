"""The disk tier: pages come back as they were, to their owner and model alone, and never more than fit."""

import torch

from dsv3.infer.disk import DiskTier
from dsv3.infer.pages import PageStore
from dsv3.infer.sampling import SamplingParams
from tests.infer.letters import engine
from tests.infer.test_engine import LONG, drain
from tests.model.tiny import TINY


def store(dtype=torch.bfloat16) -> PageStore:
    torch.manual_seed(0)
    made = PageStore(TINY, 4, layers=4, dtype=dtype, device="cpu")
    made.latents.normal_()
    made.states.normal_()
    return made


def key(i: int) -> bytes:
    return bytes([i]) * 16


def test_a_page_comes_back_bit_for_bit_after_a_restart(tmp_path):
    for dtype in (torch.bfloat16, torch.float32):
        s, tier = store(dtype), DiskTier(tmp_path, f"model {dtype}", 1.0)
        tier.keep(key(1), s, 1)
        tier.close()
        again = DiskTier(tmp_path, f"model {dtype}", 1.0)
        assert again.fetch(key(1), s, 2)
        assert torch.equal(s.latents[:, 1], s.latents[:, 2])
        assert torch.equal(s.states[1], s.states[2])
        assert not again.fetch(key(2), s, 3)
        assert (again.hits, again.misses) == (1, 1)


def test_another_model_finds_nothing(tmp_path):
    s, tier = store(), DiskTier(tmp_path, "a", 1.0)
    tier.keep(key(1), s, 1)
    tier.flush()
    assert not DiskTier(tmp_path, "b", 1.0).fetch(key(1), s, 2)


def test_a_damaged_or_misplaced_page_is_deleted_and_not_used(tmp_path):
    s, tier = store(), DiskTier(tmp_path, "a", 1.0)
    for i in (1, 2, 3):
        tier.keep(key(i), s, i)
    tier.flush()
    first, second, third = sorted(tmp_path.rglob("*.page"))
    raw = bytearray(first.read_bytes())
    raw[len(raw) // 2] ^= 1
    first.write_bytes(raw)
    second.write_bytes(third.read_bytes())
    third.write_bytes(third.read_bytes()[:-5])
    before = s.latents.clone()
    for i in (1, 2, 3):
        assert not tier.fetch(key(i), s, 1)
    assert torch.equal(s.latents, before)
    assert not list(tmp_path.rglob("*.page"))
    assert tier.size == 0


def test_the_longest_unused_go_first_also_after_a_restart(tmp_path):
    s = store()
    page = 16 + s.latents[:, 1].numel() * 2 + s.states[1].numel() * 2
    tier = DiskTier(tmp_path, "a", 3.5 * page / 1e9)
    for i in (1, 2, 3):
        tier.keep(key(i), s, i)
        tier.flush()
    tier.fetch(key(1), s, 1)
    tier.close()
    tier = DiskTier(tmp_path, "a", 3.5 * page / 1e9)
    tier.keep(key(4), s, 3)
    tier.flush()
    assert tier.size == 3 * page
    assert [tier.fetch(key(i), s, 1) for i in (1, 2, 3, 4)] == [True, False, True, True]


def test_a_half_written_file_of_a_kill_is_cleared(tmp_path):
    tier = DiskTier(tmp_path, "a", 1.0)
    half = tmp_path / next(p.name for p in tmp_path.iterdir()) / "ab" / "abcd.tmp"
    half.parent.mkdir()
    half.write_bytes(b"half")
    tier.close()
    DiskTier(tmp_path, "a", 1.0)
    assert not half.exists()


def test_a_full_disk_costs_pages_and_nothing_else(tmp_path, monkeypatch):
    s, tier = store(), DiskTier(tmp_path, "a", 1.0)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    tier.keep(key(1), s, 1)
    tier.flush()
    assert tier.failed == 1
    assert tier.size == 0
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_page_that_can_neither_be_read_nor_removed_costs_itself_alone(tmp_path):
    params, said = SamplingParams(max_tokens=4, ignore_eos=True), []
    for spoil in (False, True):
        tier = DiskTier(tmp_path, "model", 1.0)
        for path in list(tmp_path.rglob("*.page")) if spoil else ():
            path.unlink()
            path.mkdir()  # as unreadable, and as hard to unlink, as a page of a file system that went bad
        e = engine(tier=tier)
        request = e.add(LONG, params)
        said.append([t for d in drain(e, [request])[request.id, 0] for t in d.token_ids])
        assert request.cached == 0
        assert e.scheduler.book.held == 0
        tier.close()
    assert said[0] == said[1]


def test_the_writer_outlives_whatever_goes_wrong(tmp_path, monkeypatch):
    s, tier = store(), DiskTier(tmp_path, "a", 1.0)
    monkeypatch.setattr(tier, "_write", lambda *_: 1 / 0)
    tier.keep(key(1), s, 1)
    tier.flush()
    monkeypatch.undo()
    tier.keep(key(2), s, 2)
    tier.flush()
    assert (tier.failed, tier.written) == (1, 1)
    assert tier.fetch(key(2), s, 3)


def test_a_restarted_engine_reads_the_prefix_from_disk_and_says_the_same(tmp_path):
    params, said = SamplingParams(max_tokens=12, ignore_eos=True), []
    for owner, cached in ((b"a", 0), (b"a", 128), (b"b", 0)):
        tier = DiskTier(tmp_path, "model", 1.0)
        e = engine(tier=tier)
        request = e.add(LONG, params, salt=owner)
        said.append([t for d in drain(e, [request])[request.id, 0] for t in d.token_ids])
        assert request.cached == cached
        assert e.scheduler.book.held == 0
        tier.close()
    assert said[0] == said[1] == said[2]
