"""ModelConfig: from and to every dialect of config.json, what is refused and how it is said."""

import dataclasses
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DeepseekV3Config

from dsv3.model.config import ModelConfig, YarnConfig

V3 = {  # the published config.json, every field (spec 1.1)
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "aux_loss_alpha": 0.001,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "pretraining_tp": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 129280,
}
MOONLIGHT = V3 | {
    "hidden_size": 2048, "num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16,
    "q_lora_rank": None, "intermediate_size": 11264, "moe_intermediate_size": 1408, "n_routed_experts": 64,
    "num_experts_per_tok": 6, "n_shared_experts": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.446, "rope_theta": 50000, "rope_scaling": None, "rms_norm_eps": 1e-5,
    "vocab_size": 163840, "bos_token_id": 163584, "eos_token_id": 163586, "num_nextn_predict_layers": 0,
    "max_position_embeddings": 8192,
}  # fmt: skip
KIMI_K2 = V3 | {
    "model_type": "kimi_k2", "num_attention_heads": 64, "num_key_value_heads": 64, "n_routed_experts": 384,
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "routed_scaling_factor": 2.827, "rope_theta": 50000,
    "rope_scaling": V3["rope_scaling"] | {"factor": 32, "beta_fast": 1}, "vocab_size": 163840,
    "num_nextn_predict_layers": 0, "max_position_embeddings": 131072,
}  # fmt: skip
GIGACHAT_LIKE = MOONLIGHT | {
    "num_hidden_layers": 26, "v_head_dim": 192, "n_shared_experts": 1, "num_nextn_predict_layers": 1,
    "num_experts_per_tok": 4, "vocab_size": 128256, "eos_token_id": [1, 2], "bos_token_id": 1,
}  # fmt: skip
PUBLISHED = {"V3": V3, "Moonlight": MOONLIGHT, "Kimi-K2": KIMI_K2, "GigaChat-like": GIGACHAT_LIKE}
VARIANTS = {
    "all V3": {},
    "no q rank": {"q_lora_rank": None},
    "one group": {"n_group": 1, "topk_group": 1},
    "no dense layer": {"first_k_dense_replace": 0},
    "no expert layer": {"first_k_dense_replace": 61},
    "two shared": {"n_shared_experts": 2},
    "none shared": {"n_shared_experts": 0},
    "two MTP layers": {"num_nextn_predict_layers": 2},
    "no MTP": {"num_nextn_predict_layers": 0},
    "no YaRN": {"rope_scaling": None, "rope_theta": 50000.0},
    "unequal temperatures": {
        "rope_scaling": YarnConfig(factor=8, original_max_position_embeddings=512, mscale=0.7, mscale_all_dim=0.5)
    },
    "several ends": {"eos_token_id": (1, 2), "pad_token_id": 2},
}  # fmt: skip


@pytest.mark.parametrize("content", PUBLISHED.values(), ids=PUBLISHED.keys())
def test_published_config_survives_the_round_trip(content):
    config = ModelConfig.from_hf(content)
    written = config.to_hf()
    architecture_name = {"model_type"}  # Kimi's own name for the same architecture
    assert {k: v for k, v in written.items() if k in content and k not in architecture_name} == {
        k: v for k, v in content.items() if k not in architecture_name
    }
    assert ModelConfig.from_hf(written) == config
    assert ModelConfig.from_hf(written).extra == config.extra
    json.dumps(written)


def test_defaults_are_v3():
    assert ModelConfig.from_hf(V3) == ModelConfig()
    assert ModelConfig().num_layers_with_mtp == 62
    assert [ModelConfig().is_moe(layer) for layer in (0, 2, 3, 60, 61)] == [False, False, True, True, True]


def test_reads_a_file_and_a_folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(V3))
    assert ModelConfig.from_hf(tmp_path) == ModelConfig.from_hf(str(tmp_path / "config.json")) == ModelConfig()


def test_unknown_fields_are_kept_named_and_written_back():
    config = ModelConfig.from_hf(V3 | {"frobnicate": {"deep": [1, None]}})
    assert config.unknown_fields == (
        "auto_map", "aux_loss_alpha", "ep_size", "frobnicate", "pretraining_tp", "seq_aux", "transformers_version",
    )  # fmt: skip
    assert config.to_hf()["frobnicate"] == {"deep": [1, None]}
    assert config.to_hf()["quantization_config"] == V3["quantization_config"]
    assert ModelConfig.from_hf(ModelConfig().to_hf()).unknown_fields == ()


def test_unknown_field_of_our_own_is_an_error():
    with pytest.raises(TypeError, match="frobnicate"):
        ModelConfig(frobnicate=1)
    with pytest.raises(TypeError):
        ModelConfig(129280)  # keyword only
    with pytest.raises(dataclasses.FrozenInstanceError):
        ModelConfig().hidden_size = 1


def test_configs_that_differ_in_unknown_fields_alone_are_equal_and_hash_alike():
    a, b = ModelConfig.from_hf(V3), ModelConfig.from_hf(V3 | {"torch_dtype": "float32"})
    assert a == b
    assert hash(a) == hash(b)
    assert b.to_hf()["torch_dtype"] == "float32"


# -- transformers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_transformers_reads_what_we_write(changes):
    config = ModelConfig(**changes)
    theirs = DeepseekV3Config(**config.to_hf())
    for f in dataclasses.fields(config):
        if f.name in ("extra", "rope_theta", "rope_scaling"):
            continue
        ours = getattr(config, f.name)
        assert getattr(theirs, f.name) == (list(ours) if isinstance(ours, tuple) else ours), f.name
    assert theirs.qk_head_dim == config.qk_head_dim
    rope = theirs.rope_parameters
    assert rope["rope_theta"] == config.rope_theta
    assert rope["rope_type"] == ("default" if config.rope_scaling is None else "yarn")
    if config.rope_scaling is not None:
        assert {k: rope[k] for k in dataclasses.asdict(config.rope_scaling)} == dataclasses.asdict(config.rope_scaling)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_we_read_what_transformers_writes(changes, tmp_path):
    config = ModelConfig(**changes)
    theirs = DeepseekV3Config(**config.to_hf())
    content = theirs.to_dict()
    assert "rope_parameters" in content
    assert "rope_scaling" not in content
    assert ModelConfig.from_hf(content) == config
    theirs.save_pretrained(tmp_path)
    assert ModelConfig.from_hf(tmp_path) == config


def test_bare_transformers_config_means_what_it_means_there():
    config = ModelConfig.from_hf(DeepseekV3Config().to_dict())
    assert config.rope_scaling is None
    assert config.max_position_embeddings == 4096
    assert config.softmax_scale == 192**-0.5
    assert ModelConfig.from_hf({}).max_position_embeddings == 4096
    assert ModelConfig.from_hf({}).num_nextn_predict_layers == 0


def test_aliases_of_transformers():
    content = {k: v for k, v in V3.items() if k not in ("num_nextn_predict_layers", "n_routed_experts", "torch_dtype")}
    config = ModelConfig.from_hf(content | {"num_mtp_layers": 2, "num_local_experts": 128, "dtype": "float32"})
    assert (config.num_nextn_predict_layers, config.n_routed_experts) == (2, 128)
    assert config.to_hf()["torch_dtype"] == "float32"


def test_key_value_heads_may_be_left_out_or_null():
    without = {k: v for k, v in V3.items() if k not in ("num_key_value_heads", "num_attention_heads")}
    assert ModelConfig.from_hf(without) == ModelConfig()
    assert ModelConfig.from_hf(without | {"num_key_value_heads": 128}) == ModelConfig()
    assert ModelConfig.from_hf(V3 | {"num_key_value_heads": None}) == ModelConfig()


# -- derived ----------------------------------------------------------------------------------------------------------


def test_softmax_scale():
    assert ModelConfig().softmax_scale == pytest.approx(0.1352337788608801, abs=1e-12)
    assert ModelConfig(rope_scaling=None).softmax_scale == pytest.approx(0.07216878364870322, abs=1e-12)
    kimi = ModelConfig.from_hf(KIMI_K2)
    assert kimi.softmax_scale == pytest.approx(192**-0.5 * (0.1 * math.log(32) + 1) ** 2, abs=1e-12)


@pytest.mark.parametrize(("eos", "ids"), [(None, ()), (1, (1,)), ([5, 7], (5, 7))])
def test_end_tokens(eos, ids):
    config = ModelConfig.from_hf(V3 | {"eos_token_id": eos})
    assert config.eos_token_ids == ids
    assert config.to_hf()["eos_token_id"] == eos


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"n_routed_experts": 100, "n_group": 8}, ["n_routed_experts 100", "n_group 8", "104"]),
        ({"n_routed_experts": 8, "n_group": 8}, ["n_routed_experts 8", "n_group 8", "at least 2"]),
        ({"topk_group": 9}, ["topk_group 9", "n_group 8"]),
        ({"num_experts_per_tok": 200}, ["num_experts_per_tok 200", "128 experts of 4 groups", "raise topk_group"]),
        ({"qk_rope_head_dim": 63}, ["qk_rope_head_dim 63", "even"]),
        ({"hidden_size": 0}, ["hidden_size is 0", "positive"]),
        ({"n_group": 0}, ["n_group is 0", "positive"]),
        ({"num_nextn_predict_layers": -1}, ["num_nextn_predict_layers is -1", "negative"]),
        ({"q_lora_rank": 0}, ["q_lora_rank is 0", "null"]),
        ({"tie_word_embeddings": True}, ["tie_word_embeddings", "set false"]),
        ({"hidden_size": "7168"}, ["hidden_size is '7168'", "int"]),
        ({"vocab_size": True}, ["vocab_size is True", "int"]),
        ({"n_shared_experts": None}, ["n_shared_experts is None", "int"]),
        ({"norm_topk_prob": 1}, ["norm_topk_prob is 1", "bool"]),
    ],
)  # fmt: skip
def test_sizes_that_do_not_fit(changes, said):
    for build in (lambda: ModelConfig(**changes), lambda: ModelConfig.from_hf(V3 | changes)):
        with pytest.raises(ValueError) as error:
            build()
        message = str(error.value)
        assert "\n" not in message
        assert all(part in message for part in said), message


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"scoring_func": "softmax"}, "scoring_func is 'softmax', DeepSeek-V3 has 'sigmoid'"),
        ({"topk_method": "greedy"}, "topk_method is 'greedy'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"moe_layer_freq": 2}, "moe_layer_freq is 2"),
        ({"rope_interleave": False}, "rope_interleave is False"),
        ({"num_key_value_heads": 8}, "num_key_value_heads 8 is not num_attention_heads 128"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope type is 'linear'"),
        ({"rope_scaling": {"type": "yarn"}}, "original_max_position_embeddings"),
        ({"rope_scaling": {**V3["rope_scaling"], "factor": "40"}}, "numbers"),
        ({"rope_scaling": {**V3["rope_scaling"], "factor": 0.5}}, "YaRN factor 0.5"),
        ({"rope_scaling": {**V3["rope_scaling"], "attention_factor": 2.0}}, "attention_factor"),
        ({"rope_scaling": {**V3["rope_scaling"], "wobble": 2.0}}, "wobble"),
    ],
)  # fmt: skip
def test_another_architecture_is_refused(changes, said):
    with pytest.raises(ValueError) as error:
        ModelConfig.from_hf(V3 | changes)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe{}"])
def test_damaged_file(content, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json"):
        ModelConfig.from_hf(tmp_path)


def test_missing_file(tmp_path):
    with pytest.raises(ValueError, match="no config at"):
        ModelConfig.from_hf(tmp_path / "nowhere")


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    experts=st.integers(1, 64),
    groups=st.integers(1, 8),
    chosen=st.integers(1, 8),
    top_k=st.integers(1, 64),
    rope=st.integers(1, 9),
)
def test_a_config_is_accepted_exactly_when_it_can_route(experts, groups, chosen, top_k, rope):
    possible = (
        experts % groups == 0
        and (groups == 1 or experts // groups >= 2)
        and chosen <= groups
        and top_k <= experts // groups * chosen
        and rope % 2 == 0
    )
    sizes = {"n_routed_experts": experts, "n_group": groups, "topk_group": chosen, "num_experts_per_tok": top_k}
    try:
        config = ModelConfig(**sizes, qk_rope_head_dim=rope)
    except ValueError:
        assert not possible
    else:
        assert possible
        assert ModelConfig.from_hf(config.to_hf()) == config
