"""Building the C kernels: cached by content, absent without a compiler and said so, left out on other machines."""

import torch

from dsv3.kernels import native


def test_fits_only_what_the_kernels_take(monkeypatch):
    monkeypatch.setattr(native, "library", lambda: object())
    good = torch.zeros(2, 32, dtype=torch.bfloat16)
    assert native.fits(good, good)
    assert not native.fits(good, good.float())
    assert not native.fits(torch.zeros(2, 24, dtype=torch.bfloat16))
    assert not native.fits(torch.zeros(0, 32, dtype=torch.bfloat16))
    assert not native.fits(good.to("meta"))


def test_no_library_on_another_cpu(monkeypatch):
    monkeypatch.setattr(native, "_cpu", lambda: "flags : avx2")
    assert native.library.__wrapped__() is None


def test_says_so_without_a_compiler(monkeypatch, recwarn):
    monkeypatch.setattr(native, "_cpu", lambda: "flags : avx512_bf16")
    monkeypatch.setattr(native.platform, "system", lambda: "Linux")
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    assert native.library.__wrapped__() is None
    assert "no C compiler" in str(recwarn.pop().message)


def test_says_so_when_the_compiler_fails(monkeypatch, recwarn, tmp_path):
    monkeypatch.setattr(native, "_cpu", lambda: "flags : avx512_bf16")
    monkeypatch.setattr(native.platform, "system", lambda: "Linux")
    monkeypatch.setattr(native.shutil, "which", lambda name: "false")
    monkeypatch.setattr(native, "_cache_folder", lambda: tmp_path)
    assert native.library.__wrapped__() is None
    assert "could not be built" in str(recwarn.pop().message)
    assert list(tmp_path.iterdir()) == [], "nothing half-built is left"
