"""What the GPU benchmark measures of decoding runs on a CPU, and what it checks holds."""

import torch

from bench import gpu, kernels


def test_attention_over_pages_is_right_and_reported_in_both_units():
    bench = kernels.prepare(torch.device("cpu"), seconds=0.0)
    moved, computed = kernels.latent(bench, 3, 256, 4, 32, 16)
    assert moved.error <= kernels.limit(moved)
    assert (moved.unit, computed.unit) == ("GB/s", "TFLOP/s")
    read = 2 * (3 * 256 * 48 + 3 * 4 * 80)
    assert abs(moved.rate * 1e9 * moved.milliseconds / 1e3 - read) < 1e-6 * read


def test_a_decode_step_of_every_kind(monkeypatch):
    monkeypatch.setattr(gpu, "MODEL", gpu.dataclasses.replace(gpu.MODEL, num_hidden_layers=2))
    found = gpu.decode_step("cpu", small=True)
    assert list(found) == [f"decode {n} x 64, {kind}: ms" for n in (1, 2) for kind in ("forward", "rows")]
    assert all(ms > 0 for ms in found.values())
