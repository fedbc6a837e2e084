"""What a broken conversion looks like: not finite, uniform, certain; a model that predicts is left alone."""

import dataclasses
import warnings

import pytest
import torch

import dsv3
from dsv3.data.tokenizer import Tokenizer
from dsv3.model.selftest import doubts
from dsv3.model.weights import save_model
from tests.model.tiny import TINY, random_model

TOKENS = [3, 1, 4, 1, 5, 9, 2, 6]


def model_of(scale: float):
    """Random, its head `scale` times the size: predictions from uniform to certain."""
    model = random_model()
    with torch.no_grad():
        model.lm_head.weight.mul_(scale)
    return model


def test_an_untrained_model_is_told_so():
    assert "as good as uniform" in (doubts(model_of(0.01), TOKENS) or "")


def test_codes_without_scales_are_certain():
    assert "certain of every token" in (doubts(model_of(4000.0), TOKENS) or "")


def test_not_finite():
    model = model_of(1.0)
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight[0, 0] = torch.nan
    assert "not finite" in (doubts(model, TOKENS) or "")


def test_a_model_that_predicts():
    assert doubts(model_of(8.0), TOKENS) is None


def test_load_warns(tmp_path):
    tokenizer = Tokenizer.train(["the router sends every token to its experts\n"] * 3, 300)
    model = random_model(dataclasses.replace(TINY, vocab_size=300))
    for name, scale in (("uniform", 0.01), ("good", 1000.0)):
        with torch.no_grad():
            model.lm_head.weight.mul_(scale)
        save_model(model, tmp_path / name, tokenizer=tokenizer)
    with pytest.warns(UserWarning, match=r"uniform: its predictions .* untrained, or its conversion is broken"):
        dsv3.load(tmp_path / "uniform", dtype="float32")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dsv3.load(tmp_path / "good", dtype="float32")
