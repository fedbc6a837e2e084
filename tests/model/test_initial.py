"""Initial weights: of the whole model and of any part of it the same bits."""

import dataclasses

import pytest
import torch

from dsv3.model.initial import fill_initial
from dsv3.model.transformer import DeepseekV3
from tests.model.tiny import TINY

EXPERTS = "model.layers.1.mlp.experts.down_proj"


def filled(shape: tuple[int, ...], name: str, **more) -> torch.Tensor:
    tensor = torch.empty(shape, dtype=more.pop("dtype", torch.float32))
    fill_initial(tensor, name, **{"seed": 0, "std": 0.02, **more})
    return tensor


def test_a_models_weights_are_its_seeds_and_no_other_generators() -> None:
    models = [DeepseekV3(TINY) for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2)):
        model.init_weights(seed)
        torch.rand(7)  # nothing is drawn from the global stream, nor from where it stands
    first, same, other = (model.state_dict() for model in models)
    assert all(torch.equal(first[name], same[name]) for name in first)
    drawn = [name for name, tensor in first.items() if tensor.dim() > 1]
    assert not any(torch.equal(first[name], other[name]) for name in drawn)
    assert len({tuple(first[name].flatten()[:4].tolist()) for name in drawn}) == len(drawn)


def test_matrices_have_the_configs_spread_and_norms_are_ones() -> None:
    model = DeepseekV3(dataclasses.replace(TINY, initializer_range=0.006))
    model.init_weights()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert bool((parameter == 1).all()), name
        else:
            few = 4 / parameter.numel() ** 0.5  # four standard errors of a standard deviation, and more
            assert parameter.std().item() == pytest.approx(0.006, rel=few), name
            assert parameter.mean().item() == pytest.approx(0.0, abs=0.006 * few), name
    assert all(bool((router.e_score_correction_bias == 0).all()) for router in model.routers())


def test_some_of_the_experts_are_those_of_all() -> None:
    whole = filled((8, 5, 6), EXPERTS)
    assert torch.equal(filled((3, 5, 6), EXPERTS, first=4), whole[4:7])
    assert not torch.equal(whole[0], whole[1])


def test_narrower_weights_are_the_float32_ones_rounded() -> None:
    for name, shape in (("lm_head.weight", (9, 8)), (EXPERTS, (2, 3, 4))):
        assert torch.equal(filled(shape, name, dtype=torch.bfloat16), filled(shape, name).bfloat16())


def test_a_vector_of_no_norm_is_refused() -> None:
    with pytest.raises(ValueError, match=r"q_proj.bias \(4,\)"):
        filled((4,), "model.layers.0.self_attn.q_proj.bias")
