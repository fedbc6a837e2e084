"""From a stream of tokens to a stream of text that stops where it was told to.

What `push` gave is never taken back: bytes of an unfinished character are held, and so is text that may be the beginning of
a stop string. All pieces joined are the answer's text, cut in front of the first stop string.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol


class Decoder(Protocol):
    """Turns tokens into text as they come (dsv3.data.tokenizer.StreamDecoder)."""

    def push(self, ids: Iterable[int], /) -> str: ...
    def finish(self) -> str: ...


class Codec(Protocol):
    """What the engine asks of a tokenizer."""

    def encode(self, text: str, /) -> list[int]: ...
    def decode(self, ids: Sequence[int], /) -> str: ...
    def stream(self) -> Decoder: ...
    @property
    def bos_id(self) -> int | None: ...
    @property
    def vocab_size(self) -> int: ...


class TextStream:
    """One answer's text."""

    def __init__(self, decoder: Decoder, stop: Sequence[str] = ()) -> None:
        self._decoder, self._stop, self._held = decoder, tuple(stop), ""
        self.stopped = False

    def push(self, token: int, *, may_stop: bool = True) -> str:
        """Text that is now certain. `stopped` is set when a stop string has come; from then on there is none."""
        return self._release(self._decoder.push([token]), may_stop)

    def finish(self) -> str:
        """The rest: half characters as U+FFFD, and what looked like a stop string but was none."""
        if self.stopped:
            return ""
        text = self._release(self._decoder.finish(), True)
        text, self._held = text + self._held, ""
        return text

    def _release(self, text: str, may_stop: bool) -> str:
        text, self._held = self._held + text, ""
        if not self._stop or self.stopped:
            return "" if self.stopped else text
        if may_stop:
            found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
            if found:
                self.stopped = True
                return text[: min(found)]
        keep = max(_overlap(text, stop) for stop in self._stop)
        text, self._held = text[: len(text) - keep], text[len(text) - keep :]
        return text


def _overlap(text: str, stop: str) -> int:
    """The longest end of text that is a beginning of stop, shorter than all of it."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
