"""A 1.5B model for one 80 GB GPU and one day: V3's architecture and FP8 recipe at a size that one person can pay for.

`dsv3 plan mini --hardware h100 --gpus 1` says that it fits and how long it takes; launch/mini.sh starts it. Sizes: a tenth of the
parameters of Moonlight, experts as fine (8 of 64 and a shared one), a vocabulary of 32,768 to train with `dsv3 tokenizer`. Its
queries are not compressed: at this width that costs more launches than it saves.
Does not: run (the verbs `data` and `pretrain` do).
"""

from __future__ import annotations

from dsv3.model.config import ModelConfig
from dsv3.parallel.degrees import ParallelConfig
from dsv3.plan.job import Job, steps_for
from dsv3.train.optim import ScheduleConfig
from dsv3.train.trainer import TrainConfig

MODEL = ModelConfig(
    vocab_size=32768,
    hidden_size=1024,
    intermediate_size=4096,
    moe_intermediate_size=512,
    num_hidden_layers=14,
    num_nextn_predict_layers=1,
    num_attention_heads=16,
    q_lora_rank=None,
    kv_lora_rank=256,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    n_routed_experts=64,
    num_experts_per_tok=8,
    n_group=8,
    topk_group=4,
    first_k_dense_replace=1,
    max_position_embeddings=4096,
    rope_scaling=None,
    pad_token_id=2,
)
SEQ_LEN, ROWS, TOKENS = 4096, 256, 7.5e9
STEPS = steps_for(TOKENS, seq_len=SEQ_LEN, batch_size=ROWS)
TRAIN = TrainConfig(
    schedule=ScheduleConfig(steps=STEPS, peak_lr=6e-4, warmup_steps=min(500, STEPS - 1), batch_size=ROWS),
    seq_len=SEQ_LEN,
    micro_batch=4,
    precision="fp8",
    save_every=200,
)


def job() -> Job:
    return Job(name="mini", model=MODEL, train=TRAIN, parallel=ParallelConfig(), gpus=1)
