"""GGUF in and out (architecture deepseek2, BF16 or Q8_0): one file that llama.cpp runs, and back.

    blk.N.attn_k_b [H, C, n], attn_v_b [H, V, C]   kv_b_proj cut in two and k turned, as the absorbed form of attention reads it
    blk.N.ffn_{gate,up,down}_exps [E, ...]         the experts of a layer stacked
    exp_probs_b.bias                               the router's bias

Vectors, router and bias are float32; a matrix whose rows are no multiple of 32 stays BF16 in a Q8_0 file. Rotated values keep the
interleaved order of the checkpoint. Besides llama.cpp's own vocabulary the file carries tokenizer.json whole, so that nothing is
lost on the way back. MTP layers have no place in this architecture of llama.cpp and are left out, which the caller is told.
Needs the `gguf` package (extra `gguf`). Source: llama.cpp's deepseek2, whose logits agree within 7e-4 in float32.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dsv3.model import folder as disk
from dsv3.model.census import Piece, is_router_bias, layer_of, layout
from dsv3.model.config import ModelConfig, YarnConfig
from dsv3.model.shards import Progress, Value
from dsv3.model.source import as_float

QUANTISATIONS = ("bf16", "q8_0")
_LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.q_a_proj.weight": "attn_q_a.weight",
    "self_attn.q_a_layernorm.weight": "attn_q_a_norm.weight",
    "self_attn.q_b_proj.weight": "attn_q_b.weight",
    "self_attn.kv_a_proj_with_mqa.weight": "attn_kv_a_mqa.weight",
    "self_attn.kv_a_layernorm.weight": "attn_kv_a_norm.weight",
    "self_attn.kv_b_proj.weight": "attn_k_b.weight",  # and attn_v_b.weight
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    **{f"mlp.{n}_proj.weight": f"ffn_{n}.weight" for n in ("gate", "up", "down")},
    **{f"mlp.shared_experts.{n}_proj.weight": f"ffn_{n}_shexp.weight" for n in ("gate", "up", "down")},
}
_GLOBAL = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_V_B = "attn_v_b.weight"
_TOKENIZER = "tokenizer.huggingface.json"


class Part(NamedTuple):
    """One tensor of the file and the pieces that it is made of (an expert each, or one)."""

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


# -- out ---------------------------------------------------------------------------------------------------------------


def write_gguf(
    config: ModelConfig, read: Callable[[Piece], Value], tokenizer_json: str | None, path: Path, *, kind: str = "bf16",
    progress: Progress | None = None,
) -> None:  # fmt: skip
    """Write `path`, whole or not at all; memory of one layer's experts.

    Args:
        read: the value of a piece (a checkpoint's, or a model's).
        tokenizer_json: content of tokenizer.json; None writes a file that only takes token ids.
        kind: of the matrices, "bf16" or "q8_0".

    Raises:
        ValueError: the gguf package is missing, `path` exists, or kind is another.
    """
    gguf = _package()
    if kind not in QUANTISATIONS:
        raise ValueError(f"kind is {kind!r}: write one of {', '.join(QUANTISATIONS)}")
    if path.exists():
        raise ValueError(f"{path} exists: choose another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = path.with_name(f".{path.name}.saving")
    writer = gguf.GGUFWriter(temp, "deepseek2")
    for key, value in fields(config).items():
        _add(gguf, writer, f"deepseek2.{key}", value)
    if tokenizer_json is not None:
        _add_vocabulary(gguf, writer, tokenizer_json, config)
    every = [(part, _type_of(gguf, part, kind)) for part in parts(config)]
    for part, kept in every:
        size = gguf.quant_shape_to_byte_shape(part.shape, kept)
        writer.add_tensor_info(part.name, size, np.dtype(np.uint8), int(np.prod(size)), raw_dtype=kept)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for number, (part, kept) in enumerate(every, start=1):
            writer.write_tensor_data(_encode(gguf, _value(part, config, read), kept))
            if progress is not None:
                progress(number, len(every))
        writer.close()
        disk.sync(temp)
        os.replace(temp, path)
        disk.sync(path.parent)
    except BaseException as error:
        temp.unlink(missing_ok=True)
        if disk.is_disk_full(error):
            disk.raise_disk_full(path, sum(int(np.prod(gguf.quant_shape_to_byte_shape(p.shape, k))) for p, k in every))
        raise


def parts(config: ModelConfig) -> Iterator[Part]:
    """Every tensor of the file, in order."""
    stacks: dict[str, list[Piece]] = {}
    for piece in layout(config):
        layer = layer_of(piece.disk)
        if piece.duplicate or (layer is not None and layer >= config.num_hidden_layers):
            continue  # MTP
        name = _name(piece)
        if ".experts." in piece.disk:
            stack = stacks.setdefault(name, [])
            stack.append(piece)
            if len(stack) == config.n_routed_experts:
                yield Part(name, (len(stack), *piece.shape), tuple(stacks.pop(name)))
        elif name.endswith("attn_k_b.weight"):
            heads, rank = config.num_attention_heads, config.kv_lora_rank
            yield Part(name, (heads, rank, config.qk_nope_head_dim), (piece,))
            yield Part(name.replace("attn_k_b.weight", _V_B), (heads, config.v_head_dim, rank), (piece,))
        else:
            yield Part(name, piece.shape, (piece,))


def fields(config: ModelConfig) -> dict[str, Any]:
    """deepseek2.* of the file."""
    latent = config.kv_lora_rank
    found: dict[str, Any] = {
        "block_count": config.num_hidden_layers, "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size, "feed_forward_length": config.intermediate_size,
        "vocab_size": config.vocab_size, "leading_dense_block_count": min(config.first_k_dense_replace, config.num_hidden_layers),
        "attention.head_count": config.num_attention_heads, "attention.head_count_kv": 1,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps), "attention.kv_lora_rank": latent,
        "attention.key_length": latent + config.qk_rope_head_dim, "attention.value_length": latent,
        "attention.key_length_mla": config.qk_head_dim, "attention.value_length_mla": config.v_head_dim,
        "rope.dimension_count": config.qk_rope_head_dim, "rope.freq_base": float(config.rope_theta),
        "expert_count": config.n_routed_experts, "expert_used_count": config.num_experts_per_tok,
        "expert_shared_count": config.n_shared_experts, "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_weights_scale": float(config.routed_scaling_factor), "expert_weights_norm": bool(config.norm_topk_prob),
        "expert_gating_func": 2, "expert_group_count": config.n_group, "expert_group_used_count": config.topk_group,
    }  # fmt: skip
    if config.q_lora_rank is not None:
        found["attention.q_lora_rank"] = config.q_lora_rank
    if config.rope_scaling is not None:
        yarn = config.rope_scaling
        found |= {
            "rope.scaling.type": "yarn", "rope.scaling.factor": float(yarn.factor),
            "rope.scaling.original_context_length": yarn.original_max_position_embeddings,
            "rope.scaling.yarn_log_multiplier": 0.1 * float(yarn.mscale_all_dim or 0.0),
            "rope.scaling.yarn_beta_fast": float(yarn.beta_fast), "rope.scaling.yarn_beta_slow": float(yarn.beta_slow),
        }  # fmt: skip
    return found


def _name(piece: Piece) -> str:
    if piece.disk in _GLOBAL:
        return _GLOBAL[piece.disk]
    _, _, layer, rest = piece.disk.split(".", 3)
    if ".experts." in piece.disk:
        return f"blk.{layer}.ffn_{rest.split('.')[-2].removesuffix('_proj')}_exps.weight"
    return f"blk.{layer}.{_LAYER[rest]}"


def _type_of(gguf: Any, part: Part, kind: str) -> Any:
    types = gguf.GGMLQuantizationType
    if len(part.shape) == 1 or is_router_bias(part.pieces[0].disk) or part.name.endswith("ffn_gate_inp.weight"):
        return types.F32
    return types.Q8_0 if kind == "q8_0" and part.shape[-1] % 32 == 0 else types.BF16


def _value(part: Part, config: ModelConfig, read: Callable[[Piece], Value]) -> Tensor:
    """The tensor of a part, in the dtype that it is read in (FP8 as bfloat16)."""

    def floating(piece: Piece) -> Tensor:
        value = read(piece)
        return value if isinstance(value, Tensor) else as_float(value, torch.bfloat16)

    if len(part.pieces) > 1:
        whole = torch.empty(0)
        for number, piece in enumerate(part.pieces):
            value = floating(piece)
            whole = torch.empty(part.shape, dtype=value.dtype) if number == 0 else whole
            whole[number] = value
        return whole
    value = floating(part.pieces[0])
    if part.name.endswith(("attn_k_b.weight", _V_B)):
        sizes = (config.qk_nope_head_dim, config.v_head_dim)
        keys, values = value.unflatten(0, (config.num_attention_heads, -1)).split(sizes, dim=1)
        return values if part.name.endswith(_V_B) else keys.mT
    return value


def _encode(gguf: Any, value: Tensor, kept: Any) -> np.ndarray:
    types = gguf.GGMLQuantizationType
    if kept == types.F32:
        return value.float().contiguous().numpy().view(np.uint8)
    if kept == types.BF16:
        return value.bfloat16().contiguous().view(torch.uint8).numpy()
    return gguf.quants.quantize(value.float().contiguous().numpy(), kept)


def _add(gguf: Any, writer: Any, key: str, value: Any) -> None:
    kinds = gguf.GGUFValueType
    kind = {bool: kinds.BOOL, int: kinds.UINT32, float: kinds.FLOAT32, str: kinds.STRING}[type(value)]
    writer.add_key_value(key, value, kind)


def _add_vocabulary(gguf: Any, writer: Any, source: str, config: ModelConfig) -> None:
    """llama.cpp's copy of the vocabulary, and the file itself."""
    content, kinds = json.loads(source), gguf.TokenType
    tokens = [f"[unused{i}]" for i in range(config.vocab_size)]
    types = [int(kinds.UNUSED)] * config.vocab_size
    for text, number in content["model"]["vocab"].items():
        tokens[number], types[number] = text, int(kinds.NORMAL)
    for added in content["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = int(kinds.CONTROL if added["special"] else kinds.USER_DEFINED)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in content["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("deepseek-v3")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    if config.bos_token_id is not None:
        writer.add_bos_token_id(config.bos_token_id)
    if isinstance(config.eos_token_id, int):
        writer.add_eos_token_id(config.eos_token_id)
    writer.add_add_bos_token(True)
    writer.add_string(_TOKENIZER, source)


def _package() -> Any:
    try:
        import gguf
    except ImportError:
        raise ValueError("GGUF needs the gguf package: pip install 'dsv3[gguf]'") from None
    return gguf


# -- in ----------------------------------------------------------------------------------------------------------------


class GgufSource:
    """A GGUF file's config, tokenizer.json (None if it has none) and pieces, dequantised."""

    def __init__(self, path: Path) -> None:
        """Raises ValueError: the file is none, or of another architecture."""
        self._gguf = _package()
        try:
            self._reader = self._gguf.GGUFReader(path)
        except (ValueError, OSError, IndexError) as error:
            raise ValueError(f"{path} is no whole GGUF file ({error}): fetch it again") from None
        self.path = path
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        architecture = self._field("general.architecture")
        if architecture != "deepseek2" or self._field("deepseek2.expert_gating_func", 0) != 2:
            raise ValueError(f"{path} is of architecture {architecture!r}: dsv3 reads deepseek2 with sigmoid routing")
        self.config = self._config()
        self.tokenizer_json: str | None = self._field(_TOKENIZER)
        missing = [part.name for part in parts(self.config) if part.name not in self._tensors]
        if missing:
            raise ValueError(f"{path} lacks {len(missing)} tensors ({', '.join(missing[:10])}): fetch it again")

    def read(self, piece: Piece) -> Tensor:
        """A piece in bfloat16, or float32 where it is stored so."""
        name = _name(piece)
        if ".experts." in piece.disk:
            return self._tensor(name, piece.index[0])
        if not name.endswith("attn_k_b.weight"):
            return self._tensor(name)
        keys, values = self._tensor(name), self._tensor(name.replace("attn_k_b.weight", _V_B))
        return torch.cat((keys.mT, values), dim=1).flatten(0, 1)

    def _tensor(self, name: str, index: Any = None) -> Tensor:
        tensor, types = self._tensors[name], self._gguf.GGMLQuantizationType
        data = tensor.data if index is None else tensor.data[index]
        if tensor.tensor_type == types.BF16:
            return torch.from_numpy(data.copy()).view(torch.bfloat16)
        wide = self._gguf.quants.dequantize(data, tensor.tensor_type)
        return torch.from_numpy(np.array(wide, dtype=np.float32))

    def _field(self, key: str, default: Any = None) -> Any:
        found = self._reader.get_field(key)
        return default if found is None else found.contents()

    def _config(self) -> ModelConfig:
        def get(key: str, default: Any = None) -> Any:
            value = self._field(f"deepseek2.{key}", default)
            return _short(value) if isinstance(value, float) else value

        rope = get("rope.dimension_count")
        yarn = None
        if get("rope.scaling.type") == "yarn":
            log = get("rope.scaling.yarn_log_multiplier", 0.0)
            mscale = round(log * 10, 6)
            yarn = YarnConfig(
                factor=get("rope.scaling.factor"), mscale=mscale or 1.0, mscale_all_dim=mscale,
                original_max_position_embeddings=get("rope.scaling.original_context_length"),
                beta_fast=get("rope.scaling.yarn_beta_fast", 32.0), beta_slow=get("rope.scaling.yarn_beta_slow", 1.0),
            )  # fmt: skip
        return ModelConfig(
            vocab_size=self._tensors["token_embd.weight"].shape[1].item(), hidden_size=get("embedding_length"),
            intermediate_size=get("feed_forward_length"), moe_intermediate_size=get("expert_feed_forward_length"),
            num_hidden_layers=get("block_count"), num_nextn_predict_layers=0,
            num_attention_heads=get("attention.head_count"), q_lora_rank=get("attention.q_lora_rank"),
            kv_lora_rank=get("attention.kv_lora_rank"), qk_rope_head_dim=rope,
            qk_nope_head_dim=get("attention.key_length_mla") - rope, v_head_dim=get("attention.value_length_mla"),
            n_routed_experts=get("expert_count"), num_experts_per_tok=get("expert_used_count"),
            n_shared_experts=get("expert_shared_count", 0), n_group=get("expert_group_count", 1),
            topk_group=get("expert_group_used_count", 1), norm_topk_prob=bool(get("expert_weights_norm", True)),
            routed_scaling_factor=get("expert_weights_scale", 1.0), rms_norm_eps=get("attention.layer_norm_rms_epsilon"),
            first_k_dense_replace=get("leading_dense_block_count", 0), max_position_embeddings=get("context_length"),
            rope_theta=get("rope.freq_base"), rope_scaling=yarn,
            bos_token_id=self._field("tokenizer.ggml.bos_token_id"), eos_token_id=self._field("tokenizer.ggml.eos_token_id"),
        )  # fmt: skip


def _short(value: float) -> float:
    """The decimal that a float32 was made from: 1e-6, not 9.99999997e-07."""
    return float(np.format_float_positional(np.float32(value), unique=True, trim="0"))
