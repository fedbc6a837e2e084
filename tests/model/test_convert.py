"""Conversion: every form and back, bit for bit where nothing is cast; cut off and resumed; transformers reads the same."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dsv3.kernels.quant import cast_blocks, dequantize_blocks
from dsv3.model import convert as module
from dsv3.model.census import disk_tensors, inspect, is_fp8_weight
from dsv3.model.config import ModelConfig
from dsv3.model.convert import convert
from dsv3.model.shards import CODES, Form
from dsv3.model.stored import StoredAttention, keep_fp8
from dsv3.model.transformer import DeepseekV3
from dsv3.model.weights import load_model, save_checkpoint, save_model, verify_checkpoint
from tests.kernels.distance import distance
from tests.model.test_weights import WIDE, build, same, tensors_of, write_fp8
from tests.parity.test_model import BASE, YARN

KINDS = {
    "DeepSeek-V3-0324": dict(rope_scaling=YARN, num_nextn_predict_layers=1),
    "Moonlight-16B-A3B": dict(
        q_lora_rank=None, n_group=1, topk_group=1, n_shared_experts=2, routed_scaling_factor=2.446, rms_norm_eps=1e-5
    ),
    "Kimi-K2": dict(n_group=1, topk_group=1, n_routed_experts=12, routed_scaling_factor=2.827, rope_scaling=YARN),
    "GigaChat3-10B-A1.8B": dict(
        q_lora_rank=None, v_head_dim=20, n_group=1, topk_group=1, num_nextn_predict_layers=1, num_experts_per_tok=4
    ),
    "Kanana-2-30B-A3B": dict(q_lora_rank=None, n_group=1, topk_group=1, n_shared_experts=2),
}
# Blocks of 128 that end inside a matrix, in every direction.
SIZES = dict(hidden_size=160, intermediate_size=272, moe_intermediate_size=144, kv_lora_rank=136)


def kind(name: str) -> ModelConfig:
    return ModelConfig(**{**BASE, **SIZES, **KINDS[name]})


def theirs(folder):
    """transformers' logits from the folder; it leaves MTP layers aside."""
    model, said = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not said["missing_keys"]
    with torch.no_grad():
        return model.eval()(torch.arange(24).view(2, 12)).logits


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_through_fp8_and_back(tmp_path, name):
    """float32 -> FP8 -> FP8 (bit for bit) -> float32 = what the codes mean; logits equal transformers' on the last."""
    config = kind(name)
    save_model(build(config), tmp_path / "wide")
    convert(tmp_path / "wide", tmp_path / "fp8", Form(CODES))
    convert(tmp_path / "fp8", tmp_path / "again", Form(None), shard_bytes=200_000)
    convert(tmp_path / "again", tmp_path / "back", Form(torch.float32))
    wide, codes, again, back = (tensors_of(tmp_path / f) for f in ("wide", "fp8", "again", "back"))
    assert {n: list(t.shape) for n, t in codes.items()} == {n: list(s) for n, s, _ in disk_tensors(config, fp8=True)}
    assert same(codes, again)
    for n, tensor in wide.items():
        meant = dequantize_blocks(*cast_blocks(tensor)).float() if is_fp8_weight(n) else tensor
        assert torch.equal(back[n], meant if is_fp8_weight(n) or n.endswith("bias") else tensor.bfloat16().float())
    ours = load_model(tmp_path / "back", dtype="float32")
    torch.testing.assert_close(ours(torch.arange(24).view(2, 12)), theirs(tmp_path / "back"), atol=1e-4, rtol=0)
    assert verify_checkpoint(tmp_path / "again") == len(codes)


@pytest.mark.parametrize("name", KINDS)
def test_kept_in_fp8_is_the_bfloat16_model(tmp_path, name):
    """Codes multiplied as they lie give the dequantised model's logits but for its bfloat16 rounding; saved, they are the
    same bits."""
    config = kind(name)
    save_checkpoint(build(config).state_dict(), config, tmp_path / "fp8", dtype="fp8")
    kept, plain = load_model(tmp_path / "fp8", dtype="fp8"), load_model(tmp_path / "fp8", dtype="bfloat16")
    assert kept.state_dict()["model.layers.0.self_attn.o_proj.weight"].dtype == CODES
    tokens, exact = torch.arange(24).view(2, 12), load_model(tmp_path / "fp8", dtype="float32")

    def error(logits: torch.Tensor) -> float:
        """Of the median token: rounding sends one or two to another expert, and those differ by more than rounding."""
        wanted = exact(tokens)
        return ((logits - wanted).norm(dim=-1) / wanted.norm(dim=-1)).median().item()

    rounding = error(plain(tokens))
    assert error(kept(tokens)) < 1.5 * rounding
    cache = kept.new_cache(2, 16)
    assert error(torch.cat([kept(tokens[:, i : i + 1], cache=cache) for i in range(12)], dim=1)) < 2 * rounding
    save_model(kept, tmp_path / "again")
    assert same(tensors_of(tmp_path / "fp8"), tensors_of(tmp_path / "again"))
    assert (tmp_path / "fp8/config.json").read_bytes() == (tmp_path / "again/config.json").read_bytes()


def test_absorbed_attention_by_heads_of_codes():
    """With V3's 128-value heads each head's codes are multiplied as they lie: equal to the widened matrix but for rounding."""
    config = dataclasses.replace(kind("DeepSeek-V3-0324"), qk_nope_head_dim=128, v_head_dim=256, num_attention_heads=3)
    torch.manual_seed(0)
    with torch.device("meta"):
        model = DeepseekV3(config).bfloat16()
        keep_fp8(model)
    attention = model.to_empty(device="cpu").model.layers[0].self_attn
    assert type(attention) is StoredAttention
    weight = torch.randn(3 * 384, config.kv_lora_rank)
    attention.kv_b_proj.weight, attention.kv_b_proj.weight_scale_inv = cast_blocks(weight)
    q, out = torch.randn(2, 3, 5, 128).bfloat16(), torch.randn(2, 3, 5, config.kv_lora_rank).bfloat16()
    whole = dequantize_blocks(*cast_blocks(weight), torch.float64).unflatten(0, (3, -1))
    assert distance(attention.absorb_keys(q), q.double() @ whole[:, :128]) < 0.003
    assert distance(attention.expand_values(out), out.double() @ whole[:, 128:].mT) < 0.003


def test_a_published_checkpoint_whose_scales_lie_elsewhere(tmp_path):
    means = write_fp8(tmp_path / "m")
    convert(tmp_path / "m", tmp_path / "bf16", Form(torch.bfloat16))
    held = tensors_of(tmp_path / "bf16")
    assert same(held, means)
    content = json.loads((tmp_path / "bf16/config.json").read_text())
    assert "quantization_config" not in content
    convert(tmp_path / "m", tmp_path / "fp8", Form(CODES))
    source = {
        n: t for part in (1, 2) for n, t in load_file(tmp_path / f"m/model-0000{part}-of-00002.safetensors").items()
    }
    assert same(tensors_of(tmp_path / "fp8"), source)
    quantised = json.loads((tmp_path / "fp8/config.json").read_text())["quantization_config"]
    assert quantised["weight_block_size"] == [128, 128]
    kept = load_model(tmp_path / "m", dtype="fp8")
    save_model(kept, tmp_path / "kept")
    assert same(tensors_of(tmp_path / "kept"), source)


@pytest.mark.parametrize("dtype", [torch.float32, CODES])
def test_fused_experts_and_back(tmp_path, dtype):
    config = dataclasses.replace(WIDE, moe_intermediate_size=144)
    save_checkpoint(build(config).state_dict(), config, tmp_path / "split", dtype=dtype)
    convert(tmp_path / "split", tmp_path / "fused", Form(None, fused=True))
    held = tensors_of(tmp_path / "fused")
    assert list(held["model.layers.2.mlp.experts.gate_up_proj"].shape) == [config.n_routed_experts, 288, 160]
    assert not any(".experts.0." in name for name in held)
    found = inspect(tmp_path / "fused")
    assert found.missing == found.unexpected == found.mismatched == ()
    convert(tmp_path / "fused", tmp_path / "again", Form(None))
    assert same(tensors_of(tmp_path / "split"), tensors_of(tmp_path / "again"))
    one, other = (load_model(tmp_path / f, dtype="float32") for f in ("split", "fused"))
    assert same(one.state_dict(), other.state_dict())


def test_cut_off_and_resumed(tmp_path, monkeypatch):
    """The third shard is never begun the first time; the second time the first two are not written again."""
    config = kind("Moonlight-16B-A3B")
    save_model(build(config), tmp_path / "m")
    write, written = module.write_shard, []

    def dying(path, shard, read):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path.name)
        return write(path, shard, read)

    monkeypatch.setattr(module, "write_shard", dying)
    arguments = (tmp_path / "m", tmp_path / "out", Form(torch.bfloat16))
    with pytest.raises(KeyboardInterrupt):
        convert(*arguments, shard_bytes=300_000)
    assert not (tmp_path / "out").exists()
    half = tmp_path / ".out.saving" / written[1]
    half.write_bytes(half.read_bytes()[:-1] + b"?")  # damaged meanwhile: is written again
    first = list(written)
    written.clear()
    monkeypatch.setattr(module, "write_shard", lambda *a: written.append(a[0].name) or write(*a))
    convert(*arguments, shard_bytes=300_000)
    assert first[0] not in written
    assert first[1] in written
    assert verify_checkpoint(tmp_path / "out") == inspect(tmp_path / "m").tensors
    convert(tmp_path / "m", tmp_path / "whole", Form(torch.bfloat16), shard_bytes=300_000)
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "whole").iterdir()
    }


def test_verify_names_the_tensor(tmp_path):
    save_model(build(WIDE), tmp_path / "m")
    file = tmp_path / "m/model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"m: model\.norm\.weight in model\.safetensors of \d+ tensors are damaged"):
        verify_checkpoint(tmp_path / "m")


def test_what_is_refused(tmp_path):
    model = build(WIDE)
    save_model(model, tmp_path / "m")
    with pytest.raises(ValueError, match="is the source itself"):
        convert(tmp_path / "m", tmp_path / "m", Form(None))
    save_model(model, tmp_path / "there")
    with pytest.raises(ValueError, match="exists"):
        convert(tmp_path / "m", tmp_path / "there", Form(None))
    with torch.no_grad():
        model.model.layers[2].mlp.experts.down_proj[1, 3, 4] = torch.inf
    save_model(model, tmp_path / "bad")
    with pytest.raises(
        ValueError, match=r"layers\.2\.mlp\.experts\.1\.down_proj\.weight holds values that are not finite"
    ):
        convert(tmp_path / "bad", tmp_path / "x", Form(CODES))
    assert not (tmp_path / "x").exists()
