"""Generation on a CPU, a whole step in one call of C (kernels/decode/*.c): every row alone, in one order.

    step    N tokens of some sequences -> their latents into the pages, final states (N, D)
    logits  states (n, D) -> (n, V)

A row's numbers are the same bits whatever other rows run beside it, however its prompt was cut into chunks and on any number
of threads: each sum is added in one order, attention is always in the absorbed form, over pages counted from position 0.
Weights are read where they lie: float32, bfloat16, or e4m3 codes with a scale a 128x128 block; rows are float32 in between.
Written in GNU C's vectors, for any processor that its compiler knows.
Source: V3 report section 2.1; kernels/decode/forward.c. Legend: N rows, D model, V vocabulary, E experts, K top-k, L layers.
Does not: know the model's modules (dsv3.infer.native does), devices but the CPU, or float16.
"""

from __future__ import annotations

import ctypes
import functools
import time
from collections.abc import Callable, Sequence
from ctypes import c_float, c_int, c_long, c_void_p
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dsv3.kernels import native

SOURCES = Path(__file__).parent / "decode"
_PACED = 64  # rows from which a step is long enough to take all threads at any time
PAGE = 64  # tokens of a page, as in the C sources
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float8_e4m3fn: 2}


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where there is no compiler (said once)."""
    loaded = native.load_folder(
        SOURCES, "generation runs several times slower, and a request's numbers depend on what else is in the batch"
    )
    if loaded is not None:
        loaded.decode_bytes.restype = c_long
    return loaded


class Matrix(ctypes.Structure):
    """Rows of weights; of several experts, `step` apart. Empty: there is none."""

    _fields_ = (
        ("at", c_void_p), ("scales", c_void_p), ("kind", c_long), ("rows", c_long), ("width", c_long),
        ("scale_width", c_long), ("step", c_long), ("scale_step", c_long),
    )  # fmt: skip

    @classmethod
    def of(cls, weight: Tensor, scales: Tensor | None = None) -> Matrix:
        """weight ([E,] rows, width) with contiguous rows one behind the other; scales ([E,] blocks, blocks) of e4m3 codes."""
        assert weight.device.type == "cpu", weight.device
        assert weight.stride()[-2:] == (weight.shape[-1], 1), weight.stride()
        assert (weight.dtype == torch.float8_e4m3fn) == (scales is not None), weight.dtype
        step = weight.stride(0) if weight.dim() == 3 else 0
        rows, width = weight.shape[-2:]
        if scales is None:
            return cls(weight.data_ptr(), None, KINDS[weight.dtype], rows, width, 0, step, 0)
        assert scales.dtype == torch.float32, scales.dtype
        assert scales.stride(-1) == 1
        scale_step = scales.stride(0) if scales.dim() == 3 else 0
        return cls(weight.data_ptr(), scales.data_ptr(), 2, rows, width, scales.stride(-2), step, scale_step)


class Vector(ctypes.Structure):
    _fields_ = (("at", c_void_p), ("kind", c_long))

    @classmethod
    def of(cls, weight: Tensor) -> Vector:
        assert weight.is_contiguous()
        return cls(weight.data_ptr(), KINDS[weight.dtype])


class Mlp(ctypes.Structure):
    _fields_ = (("gate", Matrix), ("up", Matrix), ("down", Matrix))


class Layer(ctypes.Structure):
    _fields_ = (
        *((name, Vector) for name in (
            "input_norm", "q_norm", "kv_norm", "post_norm", "e_norm", "h_norm", "head_norm",
        )),
        *((name, Matrix) for name in ("q_a", "q", "kv_a", "kv_b", "o", "router", "eh")),
        ("mlp", Mlp), ("experts", Mlp), ("bias", c_void_p),
    )  # fmt: skip


class Model(ctypes.Structure):
    _fields_ = (
        *((name, c_long) for name in (
            "dim", "heads", "nope", "rope", "value", "rank", "experts", "top_k", "groups", "top_groups", "normalise",
            "main_layers", "all_layers", "q_rank", "mlp_width", "expert_width",
        )),
        *((name, c_float) for name in ("eps", "scale", "routed_scale", "rope_scale")),
        ("frequencies", c_void_p), ("embedding", Matrix), ("head", Matrix), ("norm", Vector), ("layers", c_void_p),
    )  # fmt: skip


class Store(ctypes.Structure):
    _fields_ = (("latents", c_void_p), ("kind", c_long), ("pages", c_long))


@dataclass(frozen=True)
class Segment:
    """A sequence's pages, the position of its first new token, and the new tokens."""

    pages: Sequence[int]
    start: int
    tokens: Sequence[int]


class Pace:
    """Whether all threads or one alone make a step faster now: on a busy machine threads wait for each other's turns.

    Both are timed as they run; the slower one is tried again after 16 steps, 32, ... at most 256. Numbers do not depend on it.
    """

    def __init__(self) -> None:
        self._seconds = {True: 0.0, False: 0.0}  # a row's, of late, by whether all threads ran; 0: not yet known
        self._together, self._left, self._wait = True, 0, 8

    def together(self) -> bool:
        """Whether the next step takes all threads."""
        self._left -= 1
        return self._together if self._left >= 0 else not self._together

    def took(self, together: bool, seconds: float) -> None:
        before = self._seconds[together]
        self._seconds[together] = (
            seconds if together != self._together or not before else before + (seconds - before) / 8
        )
        if self._left < 0:
            self._wait = min(2 * self._wait, 256)
            self._left = self._wait
        if self._seconds[self._together] > self._seconds[not self._together] > 0:
            self._together, self._left, self._wait = not self._together, 16, 16


class Decoder:
    """A model and a page store, ready to run, one call at a time.

    Args:
        model: with all addresses filled in; `keep` holds what they point to.
        latents: (L, P, 64, C + R) float32 or bfloat16.
    """

    def __init__(self, model: Model, keep: object, latents: Tensor) -> None:
        assert latents.is_contiguous()
        library_ = library()
        assert library_ is not None
        self._library, self._model, self._keep = library_, model, (latents, keep)
        self._store = Store(latents.data_ptr(), KINDS[latents.dtype], latents.shape[1])
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._room = (0, 0)  # rows and threads that the memory serves
        # By what runs, and the size of its step.
        self._paces = {what: [Pace() for _ in range(_PACED.bit_length())] for what in ("main", "mtp", "logits")}

    def step(
        self, segments: Sequence[Segment], *, chosen: Tensor | None = None, counts: Tensor | None = None,
        streams: Tensor | None = None, mtp: int = -1, previous: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """-> states (N, D) float32; with bfloat16 pages they are bfloat16 numbers.

        Args:
            segments: N tokens in all; each segment's pages reach past its last token.
            chosen: (MoE layers, N, K) int64, filled with the experts that each row went to; for the main layers it must be there.
            counts: (MoE layers, E) int64, to which this step's tokens are added.
            streams: (layers run, N, D) float32, filled with the stream behind each layer.
            mtp: which MTP layer runs, on states `previous` (N, D) float32 and the tokens behind them; -1: the main layers.
        """
        plan, tokens, pages = [], [], []
        for s in segments:
            assert s.start + len(s.tokens) <= len(s.pages) * PAGE, (s.start, len(s.tokens), len(s.pages))
            plan += (s.start, len(s.tokens), len(pages))
            tokens += s.tokens
            pages += s.pages
        rows = len(tokens)
        assert mtp >= 0 or chosen is not None
        flat = (c_long * (len(plan) + rows + len(pages)))(*plan, *tokens, *pages)
        states = torch.empty(rows, self._model.dim)
        self._call(
            "main" if mtp < 0 else "mtp", rows, self._library.decode_step,
            ctypes.byref(self._model), ctypes.byref(self._store), flat,
            c_long(len(segments)), c_long(rows), c_long(mtp), _at(previous), _at(states), _at(chosen), _at(counts),
            _at(streams),
        )  # fmt: skip
        return states

    def logits(self, states: Tensor) -> Tensor:
        """states (n, D) float32 -> (n, V) float32."""
        rows = len(states)
        out = torch.empty(rows, self._model.head.rows)
        model = ctypes.byref(self._model)
        self._call("logits", rows, self._library.decode_logits, model, _at(states), c_long(rows), _at(out))
        return out

    def _call(self, what: str, rows: int, function: Callable[..., None], *arguments: object) -> None:
        threads = torch.get_num_threads()
        if not rows:
            return
        if rows > self._room[0] or threads != self._room[1]:
            size = self._library.decode_bytes(ctypes.byref(self._model), c_long(rows), c_int(threads))
            self._memory, self._room = torch.empty(size + 64, dtype=torch.uint8), (rows, threads)
        pace = self._paces[what][rows.bit_length() - 1] if threads > 1 and rows < _PACED else None
        together = pace is None or pace.together()
        start = time.perf_counter()
        function(*arguments, _at(self._memory), c_int(threads if together else 1))
        if pace is not None:
            pace.took(together, (time.perf_counter() - start) / rows)


def _at(x: Tensor | None) -> c_void_p:
    if x is None:
        return native.NULL
    assert x.is_contiguous()
    return c_void_p(x.data_ptr())
