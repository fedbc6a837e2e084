"""attend_pages: torch's path, and the Triton kernels under their interpreter (in a process of its own), compiled for Hopper (the
compiler needs no GPU) and run on one (mark gpu), against a softmax written out in float64.

Distances: the interpreter works in float32 and cuts results to bfloat16, 2^-8 at most and 0.0035 in the norm; a GPU also rounds the
weights to bfloat16. Both below 0.006.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dsv3.kernels.attention import PAGE, attend_pages, attend_pages_reference
from tests.kernels.distance import distance
from tests.kernels.hopper import compile_for_hopper

has_triton = importlib.util.find_spec("triton") is not None
here = os.environ.get("TRITON_INTERPRET") == "1"
needs_triton = pytest.mark.skipif(not has_triton, reason="Triton is not installed")


def devices():
    interpreted = pytest.mark.skipif(not (has_triton and here), reason="runs in the interpreter's process")
    yield pytest.param("cpu", id="interpreted", marks=interpreted)
    lacking = pytest.mark.skipif(not (has_triton and torch.cuda.is_available()), reason="no CUDA device with Triton")
    yield pytest.param("cuda", id="compiled", marks=[pytest.mark.gpu, lacking])


each_device = pytest.mark.parametrize("device", list(devices()))


@needs_triton
@pytest.mark.skipif(here, reason="this is that process")
def test_under_the_interpreter():
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "pytest", __file__, "-v", "-p", "no:cacheprovider", "-k", "interpreted"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:]
    assert "passed" in done.stdout
    assert "skipped" not in done.stdout


def batch(positions, *, heads=4, rank=16, rope=8, pages=40, dtype=torch.bfloat16, seed=0, spare=1):
    """Rows at these positions, each sequence's a list; pages in no order, tables filled up with page 0, which is zero."""
    draw = torch.Generator().manual_seed(seed)
    count = sum(map(len, positions))
    store = torch.randn(pages, PAGE, rank + rope, generator=draw).to(dtype)
    store[0] = 0
    needed = [max(own) // PAGE + 1 for own in positions]
    free = (torch.randperm(pages - 1, generator=draw) + 1).tolist()
    tables = torch.zeros(len(positions), max(needed) + spare, dtype=torch.int64)
    for i, own in enumerate(needed):
        tables[i, :own] = torch.tensor([free.pop() for _ in range(own)])
    rows = torch.tensor([i for i, own in enumerate(positions) for _ in own])
    q = torch.randn(count, heads, rank + rope, generator=draw).to(dtype)
    return q, store, tables, rows, torch.tensor([p for own in positions for p in own])


def exact(q, store, tables, rows, positions, rank, scale, first=0):
    """Row by row, in float64."""
    out = []
    for own, table, position in zip(q.double(), tables[rows], positions.tolist()):
        keys = store[table].flatten(0, 1)[first : position + 1].double()
        out.append((own @ keys.t() * scale).softmax(-1) @ keys[:, :rank])
    return torch.stack(out)


def on(device, tensors):
    return [t.to(device) for t in tensors]


RAGGED = [[0], [63, 64], [200, 201], [128]]


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch(dtype, first):
    given = batch(RAGGED, dtype=dtype)
    given[-1][0] = 1  # slot 0 alone is nothing to read where `first` is 1
    limit = 1e-6 if dtype == torch.float32 else 0.003
    got = attend_pages(*given, 16, 0.3, first)
    assert got.dtype == dtype
    assert distance(got, exact(*given, 16, 0.3, first)) < limit


def test_the_op_is_registered_whole():
    given = batch([[3], [70, 71]], dtype=torch.float32)
    torch.library.opcheck(torch.ops.dsv3.attend_pages.default, (*given, 16, 0.3, 1))


@pytest.mark.parametrize("device", [pytest.param("cpu", id="torch"), *devices()])
def test_hidden_slots_and_rows_without_any(device):
    """NaN behind a row's position, in slot 0 and in page 0; a row at position 0 whose slots begin at 1 gets zeros."""
    given = batch([[70], [0], [9]], heads=4)
    _, store, tables, *_ = given
    wanted = exact(*given, 16, 0.3, 0)[[0, 2]], exact(*given, 16, 0.3, 1)[0]
    store[0] = torch.nan
    store[tables[0, 1], 7:] = torch.nan
    store[tables[2, 0], 10:] = torch.nan
    op = attend_pages if device == "cpu" and not here else kernel
    got = op(*on(device, given), 16, 0.3, 0).cpu()
    assert distance(got[[0, 2]], wanted[0]) < 0.006
    store[tables[0, 0], 0] = torch.nan
    got = op(*on(device, given), 16, 0.3, 1).cpu()
    assert distance(got[0], wanted[1]) < 0.006
    assert not got[1].any()


def kernel(*args, **kwargs):
    from dsv3.kernels.triton import attention

    return attention.attend_pages(*args, **kwargs)


@each_device
@pytest.mark.parametrize(("heads", "rank", "rope", "first"), [(4, 16, 8, 0), (20, 24, 16, 1), (70, 32, 8, 0)])
def test_random_ragged_batches(device, heads, rank, rope, first):
    given = batch([[40], *RAGGED[1:]], heads=heads, rank=rank, rope=rope, seed=heads)
    got = kernel(*on(device, given), rank, 0.3, first, split=128).cpu()
    assert distance(got, exact(*given, rank, 0.3, first)) < 0.006


@each_device
def test_a_row_alone_and_beside_others_has_the_same_bits(device):
    """With the table as wide as it must be, or wider, its sequence's place another, and other rows of its sequence or none."""
    given = batch(RAGGED, pages=60)
    q, store, tables, rows, positions = given
    together = kernel(*on(device, given), 16, 0.3, 0, split=64)
    for i, position in enumerate(positions.tolist()):
        table = tables[rows[i], : position // PAGE + 1].unsqueeze(0)
        alone = q[i : i + 1], store, table, torch.tensor([0]), positions[i : i + 1]
        assert torch.equal(kernel(*on(device, alone), 16, 0.3, 0, split=64)[0], together[i])


@each_device
def test_long_positions(device):
    """Several splits, of 512, whose largest scores differ widely."""
    given = batch([[1599, 1600]])
    given[1].mul_(torch.linspace(0.2, 3.0, 40).view(-1, 1, 1))
    got = kernel(*on(device, given), 16, 0.5, 0).cpu()
    assert distance(got, exact(*given, 16, 0.5)) < 0.006


@each_device
def test_no_rows(device):
    q, *rest, rows, positions = batch([[5]])
    assert kernel(*on(device, (q[:0], *rest, rows[:0], positions[:0])), 16, 0.3, 0).shape == (0, 4, 16)


@pytest.mark.gpu
@pytest.mark.skipif(not (has_triton and torch.cuda.is_available()), reason="no CUDA device with Triton")
@pytest.mark.parametrize("heads", [16, 128])
def test_the_op_on_a_gpu_at_v3s_shape(heads):
    """Through the op, without waiting for the device; the same bits alone and together."""
    given = on("cuda", batch([[4000], [700, 701], [63]], heads=heads, rank=512, rope=64, pages=90))
    got = attend_pages(*given, 512, 0.1352, 0)
    assert distance(got.cpu(), exact(*on("cpu", given), 512, 0.1352)) < 0.006
    assert distance(got.cpu(), attend_pages_reference(*on("cpu", given), 512, 0.1352).float()) < 0.006
    q, store, tables, _, positions = given
    alone = attend_pages(q[:1], store, tables[:1], torch.zeros_like(positions[:1]), positions[:1], 512, 0.1352, 0)
    assert torch.equal(alone[0], got[0])


@needs_triton
@pytest.mark.skipif(here, reason="the interpreter does not compile")
@pytest.mark.parametrize("heads", [16, 128])
def test_v3s_shape_compiles_for_hopper(heads):
    """Types, shared memory (an H100 has 227 KiB a block) and the products: tensor cores by warpgroup for 64 heads a block, keys
    shared out among them and not repeated."""
    from dsv3.kernels.triton import attention

    fixed, options = attention.sizes(heads, 512, 64, attention.split_tokens(heads))
    kinds = {"q": "*bf16", "pages": "*bf16", "tables": "*i64", "rows": "*i64", "positions": "*i64", "scale": "fp32"}
    kinds |= {"sums": "*fp32", "tops": "*fp32", "totals": "*fp32", "out": "*bf16"}
    made = compile_for_hopper(attention._split, kinds, fixed | {"wide": False}, **options)
    compile_for_hopper(attention._merge, kinds, fixed)
    assert "async_copy_global_to_local" in made.asm["ttgir"]
    if heads == 128:
        products = re.findall(r"nvidia_mma<.*?warpsPerCTA = (\[.*?\])", made.asm["ttgir"])
        assert products == ["[4, 2]", "[4, 2]"]
        assert made.asm["ptx"].count("wgmma.mma_async") == 40
