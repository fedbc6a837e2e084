"""What a layer leaves for its backward pass, by the plan and as autograd holds it; and how layouts change memory."""

import functools

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from dsv3.kernels import native
from dsv3.kernels.later import LateLinear, Later
from dsv3.model.config import ModelConfig
from dsv3.model.fp8 import fp8_modules
from dsv3.model.transformer import DeepseekV3
from dsv3.parallel.apply import compute_copy
from dsv3.plan.memory import layer_bytes, memory_of, promised_bytes
from dsv3.plan.step import Layout
from dsv3.plan.timeline import held
from tests.parallel.small import small_trainer

TOKENS = 256
SMALL = ModelConfig(
    vocab_size=512, hidden_size=512, intermediate_size=1280, moe_intermediate_size=128, num_hidden_layers=2,
    num_nextn_predict_layers=0, num_attention_heads=8, q_lora_rank=128, kv_lora_rank=64, qk_nope_head_dim=64,
    qk_rope_head_dim=32, v_head_dim=64, n_routed_experts=32, num_experts_per_tok=8, first_k_dense_replace=1, rope_scaling=None,
)  # fmt: skip


def autograd_holds(model: DeepseekV3, layer: int) -> float:
    """Bytes a token of distinct storages that are no parameter and no table of RoPE's."""
    held: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    x = torch.randn(1, TOKENS, SMALL.hidden_size, dtype=model.lm_head.weight.dtype, requires_grad=True)
    context = model._context(TOKENS, x.device, None, None, True)
    own = [*model.parameters(), *model.buffers(), context.cos, context.sin]
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        model.model.layers[layer](x, context)
    for tensor in own:
        held.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(tensor.untyped_storage().nbytes() for tensor in held.values()) / TOKENS


@pytest.mark.parametrize("layer", [0, 1], ids=["dense", "experts"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_layer_leaves_what_autograd_holds(precision, layer):
    torch.manual_seed(0)
    model = DeepseekV3(SMALL)
    model.init_weights()
    model = model.to(getattr(torch, precision))
    for router in model.routers():
        router.weight.data = router.weight.data.float()
    if precision == "bfloat16" and not native.fits(torch.zeros(16, 16, dtype=torch.bfloat16)):
        pytest.skip("no C kernels for bfloat16 on this CPU: the formula is theirs")
    assert layer_bytes(SMALL, layer, precision, False) == pytest.approx(autograd_holds(model, layer), rel=0.03)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "fp8"])
def test_one_process_holds_the_weights_gradients_and_moments_of_the_plan(precision, tmp_path):
    trainer = small_trainer(tmp_path, precision=precision)
    trainer.step()
    masters = {id(p) for p in trainer.model.parameters()}
    codes = [tensor for module in fp8_modules(trainer.twin) for cast in module.casts() for tensor in cast]
    copies = [p for p in trainer.twin.parameters() if id(p) not in masters] + codes
    moments = [t for state in trainer.optimizer.state.values() for name, t in state.items() if name != "step"]
    planned = memory_of(trainer.model.config, Layout(gpus=1, micro_batch=2), seq_len=24, precision=precision)
    assert sum(t.nbytes for t in [*trainer.model.parameters(), *copies]) == pytest.approx(planned.weights, rel=0.02)
    assert sum(t.nbytes for t in moments) == planned.optimizer
    own = sum(gradient.nbytes for gradient in trainer.workers.grads)
    assert own < planned.gradients <= 2 * own  # on top: the copies' gradients while a micro-batch's backward ends


def test_a_layer_computed_again_leaves_its_input():
    assert layer_bytes(SMALL, 1, "bfloat16", True) == 2 * SMALL.hidden_size
    assert layer_bytes(SMALL, 1, "fp8", False) < 0.6 * layer_bytes(SMALL, 1, "bfloat16", False)


def memory(**changes):
    layout = Layout(**{"gpus": 64, "pipeline": 4, "expert": 8, **changes})
    return memory_of(ModelConfig(), layout, seq_len=4096, precision="bfloat16")


def test_each_means_saves_the_kind_of_memory_that_it_is_for():
    plain = memory()
    assert memory(expert=16).weights < plain.weights
    assert memory(sharding="fsdp").gradients < plain.gradients / 3
    assert memory(recompute=True).activations < plain.activations / 5
    assert memory(gpus=128).optimizer < plain.optimizer


def tensors_of(thing, found):
    """Every tensor that a promise's closures hold, by storage."""
    if isinstance(thing, torch.Tensor):
        found[thing.untyped_storage().data_ptr()] = thing
    elif isinstance(thing, functools.partial):
        tensors_of(thing.args, found)
    elif isinstance(thing, tuple | list):
        for each in thing:
            tensors_of(each, found)
    elif callable(thing):
        for cell in getattr(thing, "__closure__", None) or ():
            tensors_of(cell.cell_contents, found)


@pytest.mark.parametrize("layer", [0, 1], ids=["dense", "experts"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "fp8"])
def test_a_layer_between_the_halves_of_its_backward_holds_what_its_promises_hold(precision, layer):
    if precision == "bfloat16" and not native.fits(torch.zeros(16, 16, dtype=torch.bfloat16)):
        pytest.skip("no C kernels for bfloat16 on this CPU: the formula is theirs")
    torch.manual_seed(0)
    model = DeepseekV3(SMALL)
    model.init_weights()
    model = compute_copy(model, precision)
    for module in model.model.layers.modules():
        if type(module) is nn.Linear:
            module.__class__ = LateLinear
    dtype = torch.float32 if precision == "float32" else torch.bfloat16
    x = torch.randn(1, TOKENS, SMALL.hidden_size, dtype=dtype, requires_grad=True)
    waiting, context = Later(torch.float32), model._context(TOKENS, x.device, None, None, True)
    with waiting.noted():
        y = model.model.layers[layer](x, context)[0]
    y.backward(torch.randn_like(y))
    kept: dict[int, torch.Tensor] = {}
    tensors_of([make for _, make in waiting._promises], kept)
    for tensor in [*model.parameters(), *model.buffers()]:
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    size = sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / TOKENS
    # Tiles along the tokens have one more scale a column than so few tokens fill.
    assert promised_bytes(SMALL, layer, precision) == pytest.approx(size, rel=0.03 if precision == "fp8" else 0.01)


def test_promises_are_in_the_memory_of_the_schedules_that_make_them():
    plain, promised = (memory(schedule=schedule, recompute=True).activations for schedule in ("1f1b", "zero-bubble"))
    assert promised > 2 * plain  # what is computed again leaves little to wait for its backward, and as much behind it
    rank = max(range(4), key=lambda rank: sum(waiting for each in held("zero-bubble", 4)[rank] for _, waiting in each))
    assert any(waiting for moment in held("zero-bubble", 4)[rank] for _, waiting in moment)
    assert not any(waiting for rank in held("1f1b", 4) for moment in rank for _, waiting in moment)
