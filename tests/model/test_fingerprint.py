"""The same model has one name; training, another dtype or another config give another."""

import dataclasses

import torch

from dsv3.model.fingerprint import fingerprint
from tests.model.tiny import TINY, random_model


def test_equal_models_have_one_name_and_any_step_changes_it():
    model = random_model()
    name = fingerprint(model)
    assert name == fingerprint(random_model())
    assert name != fingerprint(random_model(seed=1))
    assert name != fingerprint(random_model().bfloat16())
    assert name != fingerprint(random_model(dataclasses.replace(TINY, routed_scaling_factor=2.0)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1e-3)
    assert name != fingerprint(model)
