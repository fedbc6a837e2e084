"""The small model of the tests: every part of V3, trained on nothing."""

import torch

from dsv3.model.config import ModelConfig, YarnConfig
from dsv3.model.transformer import DeepseekV3

TINY = ModelConfig(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    moe_intermediate_size=16,
    num_hidden_layers=3,
    num_nextn_predict_layers=1,
    num_attention_heads=4,
    q_lora_rank=20,
    kv_lora_rank=16,
    qk_nope_head_dim=12,
    qk_rope_head_dim=8,
    v_head_dim=12,
    n_routed_experts=8,
    num_experts_per_tok=3,
    n_group=4,
    topk_group=2,
    first_k_dense_replace=1,
    max_position_embeddings=256,
    rope_scaling=YarnConfig(factor=4, original_max_position_embeddings=32, mscale_all_dim=1.0),
)


def random_model(config: ModelConfig = TINY, seed: int = 0) -> DeepseekV3:
    """Random weights large enough to matter, router biases of both signs."""
    torch.manual_seed(seed)
    model = DeepseekV3(config)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.normal_(1.0 if "norm" in name else 0.0, 0.2 if tensor.dim() == 1 else 0.1)
    return model
