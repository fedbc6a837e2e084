"""A corpus at scale: from raw files to shards, by datatrove's blocks and executors, on this machine, Slurm or Ray alike.

    stage      tasks    what a document meets                                                          leaves in OUT/work
    clean      plan     read, recall (code, maths), language, quality, decontaminate, scrub, sign      clean/, minhash/, dropped/
    pairs      plan     (at most 14) documents whose signatures agree in one of 14 bands of 8 hashes   minhash/pairs
    clusters   1        all but one document of each cluster of near-duplicates are to go              minhash/remove
    split      plan     near-duplicates go; train or held_out; part of the mixture                     text/SIDE/PART
    pack       plan     tokens, FIM, split tokens                                                      pieces/SIDE/TASK
    finish     1        pieces joined to OUT/train and OUT/held_out; OUT/report.json

The plan (work/plan.json) divides the input into tasks of about `task_mb` by its files alone: large .jsonl files into
ranges of bytes, small files together. Workers only decide how many tasks run at once, so the same input gives the same
shards, byte for byte, on any number of workers and any executor. A finished task leaves a mark (datatrove's completions):
killed and started again, the build goes on with the others. Another setting or changed input is refused, by
work/config.json and the plan.

Parts of the mixture are SOURCE-code, SOURCE-maths, SOURCE-NAME (of a classifier) and SOURCE-LANGUAGE (prose); a source's weight is
divided among its parts by their tokens. Held-out documents have no near-duplicate in train, as both were one set when
those went. Needs: pip install 'dsv3[data]'; a file system that all workers see. Source: datatrove's examples of FineWeb's
pipeline. Does not: fetch pages or extract text from HTML; join on several machines (one task writes all streams, at the
disk's speed).
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupFilter, MinhashDedupSignature
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.utils.hashing import HashConfig

from dsv3.data import corpus, ledger, steps
from dsv3.data.corpus import Source
from dsv3.data.decontaminate import Decontaminator
from dsv3.data.language import LANGUAGES
from dsv3.data.machines import Machines, Stage, run, submit
from dsv3.data.quality import WORDS
from dsv3.data.recall import CODE, MATHS, PROSE, widen
from dsv3.data.shards import join_shards, open_shards
from dsv3.data.steps import Slice

REPORT = "report.json"
STAGES = ("clean", "pairs", "clusters", "split", "pack", "finish")
_MINHASH = MinhashConfig(hash_config=HashConfig(hash_fc="sha1"))  # no package to install, where xxhash is one
_SAMPLE = 2000
"""Documents of the input that a classifier's training sees as the corpus."""
_PYTHON_BYTES = 10_000_000


@dataclass(frozen=True, kw_only=True)
class BuildConfig:
    """What is built; any change of it is another corpus."""

    sources: tuple[Source, ...]
    tokenizer: str
    """A folder with tokenizer.json, or `official`."""
    against: tuple[Path, ...] = ()
    """Evaluation sets that no document may share `ngram` words with."""
    ngram: int = 13
    languages: tuple[str, ...] = ("en", "zh")
    least_confidence: float = 0.3
    """Of the language; by function words, those of the best language among all found."""
    language_model: Path | None = None
    """A model of fastText's such as lid.176.bin; None: dsv3.data.language."""
    recall: tuple[tuple[str, Path], ...] = ()
    """(name, seed documents): what a classifier widened from them recognises becomes a part of the mixture of that name."""
    recall_threshold: float = 0.5
    least_words: int = 50
    """Shorter documents are dropped."""
    held_out: float = 0.02
    fim_rate: float = 0.1
    split_rate: float = 0.1
    seed: int = 0
    task_mb: float = 256.0
    """Input of a task, about."""

    def __post_init__(self) -> None:
        if unknown := set(self.languages) - set(LANGUAGES) if self.language_model is None else set():
            raise ValueError(
                f"languages {sorted(unknown)} are not known: give some of {', '.join(LANGUAGES)}, or a language_model"
            )
        if self.least_words < _MINHASH.n_grams:
            raise ValueError(
                f"least_words {self.least_words} is below {_MINHASH.n_grams}, the words of a MinHash shingle: shorter "
                f"documents would never be found to be duplicates; give {_MINHASH.n_grams} or more"
            )
        for name, least, most in (("held_out", 0, 0.5), ("least_confidence", 0, 1), ("recall_threshold", 0, 1)):
            if not least <= getattr(self, name) <= most:
                raise ValueError(f"{name} {getattr(self, name)} must be from {least} to {most}")
        if not self.task_mb > 0:
            raise ValueError(f"task_mb {self.task_mb} must be positive")
        for name, _ in self.recall:
            if name in (CODE, MATHS, PROSE, *LANGUAGES) or not re.fullmatch(r"\w[\w.]*", name):
                raise ValueError(
                    f"recall name {name!r} becomes a part's name: use letters, digits, '_' and '.', and neither code, "
                    "maths, prose nor a language"
                )
        if not self.sources:
            raise ValueError("sources is empty: give at least one path of text")


def build(
    config: BuildConfig,
    out: str | Path,
    machines: Machines = Machines(),
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any] | None:
    """Run what is not done yet; the report, or None where Slurm has taken the jobs (call again when they are done).

    Raises:
        ValueError: the input, a setting or the tokenizer is of no use, `out` holds another build, or no document is left.
        RuntimeError: a task failed; names its log. The same call goes on.
    """
    out = Path(out).absolute()
    work = out / "work"
    stages = _stages(config, out, _prepare(config, work, say))
    if (out / REPORT).exists():
        say(f"{out} is finished: nothing to do")
    elif machines.executor == "slurm":
        submit(stages, work, machines, say)
        return None
    else:
        run(stages[:-1], work, machines, say)
        say("finish: joining the pieces")
        stages[-1].steps[0].run(None)
    return json.loads((out / REPORT).read_text(encoding="utf-8"))


def progress(out: str | Path) -> list[tuple[str, int, int]]:
    """(stage, tasks done, tasks) of a build that has begun, from the marks on the disk; empty before."""
    work = Path(out).absolute() / "work"
    if not (work / "plan.json").exists():
        return []
    tasks = len(json.loads((work / "plan.json").read_text(encoding="utf-8"))["tasks"])
    return [
        (name, len(list((work / "logs" / name / "completions").glob("*"))), of) for name, of in _tasks(tasks).items()
    ]


def _tasks(plan: int) -> dict[str, int]:
    """Tasks of each stage; `plan`: of the plan."""
    few = {"pairs": min(plan, _MINHASH.num_buckets), "clusters": 1, "finish": 1}
    return {name: few.get(name, plan) for name in STAGES}


# -- before the first task ---------------------------------------------------------------------------------------------


def plan_tasks(sources: Sequence[Source], task_bytes: float) -> dict[str, Any]:
    """{tasks: lists of Slice as dictionaries, files: {path: [size, mtime]}, left_out: {reason: files}}.

    Raises:
        ValueError: a path does not exist, is of a kind that no reader takes, or a source holds no file.
    """
    report = corpus.ReadReport()
    files: dict[str, list[int]] = {}
    tasks: list[list[dict[str, Any]]] = [[]]
    filled = 0
    for source in sources:
        found = 0
        for piece, size in _pieces(source, report, files, task_bytes):
            found += 1
            if filled and filled + size > task_bytes:
                tasks.append([])
                filled = 0
            tasks[-1].append(dataclasses.asdict(piece))
            filled += size
        if not found:
            raise ValueError(f"source {source.name!r} ({', '.join(source.paths)}) holds no file that dsv3 reads")
    return {"tasks": tasks, "files": files, "left_out": dict(sorted(report.left_out.items()))}


def _pieces(
    source: Source, report: corpus.ReadReport, files: dict[str, list[int]], task_bytes: float
) -> Iterator[tuple[Slice, int]]:
    for name in source.paths:
        if name in (corpus.PYTHON_CODE, corpus.PYTHON_ENGLISH):
            yield Slice(source.name, name), _PYTHON_BYTES
            continue
        top = Path(name).absolute()
        if not top.exists():
            raise ValueError(f"{top} does not exist: give a file or a folder")
        if top.is_file() and not corpus.is_readable(top):
            raise ValueError(
                f"{top} is of a kind that dsv3 does not read: give text, code, .jsonl(.gz, .zst) or .parquet"
            )
        for path in corpus.walk_files(top, report) if top.is_dir() else [top]:
            if not corpus.is_readable(path):
                report.left_out[f"{path.suffix or 'suffixless'} files"] += 1
                continue
            about = path.stat()
            files[str(path)] = [about.st_size, about.st_mtime_ns]
            parts = max(1, math.ceil(about.st_size / task_bytes)) if path.suffix.lower() == ".jsonl" else 1
            ends = [about.st_size * part // parts for part in range(parts + 1)]
            for start, end in pairwise(ends):
                yield Slice(source.name, str(path), start, end if path.suffix.lower() == ".jsonl" else -1), end - start


def _prepare(config: BuildConfig, work: Path, say: Callable[[str], None]) -> int:
    """Check what workers would stumble over, and write or compare the plan; the number of its tasks."""
    plan = plan_tasks(config.sources, config.task_mb * 1e6)
    identity = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    identity["tokenizer_fingerprint"] = steps.open_tokenizer(config.tokenizer).fingerprint
    guard = Decontaminator(config.against, ngram=config.ngram)
    identity["against_fingerprint"] = guard.fingerprint
    identity["input"] = hashlib.sha256(json.dumps([plan["tasks"], plan["files"]]).encode()).hexdigest()
    if config.language_model is not None:
        steps.open_fasttext(config.language_model)
    made_of = work / "config.json"
    if made_of.exists():
        before = json.loads(made_of.read_text(encoding="utf-8"))
        changed = [
            f"{key}: {before.get(key)} then, {identity[key]} now"
            for key in identity
            if before.get(key) != identity[key]
        ]
        if changed:
            raise ValueError(
                f"{work.parent} holds another build; remove it or name another folder: {'; '.join(changed)}"
            )
        return len(plan["tasks"])
    work.mkdir(parents=True, exist_ok=True)
    (work / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    for name, seeds in config.recall:
        _teach(name, seeds, plan["tasks"], work, say)
    temporary = work / "config.json.tmp"
    temporary.write_text(json.dumps(identity, indent=1), encoding="utf-8")
    temporary.replace(made_of)  # last: with it the preparations are done
    return len(plan["tasks"])


def _teach(
    name: str, seeds: Path, tasks: Sequence[Sequence[Mapping[str, Any]]], work: Path, say: Callable[[str], None]
) -> None:
    """Widen a classifier from the seed documents over a sample of every task's first documents."""
    reader = steps.Read(work / "plan.json", work / "dropped" / "read")
    sample: list[str] = []
    for task in tasks:
        found = (
            text for piece in task for _, text, fault in reader.read(Slice(**piece)) if fault is None and text.strip()
        )
        sample += islice(found, math.ceil(_SAMPLE / len(tasks)))
    classifier, recalled = widen([document.text for document in corpus.read_documents([seeds])], sample)
    (work / "recall").mkdir(exist_ok=True)
    classifier.save(work / "recall" / f"{name}.npz")
    say(f"recall of {name}: {', '.join(map(str, recalled))} of {len(sample)} sample documents in three rounds")


# -- the stages --------------------------------------------------------------------------------------------------------


def _stages(config: BuildConfig, out: Path, tasks: int) -> list[Stage]:
    work = out / "work"
    dropped, minhash = work / "dropped", work / "minhash"
    classifiers = {name: work / "recall" / f"{name}.npz" for name, _ in config.recall}
    clean: list[PipelineStep] = [
        steps.Read(work / "plan.json", dropped / "read"),
        steps.Recall(classifiers, config.recall_threshold),
        steps.Language(dropped, config.languages, config.least_confidence, config.language_model),
        steps.Quality(dropped, config.least_words),
        *([steps.Decontaminate(dropped, config.against, config.ngram)] if config.against else []),
        steps.Scrub(),
        steps.writer(work / "clean"),
        MinhashDedupSignature(str(minhash / "signatures"), config=_MINHASH, language=WORDS),
    ]
    pairs = _Pairs(str(minhash / "signatures"), str(minhash / "pairs"), config=_MINHASH)
    clusters = _Clusters(str(minhash / "pairs"), str(minhash / "remove"), config=_MINHASH, save_cluster_id=True)
    split: list[PipelineStep] = [
        steps.Part(work / "clean"),
        MinhashDedupFilter(str(minhash / "remove"), steps.writer(dropped / "near-duplicates"), load_cluster_ids=True),
        steps.Split(config.held_out, config.seed),
        steps.writer(work / "text", "${side}/${part}/${rank}.jsonl"),
    ]
    pack = steps.Pack(
        work / "text", work / "logs" / "split" / "stats", work / "pieces", config.tokenizer,
        fim_rate=config.fim_rate, split_rate=config.split_rate, seed=config.seed,
    )  # fmt: skip
    finish = Finish(out, {source.name: source.weight for source in config.sources})
    each: dict[str, list[PipelineStep]] = {
        "clean": clean,
        "pairs": [pairs],
        "clusters": [clusters],
        "split": split,
        "pack": [pack],
        "finish": [finish],
    }
    return [Stage(name, number, each[name]) for name, number in _tasks(tasks).items()]


class _Pairs(MinhashDedupBuckets):
    """Any number of tasks, each with some of the bands."""

    def run(self, data: steps.Documents = None, rank: int = 0, world_size: int = 1) -> None:
        for bucket in range(rank, self.config.num_buckets, world_size):
            super().run(data, bucket, self.config.num_buckets)


class _Clusters(MinhashDedupCluster):
    def run(self, data: steps.Documents = None, _: int = 0, world_size: int = 1) -> None:
        with redirect_stderr(io.StringIO()):  # its bar
            super().run(data, _, world_size)


class Finish(PipelineStep):
    """Joins the pieces to OUT/train and OUT/held_out and writes OUT/report.json.

    Raises:
        ValueError: no document is left; says where they went.
    """

    type, name = "🏁 - FINISH", "finish"

    def __init__(self, out: Path, weights: Mapping[str, float]) -> None:
        super().__init__()
        self.out, self.weights = out, dict(weights)

    def run(self, data: steps.Documents = None, rank: int = 0, world_size: int = 1) -> None:
        report = ledger.make_report(self.out / "work")
        report["shards"] = {}
        for side in (steps.TRAIN, steps.HELD_OUT):
            pieces = sorted((self.out / "work" / "pieces" / side).glob("[0-9]*"))
            if not pieces:
                continue
            shutil.rmtree(self.out / side, ignore_errors=True)  # of an attempt that was killed
            made = join_shards(pieces, self._weights(pieces), self.out / side)
            report["shards"][side] = {
                "fingerprint": made.fingerprint,
                "tokens": made.total_tokens,
                "sources": {s.name: {"tokens": len(s.tokens), "weight": s.weight} for s in made.sources},
            }
        if steps.TRAIN not in report["shards"]:
            went = "; ".join(f"{row['step']}: {row['dropped']}" for row in report["steps"] if row["dropped"])
            raise ValueError(f"no document is left to train on ({went}): loosen the settings or give more text")
        temporary = self.out / f"{REPORT}.tmp"
        temporary.write_text(json.dumps(report, indent=1, ensure_ascii=False), encoding="utf-8")
        temporary.replace(self.out / REPORT)

    def _weights(self, pieces: Sequence[Path]) -> dict[str, float]:
        """Part -> weight: its share of the source's tokens times the source's weight."""
        tokens: dict[str, int] = {}
        for piece in pieces:
            for source in open_shards(piece).sources:
                tokens[source.name] = tokens.get(source.name, 0) + len(source.tokens)
        of = {part: max((name for name in self.weights if part.startswith(f"{name}-")), key=len) for part in tokens}
        sums = {name: sum(n for part, n in tokens.items() if of[part] == name) for name in self.weights}
        return {part: self.weights[of[part]] * tokens[part] / sums[of[part]] for part in sorted(tokens)}
