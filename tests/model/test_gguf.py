"""GGUF: every tensor bit for bit (BF16) or within half a step (Q8_0) on the way out and back, config and tokenizer too."""

import dataclasses

import gguf
import numpy as np
import pytest
import torch

from dsv3.data.tokenizer import BOS, EOS, Tokenizer
from dsv3.model.convert import convert, to_gguf
from dsv3.model.gguf import GgufSource, fields, parts
from dsv3.model.shards import Form
from dsv3.model.weights import load_model, save_checkpoint, save_model
from tests.model.test_convert import KINDS, kind
from tests.model.test_weights import build, same, tensors_of


@pytest.fixture
def tokenizer():
    return Tokenizer.train(["the router sends every token to its experts and none is dropped\n"] * 3, 300)


def plain(name: str):
    """Without MTP, which GGUF cannot hold; vocabulary of the tokenizer."""
    return dataclasses.replace(kind(name), num_nextn_predict_layers=0, vocab_size=300)


@pytest.mark.parametrize("name", KINDS)
def test_bfloat16_and_back_is_bit_exact(tmp_path, tokenizer, name):
    config = plain(name)
    save_checkpoint(build(config).state_dict(), config, tmp_path / "m", dtype=torch.bfloat16, tokenizer=tokenizer)
    to_gguf(tmp_path / "m", tmp_path / "m.gguf")
    convert(tmp_path / "m.gguf", tmp_path / "back", Form(torch.bfloat16))
    before, after = tensors_of(tmp_path / "m"), tensors_of(tmp_path / "back")
    # Router and norms pass through float32: bfloat16 values come back as they were.
    assert same(before, after)
    assert load_model(tmp_path / "back").config == config
    assert Tokenizer.from_file(tmp_path / "back").fingerprint == tokenizer.fingerprint


def test_what_llama_cpp_reads(tmp_path, tokenizer):
    config = plain("DeepSeek-V3-0324")
    model = build(config)
    save_model(model, tmp_path / "m", tokenizer=tokenizer)
    to_gguf(tmp_path / "m", tmp_path / "m.gguf")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    said = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF")}
    assert said["general.architecture"] == "deepseek2"
    assert said["deepseek2.attention.head_count_kv"] == 1
    assert said["deepseek2.attention.key_length"] == config.kv_lora_rank + config.qk_rope_head_dim
    assert said["deepseek2.expert_gating_func"] == 2
    assert said["deepseek2.rope.scaling.yarn_log_multiplier"] == pytest.approx(0.1)
    assert said["tokenizer.ggml.pre"] == "deepseek-v3"
    assert said["tokenizer.ggml.tokens"][:2] == [BOS, EOS]
    assert said["tokenizer.ggml.token_type"][:2] == [3, 3], "control tokens"
    assert len(said["tokenizer.ggml.tokens"]) == config.vocab_size
    held = {tensor.name: tensor for tensor in reader.tensors}
    assert set(held) == {part.name for part in parts(config)}
    state = model.state_dict()
    kv_b = state["model.layers.1.self_attn.kv_b_proj.weight"].unflatten(0, (config.num_attention_heads, -1))
    keys = torch.from_numpy(held["blk.1.attn_k_b.weight"].data.copy()).view(torch.bfloat16)
    assert list(keys.shape) == [config.num_attention_heads, config.kv_lora_rank, config.qk_nope_head_dim]
    assert torch.equal(keys, kv_b[:, : config.qk_nope_head_dim].mT.bfloat16())
    gate = torch.from_numpy(held["blk.2.ffn_gate_exps.weight"].data.copy()).view(torch.bfloat16)
    assert torch.equal(
        gate, state["model.layers.2.mlp.experts.gate_up_proj"][:, : config.moe_intermediate_size].bfloat16()
    )
    bias = held["blk.2.exp_probs_b.bias"].data
    assert np.array_equal(bias, state["model.layers.2.mlp.gate.e_score_correction_bias"].numpy())


def test_q8_0_is_within_half_a_step(tmp_path, tokenizer):
    config = plain("Moonlight-16B-A3B")
    model = build(config)
    save_model(model, tmp_path / "m", tokenizer=tokenizer)
    to_gguf(tmp_path / "m", tmp_path / "m.gguf", "q8_0")
    convert(tmp_path / "m.gguf", tmp_path / "back", Form(torch.float32))
    before, after = tensors_of(tmp_path / "m"), tensors_of(tmp_path / "back")
    for name, tensor in before.items():
        if name.endswith("o_proj.weight") or ".experts." in name:
            width = tensor.shape[-1] // 32 * 32
            if tensor.shape[-1] % 32:
                assert torch.equal(after[name], tensor.bfloat16().float())
                continue
            blocks = tensor[:, :width].unflatten(-1, (-1, 32))
            step = blocks.abs().amax(-1, keepdim=True) / 127
            error = (after[name].unflatten(-1, (-1, 32)) - blocks).abs()
            assert (error <= step * 0.5 + blocks.abs() * 2**-10).all()  # a step's float16 is rounded too


def test_mtp_layers_are_left_out_and_mistakes_named(tmp_path, tokenizer):
    config = dataclasses.replace(kind("DeepSeek-V3-0324"), vocab_size=300)
    save_model(build(config), tmp_path / "m", tokenizer=tokenizer)
    to_gguf(tmp_path / "m", tmp_path / "m.gguf")
    assert GgufSource(tmp_path / "m.gguf").config.num_nextn_predict_layers == 0
    assert fields(config)["block_count"] == config.num_hidden_layers
    with pytest.raises(ValueError, match=r"m\.gguf exists"):
        to_gguf(tmp_path / "m", tmp_path / "m.gguf")
    with pytest.raises(ValueError, match="write one of bf16, q8_0"):
        to_gguf(tmp_path / "m", tmp_path / "x.gguf", "q4")
    (tmp_path / "bad.gguf").write_bytes(b"no")
    with pytest.raises(ValueError, match="no whole GGUF file"):
        GgufSource(tmp_path / "bad.gguf")
    whole = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[:-1000])
    with pytest.raises(ValueError, match=r"cut\.gguf"):
        GgufSource(tmp_path / "cut.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.gguf", "cut.gguf", "m", "m.gguf"]
