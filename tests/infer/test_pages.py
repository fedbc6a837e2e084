"""The page book against a plain model of it, and keys that tell prefixes and owners apart."""

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dsv3.infer.pages import PAGE, PageBook, PagedCache, PageStore, page_keys
from tests.model.tiny import TINY


class Book(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.book, self.held, self.known, self.count = PageBook(6), [], {}, 0

    @rule()
    def take(self):
        if not self.book.available:
            with pytest.raises(IndexError):
                self.book.take()
            return
        page = self.book.take()
        assert page != 0
        assert page not in self.held
        self.known = {k: p for k, p in self.known.items() if p != page}
        self.held.append(page)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data):
        page = data.draw(st.sampled_from(self.held))
        self.held.remove(page)
        self.book.release([page])

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def publish(self, data):
        page, key = data.draw(st.sampled_from(self.held)), bytes([data.draw(st.integers(0, 4))])
        fresh = key not in self.known and page not in self.known.values()
        assert self.book.publish(page, key) == fresh
        if fresh:
            self.known[key] = page

    @rule(key=st.integers(0, 4))
    def find(self, key):
        found = self.book.find(bytes([key]))
        assert found == self.known.get(bytes([key]))
        if found is not None:
            self.held.append(found)

    @rule()
    def forget(self):
        self.book.forget()
        self.known = {}

    @invariant()
    def counts_agree(self):
        assert self.book.held == len(set(self.held))
        assert self.book.available == self.book.total - len(set(self.held))
        for key in range(5):
            assert self.book.knows(bytes([key])) == (bytes([key]) in self.known)


TestBook = Book.TestCase
TestBook.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


def test_a_key_covers_all_tokens_before_and_the_owner():
    tokens = list(range(200))
    keys = page_keys(tokens, b"a")
    assert len(keys) == 3
    assert page_keys(tokens[:64], b"a") == keys[:1]
    assert page_keys(tokens, b"a", keys[:2]) == keys
    assert not set(keys) & set(page_keys(tokens, b"b"))
    other = page_keys([1, *tokens[1:]], b"a")
    assert not set(keys) & set(other)


def test_rows_of_unequal_length_read_their_own_pages():
    store = PageStore(TINY, 8, layers=1, dtype=torch.float32, device="cpu")
    store.latents.normal_()
    cache = PagedCache(store, [[1, 2], [3]], [PAGE + 3, 5], 2)
    new = torch.randn(2, 2, store.latents.shape[-1])
    rows = cache.append(0, new, cache.positions(2))
    assert rows.shape[1] == PAGE + 5
    assert torch.equal(rows[0, PAGE + 3 : PAGE + 5], new[0])
    assert torch.equal(store.latents[0, 3, 5:7], new[1])
    assert torch.equal(rows[1, :5], store.latents[0, 3, :5])


def test_too_few_pages_are_refused():
    with pytest.raises(ValueError, match="1 pages leave none"):
        PageBook(1)
