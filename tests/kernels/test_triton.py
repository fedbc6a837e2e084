"""The Triton kernels, compiled on a GPU (mark gpu) and everywhere under Triton's CPU interpreter, in a process of its own: the
interpreter is chosen when Triton is imported.

Casts must equal the references in every bit: division is IEEE's and the rounding is ours, so neither the interpreter's own cast to
float8 nor the hardware's is used. Products may differ by the order of float32 sums: 128 terms of 2^-24 each, below 1e-5.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dsv3.kernels import fp8_gemm, quant
from dsv3.kernels.gemm import grouped_linear_reference
from tests.kernels.distance import distance
from tests.kernels.hopper import compile_for_hopper

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@needs_triton
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is that process")
def test_under_the_interpreter():
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "pytest", __file__, "-v", "-p", "no:cacheprovider", "-k", "interpreted"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:]
    assert "passed" in done.stdout
    assert "skipped" not in done.stdout


def devices():
    interpreted = pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1", reason="runs in the interpreter's process"
    )
    yield pytest.param("cpu", id="interpreted", marks=interpreted)
    lacking = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    yield pytest.param("cuda", id="compiled", marks=[pytest.mark.gpu, lacking])


each_device = pytest.mark.parametrize("device", list(devices()))


def same(got, wanted) -> None:
    assert torch.equal(got[0].cpu().view(torch.uint8), wanted[0].view(torch.uint8))
    assert torch.equal(got[1].cpu().nan_to_num(-1.0), wanted[1].nan_to_num(-1.0))


def hard_values(rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Twelve decades, zeros, denormals, and a tile each with NaN and infinity."""
    torch.manual_seed(rows)
    x = torch.randn(rows, width) * torch.exp(torch.randn(rows, width) * 5)
    x[0, :40] = 0.0
    x[1] = 0.0
    x[2] = torch.randn(width) * 1e-39
    x[3, 3], x[4, width - 1], x[5, 7] = torch.nan, torch.inf, -torch.inf
    return x.to(dtype)


@needs_triton
@each_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("pow2", [False, True])
def test_casts(device, dtype, pow2):
    from dsv3.kernels.triton import quant as kernels

    x = hard_values(37, 272, dtype)
    same(kernels.cast_tiles(x.to(device), pow2), quant.cast_tiles_reference(x, pow2))
    offsets = torch.tensor([0, 0, 9, 37])
    same(
        kernels.cast_columns(x.to(device), None, offsets.to(device), pow2),
        quant.cast_columns_reference(x, offsets, pow2),
    )
    codes, scales = quant.cast_tiles_reference(x)
    given = kernels.cast_columns(codes.to(device), scales.to(device), offsets.to(device), pow2)
    same(given, quant.cast_columns_reference(quant.dequantize_tiles(codes, scales, torch.float32), offsets, pow2))


@needs_triton
@each_device
def test_every_bfloat16(device):
    from dsv3.kernels.triton import quant as kernels

    x = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = x[x.isfinite()][: 65024 // 128 * 128].view(-1, 128)
    same(kernels.cast_tiles(x.to(device), False), quant.cast_tiles_reference(x))


@needs_triton
@each_device
def test_blocks(device):
    from dsv3.kernels.triton import quant as kernels

    w = hard_values(300, 144, torch.float32).view(2, 150, 144)
    same(kernels.cast_blocks(w.to(device)), quant.cast_blocks_reference(w))


@needs_triton
@each_device
@pytest.mark.parametrize("bounds", [[0, 5, 5, 150], [0, 150], [0, 128, 150]])
def test_products(device, bounds):
    from dsv3.kernels.triton import gemm

    torch.manual_seed(0)
    offsets, experts = torch.tensor(bounds), len(bounds) - 1
    x, w, dy = torch.randn(150, 208).bfloat16(), torch.randn(experts, 176, 208), torch.randn(150, 176).bfloat16()
    a, b = quant.cast_tiles_reference(x), quant.cast_blocks_reference(w)
    g, there = quant.cast_tiles_reference(dy), offsets.to(device)

    def on(tensors):
        return [t.to(device) for t in tensors]

    for rows, weights in ((a, b), (g, (b[0].mT, b[1].mT))):
        wanted = fp8_gemm.fp8_grouped_mm_reference(*rows, *weights, offsets, torch.float32)
        assert distance(gemm.grouped_mm(*on(rows), *on(weights), there, torch.float32).cpu(), wanted) < 1e-5
    wanted = fp8_gemm.fp8_grouped_mm_reference(x, None, *b, offsets, torch.float32)
    assert distance(gemm.grouped_mm(x.to(device), None, *on(b), there, torch.float32).cpu(), wanted) < 1e-5
    columns = quant.cast_columns_reference(dy, offsets), quant.cast_columns_reference(x, offsets)
    wanted = fp8_gemm.fp8_grouped_wgrad_reference(*columns[0], *columns[1], offsets)
    assert distance(gemm.grouped_wgrad(*on(columns[0]), *on(columns[1]), there).cpu(), wanted) < 1e-5


@needs_triton
@each_device
def test_bfloat16_products(device):
    """Results become bfloat16: rounded on a GPU, 0.0017 in the norm; cut off by the interpreter, twice that."""
    from dsv3.kernels.triton import gemm

    torch.manual_seed(0)
    counts = torch.tensor([20, 0, 70])
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(device)
    x, w, dy = torch.randn(90, 80).bfloat16(), torch.randn(3, 144, 80).bfloat16(), torch.randn(90, 144).bfloat16()
    wanted = grouped_linear_reference(x.double(), w.double(), counts)
    assert distance(gemm.grouped_mm_bfloat16(x.to(device), w.to(device), offsets).cpu(), wanted) < 0.006
    dw = gemm.grouped_wgrad_bfloat16(dy.to(device), x.to(device), offsets).cpu()
    assert distance(dw[2], dy[20:].double().t() @ x[20:].double()) < 0.006
    assert not dw[1].any()


@needs_triton
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter does not compile")
@pytest.mark.parametrize("by", ["bfloat16", "weights", "fp8"])
def test_grouped_products_compile_for_hopper(by):
    """The interpreter runs what the compiler refuses. The products are of whole groups of warps, their operands copied ahead."""
    from dsv3.kernels.triton import gemm

    rows, weights = ("*fp8e4nv" if by == "fp8" else "*bf16"), ("*bf16" if by == "bfloat16" else "*fp8e4nv")
    scales = "*bf16" if by == "bfloat16" else "*fp32"
    kinds = {"a": rows, "b": weights, "y": "*bf16", "a_scales": scales, "b_scales": scales, "offsets": "*i64"}
    fixed = {
        "by": by,
        "wide": False,
        "BM": 64,
        "BN": 128,
        "BK": 64 if by == "bfloat16" else 128,
        "MOST": 32,
        "s_tile": 1,
    }
    made = compile_for_hopper(gemm._rows, kinds, fixed, num_warps=8, num_stages=3)
    assert "wgmma.mma_async" in made.asm["ptx"]
    assert "async_copy_global_to_local" in made.asm["ttgir"]
    if by != "weights":
        kinds |= {"b": rows, "dw": "*fp32" if by == "fp8" else "*bf16"}
        fixed = {"by": by, "wide": False, "BN": 128, "BK": 128, "BR": 64 if by == "bfloat16" else 128}
        assert "wgmma.mma_async" in compile_for_hopper(gemm._wgrad, kinds, fixed, num_warps=8).asm["ptx"]


@needs_triton
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter does not compile")
def test_casts_compile_for_hopper():
    from dsv3.kernels.triton import quant as kernels

    kinds = {"x": "*i16", "given": "*i16", "w": "*fp32", "codes": "*u8", "scales": "*fp32", "offsets": "*i64"}
    compile_for_hopper(kernels._tiles, kinds, {"pow2": True, "BR": 32})
    compile_for_hopper(kernels._blocks, kinds, {})
    compile_for_hopper(kernels._columns, kinds, {"cast": False, "pow2": False, "BK": 64, "MOST": 32})
    kinds |= {"x": "*u8", "given": "*fp32"}
    compile_for_hopper(kernels._columns, kinds, {"cast": True, "pow2": False, "BK": 64, "MOST": 32})
