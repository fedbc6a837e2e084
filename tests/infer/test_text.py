"""Text as it comes: for any cut of the stream the same text, none of it taken back."""

from hypothesis import given
from hypothesis import strategies as st

from dsv3.infer.text import TextStream


class Pieces:
    """A decoder whose tokens are its pieces."""

    def __init__(self, pieces):
        self._pieces = pieces

    def push(self, ids):
        return "".join(self._pieces[i] for i in ids)

    def finish(self):
        return "!"


@given(st.lists(st.text("ab", max_size=4), max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_what_comes_out_is_the_text_before_the_first_stop_string(pieces, stops):
    stream, out = TextStream(Pieces(pieces), stops), []
    for i in range(len(pieces)):
        out.append(stream.push(i))
        if stream.stopped:
            break
    out.append(stream.finish())
    seen = pieces[: len(out) - 1]
    whole = "".join(seen)
    at = [whole.find(stop) for stop in stops if stop in whole]
    assert stream.stopped == bool(at)
    assert "".join(out) == (whole[: min(at)] if at else whole + "!")
    if at:  # and no earlier piece had one already
        assert not any(stop in "".join(seen[:-1]) for stop in stops)


def test_a_stop_string_does_not_count_before_it_may():
    stream = TextStream(Pieces(["ab", "ab"]), ["b"])
    assert stream.push(0, may_stop=False) == "ab"
    assert stream.push(1) == "a"
    assert stream.stopped
