"""attend_full against the written-out softmax, for value heads narrower, equal and wider than the query's."""

import pytest
import torch

from dsv3.kernels.attention import attend_full, attend_full_reference


@pytest.mark.parametrize("values", [4, 12, 20])
@pytest.mark.parametrize("masked", [False, True])
def test_full(values, masked):
    torch.manual_seed(0)
    q, k = torch.randn(2, 3, 9, 12), torch.randn(2, 3, 9, 12)
    v = torch.randn(2, 3, 9, values)
    mask = torch.ones(9, 9, dtype=torch.bool).tril().triu(-3).expand(2, 1, 9, 9) if masked else None
    got = attend_full(q, k, v, scale=0.3, mask=mask)
    torch.testing.assert_close(got, attend_full_reference(q, k, v, scale=0.3, mask=mask), atol=1e-5, rtol=1e-5)
