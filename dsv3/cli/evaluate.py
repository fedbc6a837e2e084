"""`dsv3 eval`: benchmarks of a checkpoint or a server, and two runs compared."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from dsv3.cli.console import bytes_bar, checkpoint_of, table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from dsv3.evals.models import Model
    from dsv3.evals.tasks import Task

_HOMES = {
    "gsm8k": ("gsm8k/test.jsonl", "gsm8k.jsonl"), "humaneval": ("humaneval/HumanEval.jsonl.gz", "HumanEval.jsonl.gz"),
    "mmlu": ("mmlu", "mmlu/test"), "math": ("math", "MATH/test", "math.jsonl"), "bpb": ("text", "bpb"),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Evaluate a checkpoint, or a server with OpenAI's protocol, on local files in each benchmark's own format, by the settings of
    the report: MMLU 5-shot by likelihood, GSM8K 8-shot, MATH 4-shot, HumanEval 0-shot, needles, bits per byte; --chat asks
    as a user does. Every answer is graded by every published convention at once. Killed and called again it asks no
    finished item twice. Examples: dsv3 eval runs/tiny --tasks gsm8k humaneval --data benchmarks/ --out evals/tiny dsv3 eval
    http://127.0.0.1:8000/v1 --model tiny --tasks gsm8k --data benchmarks/ --out evals/served dsv3 eval --compare evals/tiny
    evals/served"""

    model_at: tyro.conf.Positional[str] = ""
    """A checkpoint folder, a run folder, or a URL up to and without /completions."""
    tasks: tuple[str, ...] = ()
    """Of mmlu, gsm8k, math, humaneval, needle, bpb; apart by spaces or commas."""
    data: tuple[str, ...] = ()
    """NAME=PATH for a task's file or folder (or hub:REPO@REVISION:SPLIT), or one folder that holds them under their usual names."""
    out: Path | None = None
    """Folder of a log a task and results.json."""
    chat: bool = False
    """Ask as a user, zero-shot, instead of few-shot text."""
    shots: int | None = None
    """Other than the report's."""
    shots_data: tuple[str, ...] = ()
    """NAME=PATH of the examples, where they are not beside the task's file."""
    limit: int | None = None
    """Only the first so many items."""
    samples: int = 1
    """Answers to each item, for pass@k; needs a temperature."""
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    max_tokens: int | None = None
    lengths: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
    """Of needle's contexts, in tokens; those beyond the model's context are left out."""
    isolation: Literal["auto", "namespaces", "seccomp", "best-effort", "none"] = "auto"
    """Of the sandbox for code: best-effort runs without one where there is none."""
    harness: tuple[str, ...] = ()
    """Tasks of lm-eval to run on the checkpoint through its own evaluator (needs: pip install 'dsv3[eval]')."""
    compare: tuple[Path, ...] = ()
    """Two folders of earlier runs: differences item by item, with their significance."""
    model: str = ""
    """The model's name at a URL. Its key is read from DSV3_API_KEY."""
    concurrency: int = 16
    cache_gb: float = 2.0
    dtype: Literal["bfloat16", "float32", "fp8"] = "bfloat16"
    device: str = "cpu"


def evaluate(verb: Eval) -> None:
    from dsv3.evals.sandbox import SandboxError

    verb = replace(verb, tasks=tuple(name for given in verb.tasks for name in given.split(",") if name))
    _refuse_unheard(verb)
    try:
        if verb.compare:
            _compare(verb.compare)
        elif verb.harness:
            _harness(verb)
        else:
            _run(verb)
    except SandboxError as error:
        raise ValueError(str(error)) from error


def _refuse_unheard(verb: Eval) -> None:
    """
    Raises:
        ValueError: an option was given that what is asked for does not look at.
    """
    given = {f.name for f in fields(verb) if getattr(verb, f.name) != f.default}
    engine = {"cache_gb", "dtype", "device"}
    if verb.compare:
        how, unheard = "--compare", given - {"compare"}
    elif verb.harness:
        how, unheard = "--harness", given - {"harness", "model_at", "limit", "shots"} - engine
    elif verb.model_at.startswith(("http://", "https://")):
        how, unheard = "a URL", given & (engine | {"lengths"})
    else:
        how, unheard = "a checkpoint", given & {"model", "concurrency"}
    if not unheard and "needle" not in verb.tasks:
        how, unheard = ", ".join(verb.tasks), given & {"lengths"}
    if not unheard and verb.tasks == ("needle",):
        how, unheard = "needle", given & {"data", "shots", "shots_data", "limit"}
    if unheard:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(unheard))
        raise ValueError(f"{how} does not look at {names}: leave it out")


def _run(verb: Eval) -> None:
    from dsv3.evals.models import Sampling
    from dsv3.evals.needle import draw_heat_map
    from dsv3.evals.run import read_log, run
    from dsv3.evals.run import table as rows_of
    from dsv3.evals.tasks import Tools

    if not verb.model_at or not verb.tasks or verb.out is None:
        raise ValueError("give a checkpoint or a URL, --tasks and --out; or --compare two folders")
    sampling = Sampling(samples=verb.samples, temperature=verb.temperature, top_p=verb.top_p, seed=verb.seed)
    _check_tasks(verb)
    model, tasks = _open(verb)
    tools = Tools(isolation=verb.isolation)
    try:
        with _bars() as progress:
            told = run(model, tasks, verb.out, sampling=sampling, tools=tools, progress=progress)
    finally:
        tools.close()
    _print_rows(f"{verb.model_at}: {verb.out}/results.json", rows_of(told))
    if "needle" in verb.tasks:
        print(draw_heat_map(read_log(verb.out / "needle.jsonl")[1], verb.out / "needle.png"))


def _check_tasks(verb: Eval) -> None:
    """Before a model is read: tasks and files are there."""
    for name in verb.tasks:
        if name not in (*_HOMES, "needle"):
            raise ValueError(f"--tasks has {name!r}: give of {', '.join(_HOMES)}, needle")
        if name != "needle":
            _place(name, verb.data)


def _place(name: str, data: Sequence[str]) -> str:
    """Where a task's files are."""
    for given in data:
        head, equals, path = given.partition("=")
        if equals and head == name:
            return path
    folders = [Path(given) for given in data if "=" not in given]
    for folder in folders:
        for home in _HOMES[name]:
            if (folder / home).exists():
                return str(folder / home)
    looked = ", ".join(str(folder / home) for folder in folders for home in _HOMES[name]) or "nowhere"
    raise ValueError(f"no files for {name} (looked at {looked}): give --data {name}=PATH")


def _open(verb: Eval) -> tuple[Model, list[Task]]:
    from dsv3.evals.models import ApiModel, EngineModel
    from dsv3.evals.needle import needle_task
    from dsv3.evals.tasks import open_task
    from dsv3.model.fingerprint import fingerprint

    shots = dict(given.split("=", 1) for given in verb.shots_data)
    tasks = [
        open_task(
            name, _place(name, verb.data), chat=verb.chat, shots=verb.shots, shots_path=shots.get(name), limit=verb.limit,
            max_tokens=verb.max_tokens,
        )
        for name in verb.tasks if name != "needle"
    ]  # fmt: skip
    if verb.model_at.startswith(("http://", "https://")):
        if "needle" in verb.tasks:
            raise ValueError("needle measures contexts in the model's own tokens: evaluate the checkpoint, not a URL")
        key = next(iter(os.environ.get("DSV3_API_KEY", "").split()), None)
        return ApiModel(verb.model_at, verb.model, key=key, concurrency=verb.concurrency), tasks
    engine, tokenizer = _engine(verb)
    if "needle" in verb.tasks:
        most = engine.model.config.max_position_embeddings - 64
        lengths = [length for length in verb.lengths if length <= most]
        if not lengths:
            raise ValueError(
                f"--lengths {verb.lengths} are all beyond the model's context of {most + 64}: give shorter ones"
            )
        tasks.append(needle_task(tokenizer, lengths=lengths, chat=verb.chat, max_tokens=verb.max_tokens or 24))
    # Another checkpoint in the same folder, or another dtype, is another model: its answers are not this one's.
    name = f"{checkpoint_of(Path(verb.model_at))} {fingerprint(engine.model)[:12]}"
    return EngineModel(engine, name=name), tasks


def _engine(verb: Eval) -> tuple[Any, Any]:
    import dsv3

    with bytes_bar("loading") as progress:
        model, tokenizer = dsv3.load(
            checkpoint_of(Path(verb.model_at)), dtype=verb.dtype, device=verb.device, progress=progress
        )
    return dsv3.Engine(model, tokenizer, cache_gb=verb.cache_gb), tokenizer


def _harness(verb: Eval) -> None:
    try:
        import lm_eval
    except ImportError:
        raise ValueError("--harness needs lm-eval: pip install 'dsv3[eval]'") from None
    from dsv3.evals.harness import engine_lm

    engine, _ = _engine(verb)
    told = lm_eval.simple_evaluate(
        engine_lm(engine), tasks=list(verb.harness), limit=verb.limit, num_fewshot=verb.shots
    )
    rows = [
        {"task": name, "metric": metric, "value": f"{value:.4f}" if isinstance(value, float) else str(value)}
        for name, metrics in told["results"].items()
        for metric, value in metrics.items()
        if metric != "alias"
    ]
    _print_rows(f"lm-eval on {verb.model_at}", rows)


def _compare(folders: Sequence[Path]) -> None:
    from dsv3.evals.run import compare

    if len(folders) != 2:
        raise ValueError(f"--compare has {len(folders)} folders: give two")
    rows = [
        {
            "task": name, "items": str(c.items), str(folders[0]): f"{c.a:.4f}", str(folders[1]): f"{c.b:.4f}",
            "difference": f"{c.difference:+.4f}", "95%": f"{c.low:+.4f} to {c.high:+.4f}", "p": f"{c.p:.4f}",
            "": "significant" if c.significant else "within chance",
        }
        for name, c in compare(*folders).items()
    ]  # fmt: skip
    _print_rows("paired comparison", rows)


def _print_rows(title: str, rows: Sequence[dict[str, str]]) -> None:
    from rich.console import Console

    names = [name for name in rows[0] if any(row[name] not in ("", "-") for row in rows)] if rows else []
    shown = table(title, names or ("",))
    for row in rows:
        shown.add_row(*(row[name] for name in names))
    Console().print(shown)


@contextmanager
def _bars() -> Iterator[Callable[[str, int, int], None]]:
    """A bar a task, with ETA."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True)) as bars:
        known: dict[str, Any] = {}

        def progress(name: str, done: int, count: int) -> None:
            if name not in known:
                known[name] = bars.add_task(name, total=count)
            bars.update(known[name], completed=done)

        yield progress
