"""Adapters by role, on bases of every precision: counted, without effect until trained, merged without a change of the loss."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from dsv3.kernels.moe import sort_by_expert
from dsv3.kernels.quant import cast_blocks, dequantize_blocks
from dsv3.model.lora import (
    ADAPTER_FILE,
    LoraConfig,
    LoraExperts,
    LoraLinear,
    adapter_count,
    add_lora,
    has_lora,
    load_adapters,
    merge_lora,
    merged_state,
    save_adapters,
)
from dsv3.model.stored import StoredExperts, StoredLinear
from dsv3.model.transformer import Attention, DeepseekV3, Experts
from dsv3.model.weights import load_model, save_model
from dsv3.parallel.apply import compute_copy, refresh_copy
from tests.kernels.distance import distance
from tests.model.test_fp8 import SMALL
from tests.model.tiny import TINY, random_model

TOKENS = torch.arange(40).view(2, 20)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint of the small model, in bfloat16."""
    path = tmp_path_factory.mktemp("lora") / "model"
    save_model(random_model(SMALL).to(torch.bfloat16), path)
    return path


def disturb(model: nn.Module, size: float = 0.02) -> None:
    """What training would do to the adapters."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn(parameter.shape, generator=generator) * size


def loss_of(model: DeepseekV3) -> torch.Tensor:
    hidden = model.hidden(TOKENS % model.config.vocab_size, depth=1)
    logits = [model.lm_head(state).float() for state in (hidden.main, *hidden.mtp)]
    return sum(torch.nn.functional.cross_entropy(x.flatten(0, 1), torch.arange(38) % 50) for x in logits)  # type: ignore[return-value]


# -- which -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [TINY, dataclasses.replace(TINY, q_lora_rank=None, n_shared_experts=2)])
@pytest.mark.parametrize(
    "roles", [("attn",), ("shared",), ("routed",), ("dense",), ("attn", "shared", "routed", "dense")]
)
def test_each_role_has_as_many_parameters_as_the_config_says(config, roles):
    lora = LoraConfig(rank=3, roles=roles)
    model = random_model(config)
    counts = add_lora(model, lora)
    assert counts == adapter_count(config, lora)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == sum(counts.values())
    assert all(any(part in name for part in ("lora_a", "lora_b", "_a", "_b")) for name in trained)
    assert not any(".gate." in name or "eh_proj" in name or "lm_head" in name or "embed" in name for name in trained)
    in_mtp = any(name.startswith("model.layers.3.") for name in trained)
    assert in_mtp == (roles != ("dense",))


def test_counts_of_the_published_model():
    """671B, rank 16: the sizes of the report's tables multiplied out by hand."""
    from dsv3.model.config import ModelConfig

    counts = adapter_count(ModelConfig(), LoraConfig(rank=16))
    attention = (7168 + 1536) + (1536 + 128 * 192) + (7168 + 576) + (512 + 128 * 256) + (128 * 128 + 7168)
    assert counts["attn"] == 62 * 16 * attention
    assert counts["shared"] == 59 * 16 * 3 * (7168 + 2048)
    assert counts["routed"] == 59 * 256 * 16 * (7168 + 4096 + 2048 + 7168)


def test_bad_configs_say_what_to_do():
    with pytest.raises(ValueError, match=r"roles \['router'\] must be some of .*: the router is never adapted"):
        LoraConfig(roles=("router",))
    with pytest.raises(ValueError, match="rank 0 must be at least 1"):
        LoraConfig(rank=0)
    with pytest.raises(ValueError, match="the model has no dense matrices"):
        add_lora(random_model(dataclasses.replace(TINY, first_k_dense_replace=0)), LoraConfig(roles=("attn", "dense")))
    model = random_model()
    add_lora(model, LoraConfig(rank=2))
    with pytest.raises(ValueError, match="has adapters already"):
        add_lora(model, LoraConfig(rank=2))


# -- what they compute -------------------------------------------------------------------------------------------------


def test_untrained_adapters_change_nothing():
    plain, model = random_model(), random_model()
    add_lora(model, LoraConfig(rank=4, roles=("attn", "shared", "routed", "dense")))
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS), plain(TOKENS), atol=1e-5, rtol=1e-5)


def test_loss_and_gradients_are_those_of_the_merged_model():
    """float32: the adapters' gradients against those of a plain model through W + s B A, by the chain rule."""
    model = random_model()
    config = LoraConfig(rank=4, alpha=12, roles=("attn", "shared", "routed", "dense"))
    add_lora(model, config)
    disturb(model)
    plain = merge_lora(model)
    assert not has_lora(plain)
    loss, merged = loss_of(model), loss_of(plain)
    assert loss.item() == pytest.approx(merged.item(), rel=1e-6)
    loss.backward()
    merged.backward()
    for path, module in model.named_modules():
        if isinstance(module, LoraLinear):
            whole = plain.get_submodule(path).weight.grad * config.scale
            torch.testing.assert_close(module.lora_a.grad, module.lora_b.T @ whole, atol=1e-5, rtol=1e-3)
            torch.testing.assert_close(module.lora_b.grad, whole @ module.lora_a.T, atol=1e-5, rtol=1e-3)
        elif isinstance(module, LoraExperts):
            whole = plain.get_submodule(path).gate_up_proj.grad * config.scale
            torch.testing.assert_close(module.gate_up_a.grad, module.gate_up_b.mT @ whole, atol=1e-5, rtol=1e-3)
            whole = plain.get_submodule(path).down_proj.grad * config.scale
            torch.testing.assert_close(module.down_b.grad, whole @ module.down_a.mT, atol=1e-5, rtol=1e-3)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@pytest.mark.parametrize("roles", [("attn", "shared", "routed"), ("shared",), ("attn",)])
def test_a_base_in_fp8_gives_the_gradients_of_its_dequantised_twin(saved, roles):
    """The base's codes widened into a bfloat16 base: the same values, multiplied in another order."""
    config = LoraConfig(rank=4, roles=roles)
    kept, wide = load_model(saved, dtype="fp8"), load_model(saved, dtype="bfloat16")
    with torch.no_grad():
        for name, tensor in merged_state(kept).items():
            wide.state_dict()[name].copy_(tensor)
    grads = []
    for model in (kept, wide):
        add_lora(model, config)
        disturb(model)
        twin = compute_copy(model, "bfloat16")
        loss = loss_of(twin)
        loss.backward()
        grads.append((loss.item(), {n: p.grad for n, p in twin.named_parameters() if p.requires_grad}))
    assert grads[0][0] == pytest.approx(grads[1][0], rel=5e-3)
    here, there = (torch.cat([g.float().flatten() for g in found.values()]) for _, found in grads)
    # bfloat16 activations in another order, and a router that sends a token elsewhere; the products alone are below
    assert distance(here, there) < 0.35
    stored = [m for m in kept.modules() if isinstance(m, StoredLinear | StoredExperts)]
    assert stored
    assert all(t.dtype != torch.bfloat16 for m in stored for t in m.buffers())


def test_a_stored_product_passes_gradients_as_its_widened_matrix_would(saved):
    kept = load_model(saved, dtype="fp8")
    add_lora(kept, LoraConfig(rank=2, roles=("routed",)))
    module = kept.get_submodule("model.layers.1.self_attn.o_proj")
    x = torch.randn(5, module.weight.shape[1]).bfloat16().requires_grad_()
    dy = torch.randn(5, module.weight.shape[0]).bfloat16()
    module(x).backward(dy)
    wanted = dy.float() @ dequantize_blocks(module.weight, module.weight_scale_inv, torch.float32)
    assert distance(x.grad, wanted) < 4e-3


def test_experts_on_fp8_against_experts_on_the_same_values(saved):
    kept = load_model(saved, dtype="fp8")
    base = kept.get_submodule("model.layers.1.mlp.experts")
    wide = Experts(SMALL)
    with torch.no_grad():
        for name in ("gate_up_proj", "down_proj"):
            getattr(wide, name).copy_(merged_state(kept)[f"model.layers.1.mlp.experts.{name}"])
    x, dy = torch.randn(2, 12, SMALL.hidden_size, generator=torch.Generator().manual_seed(0)).bfloat16()
    weights, indices = torch.rand(12, 3), torch.rand(12, 8).argsort(1)[:, :3]
    found = []
    for experts in (base, wide.bfloat16().requires_grad_(False)):
        module = LoraExperts(experts, LoraConfig(rank=4), torch.Generator().manual_seed(1))
        disturb(module, 0.1)
        module.gate_up_a.data, module.gate_up_b.data = module.gate_up_a.bfloat16(), module.gate_up_b.bfloat16()
        module.down_a.data, module.down_b.data = module.down_a.bfloat16(), module.down_b.bfloat16()
        rows = x.clone().requires_grad_()
        y = module(rows, weights, *sort_by_expert(indices, 8))
        y.backward(dy)
        found.append([y, rows.grad, *(p.grad for p in module.parameters() if p.requires_grad)])
    assert len(found[0]) == 6
    for a, b in zip(*found, strict=True):
        assert distance(a.float(), b.float()) < 0.01


# -- merging -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "fp8"])
def test_the_loss_after_merging_is_the_loss_before(saved, tmp_path, dtype):
    """In float32 they are equal (above). In bfloat16 W + s B A is rounded once more, 2^-9 of a weight at most, and summed in
    another order: on these random weights as far apart as any two orders (2% of a state, a token routed otherwise), which is
    0.04 of a loss of 10. What the adapters themselves do is 0.7."""
    model = load_model(saved, dtype=dtype)
    with torch.no_grad():
        without = loss_of(model).item()
    config = LoraConfig(rank=4)
    add_lora(model, config)
    disturb(model, 0.05)
    with torch.no_grad():
        before = loss_of(compute_copy(model, "bfloat16")).item()
        after = loss_of(merge_lora(model)).item()
    assert abs(before - without) > 0.5
    assert after == pytest.approx(before, abs=0.06)
    from dsv3.model.weights import save_checkpoint

    save_checkpoint(merged_state(model), model.config, tmp_path / "merged")
    opened = load_model(tmp_path / "merged")
    assert {type(m) for m in opened.modules()} == {type(m) for m in load_model(saved).modules()}
    with torch.no_grad():
        assert loss_of(opened).item() == after


def test_merging_what_the_adapter_changed_into_fp8_would_lose_it(saved):
    """Why merged weights are wide: changes of 1% of each weight do not survive e4m3's steps of 6% and more."""
    torch.manual_seed(0)
    codes = load_model(saved, dtype="fp8").get_submodule("model.layers.0.self_attn.o_proj")
    wide = dequantize_blocks(codes.weight, codes.weight_scale_inv, torch.float32)
    change = wide * 0.01 * torch.where(torch.rand(wide.shape) < 0.5, 1.0, -1.0)
    kept = dequantize_blocks(*cast_blocks(wide + change), torch.float32) - wide
    assert ((kept - change).norm() / change.norm()) > 0.9


def test_the_absorbed_form_of_attention_has_the_adapter_too(saved):
    """Generation with adapters on, before they are merged: the cache's form of attention against the whole forward."""
    for dtype in ("float32", "fp8"):
        model = load_model(saved, dtype=dtype)
        add_lora(model, LoraConfig(rank=4, roles=("attn",)))
        disturb(model, 0.1)
        model = compute_copy(model, "float32" if dtype == "float32" else "bfloat16")
        assert all(type(m) is Attention for m in model.modules() if isinstance(m, Attention))
        with torch.no_grad():
            whole = model(TOKENS)
            cache = model.new_cache(2, 20)
            model(TOKENS[:, :19], cache=cache)
            last = model(TOKENS[:, 19:], cache=cache)
        assert distance(last[:, 0].float(), whole[:, 19].float()) < (1e-4 if dtype == "float32" else 0.15)


# -- the compute copy, and the disk ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "fp8"])
def test_the_copy_shares_the_frozen_base_and_follows_the_adapters(saved, dtype):
    model = load_model(saved, dtype=dtype)
    add_lora(model, LoraConfig(rank=2))
    twin = compute_copy(model, "bfloat16")
    own = {id(t) for t in (*model.parameters(), *model.buffers())}
    for name, tensor in (*twin.named_parameters(), *twin.named_buffers()):
        adapter = tensor.dtype == torch.bfloat16 and tensor.requires_grad
        assert (id(tensor) in own) != adapter, name
    disturb(model)
    refresh_copy(twin, model)
    a = model.get_submodule("model.layers.1.mlp.experts").gate_up_b
    b = twin.get_submodule("model.layers.1.mlp.experts").gate_up_b
    assert torch.equal(a.bfloat16(), b)
    assert b.requires_grad


def test_saved_adapters_come_back_on_a_fresh_base(saved, tmp_path):
    model = load_model(saved)
    config = LoraConfig(rank=3, alpha=7.0, roles=("attn", "routed"))
    add_lora(model, config)
    disturb(model)
    model.routers()[0].e_score_correction_bias += 0.25
    save_adapters(model, config, tmp_path)
    fresh = load_model(saved)
    assert load_adapters(fresh, tmp_path) == config
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, fresh.state_dict()[name]), name
    saved_names = load_file(tmp_path / ADAPTER_FILE)
    assert sum(t.numel() for n, t in saved_names.items() if "bias" not in n) == sum(
        adapter_count(SMALL, config).values()
    )


def test_adapters_of_another_model_are_refused(saved, tmp_path):
    with pytest.raises(ValueError, match=r"adapter\.safetensors does not exist"):
        load_adapters(random_model(), tmp_path)
    with pytest.raises(ValueError, match="no adapters to save"):
        save_adapters(random_model(), LoraConfig(), tmp_path)
    model = random_model()
    add_lora(model, LoraConfig(rank=2))
    save_adapters(model, LoraConfig(rank=2), tmp_path)
    with pytest.raises(
        ValueError, match=r"is \[2, 32\] there and \[2, 160\] in the model: they belong to another model"
    ):
        load_adapters(load_model(saved), tmp_path)
    (tmp_path / ADAPTER_FILE).write_bytes(b"torn")
    with pytest.raises(ValueError, match="is damaged"):
        load_adapters(random_model(), tmp_path)
