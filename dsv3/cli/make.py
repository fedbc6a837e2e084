"""Verbs that make things: `run` a recipe, `tokenizer`, `pretrain`."""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from dsv3.cli.console import checkpoint_of, document_bars, open_sides, open_tokenizer, print_table, together
from dsv3.parallel.degrees import ParallelConfig

if TYPE_CHECKING:
    from dsv3.model.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class Run:
    """Run a whole recipe. `dsv3 run tiny` trains a small, complete DeepSeek-V3 on this machine in under fifteen minutes:
    corpus, tokenizer, pre-training with MTP and aux-loss-free balance, then SFT, distillation and RL on sums and words to spell
    backward, evaluation, report.html. Interrupt it and give the same command again: it goes on where it was."""

    recipe: tyro.conf.Positional[Literal["tiny"]]
    out: Path = Path("runs/tiny")
    """Folder of the run."""
    data: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """PATH or NAME=WEIGHT:PATH[,PATH]; repeat for a mixture. None: the Python standard library's sources and docs."""
    steps: int = 360
    """Optimizer steps; 16 rows of 256 tokens each."""
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class TokenizerVerb:
    """Train a byte-level BPE tokenizer with V3's splitting and special tokens, or fetch the official one.
    Example: dsv3 tokenizer --data my_texts/ --vocab-size 8192 --out tok/"""

    out: Path
    """Folder for tokenizer.json and tokenizer_config.json."""
    data: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Texts to train on; none: the Python standard library."""
    vocab_size: int = 4096
    official: bool = False
    """Write DeepSeek-V3's own (needs: pip install 'dsv3[tokenizer]') instead of training."""


@dataclass(frozen=True, kw_only=True)
class Pretrain:
    """Pre-train from shards (made by `dsv3 data`). Resumes when the folder holds a checkpoint.
    Example: dsv3 pretrain --shards shards/ --tokenizer tok/ --model model.json --steps 2000 --out runs/mine
    model.json holds the fields of ModelConfig you want other than the tiny recipe's, as in a config.json.
    On several processes: torchrun --standalone --nproc-per-node 4 -m dsv3.cli pretrain --parallel.expert 4 ...
    --max-restarts 3 brings a run back from its last checkpoint when a process dies; it may go on with other degrees."""

    shards: Path
    """What `dsv3 data` wrote."""
    tokenizer: str
    """A folder with tokenizer.json, or `official`."""
    out: Path
    """Folder of the run: checkpoints, metrics.jsonl, TensorBoard, report.html."""
    model: Path | None = None
    """JSON of sizes; unknown fields are an error. None: the tiny recipe's model."""
    steps: int = 1000
    batch_size: int = 16
    """Rows of an optimizer step."""
    micro_batch: int = 16
    """Rows of one forward; the rest is accumulated."""
    seq_len: int = 256
    peak_lr: float = 4e-3
    warmup_steps: int = 30
    precision: Literal["bfloat16", "float32", "fp8"] = "bfloat16"
    """Of the products. fp8 is the report's recipe, computed in FP8 or emulated exactly, as the machine can."""
    mask_documents: bool = False
    recompute: bool = False
    compile: bool = False
    """torch.compile the layers; about a minute to start, and needs a C++ compiler (CPU) or Triton (GPU)."""
    save_every: int = 100
    keep_last: int = 2
    seed: int = 0
    extend: Path | None = None
    """Make the context of this checkpoint longer instead: YaRN, then the report's two phases on longer rows."""
    extend_lengths: tuple[int, ...] = (32768, 131072)
    """Tokens a row in each phase; --steps are of each."""
    extend_factor: float = 40.0
    extend_lr: float = 7.3e-6
    """Constant over both phases: pre-training's last; a small model wants more."""
    device: str = "cpu"
    parallel: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)


def run(verb: Run) -> None:
    from dsv3.recipes import tiny

    config = tiny.TinyConfig(**{f.name: getattr(verb, f.name) for f in dataclasses.fields(verb) if f.name != "recipe"})
    results = tiny.run(config, say=lambda text: print(text, flush=True), bars=document_bars)
    samples = results.pop("samples")
    for sample in samples[:3]:
        print(f"\n>>> {sample['prompt']!r}\n{sample['prompt']}{sample['text']}")
    print_table("results", [(name, value) for name, value in results.items()])
    print("next:\n" + "\n".join("  " + step for step in tiny.next_steps(verb.out)))


def tokenizer(verb: TokenizerVerb) -> None:
    from dsv3.data.corpus import standard_library
    from dsv3.data.tokenizer import Tokenizer
    from dsv3.recipes.corpus import parse_sources, read_texts

    if verb.official:
        tokenizer = Tokenizer.official()
    else:
        texts = read_texts(parse_sources(verb.data) or standard_library())
        corpus = (text for source in texts.train.values() for text in source)
        tokenizer = Tokenizer.train(corpus, verb.vocab_size, progress=sys.stderr.isatty())
    tokenizer.save(verb.out)
    print(f"{tokenizer.vocab_size:,} tokens in {verb.out}, fingerprint {tokenizer.fingerprint[:12]}")


def _extend(verb: Pretrain) -> None:
    """A step reads --batch-size rows of the longest length, and as many tokens in every phase."""
    from dsv3.data.shards import open_shards
    from dsv3.train.extend import ExtendConfig, extend_from_shards, longer

    assert verb.extend is not None
    plain = {field.name: field.default for field in dataclasses.fields(Pretrain)}
    for name in (
        "model",
        "micro_batch",
        "seq_len",
        "peak_lr",
        "warmup_steps",
        "mask_documents",
        "recompute",
        "compile",
    ):
        if getattr(verb, name) != plain[name]:
            raise ValueError(
                f"--extend takes no --{name.replace('_', '-')} ({getattr(verb, name)}): the model is the checkpoint's, rows are of "
                "--extend-lengths, one at a time and computed again, at --extend-lr; leave it out"
            )
    config = ExtendConfig(
        lengths=verb.extend_lengths, steps=verb.steps, step_tokens=verb.batch_size * verb.extend_lengths[-1],
        lr=verb.extend_lr, factor=verb.extend_factor, precision=verb.precision, seed=verb.seed, save_every=verb.save_every,
        keep_last=verb.keep_last,
    )  # fmt: skip
    shards, tokenizer = open_shards(verb.shards / "train"), open_tokenizer(verb.tokenizer)
    start = checkpoint_of(verb.extend)
    with together(verb.parallel, longer(start, config), verb.device) as mesh:
        leads = mesh is None or mesh.leads
        newest = extend_from_shards(
            start,
            config,
            shards,
            tokenizer,
            verb.out,
            device=verb.device,
            mesh=mesh,
            say=print if leads else lambda text: None,
        )
        if leads:
            print(newest)


def pretrain(verb: Pretrain) -> None:
    if verb.extend is not None:
        _extend(verb)
        return
    from dsv3.recipes.tiny import MODEL
    from dsv3.train.optim import ScheduleConfig
    from dsv3.train.pretrain import build_trainer
    from dsv3.train.report import write_report
    from dsv3.train.trainer import TrainConfig

    tokenizer = open_tokenizer(verb.tokenizer)
    model = dataclasses.replace(
        _model_config(verb.model, MODEL), vocab_size=max(MODEL.vocab_size, tokenizer.vocab_size)
    )
    schedule = ScheduleConfig(
        steps=verb.steps, peak_lr=verb.peak_lr, warmup_steps=verb.warmup_steps, batch_size=verb.batch_size
    )
    shared = {f.name for f in dataclasses.fields(TrainConfig)} & {f.name for f in dataclasses.fields(Pretrain)}
    config = TrainConfig(schedule=schedule, **{name: getattr(verb, name) for name in shared})
    train, held = open_sides(verb.shards)
    with together(verb.parallel, model, verb.device) as mesh:
        trainer = build_trainer(
            model, config, train, tokenizer, verb.out, held_out=held, device=verb.device, mesh=mesh
        )  # fmt: skip
        trainer.run()
        results = {"held-out bits per byte": trainer.bits_per_byte()} if held else {}
        if trainer.workers.leads:
            sections = {"model": model.to_hf(), "training": dataclasses.asdict(config)}
            if mesh is not None:
                sections["processes"] = {"world": mesh.world, **dataclasses.asdict(mesh.config)}
            report = write_report(verb.out, title="dsv3 pretrain", config=sections, samples=[], results=results)
            print(f"report: {report}")


def _model_config(path: Path | None, base: ModelConfig) -> ModelConfig:
    """`base` with the fields of our own JSON file; an unknown field is an error, unlike in a checkpoint's config.json."""
    if path is None:
        return base
    if not path.exists():
        raise ValueError(f"--model {path} does not exist: give a JSON file of ModelConfig fields")
    config = type(base).from_hf({**base.to_hf(), **json.loads(path.read_text(encoding="utf-8"))})
    unknown = set(config.extra) - {"torch_dtype", "use_cache"}
    if unknown:
        known = sorted(f.name for f in dataclasses.fields(base) if f.name != "extra")
        raise ValueError(f"--model {path} has unknown fields {sorted(unknown)}: known are {', '.join(known)}")
    return dataclasses.replace(config, extra={})
