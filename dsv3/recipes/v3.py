"""DeepSeek-V3 itself: 671B parameters, 14.8T tokens, 2,048 H800. Config, no code: `dsv3 plan v3`, and launch/ starts it.

    pre-training   rows 3,072 -> 15,360 over the first 469B tokens, 4,096 tokens each; rate 0 -> 2.2e-4 in 2,000 steps, constant
                   to 10T, cosine to 2.2e-5 at 14.3T, 2.2e-5 for 333B, 7.3e-6 for 167B; gamma 0.001, then 0 for the last 500B;
                   MTP weight 0.3 to 10T, then 0.1                                                     (report section 4.2)
    extension      1,000 steps of 1,920 rows of 32K, 1,000 of 480 rows of 128K                         (4.3)
    fine-tuning    1.5M conversations, twice; their length is not published, 4,096 tokens are assumed   (5.1)
    layout         pipeline 16 x expert 64 over 8 nodes, ZeRO-1 over 128 data ranks, no tensor parallelism (3.2)

The schedule counts steps and the report tokens: the shares below are those of the step at which so many tokens are read. How fine
the report's ramp was is not published; here every data rank gets equally many rows. Its first steps have 24 micro-batches a
rank, and DualPipeV on 16 ranks takes no fewer than 32; what ZB-V promises of weights' gradients does not fit an H800 (92 GiB on
the last rank: plan/memory.py). So the pipeline runs 1F1B.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsv3.model.config import ModelConfig
from dsv3.parallel.degrees import ParallelConfig
from dsv3.plan.job import Job, Phase
from dsv3.train.optim import ScheduleConfig
from dsv3.train.trainer import TrainConfig

MODEL = ModelConfig(initializer_range=0.006)
SEQ_LEN = 4096
FIRST_ROWS, ROWS = 3072, 15360
RAMP_TOKENS, TOKENS = 469e9, 14.8e12
RAMP_STEPS = RAMP_TOKENS / (SEQ_LEN * (FIRST_ROWS + ROWS) / 2)
STEPS = round(RAMP_STEPS + (TOKENS - RAMP_TOKENS) / (SEQ_LEN * ROWS))


def share(tokens: float) -> float:
    """Share of the steps at which so many tokens are read (behind the ramp)."""
    return (RAMP_STEPS + (tokens - RAMP_TOKENS) / (SEQ_LEN * ROWS)) / STEPS


@dataclass(frozen=True, kw_only=True)
class EvenRamp(ScheduleConfig):
    """ScheduleConfig whose batches divide over the data ranks."""

    data_ranks: int

    def rows(self, step: int) -> int:
        return (super().rows(step) + self.data_ranks // 2) // self.data_ranks * self.data_ranks


SCHEDULE = EvenRamp(
    data_ranks=128,
    steps=STEPS,
    peak_lr=2.2e-4,
    warmup_steps=2000,
    constant_until=share(10e12),
    cosine_until=share(14.3e12),
    second_constant_from=share(14.633e12),
    batch_size=ROWS,
    batch_ramp_from=FIRST_ROWS,
    batch_ramp_until=RAMP_STEPS / STEPS,
    gamma=1e-3,
    mtp_weight=0.3,
)
TRAIN = TrainConfig(schedule=SCHEDULE, seq_len=SEQ_LEN, micro_batch=1, precision="fp8", save_every=200)
PARALLEL = ParallelConfig(pipeline=16, expert=64, sharding="zero1", schedule="1f1b")
PHASES = (
    Phase(name="extension to 32K", tokens=1000 * 1920 * 32768, seq_len=32768, rows=1920),
    Phase(name="extension to 128K", tokens=1000 * 480 * 131072, seq_len=131072, rows=480),
    Phase(name="fine-tuning", tokens=2 * 1.5e6 * 4096, seq_len=4096, rows=ROWS),
)


def job() -> Job:
    return Job(name="v3", model=MODEL, train=TRAIN, parallel=PARALLEL, phases=PHASES, gpus=2048)
