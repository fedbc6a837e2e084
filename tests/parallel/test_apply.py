"""What is put before a layer's own methods follows the layer."""

import copy

import pytest
import torch

from dsv3.parallel.apply import compute_copy, prepare
from tests.model.tiny import TINY, random_model


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("precision", ["float32", "fp8"])
def test_a_deep_copy_of_a_prepared_model_runs_its_own_layers(precision, recompute):
    model = compute_copy(random_model(TINY), precision)
    prepare(model, recompute=recompute, compile_layers=False)
    copied, tokens = copy.deepcopy(model), torch.arange(24).view(2, 12)
    start = copied(tokens)
    start.float().square().mean().backward()
    assert all(p.grad is None for p in model.parameters())
    assert copied.model.layers[1].mlp.gate.weight.grad is not None
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight.zero_()
        assert torch.equal(copied(tokens), start)
        assert not torch.equal(model(tokens), start)
