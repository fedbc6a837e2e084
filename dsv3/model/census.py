"""What a config amounts to, in exact integers: every tensor on disk and in memory, parameters, bytes, cache, FLOPs.

One list, `layout`, ties the two forms of a model together and is the only place that knows both:

    piece on disk   model.layers.3.mlp.experts.7.up_proj.weight   [I, D]
    is in memory    model.layers.3.mlp.experts.gate_up_proj       [7, I:2I]       (experts stacked, spec 2.4)

An MTP layer's embed_tokens and shared_head.head exist only on disk, as duplicates of the main model's. Stored as
F8_E4M3, every Linear but router, eh_proj, embedding and heads has a `_scale_inv` of one F32 a 128x128 block, ragged
blocks included.

    FLOPs a trained token = 6·(active parameters without the embedding) + 3·L·2·H·S·(qk + v), the last halved if causal

Source: the published index (spec 2.1, 2.2), V3 report (arXiv 2412.19437) sections 2.1, 2.2; ISCA'25 paper (FLOPs).
Does not: read a single weight; `inspect` reads the headers of the files alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dsv3.model.config import ModelConfig
from dsv3.model.headers import ITEM_BYTES, Stored, read_headers

BLOCK = 128  # side of a block that shares one scale
SCALE = "_scale_inv"  # behind a weight's name: its scales


class Piece(NamedTuple):
    """One tensor of the file and where it lives in memory: `state[memory][index]`."""

    disk: str
    memory: str
    index: tuple[int | slice, ...]
    shape: tuple[int, ...]
    duplicate: bool = False  # an MTP layer's copy of the embedding or the head


# -- names and shapes --------------------------------------------------------------------------------------------------


def memory_shapes(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of every entry of the model's state dict, in the published order: main model, then MTP layers."""
    yield "model.embed_tokens.weight", (config.vocab_size, config.hidden_size)
    for layer in range(config.num_hidden_layers):
        yield from _layer_shapes(config, layer)
    yield "model.norm.weight", (config.hidden_size,)
    yield "lm_head.weight", (config.vocab_size, config.hidden_size)
    for layer in range(config.num_hidden_layers, config.num_layers_with_mtp):
        yield from _layer_shapes(config, layer)


def layout(config: ModelConfig) -> Iterator[Piece]:
    """Every weight of the checkpoint (scales aside). The pieces of one tensor in memory follow each other."""
    for name, shape in memory_shapes(config):
        if ".mlp.experts." not in name:
            yield Piece(name, name, (), shape)
            if name.endswith("shared_head.norm.weight"):
                yield from _duplicates(config, name.removesuffix("shared_head.norm.weight"))
            continue
        folder, _, which = name.rpartition(".")
        width = config.moe_intermediate_size
        for expert in range(shape[0]):
            stem = f"{folder}.{expert}"
            if which == "down_proj":
                yield Piece(f"{stem}.down_proj.weight", name, (expert,), shape[1:])
            else:
                half = (width, config.hidden_size)
                yield Piece(f"{stem}.gate_proj.weight", name, (expert, slice(0, width)), half)
                yield Piece(f"{stem}.up_proj.weight", name, (expert, slice(width, 2 * width)), half)


def disk_tensors(config: ModelConfig, fp8: bool, dtype: str = "BF16") -> Iterator[tuple[str, tuple[int, ...], str]]:
    """(name, shape, dtype) of every tensor of the checkpoint in the published layout.

    Args:
        fp8: as released: Linears in F8_E4M3, each with its scales; the rest in `dtype`.
        dtype: safetensors' spelling: BF16, F32 or F16. Router biases and scales are F32 always.
    """
    for piece in layout(config):
        if fp8 and is_fp8_weight(piece.disk):
            yield piece.disk, piece.shape, "F8_E4M3"
            yield piece.disk + SCALE, scale_shape(piece.shape), "F32"
        else:
            yield piece.disk, piece.shape, "F32" if is_router_bias(piece.disk) else dtype


def is_fp8_weight(name: str) -> bool:
    """Whether the published checkpoint stores it as FP8: every Linear but router, eh_proj, embedding and heads."""
    return name.endswith(("_proj.weight", "_proj_with_mqa.weight")) and not name.endswith("eh_proj.weight")


def is_router_bias(name: str) -> bool:
    """float32 whatever the model's dtype: its values sit closer together than a bfloat16 step."""
    return name.endswith("e_score_correction_bias")


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.ceil(size / BLOCK) for size in shape)


def scale_of(piece: Piece) -> Piece:
    """The scales of a piece, on disk and in a model that is kept in FP8: stacked as the weights are, gate's blocks first."""
    index: tuple[int | slice, ...] = piece.index
    if len(index) == 2:
        part = index[1]
        assert isinstance(part, slice)
        blocks = math.ceil((part.stop - part.start) / BLOCK)
        index = (index[0], slice(blocks, 2 * blocks) if part.start else slice(0, blocks))
    return Piece(piece.disk + SCALE, piece.memory + SCALE, index, scale_shape(piece.shape))


def layer_of(name: str) -> int | None:
    """The layer number in a tensor's name, None for what belongs to no layer."""
    parts = name.split(".")
    return int(parts[2]) if parts[:2] == ["model", "layers"] and len(parts) > 2 and parts[2].isdecimal() else None


def _duplicates(config: ModelConfig, stem: str) -> Iterator[Piece]:
    shape = (config.vocab_size, config.hidden_size)
    yield Piece(f"{stem}embed_tokens.weight", "model.embed_tokens.weight", (), shape, duplicate=True)
    yield Piece(f"{stem}shared_head.head.weight", "lm_head.weight", (), shape, duplicate=True)


def _layer_shapes(config: ModelConfig, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    dim, stem = config.hidden_size, f"model.layers.{layer}."
    yield f"{stem}input_layernorm.weight", (dim,)
    for name, shape in _attention_shapes(config):
        yield f"{stem}self_attn.{name}.weight", shape
    yield f"{stem}post_attention_layernorm.weight", (dim,)
    if config.is_moe(layer):
        experts, width = config.n_routed_experts, config.moe_intermediate_size
        yield f"{stem}mlp.gate.weight", (experts, dim)
        yield f"{stem}mlp.gate.e_score_correction_bias", (experts,)
        yield f"{stem}mlp.experts.gate_up_proj", (experts, 2 * width, dim)
        yield f"{stem}mlp.experts.down_proj", (experts, dim, width)
        if config.n_shared_experts:
            yield from _mlp_shapes(f"{stem}mlp.shared_experts.", dim, config.n_shared_experts * width)
    else:
        yield from _mlp_shapes(f"{stem}mlp.", dim, config.intermediate_size)
    if layer >= config.num_hidden_layers:
        yield f"{stem}enorm.weight", (dim,)
        yield f"{stem}hnorm.weight", (dim,)
        yield f"{stem}eh_proj.weight", (dim, 2 * dim)
        yield f"{stem}shared_head.norm.weight", (dim,)


def _attention_shapes(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    dim, heads, rank = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    queries = heads * config.qk_head_dim
    if config.q_lora_rank is None:
        yield "q_proj", (queries, dim)
    else:
        yield "q_a_proj", (config.q_lora_rank, dim)
        yield "q_a_layernorm", (config.q_lora_rank,)
        yield "q_b_proj", (queries, config.q_lora_rank)
    yield "kv_a_proj_with_mqa", (rank + config.qk_rope_head_dim, dim)
    yield "kv_a_layernorm", (rank,)
    yield "kv_b_proj", (heads * (config.qk_nope_head_dim + config.v_head_dim), rank)
    yield "o_proj", (dim, heads * config.v_head_dim)


def _mlp_shapes(stem: str, dim: int, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{stem}gate_proj.weight", (width, dim)
    yield f"{stem}up_proj.weight", (width, dim)
    yield f"{stem}down_proj.weight", (dim, width)


# -- counts ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Storage:
    """What lies on disk: numbers of tensors, and of elements and bytes by dtype (scales and duplicates included)."""

    tensors: int
    elements: Mapping[str, int]
    bytes: Mapping[str, int]

    @property
    def total_elements(self) -> int:
        return sum(self.elements.values())

    @property
    def total_bytes(self) -> int:
        return sum(self.bytes.values())


@dataclass(frozen=True, kw_only=True)
class Census:
    """Exact integers of a config; the router biases are counted as parameters. V3's value behind each."""

    parts: Mapping[str, int]  # main model by kind of module; sums to total
    total: int  # main model with embedding and head: 671,026,419,200
    active: int  # of it, used by one token: 37,552,297,472
    active_without_embedding: int  # what costs FLOPs: 36,625,618,432
    active_without_embedding_and_head: int  # 35,698,939,392
    mtp: int  # all MTP layers, weights of their own: 11,610,068,224
    mtp_stored: int  # with the duplicates of embedding and head on disk: 13,463,426,304
    mtp_active: int  # used by one token, of their own: 688,100,608
    mtp_active_with_shared: int  # with the shared embedding and head, once a layer: 2,541,458,688
    in_memory: int  # total + mtp, what a model object holds: 682,636,487,424
    checkpoint_elements: int  # on disk without scales: 684,489,845,504
    scale_elements: int  # of an FP8 checkpoint: 41,540,496
    fp8: Storage  # as released: 688,574,839,360 bytes in 91,991 tensors
    bf16: Storage
    cache_bytes_per_token: int  # bfloat16 latent cache, main layers: 70,272
    cache_bytes_per_token_with_mtp: int  # 71,424


def census(config: ModelConfig) -> Census:
    """Count everything that the config alone decides (a second at most for V3)."""
    parts: dict[str, int] = {}
    active = mtp = mtp_active = 0
    for name, shape in memory_shapes(config):
        size = math.prod(shape)
        used = _used(config, name, size)
        if _is_mtp(config, name):
            mtp, mtp_active = mtp + size, mtp_active + used
        else:
            part = _part(name)
            parts[part] = parts.get(part, 0) + size
            active += used
    total, table = sum(parts.values()), config.vocab_size * config.hidden_size
    shared = 2 * table * config.num_nextn_predict_layers
    fp8, bf16 = _tally(disk_tensors(config, True)), _tally(disk_tensors(config, False))
    latent = 2 * (config.kv_lora_rank + config.qk_rope_head_dim)
    return Census(
        parts=parts,
        total=total,
        active=active,
        active_without_embedding=active - table,
        active_without_embedding_and_head=active - 2 * table,
        mtp=mtp,
        mtp_stored=mtp + shared,
        mtp_active=mtp_active,
        mtp_active_with_shared=mtp_active + shared,
        in_memory=total + mtp,
        checkpoint_elements=bf16.total_elements,
        scale_elements=fp8.total_elements - bf16.total_elements,
        fp8=fp8,
        bf16=bf16,
        cache_bytes_per_token=latent * config.num_hidden_layers,
        cache_bytes_per_token_with_mtp=latent * config.num_layers_with_mtp,
    )


def training_flops_per_token(config: ModelConfig, seq_len: int, causal: bool, mtp: bool = False) -> float:
    """FLOPs to train on one token, forward and backward, at `seq_len` tokens a row; no recomputation counted.

    With causal, attention counts half (each token sees half the row on average). With mtp, the MTP layers and the
    shared head they run count too; published figures (250.5 and 281.2 GFLOP at 4,096) are without.
    """
    used = [(name, _used(config, name, math.prod(shape))) for name, shape in memory_shapes(config)]
    table, layers = config.vocab_size * config.hidden_size, config.num_hidden_layers
    matmul = sum(size for name, size in used if not _is_mtp(config, name)) - table
    if mtp:
        matmul += sum(size for name, size in used if _is_mtp(config, name)) + table * config.num_nextn_predict_layers
        layers = config.num_layers_with_mtp
    attention = 2 * config.num_attention_heads * seq_len * (config.qk_head_dim + config.v_head_dim)
    return 6.0 * matmul + 3.0 * layers * attention / (2 if causal else 1)


def _used(config: ModelConfig, name: str, size: int) -> int:
    """Of a tensor's `size` elements, how many one token uses."""
    return size // config.n_routed_experts * config.num_experts_per_tok if ".mlp.experts." in name else size


def _is_mtp(config: ModelConfig, name: str) -> bool:
    return (layer_of(name) or 0) >= config.num_hidden_layers


def _tally(tensors: Iterable[tuple[str, tuple[int, ...], str]]) -> Storage:
    number, elements = 0, dict[str, int]()
    for _, shape, dtype in tensors:
        number += 1
        elements[dtype] = elements.get(dtype, 0) + math.prod(shape)
    return Storage(
        tensors=number, elements=elements, bytes={dtype: n * ITEM_BYTES[dtype] for dtype, n in elements.items()}
    )


def _part(name: str) -> str:
    if name == "lm_head.weight":
        return "head"
    if name == "model.embed_tokens.weight":
        return "embedding"
    for mark, part in (
        ("norm.weight", "norms"),
        (".self_attn.", "attention"),
        (".mlp.gate.", "routers"),
        (".mlp.experts.", "routed experts"),
        (".mlp.shared_experts.", "shared experts"),
    ):
        if mark in name:
            return part
    return "dense MLPs"


# -- inspection --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """A checkpoint or config at a glance; nothing in it needed a weight."""

    path: str
    source: str  # "headers": storage counted from the files; "config": computed
    config: ModelConfig
    census: Census
    tensors: int
    elements_by_dtype: Mapping[str, int]
    bytes_by_dtype: Mapping[str, int]
    unknown_fields: tuple[str, ...]  # of config.json
    missing: tuple[str, ...]  # tensors that the config demands and the files lack; () without files
    unexpected: tuple[str, ...]  # tensors that the config knows nothing of
    mismatched: tuple[str, ...]  # "name: shape in the file, shape by the config"

    def rows(self) -> list[tuple[str, str, int | float | str | None]]:
        """(section, name, value) for a table, in order; integers exact."""
        return [(section, name, value) for section, part in _table(self).items() for name, value in part.items()]

    def to_json(self) -> dict[str, Any]:
        """The same as nested plain values for json.dump; integers exact."""
        content = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        content |= {"config": self.config.to_hf(), "census": dataclasses.asdict(self.census)}
        return content | {"bytes": sum(self.bytes_by_dtype.values())}


def inspect(path: str | Path) -> Inspection:
    """Describe a checkpoint folder from config.json and file headers, or a config.json (or bare folder) by computing.

    Raises:
        ValueError: no config there, a config outside the architecture, or damaged headers (see `read_headers`).
            Tensors that do not fit the config are reported, not raised.
    """
    path = Path(path)
    config = ModelConfig.from_hf(path)
    headers = read_headers(path) if path.is_dir() else {}
    count = census(config)
    if headers:
        expected = _expected(config, headers)
        storage = _tally((name, stored.shape, stored.dtype) for name, stored in headers.items())
    else:
        expected, storage = {}, _storage_of_config(config, count)
    return Inspection(
        path=str(path),
        source="headers" if headers else "config",
        config=config,
        census=count,
        tensors=storage.tensors,
        elements_by_dtype=storage.elements,
        bytes_by_dtype=storage.bytes,
        unknown_fields=config.unknown_fields,
        missing=tuple(name for name in expected if name not in headers),
        unexpected=tuple(name for name in headers if name not in expected),
        mismatched=tuple(
            f"{name}: {list(headers[name].shape)} in the file, {list(shape)} by the config"
            for name, shape in expected.items()
            if name in headers and headers[name].shape != shape
        ),
    )


def _expected(config: ModelConfig, headers: Mapping[str, Stored]) -> dict[str, tuple[int, ...]]:
    """Names and shapes the files should hold. The files say which weights are FP8; those need a scale."""
    expected: dict[str, tuple[int, ...]] = {}
    fused = {name: shape for name, shape in memory_shapes(config) if ".mlp.experts." in name and name in headers}
    for piece in layout(config):
        if piece.memory in fused:  # one tensor for all experts, as transformers 5 holds them
            expected[piece.memory] = fused[piece.memory]
            if headers[piece.memory].dtype == "F8_E4M3" and piece.memory + SCALE in headers:
                expected[piece.memory + SCALE] = headers[piece.memory + SCALE].shape
            continue
        expected[piece.disk] = piece.shape
        stored, scale = headers.get(piece.disk), piece.disk + SCALE
        if stored.dtype == "F8_E4M3" if stored else scale in headers:
            expected[scale] = scale_shape(piece.shape)
    return expected


def _storage_of_config(config: ModelConfig, count: Census) -> Storage:
    """What the files of a config.json will hold, by the quantisation and dtype it names."""
    if (config.extra.get("quantization_config") or {}).get("quant_method") == "fp8":
        return count.fp8
    dtype = {"float32": "F32", "float16": "F16"}.get(str(config.extra.get("torch_dtype")), "BF16")
    return count.bf16 if dtype == "BF16" else _tally(disk_tensors(config, False, dtype))


def _table(found: Inspection) -> dict[str, dict[str, int | float | str | None]]:
    config, count = found.config, found.census
    dense = min(config.first_k_dense_replace, config.num_hidden_layers)
    groups = f"{config.topk_group} of {config.n_group} groups"
    rope = config.rope_scaling
    return {
        "layers": {
            "dense": dense,
            "with experts": config.num_hidden_layers - dense,
            "MTP": config.num_nextn_predict_layers,
            "width": config.hidden_size,
            "dense MLP width": config.intermediate_size,
            "vocabulary": config.vocab_size,
        },
        "attention (MLA)": {
            "heads": config.num_attention_heads,
            "query rank": config.q_lora_rank,
            "key-value rank": config.kv_lora_rank,
            "head size nope / rope / v": f"{config.qk_nope_head_dim} / {config.qk_rope_head_dim} / {config.v_head_dim}",
            "context": config.max_position_embeddings,
            "RoPE": f"theta {config.rope_theta:g}"
            + (f", YaRN x{rope.factor:g} from {rope.original_max_position_embeddings}" if rope else ""),
            "softmax scale": config.softmax_scale,
        },
        "experts": {
            "routed": config.n_routed_experts,
            "a token": f"{config.num_experts_per_tok} from {groups}",
            "shared": config.n_shared_experts,
            "width": config.moe_intermediate_size,
            "routed scaling": config.routed_scaling_factor,
        },
        "parameters": {
            **count.parts,
            "total": count.total,
            "active a token": count.active,
            "active without embedding": count.active_without_embedding,
            "MTP": count.mtp,
            "MTP active a token": count.mtp_active,
        },
        "on disk" if found.source == "headers" else "on disk (computed)": {
            "tensors": found.tensors,
            **{f"bytes {dtype}": size for dtype, size in found.bytes_by_dtype.items()},
            "bytes": sum(found.bytes_by_dtype.values()),
        },
        "cache, bytes a token (bfloat16)": {
            "main layers": count.cache_bytes_per_token,
            "with MTP": count.cache_bytes_per_token_with_mtp,
        },
        "training": {"FLOPs a token at 4,096, causal": int(training_flops_per_token(config, 4096, causal=True))},
        "to note": {
            name: f"{len(names)}: {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}"
            for name, names in (
                ("config fields not used", found.unknown_fields),
                ("tensors missing", found.missing),
                ("tensors unexpected", found.unexpected),
                ("tensors of another shape", found.mismatched),
            )
            if names
        },
    }
