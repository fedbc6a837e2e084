"""How far two tensors are apart, as a share of the second's norm."""

from torch import Tensor


def distance(got: Tensor, wanted: Tensor) -> float:
    return ((got.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30)).item()
