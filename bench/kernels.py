"""Every kernel over V3's own shapes: time, rate, share of the device's measured ceiling, ratio to what bfloat16 costs; checked in
the same run.

    products    TFLOP/s; ceiling: the best square bfloat16 product; peer: the same product in bfloat16 by torch
    grouped     the same for 32 experts; peer: dsv3's grouped product in bfloat16
    casts       GB/s read and written; ceiling: a copy
    pages       absorbed attention of decoding rows over pages: GB/s of the pages read once (goal: 70% of a copy), and TFLOP/s of
                the same call: with 16 heads a rank the pages decide, with 128 on one device the products do as much
    check       distance to the reference on a slice: 0 for casts, below 1e-3 for products that end in bfloat16

On a CPU, and with --small anywhere, the shapes are a fraction of V3's and the whole takes under a minute.
    python -m bench.kernels [--small] [--out FOLDER]        a table; with --out also kernels.json and kernels.md
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from bench.common import machine
from dsv3.kernels import fp8_gemm, quant
from dsv3.kernels.attention import PAGE, attend_pages, attend_pages_reference
from dsv3.kernels.gemm import grouped_linear
from dsv3.kernels.swiglu import swiglu, swiglu_reference
from dsv3.train.metrics import measure_peak, write_atomic

# (K, N) of V3's Linears at M = 4096 tokens: q_a, q_b, kv_a, kv_b, o, dense gate, dense down, shared expert both ways.
SHAPES = [
    (7168, 1536), (1536, 24576), (7168, 576), (512, 32768), (16384, 7168), (7168, 18432), (18432, 7168), (7168, 2048),
    (2048, 7168),
]  # fmt: skip
SMALL = [(1024, 256), (256, 1536), (1024, 144), (1024, 1024)]


@dataclass(frozen=True)
class Result:
    """One line of the table."""

    kernel: str
    shape: str
    milliseconds: float
    rate: float  # TFLOP/s or GB/s
    unit: str
    of_ceiling: float
    to_bfloat16: float | None  # how many times as fast as the peer
    error: float


@dataclass(frozen=True)
class Bench:
    """Where it runs and what it is measured against."""

    device: torch.device
    flops: float
    bandwidth: float
    seconds: float

    def time(self, call: Callable[[], object]) -> float:
        """Median seconds of a call, warm."""
        for _ in range(2):
            call()
        times: list[float] = []
        while len(times) < 3 or (sum(times) < self.seconds and len(times) < 200):
            self.wait()
            start = time.perf_counter()
            call()
            self.wait()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def product(
        self,
        kernel: str,
        shape: str,
        flops: float,
        call: Callable[[], Tensor],
        peer: Callable[[], Tensor],
        error: float,
    ) -> Result:
        mine, other = self.time(call), self.time(peer)
        return Result(
            kernel, shape, 1e3 * mine, flops / mine / 1e12, "TFLOP/s", flops / mine / self.flops, other / mine, error
        )

    def moved(self, kernel: str, shape: str, size: int, call: Callable[[], object], error: float) -> Result:
        mine = self.time(call)
        return Result(kernel, shape, 1e3 * mine, size / mine / 1e9, "GB/s", size / mine / self.bandwidth, None, error)


def prepare(device: torch.device, seconds: float) -> Bench:
    """Measure the ceilings: matmul rate, and bandwidth of a copy larger than any cache."""
    bench = Bench(device, measure_peak(torch.bfloat16, device), 1.0, seconds)
    x = torch.empty(2**28 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    return Bench(device, bench.flops, 2 * x.numel() / bench.time(lambda: y.copy_(x)), seconds)


def distance(got: Tensor, wanted: Tensor) -> float:
    return ((got.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30)).item()


def casts(bench: Bench, rows: int, width: int) -> list[Result]:
    """The three casts, the retile, SwiGLU."""
    x = torch.randn(rows, width, device=bench.device).bfloat16()
    w, few = torch.randn(width, width, device=bench.device), slice(0, 256)
    ends = fp8_gemm.one_group(rows, x.device)
    codes, scales = quant.cast_tiles(x)
    shape, values = f"{rows}x{width}", rows * width
    meant = quant.dequantize_tiles(codes, scales, torch.float32)
    part = fp8_gemm.one_group(256, x.device)

    def off(got: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> float:
        return max(distance(a.float(), b.float()) for a, b in zip(got, wanted))

    return [
        bench.moved("cast_tiles", shape, 3 * values, lambda: quant.cast_tiles(x),
                    off(quant.cast_tiles(x[few]), quant.cast_tiles_reference(x[few]))),
        bench.moved("cast_columns", shape, 3 * values, lambda: quant.cast_columns(x, ends),
                    off(quant.cast_columns(x[few], part), quant.cast_columns_reference(x[few], part))),
        bench.moved("retile", shape, 2 * values, lambda: quant.retile(codes, scales, ends),
                    off(quant.retile(codes[few], scales[few], part), quant.cast_columns_reference(meant[few], part))),
        bench.moved("cast_blocks", f"{width}x{width}", 5 * width * width, lambda: quant.cast_blocks(w),
                    off(quant.cast_blocks(w[few]), quant.cast_blocks_reference(w[few]))),
        bench.moved("swiglu", shape, 6 * values, lambda: swiglu(x, x), distance(swiglu(x, x), swiglu_reference(x, x))),
    ]  # fmt: skip


def products(bench: Bench, rows: int, width: int, columns: int) -> list[Result]:
    """fprop, dgrad and wgrad of one Linear."""
    x, dy = (torch.randn(rows, n, device=bench.device).bfloat16() for n in (width, columns))
    w = torch.randn(columns, width, device=bench.device).bfloat16()
    a, b, g = quant.cast_tiles(x), quant.cast_blocks(w), quant.cast_tiles(dy)
    ends = fp8_gemm.one_group(rows, x.device)
    left, right = quant.cast_columns(dy, ends), quant.cast_columns(x, ends)
    flops, shape, few = 2.0 * rows * width * columns, f"{rows}x{columns}x{width}", slice(0, 64)

    def mm(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> Tensor:
        return fp8_gemm.fp8_mm(*left, *right, torch.bfloat16)

    turned = (b[0].t(), b[1].t())
    meant = quant.dequantize_blocks(*b, torch.float32)
    return [
        bench.product("fp8 fprop", shape, flops, lambda: mm(a, b), lambda: x @ w.t(),
                      distance(mm(a, b)[few], quant.dequantize_tiles(*a, torch.float32)[few] @ meant.t())),
        bench.product("fp8 dgrad", shape, flops, lambda: mm(g, turned), lambda: dy @ w,
                      distance(mm(g, turned)[few], quant.dequantize_tiles(*g, torch.float32)[few] @ meant)),
        bench.product("fp8 wgrad", shape, flops, lambda: fp8_gemm.fp8_wgrad(*left, *right), lambda: dy.t() @ x,
                      distance(fp8_gemm.fp8_wgrad(*left, *right), dy.float().t() @ x.float())),
    ]  # fmt: skip


def grouped(bench: Bench, experts: int, rows: int, width: int, columns: int) -> list[Result]:
    """fprop and wgrad of routed experts, whose loads differ as they do in training."""
    torch.manual_seed(0)
    share = torch.rand(experts) + 0.5
    counts = (share / share.sum() * rows).long()
    counts[0] += rows - int(counts.sum())
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(bench.device)
    x = torch.randn(rows, width, device=bench.device).bfloat16()
    dy = torch.randn(rows, columns, device=bench.device).bfloat16()
    w = torch.randn(experts, columns, width, device=bench.device).bfloat16()
    a, b, there = quant.cast_tiles(x), quant.cast_blocks(w), counts.to(bench.device)
    left, right = quant.cast_columns(dy, offsets), quant.retile(*a, offsets)
    flops, shape = 2.0 * rows * width * columns, f"{experts} experts, {rows}x{columns}x{width}"
    y = fp8_gemm.fp8_grouped_mm(*a, *b, offsets, torch.bfloat16)
    first = int(counts[0])
    meant = (
        quant.dequantize_tiles(*a, torch.float32)[:first] @ quant.dequantize_blocks(b[0][0], b[1][0], torch.float32).t()
    )
    dw = fp8_gemm.fp8_grouped_wgrad(*left, *right, offsets)
    return [
        bench.product("fp8 grouped fprop", shape, flops,
                      lambda: fp8_gemm.fp8_grouped_mm(*a, *b, offsets, torch.bfloat16),
                      lambda: grouped_linear(x, w, there), distance(y[:first], meant)),
        bench.product("fp8 grouped wgrad", shape, flops, lambda: fp8_gemm.fp8_grouped_wgrad(*left, *right, offsets),
                      lambda: grouped_linear(x, w, there), distance(dw[0], dy[:first].float().t() @ x[:first].float())),
    ]  # fmt: skip


def latent(bench: Bench, rows: int, context: int, heads: int, rank: int, rope: int) -> list[Result]:
    """Absorbed attention over pages, each row the last of a sequence of its own whose pages lie in no order."""
    per_row, width, scale = context // PAGE, rank + rope, (rank + rope) ** -0.5
    pages = torch.randn(rows * per_row + 1, PAGE, width, device=bench.device).bfloat16()
    q = torch.randn(rows, heads, width, device=bench.device).bfloat16()
    tables = (torch.randperm(rows * per_row, device=bench.device) + 1).view(rows, per_row)
    mine, positions = torch.arange(rows, device=bench.device), torch.full((rows,), context - 1, device=bench.device)
    calls = (
        10 if bench.device.type == "cuda" else 1
    )  # in flight together: starting one takes as long as a part of running it

    def call() -> Tensor:
        return attend_pages(q, pages, tables, mine, positions, rank, scale)

    wanted = attend_pages_reference(q[:2].float(), pages, tables, mine[:2], positions[:2], rank, scale)
    error = distance(call()[:2], wanted)
    seconds = bench.time(lambda: [call() for _ in range(calls)]) / calls
    read = 2 * (rows * context * width + rows * heads * (width + rank))
    flops = 2.0 * rows * context * heads * (width + rank)
    shape, rate = f"{rows} rows of {context}, {heads} heads", read / seconds
    moved = Result("attend_pages", shape, 1e3 * seconds, rate / 1e9, "GB/s", rate / bench.bandwidth, None, error)
    rate = flops / seconds
    return [moved, replace(moved, rate=rate / 1e12, unit="TFLOP/s", of_ceiling=rate / bench.flops)]


def run(device: torch.device, small: bool, seconds: float = 0.3) -> list[Result]:
    bench = prepare(device, seconds)
    if small:
        results = casts(bench, 1024, 1024)
        for width, columns in SMALL:
            results += products(bench, 512, width, columns)
        return results + grouped(bench, 8, 2048, 512, 256) + latent(bench, 4, 512, 16, 128, 64)
    results = casts(bench, 4096, 7168) + casts(bench, 32768, 2048)
    for width, columns in SHAPES:
        results += products(bench, 4096, width, columns)
    results += grouped(bench, 32, 32768, 7168, 4096) + grouped(bench, 32, 32768, 2048, 7168)
    return results + latent(bench, 64, 8192, 16, 512, 64) + latent(bench, 64, 8192, 128, 512, 64)


def limit(result: Result) -> float:
    """How far a result may be from its reference: casts are exact; SwiGLU and FP8 products end in bfloat16, and attention's weights
    are bfloat16 too; a weight gradient is compared with the values before their casts, 3.7% each, 5.2% where the rows were cast
    twice."""
    if result.kernel == "attend_pages":
        return 6e-3
    if result.kernel in ("swiglu", "fp8 fprop", "fp8 dgrad", "fp8 grouped fprop"):
        return 4e-3
    return 0.06 if "wgrad" in result.kernel else 0.0


def markdown(results: list[Result]) -> str:
    lines = [
        "| kernel | shape | ms | rate | of the ceiling | times bfloat16 | error |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in results:
        ratio = "" if r.to_bfloat16 is None else f"{r.to_bfloat16:.2f}"
        rate = f"{r.rate:.3g} {r.unit}"
        lines.append(
            f"| {r.kernel} | {r.shape} | {r.milliseconds:.3g} | {rate} | {r.of_ceiling:.0%} | {ratio} | {r.error:.1e} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a fraction of V3's shapes; the default on a CPU")
    parser.add_argument("--out", type=Path, help="folder for kernels.json and kernels.md")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results = run(device, options.small or device.type == "cpu")
    print(markdown(results))
    print(json.dumps({"bench": "kernels", "device": str(device), **machine()}))
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        content = {**machine(), "results": [asdict(r) for r in results]}
        write_atomic(options.out / "kernels.json", json.dumps(content, indent=1).encode())
        write_atomic(options.out / "kernels.md", markdown(results).encode())
    wrong = [r for r in results if not r.error <= limit(r)]
    if wrong:
        raise SystemExit(f"wrong results: {', '.join(f'{r.kernel} {r.shape} ({r.error:.2e})' for r in wrong)}")


if __name__ == "__main__":
    main()
