"""Checkpoints: bit-exact round trips, transformers both ways, FP8, and every way in which files or disks go wrong."""

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dsv3.kernels.quant import dequantize_blocks as dequantize
from dsv3.model import folder as folder_module
from dsv3.model import shards
from dsv3.model.census import disk_tensors, inspect, is_fp8_weight, scale_shape
from dsv3.model.config import ModelConfig, YarnConfig
from dsv3.model.fingerprint import Fingerprint, fingerprint
from dsv3.model.transformer import DeepseekV3
from dsv3.model.weights import config_of, load_into, load_model, read_tensors, save_checkpoint, save_model

TINY = ModelConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=3,
    num_nextn_predict_layers=2, num_attention_heads=2, q_lora_rank=12, kv_lora_rank=16, qk_nope_head_dim=8,
    qk_rope_head_dim=8, v_head_dim=12, n_routed_experts=8, num_experts_per_tok=3, n_shared_experts=2, n_group=4,
    topk_group=2, first_k_dense_replace=1, max_position_embeddings=128, initializer_range=0.2,
    rope_scaling=YarnConfig(factor=4, original_max_position_embeddings=32, mscale_all_dim=1.0),
)  # fmt: skip
VARIANTS = {
    "mtp 2": TINY,
    "no mtp": dataclasses.replace(TINY, num_nextn_predict_layers=0),
    "no q rank, no yarn, one group": dataclasses.replace(
        TINY, q_lora_rank=None, rope_scaling=None, rope_theta=50000.0, n_group=1, topk_group=1
    ),
    "no dense layer, no shared expert": dataclasses.replace(TINY, first_k_dense_replace=0, n_shared_experts=0),
}
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


def build(config=TINY, dtype=torch.float32, seed=0):
    model = DeepseekV3(config)
    generator = torch.Generator().manual_seed(seed)
    model.init_weights(seed)
    for router in model.routers():
        router.e_score_correction_bias.normal_(0.0, 0.1, generator=generator)
    return model.to(dtype).eval()


def same(a, b):
    a, b = dict(a), dict(b)
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def tensors_of(folder):
    return {k: v for file in sorted(Path(folder).glob("*.safetensors")) for k, v in load_file(file).items()}


def rewrite(folder, change):
    """Apply `change` to the tensors of a single-file checkpoint, as another program would: without checksums."""
    held = {k: v.clone() for k, v in tensors_of(folder).items()}
    change(held)
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "checksums.json").unlink(missing_ok=True)


@pytest.fixture
def saved(tmp_path):
    model = build()
    save_model(model, tmp_path / "m")
    return model, tmp_path / "m"


# -- round trips ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize("shard_bytes", [5 << 30, 20_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_bit_exact(tmp_path, config, shard_bytes, dtype):
    model = build(config, dtype)
    save_checkpoint(model.state_dict(), config, tmp_path / "m", shard_bytes=shard_bytes)
    loaded = load_model(tmp_path / "m", dtype=dtype)
    assert loaded.config == config
    assert same(model.state_dict(), loaded.state_dict())
    assert loaded.state_dict()[BIAS].dtype == torch.float32
    assert not loaded.training
    tokens = torch.arange(10).view(1, 10)
    assert torch.equal(model(tokens), loaded(tokens))


def test_tensors_one_at_a_time_are_those_of_the_loaded_model_and_have_its_fingerprint(tmp_path):
    config = dataclasses.replace(TINY, num_nextn_predict_layers=2)
    save_checkpoint(build(config).state_dict(), config, tmp_path / "model", dtype="fp8")
    config = config_of(tmp_path / "model")
    model, base, done = load_model(tmp_path / "model", dtype="float32"), Fingerprint(config), []
    read = {}
    for name, tensor in read_tensors(
        tmp_path / "model", config, progress=lambda so_far, total: done.append(so_far / total)
    ):
        base.add(name, tensor)
        read[name] = tensor
    assert list(read) == list(model.state_dict())
    assert all(torch.equal(read[name], tensor) for name, tensor in model.state_dict().items())
    assert str(base) == fingerprint(model)
    assert done[-1] == 1


def test_what_lies_on_disk(saved):
    model, folder = saved
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "checksums.json",
    }  # fmt: skip
    held, state = tensors_of(folder), model.state_dict()
    assert {name: list(tensor.shape) for name, tensor in held.items()} == {
        name: list(shape) for name, shape, _ in disk_tensors(TINY, fp8=False)
    }
    stacked = state["model.layers.2.mlp.experts.gate_up_proj"]
    assert torch.equal(held["model.layers.2.mlp.experts.5.gate_proj.weight"], stacked[5, :16])
    assert torch.equal(held["model.layers.2.mlp.experts.5.up_proj.weight"], stacked[5, 16:])
    assert torch.equal(held["model.layers.4.embed_tokens.weight"], state["model.embed_tokens.weight"])
    assert torch.equal(held["model.layers.4.shared_head.head.weight"], state["lm_head.weight"])
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    found = inspect(folder)
    assert found.missing == found.unexpected == found.mismatched == found.unknown_fields == ()
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "float32"


def test_shards_and_index(tmp_path):
    model = build(dtype=torch.bfloat16)
    save_checkpoint(model.state_dict(), TINY, tmp_path / "m", shard_bytes=20_000)
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "m").glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert set(index["weight_map"].values()) == set(files)
    assert set(json.loads((tmp_path / "m" / "checksums.json").read_text())["files"]) == set(files)
    held = tensors_of(tmp_path / "m")
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in held.values())
    for file in files:
        assert sum(t.numel() * t.element_size() for t in load_file(tmp_path / "m" / file).values()) <= 20_000


def test_stored_dtype_casts_all_but_the_router_bias(saved, tmp_path):
    model, _ = saved
    save_checkpoint(model.state_dict(), TINY, tmp_path / "half", dtype=torch.bfloat16)
    held = tensors_of(tmp_path / "half")
    assert {name for name, tensor in held.items() if tensor.dtype == torch.float32} == {
        name for name in held if name.endswith("e_score_correction_bias")
    }
    assert torch.equal(held[BIAS], model.state_dict()[BIAS])
    assert json.loads((tmp_path / "half" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    back = load_model(tmp_path / "half", dtype="float32").state_dict()
    assert torch.equal(back["lm_head.weight"], model.lm_head.weight.bfloat16().float())


def test_config_loses_what_no_longer_holds_and_keeps_the_rest(tmp_path):
    fp8 = {
        "quantization_config": {"quant_method": "fp8"},
        "auto_map": {"AutoConfig": "x.Y"},
        "mine": [1],
        "dtype": "float16",
    }
    config = ModelConfig.from_hf(TINY.to_hf(**fp8))
    save_checkpoint(build(config).state_dict(), config, tmp_path / "m")
    content = json.loads((tmp_path / "m" / "config.json").read_text())
    assert "quantization_config" not in content
    assert "auto_map" not in content
    assert content["mine"] == [1]
    assert content["torch_dtype"] == "float32"
    assert content.get("dtype", "float32") == "float32"


def test_progress_ends_at_the_whole(saved):
    _, folder = saved
    seen = []
    load_model(folder, progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == seen[-1][1] == sum(inspect(folder).bytes_by_dtype.values())


def test_tokenizer_is_saved_before_the_folder_appears(tmp_path):
    class Tokenizer:
        def save(self, folder):
            assert not (tmp_path / "m").exists()
            (Path(folder) / "tokenizer.json").write_text("{}")

    save_model(build(), tmp_path / "m", Tokenizer())
    assert (tmp_path / "m" / "tokenizer.json").read_text() == "{}"


# -- transformers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [TINY, VARIANTS["no q rank, no yarn, one group"]], ids=["v3", "other"])
@pytest.mark.parametrize("shard_bytes", [5 << 30, 40_000])
def test_transformers_opens_ours(tmp_path, config, shard_bytes):
    model = build(config)
    save_checkpoint(model.state_dict(), config, tmp_path / "m", shard_bytes=shard_bytes)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32).eval()
    tokens = torch.randint(0, config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), theirs(tokens).logits, atol=1e-4, rtol=0)
    assert torch.equal(theirs.state_dict()[BIAS], model.state_dict()[BIAS])


def test_we_open_what_transformers_saves(saved, tmp_path):
    model, folder = saved
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs.save_pretrained(tmp_path / "theirs")
    with pytest.raises(ValueError, match=r"lacks MTP layers.*num_nextn_predict_layers=2.*mtp=False"):
        load_model(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs", dtype="float32", mtp=False)
    assert same(ours.state_dict(), {k: v for k, v in model.state_dict().items() if k in ours.state_dict()})
    assert "model.layers.3.eh_proj.weight" not in ours.state_dict()


# -- MTP ------------------------------------------------------------------------------------------------------------


def test_mtp_layers_are_left_aside_on_request(saved):
    model, folder = saved
    assert config_of(folder) == TINY
    assert config_of(folder, mtp=False) == dataclasses.replace(TINY, num_nextn_predict_layers=0)
    main = load_model(folder, dtype="float32", mtp=False)
    tokens = torch.arange(8).view(1, 8)
    assert torch.equal(main(tokens), model(tokens))


def test_undeclared_mtp_layers_are_named(saved):
    _, folder = saved
    (folder / "config.json").write_text(json.dumps(dataclasses.replace(TINY, num_nextn_predict_layers=0).to_hf()))
    with pytest.raises(
        ValueError, match=r"holds 2 layers behind the 3 main ones.*num_nextn_predict_layers=0.*set it to 2"
    ):
        load_model(folder)


@pytest.mark.parametrize("name", ["model.layers.3.embed_tokens.weight", "model.layers.4.shared_head.head.weight"])
def test_duplicates_must_be_there_and_equal(saved, name):
    _, folder = saved
    rewrite(folder, lambda held: held[name].view(-1)[7].add_(1))
    with pytest.raises(ValueError, match=f"{name} differs from"):
        load_model(folder)
    rewrite(folder, lambda held: held.pop(name))
    with pytest.raises(ValueError, match=rf"{name} \[64, 32\] is missing"):
        load_model(folder)
    assert load_model(folder, mtp=False).config.num_nextn_predict_layers == 0


# -- FP8 ------------------------------------------------------------------------------------------------------------


def test_dequantize_blocks_also_ragged():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(192, 300, generator=generator).to(torch.float8_e4m3fn)
    scale = torch.rand(2, 3, generator=generator)
    expected = torch.empty(192, 300)
    for i in range(192):
        for j in range(0, 300, 4):
            expected[i, j : j + 4] = weight[i, j : j + 4].float() * scale[i // 128, j // 128]
    assert torch.equal(dequantize(weight, scale), expected.bfloat16())


WIDE = dataclasses.replace(TINY, hidden_size=160, intermediate_size=144, moe_intermediate_size=136, kv_lora_rank=140)


def write_fp8(folder, config=WIDE):
    """An FP8 checkpoint whose scales lie in another shard than their weights; returns the values it means."""
    save_model(build(config), folder)
    held = tensors_of(folder)
    means, first, second = {}, {}, {}
    generator = torch.Generator().manual_seed(3)
    for name, tensor in held.items():
        if is_fp8_weight(name):
            first[name] = tensor.to(torch.float8_e4m3fn)
            second[name + "_scale_inv"] = torch.rand(scale_shape(tensor.shape), generator=generator) + 0.5
            means[name] = dequantize(first[name], second[name + "_scale_inv"])
        else:
            first[name] = means[name] = tensor if name.endswith("bias") else tensor.bfloat16()
    for path in (folder / "model.safetensors", folder / "checksums.json"):
        path.unlink()
    files = {"model-00001-of-00002.safetensors": first, "model-00002-of-00002.safetensors": second}
    for file, part in files.items():
        save_file(part, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, part in files.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return means


def test_fp8_checkpoint(tmp_path):
    means = write_fp8(tmp_path / "m")
    assert inspect(tmp_path / "m").missing == inspect(tmp_path / "m").unexpected == ()
    model = load_model(tmp_path / "m")
    save_model(model, tmp_path / "wide")
    assert same(tensors_of(tmp_path / "wide"), means)


def test_fp8_in_float32_is_what_the_bfloat16_checkpoint_means(tmp_path):
    means = write_fp8(tmp_path / "m")
    state = load_model(tmp_path / "m", dtype="float32").state_dict()
    name = "model.layers.0.self_attn.o_proj.weight"
    assert torch.equal(state[name], means[name].float())


def test_fp8_without_its_scale(tmp_path):
    write_fp8(tmp_path / "m")
    second, name = tmp_path / "m" / "model-00002-of-00002.safetensors", "model.layers.0.self_attn.o_proj.weight"
    scales = {k: v.clone() for k, v in load_file(second).items()}
    del scales[name + "_scale_inv"]
    save_file(scales, second)
    index = tmp_path / "m" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"][name + "_scale_inv"]
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"{name} is F8_E4M3 but {name}_scale_inv is in no file"):
        load_model(tmp_path / "m")


# -- damaged or foreign files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda held: held.pop("model.norm.weight"), "model.norm.weight [32] is missing"),
        (lambda held: held.update(ghost=torch.zeros(1)), "ghost [1] is unexpected"),
        (lambda held: held.update({"lm_head.weight": torch.zeros(64, 31)}),
         "lm_head.weight is [64, 31] in model.safetensors, config.json makes it [64, 32]"),
        (lambda held: held.update({"model.norm.weight": torch.zeros(32, dtype=torch.int32)}), "dtype I32"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit(saved, change, said):
    _, folder = saved
    rewrite(folder, change)
    with pytest.raises(ValueError) as error:
        load_model(folder)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_truncated_and_tampered_files_are_named(saved):
    _, folder = saved
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match=r"model\.safetensors: .* ends at byte \d+, the file has \d+"):
        load_model(folder)
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(
        ValueError, match=r"model\.safetensors has sha256 [0-9a-f]{64}, checksums.json says [0-9a-f]{64}"
    ):
        load_model(folder)
    load_model(folder, verify=False)


def test_nothing_is_written_into_the_model_before_all_is_checked(saved):
    _, folder = saved
    rewrite(folder, lambda held: held.pop("model.layers.4.enorm.weight"))
    model = build(seed=9)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="is missing"):
        load_into(model.state_dict(), TINY, folder)
    assert same(before, model.state_dict())


def test_state_and_config_must_agree(saved, tmp_path):
    model, folder = saved
    other = dataclasses.replace(TINY, vocab_size=65)
    with pytest.raises(ValueError, match=r"is \[64, 32\], the config says \[65, 32\]"):
        load_into(model.state_dict(), other, folder)
    with pytest.raises(ValueError, match=r"is \[64, 32\], the config says \[65, 32\]"):
        save_checkpoint(model.state_dict(), other, tmp_path / "x")
    with torch.device("meta"):
        empty = DeepseekV3(TINY).state_dict()
    with pytest.raises(ValueError, match="meta device"):
        load_into(empty, TINY, folder)
    with pytest.raises(ValueError, match="meta device"):
        save_checkpoint(empty, TINY, tmp_path / "x")
    assert not (tmp_path / "x").exists()
    with pytest.raises(ValueError, match="dtype is int8"):
        load_model(folder, dtype="int8")
    with pytest.raises(ValueError, match="holds no safetensors"):
        load_into(model.state_dict(), TINY, tmp_path / "nowhere")


# -- the folder on disk ---------------------------------------------------------------------------------------------


def test_an_existing_folder_is_refused_unless_told(saved):
    _, folder = saved
    before = (folder / "model.safetensors").read_bytes()
    other = build(seed=5)
    with pytest.raises(ValueError, match=r"exists.*overwrite=True"):
        save_model(other, folder)
    assert (folder / "model.safetensors").read_bytes() == before
    save_model(other, folder, overwrite=True)
    assert same(load_model(folder, dtype="float32").state_dict(), other.state_dict())
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_an_empty_folder_is_filled_and_a_foreign_one_spared(tmp_path):
    (tmp_path / "empty").mkdir()
    save_model(build(), tmp_path / "empty")
    assert (tmp_path / "empty" / "config.json").exists()
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="no checkpoint"):
        save_model(build(), tmp_path / "home", overwrite=True)
    assert (tmp_path / "home" / "thesis.txt").read_text() == "mine"


FULL = [OSError(errno.ENOSPC, "No space left"), SafetensorError("I/O error: No space left on device (os error 28)")]


@pytest.mark.parametrize("error", FULL, ids=["Python", "Rust"])
def test_full_disk(saved, monkeypatch, error):
    _, folder = saved
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*_, **__):
        raise error

    monkeypatch.setattr(shards, "save_file", full)
    for target in (folder, folder.with_name("new")):
        with pytest.raises(OSError, match=r"disk full: saving .* needs \d+ bytes, \d+ are free") as caught:
            save_model(build(seed=5), target, overwrite=True)
        assert caught.value.errno == errno.ENOSPC
        assert "\n" not in str(caught.value)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_disk_known_to_be_too_small_is_not_begun(tmp_path, monkeypatch):
    usage = type(shutil.disk_usage(tmp_path))(10**6, 10**6 - 100, 100)
    monkeypatch.setattr(folder_module.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match="100 are free"):
        save_model(build(), tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("at", range(2))
def test_a_crash_in_the_swap_leaves_old_or_new(saved, monkeypatch, at):
    model, folder = saved
    other, calls, replace = build(seed=5), [], os.replace

    class Killed(BaseException):
        pass

    def dying(source, target):
        calls.append(source)
        if len(calls) > at:
            raise Killed  # and the process does nothing further: every later rename fails too
        replace(source, target)

    monkeypatch.setattr(folder_module.os, "replace", dying)
    with pytest.raises(Killed):
        save_model(other, folder, overwrite=True)
    monkeypatch.setattr(folder_module.os, "replace", replace)
    assert same(load_model(folder, dtype="float32").state_dict(), model.state_dict())
    save_model(other, folder, overwrite=True)
    assert same(load_model(folder, dtype="float32").state_dict(), other.state_dict())
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


# -- memory ---------------------------------------------------------------------------------------------------------

MEASURE = """
    import sys, torch
    from dsv3.model.weights import load_model
    torch.set_num_threads(1)
    def field(name):
        return int(open("/proc/self/status").read().split(name + ":")[1].split()[0]) / 1024
    folder, dtype = sys.argv[1:]
    load_model(sys.argv[1] + "/small", dtype=dtype)  # code and libraries are in memory before
    before = field("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")  # resets the high-water mark
    model = load_model(sys.argv[1] + "/large", dtype=dtype)
    print(field("VmHWM") - before, sum(t.numel() * t.element_size() for t in model.state_dict().values()) / 2**20)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's high-water mark")
@pytest.mark.parametrize(("stored", "dtype"), [("bfloat16", "bfloat16"), ("fp8", "fp8"), ("fp8", "bfloat16")])
def test_a_load_holds_the_model_and_a_tenth(tmp_path, stored, dtype):
    """Peak resident memory of a load, in a process of its own: at most 1.1 times the model (here some 250 MiB in bfloat16)."""
    large = dataclasses.replace(
        WIDE, hidden_size=512, moe_intermediate_size=512, n_routed_experts=32, num_hidden_layers=5, vocab_size=512
    )
    for name, config in (("small", WIDE), ("large", large)):
        save_checkpoint(build(config).state_dict(), config, tmp_path / name, dtype=stored, shard_bytes=50_000_000)
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MEASURE), str(tmp_path), dtype],
        cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    peak, model = map(float, done.stdout.split())
    assert model > 100
    assert peak < 1.1 * model
