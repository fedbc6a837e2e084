"""The benchmark of the kernels runs, and what it checks holds, on shapes of a second."""

import torch

from bench import gpu, kernels


def test_every_kernel_is_right_and_reported(tmp_path):
    bench = kernels.prepare(torch.device("cpu"), seconds=0.0)
    results = (
        kernels.casts(bench, 300, 272)
        + kernels.products(bench, 150, 272, 144)
        + kernels.grouped(bench, 3, 160, 144, 272)
    )
    assert all(result.error <= kernels.limit(result) for result in results)
    assert {"cast_tiles", "retile", "fp8 dgrad", "fp8 grouped wgrad"} <= {result.kernel for result in results}
    assert all(result.rate > 0 for result in results)
    assert kernels.markdown(results).count("\n") == len(results) + 2


def test_a_training_step_of_the_gpu_bench():
    step = gpu.training_step("cpu", small=True)
    assert step["fp8 seconds"] > 0
    assert step["parameters"] > 1e6
