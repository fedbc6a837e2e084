"""Who runs next: prompts never starve those who speak, order of arrival holds, pressure loses nothing."""

import pytest

from dsv3.infer.pages import PAGE, PageBook
from dsv3.infer.sampling import SamplingParams
from dsv3.infer.scheduler import Scheduler, Sequence


def scheduler(pages=20, **options):
    return Scheduler(PageBook(pages + 1), **({"step_tokens": 32, "max_running": 4} | options))


def sequence(size, first=1, answer=20, salt=b""):
    return Sequence([first] * size, SamplingParams(max_tokens=answer), salt=salt)


def run(s: Scheduler):
    """Plan a step, pretend that it was computed, and give a token to each sequence that is ready."""
    chunks = s.next_step()
    for chunk in chunks:
        upto = chunk.start + chunk.count
        if chunk.sequence.decoding or upto == chunk.sequence.prompt_length:
            chunk.sequence.tokens.append(9)
        s.computed(chunk.sequence, upto)
    return chunks


def test_decoding_goes_on_while_a_long_prompt_is_read_in_pieces():
    s, short, long = scheduler(), sequence(4), sequence(200)
    s.add(short)
    run(s)
    s.add(long)
    for _ in range(5):
        chunks = run(s)
        assert [c.count for c in chunks if c.sequence is short] == [1]
        assert sum(len(c.tokens) for c in chunks) <= 32
    assert long.computed == 5 * 31


def test_the_order_of_arrival_is_kept_and_the_number_bounded():
    s = scheduler(max_running=2)
    all_ = [sequence(3, first) for first in range(4)]
    for one in all_:
        s.add(one)
    run(s)
    assert s.running == all_[:2]
    s.remove(all_[0])
    run(s)
    assert s.running == all_[1:3]


def test_many_requests_of_one_owner_make_anothers_wait_for_one_place():
    s = scheduler(pages=60)
    many = [sequence(3, first, salt=b"a") for first in range(8)]
    few = [sequence(3, first, salt=b"b") for first in range(2)]
    for one in (*many, *few):
        s.add(one)
    run(s)
    assert s.running == [many[0], few[0], many[1], few[1]]  # by turns, also when all come at once
    late = sequence(3, 9, salt=b"c")
    s.add(late)
    s.remove(few[0])
    run(s)
    assert s.running == [many[0], many[1], few[1], late]
    s.remove(few[1])
    s.remove(late)
    run(s)
    assert s.running == many[:4]  # nobody else wants a place


@pytest.mark.parametrize(("places", "owners"), [(1, 1), (2, 2), (2, 3)])
def test_a_late_owner_waits_for_no_more_than_a_place_of_each_busy_one(places, owners):
    s = scheduler(pages=60, max_running=places)
    for owner in range(owners):
        for first in range(9):
            s.add(sequence(3, 10 * owner + first, salt=b"%d" % owner))
    run(s)
    late, ended = sequence(3, 99, salt=b"late"), 0
    s.add(late)
    while late not in s.running:
        s.remove(s.running[0])
        run(s)
        ended += 1
    assert ended <= owners


def test_owners_that_always_come_anew_do_not_pass_one_that_waits():
    s = scheduler(pages=60, max_running=1)
    old = [sequence(3, first, salt=b"old") for first in range(3)]
    for one in old:
        s.add(one)
    for number in range(12):
        s.add(sequence(3, 10 + number, salt=b"%d" % number))
        run(s)
        s.remove(s.running[0])
    assert not [one for one in old if one in s.waiting]
    assert not s._turns  # of nobody who waits


def test_a_choice_that_waits_for_its_first_holds_up_no_other_request():
    s, long, other = scheduler(pages=60), sequence(100), sequence(3)
    second = Sequence(list(long.tokens), SamplingParams(max_tokens=20), 1, after=long)
    for one in (long, second, other):
        s.add(one)
    run(s)
    assert s.running == [long]  # its chunk took the step
    for _ in range(4):
        run(s)
    assert s.running == [long, other, second]
    assert second.cached == PAGE


def test_what_does_not_fit_yet_is_not_passed_by_for_ever():
    s = scheduler(pages=4, max_running=4)
    s.add(sequence(PAGE, 1, salt=b"a"))
    run(s)
    large, small = sequence(3 * PAGE, 2, 1, salt=b"b"), sequence(2, 3, salt=b"a")
    s.add(large)
    s.add(small)
    run(s)
    assert large not in s.running
    assert small not in s.running
    s.remove(s.running[0])
    run(s)
    assert s.running[0] is large


def test_drafts_count_as_tokens_of_the_step():
    s, one = scheduler(step_tokens=4, drafts=3), sequence(2)
    s.add(one)
    run(s)
    one.drafts = [7, 7, 7]
    (chunk,) = s.next_step()
    assert chunk.tokens == [9, 7, 7, 7]
    with pytest.raises(ValueError, match="step_tokens 3 cannot hold a token and its 3 drafts"):
        scheduler(step_tokens=3, drafts=3)


def test_the_youngest_is_set_aside_and_comes_back_with_all_it_has_said():
    s, old, young = scheduler(pages=3), sequence(PAGE - 1, 1, 60), sequence(PAGE - 1, 2, 60)
    s.add(old)
    s.add(young)
    while not young.preempted:
        run(s)
        assert len(s.running) > 0
    said = list(young.tokens)
    assert young.pages == []
    assert young.computed == 0
    while old.answered < 60:
        run(s)
    s.remove(old)
    while young.computed < len(said) - 1:
        run(s)
    assert young.tokens[: len(said)] == said
    assert young.decoding


def test_pages_of_a_known_beginning_are_shared_and_counted_once():
    s, first = scheduler(), sequence(2 * PAGE + 5)
    s.add(first)
    while not first.decoding:
        run(s)
    held = s.book.held
    second = sequence(2 * PAGE + 5)
    s.add(second)
    run(s)
    assert second.cached == 2 * PAGE
    assert second.pages[:2] == first.pages[:2]
    assert s.book.held == held + 1


def test_what_can_never_fit_is_refused_with_both_numbers():
    with pytest.raises(ValueError, match="need 4 cache pages, there are 2"):
        scheduler(pages=2).add(sequence(200))


def test_a_second_place_is_asked_only_for_what_memory_lacks():
    asked = []
    s = scheduler(fetch=lambda key, page: asked.append(page) or len(asked) == 1)
    one = sequence(3 * PAGE)
    s.add(one)
    run(s)
    assert len(asked) == 2
    assert one.cached == PAGE
    s.remove(one)
    assert s.book.held == 0
