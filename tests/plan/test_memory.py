"""What a layer leaves for its backward pass, by the plan and as autograd holds it; and how layouts change memory."""

import dataclasses

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from dsv3.kernels import native
from dsv3.model.config import ModelConfig
from dsv3.model.fp8 import fp8_modules
from dsv3.model.transformer import DeepseekV3
from dsv3.plan.memory import layer_bytes, memory_of, under_way
from dsv3.plan.step import Layout
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


def test_micro_batches_under_way_are_dualpipes_table():
    layout = Layout(gpus=16, pipeline=16)
    assert [under_way(layout, rank) for rank in (0, 15)] == [16.0, 1.0]
    assert under_way(dataclasses.replace(layout, schedule="dualpipe"), 3) == 17.0
    assert under_way(Layout(gpus=1), 0) == 1.0
