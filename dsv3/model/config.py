"""ModelConfig: one frozen description of a DeepSeek-V3-architecture model, and its Hugging Face form.

Field names are those of the published config.json, so `from_hf` and `to_hf` are the identity on them. What is fixed in
the architecture (sigmoid scores, noaux_tc selection, SwiGLU, no biases, every layer after the dense ones MoE) is no
field here: a config.json that asks for something else is refused. Fields of a config.json that we do not know are kept
in `extra`, named by `unknown_fields`, and written back; our own configs have no such door.

Sources: DeepSeek-V3 technical report (arXiv 2412.19437) sections 2.1, 4.2; the published config.json.
Does not: hold run settings (learning rate, sequence length, balance coefficients); those belong to the trainer.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class YarnConfig:
    """YaRN context extension, as in `rope_scaling` of config.json (arXiv 2309.00071; V3 report section 4.3)."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32
    beta_slow: float = 1
    mscale: float = 1.0
    mscale_all_dim: float = 0.0

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise ValueError(f"YaRN factor {self.factor} shortens the context: give a factor >= 1, or no rope_scaling")
        if self.original_max_position_embeddings < 1:
            raise ValueError(
                f"YaRN original_max_position_embeddings is {self.original_max_position_embeddings}: give the context "
                "length the model was pre-trained with (4096 for V3)"
            )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and constants of the model; checked when built. Defaults are DeepSeek-V3-0324 itself (671B)."""

    vocab_size: int = 129280
    hidden_size: int = 7168
    intermediate_size: int = 18432
    moe_intermediate_size: int = 2048
    num_hidden_layers: int = 61
    num_nextn_predict_layers: int = 1
    num_attention_heads: int = 128
    q_lora_rank: int | None = 1536
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    n_routed_experts: int = 256
    num_experts_per_tok: int = 8
    n_shared_experts: int = 1
    n_group: int = 8
    topk_group: int = 4
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5
    first_k_dense_replace: int = 3
    max_position_embeddings: int = 163840
    rope_theta: float = 10000.0
    rope_scaling: YarnConfig | None = YarnConfig(
        factor=40, original_max_position_embeddings=4096, beta_fast=32, beta_slow=1, mscale=1.0, mscale_all_dim=1.0
    )
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    bos_token_id: int | None = 0
    eos_token_id: int | tuple[int, ...] | None = 1
    pad_token_id: int | None = None
    tie_word_embeddings: bool = False
    # The rest of a checkpoint's config.json. It describes no model, so two configs that differ only here are equal.
    extra: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._check_types()
        self._check_signs()
        if self._has_experts:
            self._check_routing()
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim {self.qk_rope_head_dim} is odd: RoPE turns pairs; give an even number")
        if self.tie_word_embeddings:
            raise ValueError(
                "tie_word_embeddings true is not part of this architecture: the head has a weight of its own; set false"
            )

    @property
    def _has_experts(self) -> bool:
        return self.first_k_dense_replace < self.num_hidden_layers or self.num_nextn_predict_layers > 0

    def _check_types(self) -> None:
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            kinds = {"int": (int,), "float": (int, float), "bool": (bool,)}.get(str(f.type))
            if kinds and (not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)):
                raise ValueError(f"{f.name} is {value!r}: it must be of type {f.type}")

    def _check_signs(self) -> None:
        positive = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
        positive += ["kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"]
        positive += ["max_position_embeddings", "rope_theta", "rms_norm_eps"]
        if self._has_experts:
            positive += ["moe_intermediate_size", "n_routed_experts", "num_experts_per_tok", "n_group", "topk_group"]
        for name in positive:
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be positive")
        for name in ("num_nextn_predict_layers", "n_shared_experts", "first_k_dense_replace"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must not be negative")
        if self.q_lora_rank is not None and self.q_lora_rank <= 0:
            raise ValueError(f"q_lora_rank is {self.q_lora_rank}: give a positive rank, or null for a plain query")

    def _check_routing(self) -> None:
        experts, groups = self.n_routed_experts, self.n_group
        if experts % groups:
            raise ValueError(
                f"n_routed_experts {experts} is not divisible by n_group {groups}: groups hold equally many experts; "
                f"change one, for example n_routed_experts={math.ceil(experts / groups) * groups}"
            )
        if groups > 1 and experts // groups < 2:
            raise ValueError(
                f"n_routed_experts {experts} in n_group {groups} leaves {experts // groups} expert a group: "
                "a group's score is the sum of its two best; give at least 2 a group"
            )
        if not 1 <= self.topk_group <= groups:
            raise ValueError(f"topk_group {self.topk_group} must be between 1 and n_group {groups}")
        reachable = experts // groups * self.topk_group
        if self.num_experts_per_tok > reachable:
            raise ValueError(
                f"num_experts_per_tok {self.num_experts_per_tok} exceeds the {reachable} experts of {self.topk_group} "
                f"groups ({experts} experts in {groups} groups): raise topk_group or lower num_experts_per_tok"
            )

    # -- derived ------------------------------------------------------------------------------------------------------

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def num_layers_with_mtp(self) -> int:
        """Layers on disk: the main ones, then one for each MTP depth."""
        return self.num_hidden_layers + self.num_nextn_predict_layers

    @property
    def softmax_scale(self) -> float:
        """qk_head_dim^-0.5, times mscale(mscale_all_dim)^2 under YaRN (0.13523 for V3)."""
        scale = self.qk_head_dim**-0.5
        if self.rope_scaling is not None and self.rope_scaling.mscale_all_dim:
            scale *= yarn_mscale(self.rope_scaling.factor, self.rope_scaling.mscale_all_dim) ** 2
        return scale

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        eos = self.eos_token_id
        return () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)

    @property
    def unknown_fields(self) -> tuple[str, ...]:
        """Fields of the config.json this was read from that dsv3 does not use; they are kept and written back."""
        return tuple(sorted(set(self.extra) - _FILE_FIELDS))

    def is_moe(self, layer: int) -> bool:
        """Whether decoder layer `layer` (MTP layers included) routes to experts."""
        return layer >= min(self.first_k_dense_replace, self.num_hidden_layers)

    # -- Hugging Face -------------------------------------------------------------------------------------------------

    @classmethod
    def from_hf(cls, source: str | Path | Mapping[str, Any]) -> ModelConfig:
        """Read a DeepseekV3 config.json: a path to it, to its folder, or its content.

        Accepts `rope_scaling` (published files) and `rope_parameters` (transformers 5). Missing fields take the
        defaults of transformers' DeepseekV3Config, not ours: that is what the file means elsewhere; but a file silent
        about MTP layers has none. Unknown fields are kept in `extra`.

        Raises:
            ValueError: the file asks for something outside the architecture, or holds sizes that do not fit together.
        """
        return cls(**_fields_from_hf(_read_json(source)))

    def to_hf(self, **overrides: Any) -> dict[str, Any]:
        """The content of config.json: every field explicit, as transformers, vLLM and SGLang read it."""
        out: dict[str, Any] = {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", **_FIXED_IN_HF}
        for f in dataclasses.fields(self):
            if f.name not in ("extra", "rope_scaling"):
                out[f.name] = getattr(self, f.name)
        if isinstance(self.eos_token_id, tuple):
            out["eos_token_id"] = list(self.eos_token_id)
        out["num_key_value_heads"] = self.num_attention_heads
        rope = self.rope_scaling
        out["rope_scaling"] = None if rope is None else {"type": "yarn", **dataclasses.asdict(rope)}
        return {**out, "torch_dtype": "bfloat16", "use_cache": True, **self.extra, **overrides}


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's attention temperature 0.1·mscale·ln(factor) + 1 (report section 4.3)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 and mscale else 1.0


# Architecture constants that config.json spells out. Another value means another model, so it is refused.
_FIXED_IN_HF: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "moe_layer_freq": 1,
    "rope_interleave": True,
}
# What a config.json means that leaves the field out, where it is not V3's value: the defaults of transformers 5.23's
# DeepseekV3Config; except that it defaults to one MTP layer, while files without the field come from code without MTP.
_HF_DEFAULTS: dict[str, Any] = {"max_position_embeddings": 4096, "num_nextn_predict_layers": 0, "rope_scaling": None}
# About the file rather than the model: kept like unknown fields, but used (by weights and census), so not unknown.
_FILE_FIELDS = {"torch_dtype", "use_cache", "quantization_config"}
# Known to the file format, without meaning for this model: derived here, or belonging to the framework that wrote them.
_DERIVED_IN_HF = {"architectures", "model_type", "num_key_value_heads", "qk_head_dim", "head_dim", "rope_parameters"}
_ALIASES = {
    "num_mtp_layers": "num_nextn_predict_layers",
    "num_local_experts": "n_routed_experts",
    "dtype": "torch_dtype",  # transformers 5
}


def _read_json(source: str | Path | Mapping[str, Any]) -> Mapping[str, Any]:
    if isinstance(source, Mapping):
        return source
    path = Path(source)
    path = path / "config.json" if path.is_dir() else path
    if not path.exists():
        raise ValueError(f"no config at {path}: give a config.json or a folder that holds one")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): the file is damaged; fetch it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a JSON {type(content).__name__}, not an object: this is no model's config.json")
    return content


def _fields_from_hf(content: Mapping[str, Any]) -> dict[str, Any]:
    raw = dict(content)
    kind = raw.get("model_type", "deepseek_v3")
    if kind not in ("deepseek_v3", "kimi_k2"):
        raise ValueError(f"model_type is {kind!r}, not 'deepseek_v3': dsv3 is one architecture, this is another")
    for name, fixed in _FIXED_IN_HF.items():
        if raw.pop(name, fixed) != fixed:
            raise ValueError(f"{name} is {content[name]!r}, DeepSeek-V3 has {fixed!r}: another architecture")
    heads = raw.get("num_attention_heads", ModelConfig.num_attention_heads)
    if raw.get("num_key_value_heads") not in (None, heads):
        raise ValueError(
            f"num_key_value_heads {raw['num_key_value_heads']} is not num_attention_heads {heads}: MLA has one each"
        )
    rope = _rope_fields(raw)
    for alias, name in _ALIASES.items():
        if alias in raw:
            raw.setdefault(name, raw.pop(alias))
    known = {f.name for f in dataclasses.fields(ModelConfig)} - {"extra"}
    fields = {**_HF_DEFAULTS, **{k: v for k, v in raw.items() if k in known}, **rope}
    if isinstance(fields.get("eos_token_id"), list):
        fields["eos_token_id"] = tuple(fields["eos_token_id"])
    fields["extra"] = {k: v for k, v in raw.items() if k not in known and k not in _DERIVED_IN_HF}
    return fields


def _rope_fields(raw: dict[str, Any]) -> dict[str, Any]:
    """rope_theta and YaRN from either spelling; transformers 5 moves both into `rope_parameters`."""
    parameters = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    parameters = dict(parameters)
    theta = parameters.pop("rope_theta", raw.get("rope_theta", 10000.0))
    kind = parameters.pop("rope_type", parameters.pop("type", "default"))
    parameters.pop("type", None)
    out: dict[str, Any] = {"rope_theta": float(theta), "rope_scaling": None}
    if kind == "yarn":
        known = {f.name for f in dataclasses.fields(YarnConfig)}
        unknown = sorted(set(parameters) - known - {"partial_rotary_factor", "attention_factor", "truncate"})
        if unknown or parameters.get("attention_factor") is not None or parameters.get("truncate", True) is not True:
            raise ValueError(f"rope_scaling holds {parameters}: dsv3 knows the YaRN fields {sorted(known)} only")
        given = {k: v for k, v in parameters.items() if k in known and v is not None}
        bad = {k: v for k, v in given.items() if isinstance(v, bool) or not isinstance(v, (int, float))}
        if bad or not {"factor", "original_max_position_embeddings"} <= set(given):
            raise ValueError(
                f"rope_scaling is {parameters}: yarn needs numbers: factor, original_max_position_embeddings"
            )
        out["rope_scaling"] = YarnConfig(**given)
    elif kind != "default":
        raise ValueError(f"rope type is {kind!r}: this architecture uses plain RoPE ('default') or 'yarn'")
    return out
