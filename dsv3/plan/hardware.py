"""What a device can do: rates that kernels were measured to reach, not data sheets' peaks, each with its source.

    product        seconds = FLOPs / rate · (1 + half / K)         K: length of the sums
    attention      seconds = FLOPs / rate, forward and backward apart
    memory         bytes / rate (copies reach about 0.9 of the data sheet: 3,000 of 3,350 GB/s on an H800, FlashMLA)
    network        bytes / rate, inside a node (or NVLink domain) and between nodes

`half` is the length at which a product reaches half its rate: what is written and promoted a tile costs the same, however
long its sums are. DeepGEMM's table for an H800 (README, first release; M = 4096 or 8192 a group) gives rate and half:

    K                      512    1,536    2,048    7,168    16,384
    published, TFLOPS      590    990      1,025 1,099      1,304 1,297    1,358
    1,430 / (1 + 730 / K)  590    969      1,054    1,298    1,369

`kept` is the one number that no kernel's table gives: the share of these rates that a whole run keeps, after launches, clocks
under load, waiting for the slowest rank, and everything else that a list of products forgets. It is the median over the
published runs of published.py (a test takes each run out in turn and predicts it from the others).
A file of TOML describes other hardware: the fields of `Hardware`, and `like` for what it does not say.
Does not: know models.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GB = 10**9


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One device and its share of the network. FLOP/s, bytes and bytes/s."""

    name: str
    memory: float
    products: Mapping[str, float]
    """Rate of long products by precision: fp8, bfloat16, float32."""
    half: Mapping[str, float]
    """Length of sums at which half of it is reached."""
    attention: tuple[float, float]
    """Forward and backward, bfloat16, causal rows of 4,096."""
    decode_attention: float
    """Of the absorbed form over a cache, when it is bound by products."""
    bandwidth: float
    inside: float
    """All-to-all between devices of one node."""
    between: float
    """All-to-all between nodes, a device."""
    small: float = 0.0
    """All-to-all of few tokens between nodes, a device (DeepEP's low-latency kernels); 0: as `between`."""
    node: int
    """Devices that `inside` joins."""
    message: float = 0.0
    """Seconds that an exchange takes at least."""
    launch: float = 0.0
    """Seconds an operation costs, however small it is."""
    copy_share: float = 0.0
    """Of the device's processors, held by the network's kernels while it exchanges."""
    kept: float = 1.0
    """Share of these rates that a whole run keeps; see the header."""
    usable: float = 0.94
    """Of the memory, after the driver, the network's buffers and fragments."""
    peak: Mapping[str, float]
    """The data sheet's, for MFU alone."""
    price: float = 0.0
    """Dollars an hour."""
    priced: str = ""
    """Where the price is from."""
    sources: str

    def __post_init__(self) -> None:
        for name in ("memory", "bandwidth", "inside", "between", "node", "kept"):
            if getattr(self, name) <= 0:
                raise ValueError(f"hardware {self.name!r}: {name} is {getattr(self, name)}, it must be positive")

    def product_seconds(self, flops: float, length: float, precision: str) -> float:
        """Of a product whose sums have `length` terms.

        Raises:
            ValueError: the hardware has no such products.
        """
        if precision not in self.products:
            raise ValueError(f"{self.name} has no {precision} products: choose one of {', '.join(self.products)}")
        return flops / self.products[precision] * (1 + self.half[precision] / length)


def _hopper(name: str, **changes: Any) -> Hardware:
    """H100, H200 and H800 have the same processor. BF16: mamf-finder's 794 (ml-engineering); FP8: DeepGEMM; attention:
    FlashAttention-3 at 128 a head and 4K (arXiv 2407.08608; figure 5: forward 638, causal 579; figure 6: backward 542 without
    a mask, here times 579 / 638) and FlashMLA's 660; NVLink and IB: DeepEP's EP8 and EP64, of few tokens (128 a device) its
    low-latency EP64: 173 us there, 314 us back."""
    fields: dict[str, Any] = {
        "name": name, "memory": 80 * GB,
        "products": {"fp8": 1430e12, "bfloat16": 794e12, "float32": 380e12},
        "half": {"fp8": 730.0, "bfloat16": 405.0, "float32": 200.0},  # as long a time a tile: 730 / 1430 · 794
        "attention": (579e12, 492e12), "decode_attention": 660e12,
        "bandwidth": 3000 * GB, "inside": 155 * GB, "between": 50.5 * GB, "small": 45 * GB, "node": 8, "message": 30e-6,
        "copy_share": 20 / 132,  # report 3.2.2: 20 of 132 multiprocessors
        "kept": KEPT,
        "peak": {"fp8": 1979e12, "bfloat16": 989e12, "float32": 495e12}, "sources": _HOPPER,
    }  # fmt: skip
    return Hardware(**(fields | changes))


KEPT = 0.74
_HOPPER = (
    "products: DeepGEMM's README (FP8), ml-engineering's mamf-finder (BF16); attention: FlashAttention-3, FlashMLA; "
    "memory: FlashMLA's 3,000 GB/s; network: DeepEP (153/158 GB/s in a node, 51/50 between)"
)
_BLACKWELL = (
    "products: ml-engineering's mamf-finder (1,745 and 3,432 TFLOPS); attention: FlashMLA's 1,460 and 1,000; memory: 0.9 of "
    "8 TB/s; network: DeepEP's share of NVLink 5, 400 Gb/s a device between nodes"
)
_GB200: dict[str, Any] = {  # its data sheet promises 2,500 and 5,000 TFLOPS, 1.11 times a B200's; 72 devices share NVLink
    "node": 72, "memory": 186 * GB, "attention": (1620e12, 1110e12), "decode_attention": 1620e12,
    "products": {"fp8": 3810e12, "bfloat16": 1940e12, "float32": 890e12},
    "peak": {"fp8": 5000e12, "bfloat16": 2500e12, "float32": 1250e12},
}  # fmt: skip
PRICES = {
    "h800": (2.0, "the report's own assumption (table 1); no market's price was found"),
    "h100": (3.99, "Lambda, eight on demand, 25 September 2026; elsewhere 2.69 (RunPod) to 10.98 (Google)"),
    "h200": (4.5, "Nebius, on demand, 25 September 2026; elsewhere 3.59 to 4.59 (RunPod)"),
    "b200": (6.69, "Lambda, eight on demand, 20 September 2026; elsewhere 5.98 (RunPod) to 7.15 (Nebius)"),
    "gb200": (4.54, "half of a superchip's 9.08, Spheron, 17 March 2026"),
    "cpu": (0.05, "a round figure for a core of a cloud machine, without a source"),
}
"""Dollars an hour and device; where and when. Rents move: give your own with --price."""


def known_hardware() -> dict[str, Hardware]:
    """By name. `cpu` holds one core of a server with AVX-512 BF16, as bench/plan.py measured it."""
    blackwell: dict[str, Any] = {
        "memory": 180 * GB,
        "products": {"fp8": 3432e12, "bfloat16": 1745e12, "float32": 800e12},
        "half": {"fp8": 730.0, "bfloat16": 405.0, "float32": 200.0},
        "attention": (1460e12, 1000e12), "decode_attention": 1460e12,
        "bandwidth": 7200 * GB, "inside": 310 * GB, "between": 50.5 * GB, "copy_share": 20 / 148,
        "peak": {"fp8": 4500e12, "bfloat16": 2250e12, "float32": 1100e12}, "sources": _BLACKWELL,
    }  # fmt: skip
    known = {
        "h800": _hopper("h800"),
        "h100": _hopper("h100", inside=300 * GB),
        "h200": _hopper("h200", inside=300 * GB, memory=141 * GB, bandwidth=4300 * GB),
        "b200": _hopper("b200", **blackwell),
        "gb200": _hopper("gb200", **(blackwell | _GB200)),
        "cpu": _cpu(),
    }
    return {
        name: dataclasses.replace(hardware, price=PRICES[name][0], priced=PRICES[name][1])
        for name, hardware in known.items()
    }


def _cpu() -> Hardware:
    """Fitted by `python -m bench.plan --fit` to nine cases on a quiet machine; six others came within 10% (docs/RESULTS.md)."""
    return Hardware(
        name="cpu", memory=16 * GB,
        products={"fp8": 203e9, "bfloat16": 226e9, "float32": 61e9},
        half={"fp8": 341.0, "bfloat16": 37.0, "float32": 0.0},
        attention=(148e9, 148e9), decode_attention=148e9, bandwidth=9.1 * GB, inside=1 * GB, between=1 * GB, node=64,
        usable=0.9, peak={"fp8": 225e9, "bfloat16": 225e9, "float32": 75e9},
        sources="bench/plan.py on one core of an AMD EPYC with AVX-512 BF16",
    )  # fmt: skip


def hardware_named(name: str, *, price: float | None = None) -> Hardware:
    """The hardware of that name, or of a TOML file.

    Raises:
        ValueError: unknown; the message has the known names. Or a file with unknown fields.
    """
    known = known_hardware()
    if name.lower() in known:
        found = known[name.lower()]
    elif name.endswith(".toml"):
        found = _from_file(Path(name), known)
    else:
        raise ValueError(
            f"there is no hardware {name!r}: known are {', '.join(known)}, or give a TOML file of its rates"
        )
    if price is not None and price < 0:
        raise ValueError(f"--price {price} is negative: give dollars an hour and device")
    return found if price is None else dataclasses.replace(found, price=price, priced="--price")


def _alike(value: Any, example: Any) -> bool:
    """Whether a file's value can stand for the example: text, a positive number (0 where that is one), a pair, or a table."""
    if isinstance(example, str):
        return isinstance(value, str)
    if isinstance(example, Mapping):
        return isinstance(value, dict) and all(key in example and _alike(v, 1.0) and v for key, v in value.items())
    if isinstance(example, tuple):
        return isinstance(value, list) and len(value) == len(example) and all(_alike(v, 1.0) and v for v in value)
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0


def _shown(example: Any) -> str:
    return str(
        dict(example) if isinstance(example, Mapping) else list(example) if isinstance(example, tuple) else example
    )


def _from_file(path: Path, known: Mapping[str, Hardware]) -> Hardware:
    if not path.exists():
        raise ValueError(f"{path} does not exist: give a TOML file of hardware, or one of {', '.join(known)}")
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is no TOML ({error})") from None
    like = content.pop("like", "h100")
    fields = {f.name for f in dataclasses.fields(Hardware)}
    if like not in known:
        raise ValueError(f"{path}: like = {like!r} is no hardware: take one of {', '.join(known)}")
    if unknown := sorted(set(content) - fields):
        raise ValueError(f"{path} has unknown fields {unknown}: known are {', '.join(sorted(fields))}")
    base = known[like]
    changes: dict[str, Any] = {"name": path.stem, "sources": str(path)}
    changes |= {"priced": str(path)} if "price" in content else {}
    for key, value in content.items():
        like_this = getattr(base, key)
        if not _alike(value, like_this):
            raise ValueError(f"{path}: {key} = {value!r} is of another kind than {base.name}'s, {_shown(like_this)}")
        changes[key] = {**like_this, **value} if isinstance(value, dict) else value
    if "attention" in changes:
        changes["attention"] = tuple(changes["attention"])
    return dataclasses.replace(base, **changes)
