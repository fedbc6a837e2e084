"""Census: the published numbers of three models, names and shapes against the model object, headers and inspection."""

import json
import math
import struct

import pytest
import torch
from safetensors.torch import save_file

from dsv3.model.census import (
    census,
    disk_tensors,
    inspect,
    layout,
    memory_shapes,
    read_headers,
    training_flops_per_token,
)
from dsv3.model.config import ModelConfig, YarnConfig
from dsv3.model.transformer import DeepseekV3

V3 = ModelConfig()
MOONLIGHT = ModelConfig(
    hidden_size=2048, num_hidden_layers=27, num_attention_heads=16, q_lora_rank=None, intermediate_size=11264,
    moe_intermediate_size=1408, n_routed_experts=64, num_experts_per_tok=6, n_shared_experts=2, n_group=1, topk_group=1,
    first_k_dense_replace=1, vocab_size=163840, num_nextn_predict_layers=0, rope_scaling=None, rope_theta=50000.0,
)  # fmt: skip
KIMI_K2 = ModelConfig(
    num_attention_heads=64, n_routed_experts=384, n_group=1, topk_group=1, first_k_dense_replace=1, vocab_size=163840,
    num_nextn_predict_layers=0, rope_theta=50000.0,
    rope_scaling=YarnConfig(factor=32, original_max_position_embeddings=4096, beta_fast=1, mscale_all_dim=1.0),
)  # fmt: skip
TINY = ModelConfig(
    vocab_size=48, hidden_size=16, intermediate_size=24, moe_intermediate_size=8, num_hidden_layers=2,
    num_attention_heads=2, q_lora_rank=12, kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=6,
    n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1, first_k_dense_replace=1, eos_token_id=(1, 2),
)  # fmt: skip


# -- published numbers (spec 1.4, 1.5) --------------------------------------------------------------------------------


def test_parameters_of_v3():
    count = census(V3)
    assert count.total == 671_026_419_200
    assert count.active == 37_552_297_472
    assert count.active_without_embedding == 36_625_618_432
    assert count.active_without_embedding_and_head == 35_698_939_392
    assert count.mtp == 11_610_068_224
    assert count.mtp_stored == 13_463_426_304
    assert count.mtp_active_with_shared == 2_541_458_688
    assert count.mtp_active == 688_100_608
    assert count.in_memory == 671_026_419_200 + 11_610_068_224
    assert sum(count.parts.values()) == count.total
    assert count.parts["attention"] + 61 * 2048 == 61 * 187_107_328  # the table counts the two inner norms as attention
    assert count.parts["routed experts"] == 58 * 256 * 44_040_192
    assert count.parts["embedding"] == count.parts["head"] == 926_679_040


def test_checkpoint_of_v3():
    count = census(V3)
    assert count.fp8.tensors == 91_991
    assert count.fp8.total_elements == 684_531_386_000
    assert count.fp8.elements == {"F8_E4M3": 680_571_043_840, "BF16": 3_918_786_560, "F32": 41_555_600}
    assert count.fp8.total_bytes == 688_574_839_360
    assert count.checkpoint_elements == count.bf16.total_elements == 684_489_845_504
    assert count.bf16.elements["F32"] == 59 * 256
    assert count.scale_elements == 41_540_496


@pytest.mark.parametrize(
    ("config", "total", "active"),
    [(MOONLIGHT, 15_960_110_208, 2_914_776_192), (KIMI_K2, 1_026_408_232_448, 32_861_500_928)],
    ids=["Moonlight", "Kimi-K2"],
)
def test_other_published_models(config, total, active):
    count = census(config)
    assert (count.total, count.active, count.mtp, count.mtp_stored) == (total, active, 0, 0)
    assert count.checkpoint_elements == total


def test_cache_and_flops_of_v3():
    assert census(V3).cache_bytes_per_token == 70_272
    assert census(V3).cache_bytes_per_token_with_mtp == 71_424
    whole, half = training_flops_per_token(V3, 4096, causal=False), training_flops_per_token(V3, 4096, causal=True)
    assert whole == 6 * 36_625_618_432 + 3 * 61 * 2 * 128 * 4096 * (192 + 128)
    assert round(whole / 1e9, 1) == 281.2
    assert round(half / 1e9, 1) == 250.5
    added = training_flops_per_token(V3, 4096, causal=True, mtp=True) - half
    assert added == 6 * (688_100_608 + 926_679_040) + 3 * 128 * 4096 * 320


def test_names_shapes_and_dtypes_of_v3():
    tensors = {name: (list(shape), dtype) for name, shape, dtype in disk_tensors(V3, fp8=True)}
    expert, attention = "model.layers.60.mlp.experts.255.", "model.layers.0.self_attn."
    assert {name: tensors[name] for name in tensors if name.startswith(attention)} == {
        attention + "q_a_proj.weight": ([1536, 7168], "F8_E4M3"),
        attention + "q_a_proj.weight_scale_inv": ([12, 56], "F32"),
        attention + "q_a_layernorm.weight": ([1536], "BF16"),
        attention + "q_b_proj.weight": ([24576, 1536], "F8_E4M3"),
        attention + "q_b_proj.weight_scale_inv": ([192, 12], "F32"),
        attention + "kv_a_proj_with_mqa.weight": ([576, 7168], "F8_E4M3"),
        attention + "kv_a_proj_with_mqa.weight_scale_inv": ([5, 56], "F32"),  # ragged: 576 = 4·128 + 64
        attention + "kv_a_layernorm.weight": ([512], "BF16"),
        attention + "kv_b_proj.weight": ([32768, 512], "F8_E4M3"),
        attention + "kv_b_proj.weight_scale_inv": ([256, 4], "F32"),
        attention + "o_proj.weight": ([7168, 16384], "F8_E4M3"),
        attention + "o_proj.weight_scale_inv": ([56, 128], "F32"),
    }
    assert tensors["model.layers.2.mlp.down_proj.weight"] == ([7168, 18432], "F8_E4M3")
    assert tensors["model.layers.3.mlp.gate.weight"] == ([256, 7168], "BF16")
    assert tensors["model.layers.3.mlp.gate.e_score_correction_bias"] == ([256], "F32")
    assert tensors[expert + "up_proj.weight"] == ([2048, 7168], "F8_E4M3")
    assert tensors[expert + "down_proj.weight_scale_inv"] == ([56, 16], "F32")
    assert tensors["model.layers.61.eh_proj.weight"] == ([7168, 14336], "BF16")
    assert "model.layers.61.eh_proj.weight_scale_inv" not in tensors
    assert tensors["model.layers.61.embed_tokens.weight"] == tensors["model.embed_tokens.weight"]
    assert tensors["model.layers.61.shared_head.head.weight"] == tensors["lm_head.weight"] == ([129280, 7168], "BF16")
    assert "model.layers.2.mlp.gate.weight" not in tensors
    assert "model.layers.3.mlp.gate_proj.weight" not in tensors
    assert not any(name.startswith("model.layers.62") for name in tensors)


# -- the model object -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [V3, MOONLIGHT, KIMI_K2, TINY], ids=["V3", "Moonlight", "Kimi-K2", "tiny"])
def test_the_model_on_the_meta_device_is_what_the_census_says(config):
    with torch.device("meta"):
        state = DeepseekV3(config).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == dict(memory_shapes(config))
    assert sum(tensor.numel() for tensor in state.values()) == census(config).in_memory


@pytest.mark.parametrize("changes", [{}, {"num_nextn_predict_layers": 2}, {"n_shared_experts": 0, "q_lora_rank": None}])
def test_layout_covers_memory_exactly_once(changes):
    config = ModelConfig(**{**{k: getattr(TINY, k) for k in TINY.__dataclass_fields__}, **changes})
    filled = {name: torch.zeros(shape, dtype=torch.int32) for name, shape in memory_shapes(config)}
    for piece in layout(config):
        if not piece.duplicate:
            part = filled[piece.memory][piece.index]
            assert tuple(part.shape) == piece.shape
            part += 1
    assert all((tensor == 1).all() for tensor in filled.values())
    names = [piece.disk for piece in layout(config)]
    assert len(names) == len(set(names))
    assert sum(piece.duplicate for piece in layout(config)) == 2 * config.num_nextn_predict_layers


@pytest.mark.parametrize("config", [V3, MOONLIGHT, KIMI_K2], ids=["V3", "Moonlight", "Kimi-K2"])
def test_the_model_on_the_meta_device_has_the_published_counts(config):
    with torch.device("meta"):
        model = DeepseekV3(config)
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    main = {"V3": 671_026_419_200, "Moonlight": 15_960_110_208, "Kimi-K2": 1_026_408_232_448}
    found = sum(tensor.numel() for tensor in model.state_dict().values())
    mtp = sum(tensor.numel() for layer in model.model.mtp_layers for tensor in layer.state_dict().values())
    assert found - mtp == main["V3" if config is V3 else "Moonlight" if config is MOONLIGHT else "Kimi-K2"]
    assert mtp == (11_610_068_224 if config is V3 else 0)


# -- inspect ----------------------------------------------------------------------------------------------------------

KINDS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F8_E4M3": torch.float8_e4m3fn}


def tensors(storage, config=TINY):
    """Names, shapes and dtypes of a checkpoint stored so."""
    fp8 = storage == "F8_E4M3"
    return list(disk_tensors(config, fp8, "BF16" if fp8 else storage))


def write(folder, storage="BF16", config=TINY, shards=1, **fields):
    """A checkpoint of zeros."""
    (folder / "config.json").write_text(json.dumps(config.to_hf(**fields)))
    named = [(name, torch.zeros(shape, dtype=KINDS[dtype])) for name, shape, dtype in tensors(storage, config)]
    if shards == 1:
        save_file(dict(named), folder / "model.safetensors")
        return folder
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_file(dict(named[i::shards]), folder / file)
        weight_map |= {name: file for name, _ in named[i::shards]}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("storage", ["F32", "BF16", "F16", "F8_E4M3"])
@pytest.mark.parametrize("shards", [1, 3])
def test_inspect_counts_the_headers(tmp_path, storage, shards):
    found = inspect(write(tmp_path, storage, shards=shards, frobnicate=1))
    assert found.source == "headers"
    elements, kinds = dict[str, int](), [kind for _, _, kind in tensors(storage)]
    for _, shape, kind in tensors(storage):
        elements[kind] = elements.get(kind, 0) + math.prod(shape)
    assert found.elements_by_dtype == elements
    assert found.bytes_by_dtype == {kind: KINDS[kind].itemsize * n for kind, n in elements.items()}
    assert found.tensors == len(kinds)
    assert found.census == census(TINY)
    assert found.missing == found.unexpected == found.mismatched == ()
    assert found.unknown_fields == ("frobnicate",)
    assert found.census.cache_bytes_per_token == 2 * 2 * (8 + 4)
    assert found.census.cache_bytes_per_token_with_mtp == 3 * 2 * (8 + 4)


def test_inspect_computes_without_weights(tmp_path):
    path = tmp_path / "config.json"
    fp8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    path.write_text(json.dumps(V3.to_hf(**fp8)))
    for found in (inspect(path), inspect(str(tmp_path))):
        assert found.source == "config"
        assert sum(found.bytes_by_dtype.values()) == 688_574_839_360
        assert found.tensors == 91_991
        assert ("parameters", "total", 671_026_419_200) in found.rows()
        assert ("parameters", "active a token", 37_552_297_472) in found.rows()
        assert ("on disk (computed)", "bytes F8_E4M3", 680_571_043_840) in found.rows()
        assert found.missing == found.unexpected == ()
    path.write_text(json.dumps(TINY.to_hf(torch_dtype="float32")))
    assert inspect(path).bytes_by_dtype == {"F32": 4 * census(TINY).checkpoint_elements}


def test_inspect_json_is_exact(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(V3.to_hf()))
    content = json.loads(json.dumps(inspect(tmp_path).to_json()))
    assert content["census"]["total"] == 671_026_419_200
    assert content["census"]["fp8"]["bytes"]["F8_E4M3"] == 680_571_043_840
    assert content["bytes_by_dtype"]["F32"] == 4 * 59 * 256
    assert content["bytes"] == 2 * 684_489_830_400 + 4 * 59 * 256
    assert content["config"] == V3.to_hf()


def test_inspect_names_what_does_not_fit(tmp_path):
    write(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(TINY.to_hf(first_k_dense_replace=2, vocab_size=50)))
    found = inspect(tmp_path)
    assert "model.layers.1.mlp.gate_proj.weight" in found.missing
    assert "model.layers.1.mlp.experts.3.up_proj.weight" in found.unexpected
    assert "lm_head.weight: [48, 16] in the file, [50, 16] by the config" in found.mismatched
    assert not any("layers.0." in name for name in found.missing + found.unexpected)
    noted = {name: value for section, name, value in found.rows() if section == "to note"}
    assert noted["tensors missing"].startswith("3: model.layers.1.mlp.gate_proj.weight")
    assert set(noted) == {"tensors missing", "tensors unexpected", "tensors of another shape"}


def test_inspect_misses_a_lost_scale_but_not_one_of_a_wide_weight(tmp_path):
    held = {name: torch.zeros(shape, dtype=KINDS[dtype]) for name, shape, dtype in tensors("F8_E4M3")}
    stem = "model.layers.0.self_attn."
    del held[stem + "o_proj.weight_scale_inv"], held[stem + "kv_b_proj.weight_scale_inv"]
    held[stem + "kv_b_proj.weight"] = held[stem + "kv_b_proj.weight"].bfloat16()
    (tmp_path / "config.json").write_text(json.dumps(TINY.to_hf()))
    save_file(held, tmp_path / "model.safetensors")
    assert inspect(tmp_path).missing == (stem + "o_proj.weight_scale_inv",)


# -- damaged headers --------------------------------------------------------------------------------------------------


def pack(header, data=b"", length=None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(begin, end, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"abc", "the file has 3"),
        (pack({}, length=10**9), "its header takes 1000000000 bytes, the file has"),
        (pack(b"{nonsense"), "damaged header"),
        (pack(b"[1, 2]"), "damaged header"),
        (pack({"w": entry(0, 8)}, b"1234"), "w ends at byte 8, the file has 4"),
        (pack({"w": entry(0, 8)}, b"12345678 and more"), "has 17 bytes of data, its header accounts for 8"),
        (pack({"w": entry(0, 8), "v": entry(4, 12)}, bytes(12)), "v begins at byte 4, the tensor before it ends at 8"),
        (pack({"w": entry(0, 12)}, bytes(12)), "w is F32 [2] = 8 bytes, but holds 12"),
        (pack({"w": entry(0, 8, dtype="F31")}, bytes(8)), "w has the unknown dtype 'F31'"),
        (pack({"w": entry(0, 8, (-1, -2))}, bytes(8)), "w is described as"),
        (pack({"w": {"dtype": "F32"}}, bytes(8)), "w is described as"),
        (pack({"w": entry(0, 8, dtype=["F32"])}, bytes(8)), "w"),
    ],
)  # fmt: skip
def test_damaged_header_is_named(tmp_path, content, said):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError) as error:
        read_headers(tmp_path)
    assert said in str(error.value)
    assert "model.safetensors" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_cut_anywhere_is_found(tmp_path):
    write(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    for length in [0, 7, 8, 100, len(whole) // 2, len(whole) - 1]:
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"model\.safetensors"):
            inspect(tmp_path)


def test_index_and_files_must_agree(tmp_path):
    write(tmp_path, shards=2)
    index, first = tmp_path / "model.safetensors.index.json", "model-00001-of-00002.safetensors"
    good = json.loads(index.read_text())["weight_map"]

    def refused(weight_map, said):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(ValueError, match=said):
            read_headers(tmp_path)

    refused(good | {"ghost": first}, "ghost is in .*, but it is not there")
    refused({k: v for k, v in good.items() if k != "lm_head.weight"}, "holds lm_head.weight, but .* says no file")
    refused(good | {"lm_head.weight": "elsewhere.safetensors"}, r"elsewhere\.safetensors is missing")
    refused(good | {"lm_head.weight": "../secret.safetensors"}, "outside its folder")
    refused([1], "is no index")
    index.unlink()
    with pytest.raises(ValueError, match=r"no model\.safetensors\.index\.json"):
        read_headers(tmp_path)
    save_file({"w": torch.zeros(1)}, tmp_path / "model.safetensors")
    index.write_text(json.dumps({"weight_map": good}))
    with pytest.raises(ValueError, match="holds both"):
        read_headers(tmp_path)


def test_a_bare_folder_has_no_headers(tmp_path):
    assert read_headers(tmp_path) == {}
