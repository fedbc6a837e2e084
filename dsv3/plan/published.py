"""What others published of trainings and deployments of this architecture, and what the planner says of the same.

    kept_of(run)   published rate / rate that the kernels' rates alone would give: what that run kept of them
    KEPT           the median of all (hardware.py); a run is predicted with the median of the OTHERS in `held_out`

A benchmark that forces the balance of its experts by handing out experts in a row sends a token to one node (Automodel's
FakeBalancedGate), which is in `neighbours`. Where a source does not say something (how much is computed again, how many
devices), it stands in `assumed`. Megatron-Bridge's configs say what it computes again (mla_up_proj), and its TFLOPS over its
tokens/s that only the B200 run has the MTP layer: 260 GFLOP a token, 249 without.
Does not: choose among them; every figure that was found with its layout is here.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from dsv3.model.census import training_flops_per_token
from dsv3.model.config import ModelConfig
from dsv3.plan.hardware import known_hardware
from dsv3.plan.serving import decode_seconds, network_bound, prefill_seconds
from dsv3.plan.step import EAGER, REPORT, Layout, StepTime, System, step_time
from dsv3.plan.timeline import lay_out

V3 = ModelConfig()
V3_WITHOUT_MTP = dataclasses.replace(V3, num_nextn_predict_layers=0)
V2 = dataclasses.replace(
    V3_WITHOUT_MTP, vocab_size=102400, hidden_size=5120, intermediate_size=12288, moe_intermediate_size=1536,
    num_hidden_layers=60, n_routed_experts=160, num_experts_per_tok=6, n_shared_experts=2, topk_group=3,
    first_k_dense_replace=1,
)  # fmt: skip
KIMI_K2 = dataclasses.replace(
    V3_WITHOUT_MTP, vocab_size=163840, num_attention_heads=64, n_routed_experts=384, n_group=1, topk_group=1,
    first_k_dense_replace=1,
)  # fmt: skip
_NEIGHBOURS = dataclasses.replace(EAGER, neighbours=True)
_SHARED = dataclasses.replace(EAGER, behind_shared="both")
_UP_AGAIN = dataclasses.replace(EAGER, up_again=True)
FLASH_ATTENTION_2 = (319e12, 269e12)
"""On an H100, causal, 128 a head, 4K (FlashAttention-3's figures 5 and 6; backward as for hardware.py's)."""


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """A published training rate, tokens a second and device."""

    name: str
    model: ModelConfig
    hardware: str
    system: System
    layout: Layout
    rows: int
    precision: str
    rate: float
    source: str
    assumed: str = ""
    seq_len: int = 4096
    attention: tuple[float, float] | None = None
    """Its attention's rates, where the source names older kernels than the hardware's."""


def _interleaved(
    gpus: int, pipeline: int, expert: int, chunks: int, recompute: bool = False, rounds: int = 1
) -> Layout:
    return Layout(
        gpus=gpus, pipeline=pipeline, expert=expert, schedule="interleaved", chunks=chunks, recompute=recompute, rounds=rounds
    )  # fmt: skip


_AUTOMODEL = "NVIDIA NeMo Automodel, docs/performance-summary.md at 01926a5c and its benchmark configs"
_BRIDGE = "NVIDIA Megatron-Bridge 25.11, docs/performance-summary.md at 00b7660b"
_V2_GPUS = "the number of devices (2,048)"
RUNS = (
    TrainingRun(
        name="DeepSeek-V3, 2,048 H800", model=V3, hardware="h800", system=REPORT, rows=15360, precision="fp8", rate=1541.7,
        layout=Layout(gpus=2048, pipeline=16, expert=64, schedule="dualpipe"),
        source="V3 report table 1 (180K GPU-hours a trillion tokens); ISCA'25 table 4 (19.926 s a step)",
    ),
    TrainingRun(
        name="DeepSeek-V2, H800", model=V2, hardware="h800", system=_SHARED, rows=9216, precision="bfloat16",
        rate=1e12 / (172.8e3 * 3600), layout=Layout(gpus=2048, pipeline=16, expert=8, schedule="zb1p"),
        source="V2 report (arXiv 2405.04434) sections 3.1.3 (shared experts behind the all-to-all, FlashAttention-2) and 3.2.3 "
        "(172.8K GPU-hours a trillion tokens)", assumed=_V2_GPUS, attention=FLASH_ATTENTION_2,
    ),
    TrainingRun(
        name="V3 in Automodel, 1,024 H100", model=V3_WITHOUT_MTP, hardware="h100", system=_NEIGHBOURS, rows=8192,
        precision="bfloat16", rate=865, layout=_interleaved(1024, 4, 64, 8, recompute=True, rounds=4), source=_AUTOMODEL,
    ),
    TrainingRun(
        name="V3 in Automodel, 256 H100", model=V3_WITHOUT_MTP, hardware="h100", system=_NEIGHBOURS, rows=512,
        precision="bfloat16", rate=1002, layout=_interleaved(256, 4, 64, 8, recompute=True), source=_AUTOMODEL,
    ),
    TrainingRun(
        name="Kimi K2 in Automodel, 256 H100", model=KIMI_K2, hardware="h100", system=_NEIGHBOURS, rows=512,
        precision="bfloat16", rate=924, layout=_interleaved(256, 8, 32, 4, recompute=True, rounds=2), source=_AUTOMODEL,
    ),
    TrainingRun(
        name="V3 in Megatron-Bridge, 256 B200, FP8", model=V3, hardware="b200", system=EAGER, rows=2048,
        precision="fp8", rate=2139, layout=Layout(gpus=256, pipeline=16, expert=8), source=_BRIDGE,
    ),
    TrainingRun(
        name="V3 in Megatron-Bridge, 256 GB200, BF16", model=V3_WITHOUT_MTP, hardware="gb200", system=_UP_AGAIN,
        rows=4096, precision="bfloat16", rate=3139, layout=_interleaved(256, 4, 64, 4), source=_BRIDGE,
    ),
    TrainingRun(
        name="V3 in Megatron-Bridge, 256 GB200, FP8", model=V3_WITHOUT_MTP, hardware="gb200", system=EAGER, rows=4096,
        precision="fp8", rate=4018, layout=_interleaved(256, 8, 32, 4), source=_BRIDGE,
    ),
)  # fmt: skip


def time_of(run: TrainingRun, kept: float) -> StepTime:
    """A step of the run, if it keeps that share of its kernels' rates."""
    hardware = dataclasses.replace(known_hardware()[run.hardware], kept=kept)
    if run.attention:
        hardware = dataclasses.replace(hardware, attention=run.attention)
    return step_time(
        run.model, run.layout, hardware, run.system, rows=run.rows, seq_len=run.seq_len, precision=run.precision
    )


def rate_of(run: TrainingRun, kept: float) -> float:
    """Tokens a second and device that the planner gives the run, if it keeps that share."""
    time = time_of(run, kept)
    return run.rows * run.seq_len / run.layout.gpus / time.seconds


def kept_of(run: TrainingRun) -> float:
    """What the run kept of its kernels' rates."""
    return run.rate / rate_of(run, 1.0)


@dataclass(frozen=True)
class Comparison:
    """A published figure and ours."""

    name: str
    published: float
    ours: float
    unit: str
    source: str

    @property
    def error(self) -> float:
        return self.ours / self.published - 1


def held_out(runs: Sequence[TrainingRun] = RUNS) -> list[Comparison]:
    """Each run predicted with the median share that the other runs kept."""
    shares = [kept_of(run) for run in runs]
    found = []
    for index, run in enumerate(runs):
        others = statistics.median(shares[:index] + shares[index + 1 :])
        found.append(Comparison(run.name, run.rate, rate_of(run, others), "tokens/s a device", run.source))
    return found


def all_comparisons() -> list[Comparison]:
    """Every published figure that the planner has an answer to."""
    return [*held_out(), *report_run(), *step_of_the_report(), *deployments()]


def report_run(runs: Sequence[TrainingRun] = RUNS) -> list[Comparison]:
    """The V3 report's table 1, with the share that the run itself, the first, did not help to set."""
    others = statistics.median([kept_of(run) for run in runs[1:]])
    ours = rate_of(runs[0], others)
    hours = 1e12 / ours / 3600
    return [Comparison("GPU-hours a trillion tokens", 180e3, hours, "GPU-hours", "V3 report section 1")]


def step_of_the_report() -> list[Comparison]:
    """What ISCA'25's table 4 counts of the report's step."""
    run, hardware = RUNS[0], known_hardware()["h800"]
    time = time_of(run, hardware.kept)
    flops = training_flops_per_token(run.model, run.seq_len, causal=True)
    source = "ISCA'25 table 4"
    return [
        Comparison("seconds of a step", 19.926, time.seconds, "s", source),
        *(
            Comparison(f"of it {name}", ISCA[name], ours, "s", source)
            for name, ours in parts_of(time, run.layout).items()
        ),
        Comparison("TFLOPS a device, causal", 385.0, run.rate * flops / 1e12, "TFLOPS at the published rate", source),
    ]


ISCA = {"1F": 1.13, "1B": 1.99, "1W": 0.48, "1F1B": 13.95, "bubble": 2.06, "opt": 0.29}
"""Its parts of a step, in seconds: forwards, backwards and weights' gradients that run alone, pairs of a forward and a backward,
idle time, optimizer. They add up to 19.90 of 19.926 s: they are a step's sums on a rank, not one micro-batch's times."""


def parts_of(time: StepTime, layout: Layout) -> dict[str, float]:
    """Ours of the same names: of a rank on average, in the schedule's order."""
    blocks, ranks = lay_out(time.schedule, layout.pipeline, time.micro_batches, time.passes), layout.pipeline
    names = {"F": "1F", "I": "1B", "B": "1B", "W": "1W", "FB": "1F1B"}
    parts = dict.fromkeys(ISCA, 0.0)
    for block in blocks:
        parts[names[block.kind]] += block.seconds / ranks
    parts["bubble"] = max(block.end for block in blocks) - sum(parts.values())
    parts["opt"] = time.exchange + time.optimizer
    return parts


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """A published serving rate a node of eight. batch 0: prefill."""

    name: str
    hardware: str
    devices: int
    batch: int
    context: int
    rate: float
    source: str


_LMSYS = "SGLang on 96 H100 (LMSYS, 5 May 2025): 2,000-token inputs"
DEPLOYMENTS = (
    Deployment(name="SGLang prefill, EP32", hardware="h100", devices=32, batch=0, context=2000, rate=52300 / 8, source=_LMSYS),
    Deployment(
        name="SGLang decode, EP72, 256 requests a device", hardware="h100", devices=72, batch=256, context=2050, rate=22300 / 8,
        source=_LMSYS,
    ),
    Deployment(
        name="DeepSeek's day, EP144 (of mixed load: ours is a bound)", hardware="h800", devices=144, context=4989,
        batch=round(14800 / 8 / 21), rate=14800 / 8,
        source="DeepSeek, 27 February 2025: 14.8k tokens/s a node; the batch is that over 21 a user",
    ),
)  # fmt: skip


def deployments() -> list[Comparison]:
    """Serving. The bound of ISCA'25 is arithmetic alone, and has nothing of `kept` in it."""
    found = [
        Comparison("decoding bound of 400G InfiniBand", 67.0, network_bound(V3, 50e9), "tokens/s a request", "ISCA'25")
    ]
    for case in DEPLOYMENTS:
        hardware = known_hardware()[case.hardware]
        if case.batch:
            ours = case.batch / decode_seconds(V3, hardware, case.devices, case.batch, case.context)[0]
        else:
            ours = 1 / prefill_seconds(V3, hardware, case.devices, case.context)[0]
        found.append(Comparison(case.name, case.rate, ours, "tokens/s a device", case.source))
    return found
