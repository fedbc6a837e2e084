"""Grouped GEMM against gathered matrices, and its gradients; experts without a token included."""

import pytest
import torch

from dsv3.kernels.gemm import grouped_linear, grouped_linear_reference


@pytest.mark.parametrize("counts", [[3, 0, 5, 1], [0, 0, 9, 0], [9, 0, 0, 0]])
def test_forward_and_gradients(counts):
    torch.manual_seed(0)
    counts = torch.tensor(counts)
    x = torch.randn(9, 6, dtype=torch.float64, requires_grad=True)
    w = torch.randn(4, 5, 6, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(grouped_linear(x, w, counts), grouped_linear_reference(x, w, counts))
    dy = torch.randn(9, 5, dtype=torch.float64)
    got = torch.autograd.grad(grouped_linear(x, w, counts), (x, w), dy)
    wanted = torch.autograd.grad(grouped_linear_reference(x, w, counts), (x, w), dy)
    for a, b in zip(got, wanted):
        torch.testing.assert_close(a, b)
    assert not got[1][counts == 0].any()


def test_registered_for_the_compiler():
    args = (torch.randn(4, 3, requires_grad=True), torch.randn(2, 5, 3, requires_grad=True), torch.tensor([1, 3]))
    torch.library.opcheck(
        grouped_linear, args, test_utils=("test_schema", "test_faketensor", "test_autograd_registration")
    )


def test_counts_must_cover_the_rows():
    with pytest.raises(AssertionError, match="counts sum to 3, rows are 4"):
        grouped_linear(torch.randn(4, 3), torch.randn(2, 5, 3), torch.tensor([1, 2]))
