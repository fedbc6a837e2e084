"""Distillation, read top down: problems -> a teacher's answers -> judged and cleaned -> samples to fine-tune on.

    problems    JSON lines {prompt, kind, answer | tests, original, language, system, id}; kind: maths, choice, code, text, or
                none, which nobody can judge
    ask         `samples` answers a problem, each asked for once (distill_teacher.py)
    reject      what is wrong, cut, too long, in mixed languages, repetitive, or touches an evaluation set (distill_filter.py)
    keep        of the right answers of a problem the shortest `keep`: R1 overthinks
    write       sft.jsonl, which `dsv3 sft` reads, and statistics.json

Two kinds of sample, as in the report (section 5.1), of every problem where they can be had:

    original    <problem, original response>: the problem's own answer, where its line has one
    r1          <reflective system prompt, problem, the teacher's response>

The run is a function of the problems, the config and requests.jsonl: killed and started again it asks for what is missing.
What the teacher fails to give, or a bad line of problems, is counted and told, and the rest is kept.
Does not: train (train/sft.py), or choose problems.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dsv3.data.conversations import MOST_TOLD, read_json_lines
from dsv3.data.decontaminate import Decontaminator
from dsv3.evals.sandbox import Sandbox
from dsv3.post.distill_filter import is_repetitive, language_of, mixes_languages
from dsv3.post.distill_teacher import Asked, EngineTeacher, HttpTeacher, Reply, Request, RequestLog, Sampling, Teacher
from dsv3.post.rewards import LANGUAGES, Rewarder
from dsv3.post.tasks import Problem
from dsv3.train.metrics import write_atomic

Say = Callable[[str], None]
KINDS = ("maths", "choice", "code", "text", "none")

REFLECT = (
    "Think before you answer. Take the problem apart, work through it step by step, and look at each step again: check it "
    "by another way where there is one, and when something does not fit, say so, go back and correct it. Only when the "
    "result has stood the test, give it, briefly and in the language of the question."
)
"""The reflective system prompt of r1 samples (the report describes its own and does not print it)."""


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Turn problems and a teacher into samples for `dsv3 sft`."""

    prompts: tuple[Path, ...]
    """JSON lines of problems."""
    out: Path
    """Folder of requests.jsonl, sft.jsonl, statistics.json; the same command resumes an interrupted run."""
    checkpoint: Path | None = None
    """The teacher: a checkpoint, in our engine."""
    url: str | None = None
    """Or an endpoint that speaks OpenAI's protocol, up to and without /chat/completions."""
    model: str | None = None
    """The model's name there; of a checkpoint its folder's."""
    api_key: str | None = field(default=None, repr=False)
    """Sent as a bearer token, written nowhere."""
    samples: int = 1
    """Answers to ask of each problem."""
    keep: int = 1
    """Right answers to keep of each problem, the shortest."""
    sampling: Sampling = field(default_factory=Sampling)
    teacher_system: str | None = None
    """System prompt to ask with; R1 wants none. A problem's own goes before."""
    system: str = REFLECT
    """System prompt that r1 samples are learnt with."""
    thoughts: Literal["think", "inline", "drop"] = "think"
    """The teacher's reasoning in a sample: as reasoning_content, as the beginning of the answer (V3's way), or not at all."""
    originals: bool = True
    """Make samples of the problems' own answers too."""
    max_characters: int = 32_000
    """Of reasoning and answer together."""
    decontaminate: tuple[Path, ...] = ()
    """Evaluation sets: files or folders. Without any nothing is compared, and the statistics say so."""
    ngram: int = 13
    concurrency: int = 16
    tries: int = 5
    timeout: float = 1800.0
    """Seconds for one try."""
    price_in: float = 0.0
    """Per million prompt tokens, in any currency."""
    price_out: float = 0.0
    """Per million answer tokens."""
    budget: float | None = None
    """Stop asking when so much is spent, earlier sittings included."""
    isolation: str = "auto"
    """Of the sandbox that runs code."""
    device: str = "cpu"

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ValueError("prompts is empty: give at least one file of problems")
        if (self.checkpoint is None) == (self.url is None):
            both = "both are given" if self.url else "none is given"
            raise ValueError(f"the teacher is a checkpoint or a url, {both}: give one")
        if self.url is not None and self.model is None:
            raise ValueError(f"url {self.url} needs a model's name: give model")
        if not 1 <= self.keep <= self.samples:
            raise ValueError(f"keep {self.keep} must be from 1 to samples {self.samples}")
        if self.samples > 1 and self.sampling.temperature == 0:
            raise ValueError(f"samples {self.samples} at temperature 0 are all alike: set a temperature")
        if self.budget is not None and not (self.price_in or self.price_out):
            raise ValueError(f"budget {self.budget} needs prices: give price_in and price_out")


@dataclass(frozen=True, kw_only=True)
class Given:
    """A line of problems. `problem` is None where nobody can judge the answer."""

    id: str
    prompt: str
    problem: Problem | None
    original: str | None
    original_reasoning: str
    system: str | None
    language: str | None


# -- problems ------------------------------------------------------------------------------------------------------------


def read_problems(paths: Sequence[Path], faults: list[str]) -> list[Given]:
    """The good lines; of the others a sentence each goes to faults.

    Raises:
        ValueError: a file is missing, or no line is a problem.
    """
    found: dict[str, Given] = {}
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{path} does not exist: give JSON lines of problems")
        for where, row in read_json_lines(path, faults):
            try:
                given = _given(row, where)
                if given.id in found:
                    raise ValueError(f"{where}: id {given.id!r} occurs twice: give each problem its own, or none")
            except ValueError as error:
                faults.append(str(error))
                continue
            found[given.id] = given
    if not found:
        raise ValueError(
            f"there is no problem in {', '.join(map(str, paths))}: {'; '.join(faults[:MOST_TOLD]) or 'empty'}"
        )
    return list(found.values())


def _given(row: dict[str, Any], where: str) -> Given:
    for name in ("prompt", "id", "kind", "answer", "tests", "original", "original_reasoning", "system", "language"):
        if not isinstance(row.get(name, ""), str) and not (name != "prompt" and row[name] is None):
            raise ValueError(f"{where}: {name} is {row[name]!r:.80}: give a string")
    prompt, kind = row.get("prompt"), row.get("kind") or ("maths" if row.get("answer") else "none")
    if not prompt or not prompt.strip():
        raise ValueError(f"{where}: prompt is missing or empty: give the problem's text")
    if kind not in KINDS:
        raise ValueError(f"{where}: kind is {kind!r}: give one of {', '.join(KINDS)}")
    gold = None if kind == "none" else row.get("tests") if kind == "code" else row.get("answer")
    if kind != "none" and not gold:
        raise ValueError(f"{where}: {'tests' if kind == 'code' else 'answer'} is missing, and kind {kind!r} needs it")
    if (language := row.get("language") or None) is not None and language not in LANGUAGES:
        raise ValueError(f"{where}: language is {language!r}: give one of {', '.join(LANGUAGES)}, or leave it out")
    name = row.get("id") or hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    language, problem = language or language_of(prompt), None
    if gold:
        problem = Problem(id=name, prompt=prompt, answer=gold, kind="maths" if kind == "choice" else kind)
    return Given(
        id=name,
        prompt=prompt,
        problem=problem,
        original=row.get("original") or None,
        original_reasoning=row.get("original_reasoning") or "",
        system=row.get("system") or None,
        language=language,
    )


# -- the run -------------------------------------------------------------------------------------------------------------


def run_distill(
    config: DistillConfig, say: Say = lambda text: None, *, teacher: Teacher | None = None
) -> dict[str, Any]:
    """Problems to sft.jsonl; returns the statistics, which are in statistics.json too.

    Args:
        teacher: instead of the config's.

    Raises:
        ValueError: no problem can be read, an evaluation set is missing, the log is damaged.
    """
    faults: list[str] = []
    given = read_problems(config.prompts, faults)
    say(f"{len(given):,} problems" + (f"; left out {len(faults):,} lines: {_first(faults)}" if faults else ""))
    guard = Decontaminator(config.decontaminate, ngram=config.ngram)
    if not config.decontaminate:
        say("no evaluation sets were given: nothing is compared with them")
    clean = [one for one in given if guard.touches(one.prompt) is None]
    if len(clean) < len(given):
        say(f"{len(given) - len(clean):,} problems touch an evaluation set and are not asked")
    teacher = teacher or _teacher(config)
    log = RequestLog(config.out / "requests.jsonl")
    requests = {one.id: _requests(one, config, teacher.name) for one in clean}
    try:
        # The sandbox first: that there is none is to be known before the teacher is paid.
        with Sandbox(isolation=config.isolation) if _needs_sandbox(clean) else _Nothing() as sandbox:
            asked = _ask(config, teacher, [r for many in requests.values() for r in many], log, say)
            judge = _Judge(config, guard, Rewarder(sandbox=sandbox if isinstance(sandbox, Sandbox) else None))
            samples = [
                s for one in clean for s in judge.samples(one, [log.replies.get(r.key) for r in requests[one.id]])
            ]
    finally:
        log.close()
    lines = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
    write_atomic(config.out / "sft.jsonl", lines.encode())
    wanted = [r.key for many in requests.values() for r in many]
    told = _statistics(
        config, given, clean, faults, guard, judge, samples, asked, [log.replies[k] for k in wanted if k in log.replies]
    )
    told |= {"teacher": teacher.name, "out": str(config.out / "sft.jsonl")}
    write_atomic(config.out / "statistics.json", json.dumps(told, indent=1, ensure_ascii=False).encode())
    for line in report_lines(told):
        say(line)
    return told


def _teacher(config: DistillConfig) -> Teacher:
    if config.url is not None:
        assert config.model is not None
        return HttpTeacher(
            config.url, config.model, key=config.api_key, concurrency=config.concurrency, tries=config.tries, timeout=config.timeout
        )  # fmt: skip
    from dsv3.data.tokenizer import Tokenizer
    from dsv3.infer.engine import Engine
    from dsv3.model.fingerprint import fingerprint
    from dsv3.model.weights import load_model

    assert config.checkpoint is not None
    model = load_model(config.checkpoint, device=config.device)
    # Another checkpoint in the same folder is another teacher.
    name = f"{config.model or config.checkpoint.resolve().name} {fingerprint(model)[:12]}"
    return EngineTeacher(
        Engine(model, Tokenizer.from_file(config.checkpoint)), name=name, concurrency=config.concurrency
    )


def _requests(given: Given, config: DistillConfig, model: str) -> list[Request]:
    system = "\n\n".join(text for text in (given.system, config.teacher_system) if text)
    messages = (*((("system", system),) if system else ()), ("user", given.prompt))
    return [
        Request(model=model, problem=given.id, messages=messages, sampling=config.sampling, sample=i)
        for i in range(config.samples)
    ]


def _ask(config: DistillConfig, teacher: Teacher, requests: list[Request], log: RequestLog, say: Say) -> Asked:
    """Ask for what the log does not have; the good part is in the log whatever happens here."""
    missing = [request for request in requests if request.key not in log.replies]
    asked, done = Asked(), len(requests) - len(missing)
    if done:
        say(f"{done:,} of {len(requests):,} answers are there already")
    spent, start = cost(log.replies.values(), config), done
    every = max(1, len(missing) // 20)

    def finished(request: Request, reply: Reply) -> bool:
        nonlocal done, spent
        log.add(request, reply)
        done, spent = done + 1, spent + cost([reply], config)
        if (done - start) % every == 0:
            priced = f", {spent:,.2f} spent" if config.price_in or config.price_out else ""
            say(f"{done:,} of {len(requests):,} answers{priced}")
        if config.budget is not None and spent >= config.budget:
            asked.stopped = f"{spent:,.2f} is spent, the budget is {config.budget:,.2f}"
        return asked.stopped is None

    if config.budget is not None and spent >= config.budget and missing:
        asked.stopped = f"{spent:,.2f} is spent, the budget is {config.budget:,.2f}"
    elif missing:
        teacher.ask(missing, finished, asked)
    return asked


def cost(replies: Any, config: DistillConfig) -> float:
    """Of what was told; a reply without usage costs nothing here."""
    pairs = [(reply.prompt_tokens or 0, reply.answer_tokens or 0) for reply in replies]
    return sum(a * config.price_in + b * config.price_out for a, b in pairs) / 1e6


# -- judging -------------------------------------------------------------------------------------------------------------


class _Judge:
    """What is kept of the answers to a problem, and why the rest is not."""

    def __init__(self, config: DistillConfig, guard: Decontaminator, rewarder: Rewarder) -> None:
        self.config, self.guard, self.rewarder = config, guard, rewarder
        self.rejected: dict[str, Counter[str]] = {"r1": Counter(), "original": Counter()}
        self.faults: list[str] = []
        self.right = self.judged = self.unjudged = 0
        self._seen: set[str] = set()

    def samples(self, given: Given, replies: Sequence[Reply | None]) -> list[dict[str, Any]]:
        """Samples of one problem, r1 first."""
        kept: list[Reply] = []
        for reply in replies:
            if reply is None:
                self.rejected["r1"]["failed"] += 1
                continue
            reason = self._reject(given, reply, "r1")
            if reason is None:
                kept.append(reply)
            else:
                self.rejected["r1"][reason] += 1
        kept.sort(key=lambda reply: len(reply.reasoning) + len(reply.text))
        self.rejected["r1"]["longer than another"] += len(kept[self.config.keep :])
        made = [self._sample(given, reply, "r1") for reply in kept[: self.config.keep]]
        if self.config.originals and given.original is not None:
            reply = Reply(text=given.original, reasoning=given.original_reasoning, finish_reason="stop")
            reason = self._reject(given, reply, "original")
            if reason is None:
                made.append(self._sample(given, reply, "original"))
            else:
                self.rejected["original"][reason] += 1
        return made

    def _reject(self, given: Given, reply: Reply, kind: str) -> str | None:
        """Why not, or None. The cheap reasons first."""
        if reply.refused is not None or not reply.text.strip():
            return "cut" if reply.finish_reason == "length" else "failed"
        if reply.finish_reason not in ("stop", "unknown"):
            return "cut"
        whole = f"{reply.reasoning}\n{reply.text}"
        if len(whole) > self.config.max_characters:
            return "too long"
        if is_repetitive(whole):
            return "repetitive"
        if any(mixes_languages(part, given.language) for part in (reply.text, reply.reasoning)):
            return "mixed"
        if self.guard.touches(whole) is not None:
            return "contaminated"
        if (reason := self._wrong(given, reply, kind)) is not None:
            return reason
        digest = hashlib.sha256(f"{kind}\0{given.prompt}\0{whole}".encode("utf-8", "replace")).hexdigest()
        if digest in self._seen:
            return "duplicate"
        self._seen.add(digest)
        return None

    def _wrong(self, given: Given, reply: Reply, kind: str) -> str | None:
        """The answer alone is judged, not what was thought on the way."""
        if given.problem is None:
            self.unjudged += kind == "r1"
            return None
        reward = self.rewarder.score(given.problem, reply.text)
        if reward.total is None:
            if len(self.faults) < MOST_TOLD:
                self.faults.append(f"{given.id}: {reward.note}")
            return "ungradable"
        if kind == "r1":
            self.judged, self.right = self.judged + 1, self.right + reward.right
        return None if reward.right else "wrong"

    def _sample(self, given: Given, reply: Reply, kind: str) -> dict[str, Any]:
        """A line of sft.jsonl."""
        system = [given.system, self.config.system if kind == "r1" else None]
        joined = "\n\n".join(text for text in system if text)
        answer: dict[str, Any] = {"role": "assistant", "content": reply.text.strip()}
        thought = reply.reasoning.strip()
        if thought and self.config.thoughts == "think":
            answer["reasoning_content"] = thought
        elif thought and self.config.thoughts == "inline":
            answer["content"] = f"{thought}\n\n{answer['content']}"
        messages = [{"role": "system", "content": joined}] if joined else []
        messages += [{"role": "user", "content": given.prompt}, answer]
        return {"messages": messages, "source": {"id": given.id, "kind": kind}}


class _Nothing:
    """No sandbox is needed."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None


def _needs_sandbox(given: Sequence[Given]) -> bool:
    return any(one.problem is not None and one.problem.kind == "code" for one in given)


# -- what came of it -----------------------------------------------------------------------------------------------------


def _statistics(
    config: DistillConfig, given: list[Given], clean: list[Given], faults: list[str], guard: Decontaminator, judge: _Judge,
    samples: list[dict[str, Any]], asked: Asked, replies: list[Reply],
) -> dict[str, Any]:  # fmt: skip
    kinds = Counter(sample["source"]["kind"] for sample in samples)
    solved = len({sample["source"]["id"] for sample in samples if sample["source"]["kind"] == "r1"})
    lengths = sorted(
        sum(len(message["content"]) + len(message.get("reasoning_content", "")) for message in sample["messages"][-1:])
        for sample in samples
    )
    told = [reply for reply in replies if reply.refused is None]
    return {
        "problems": {"read": len(given), "bad_lines": len(faults), "faults": faults[:MOST_TOLD]},
        "contaminated_problems": len(given) - len(clean),
        "evaluation_texts": guard.texts,
        "answers": {
            "wanted": len(clean) * config.samples,
            "there": len(told),
            "refused": len(replies) - len(told),
            "missing": len(clean) * config.samples - len(replies),
        },
        "this_sitting": {
            "answered": asked.answered,
            "refused": asked.refused,
            "failed": asked.failed,
            "retries": asked.retries,
            "stopped": asked.stopped,
            "faults": asked.faults,
        },
        "right": {"judged": judge.judged, "right": judge.right, "unjudged": judge.unjudged},
        "rejected": {kind: {k: v for k, v in reasons.items() if v} for kind, reasons in judge.rejected.items()},
        "grader_faults": judge.faults,
        "samples": {"r1": kinds["r1"], "original": kinds["original"], "problems_with_r1": solved},
        "answer_characters": {
            "median": int(statistics.median(lengths)) if lengths else 0,
            "p95": lengths[int(0.95 * (len(lengths) - 1))] if lengths else 0,
            "longest": lengths[-1] if lengths else 0,
        },
        "tokens": {
            "prompt": sum(reply.prompt_tokens or 0 for reply in told),
            "answer": sum(reply.answer_tokens or 0 for reply in told),
            "untold": sum(reply.answer_tokens is None or reply.prompt_tokens is None for reply in told),
        },
        "cost": round(cost(told, config), 6),
    }


def report_lines(told: dict[str, Any]) -> list[str]:
    """The statistics for the user."""
    answers, sitting, right, samples = (told[k] for k in ("answers", "this_sitting", "right", "samples"))
    said = [
        f"answers: {answers['there']:,} of {answers['wanted']:,}, {answers['refused']:,} refused, {answers['missing']:,} missing"
    ]
    if sitting["stopped"]:
        said.append(
            f"stopped asking: {sitting['stopped']}; what was answered is kept, the same command asks for the rest"
        )
    if sitting["failed"] or sitting["retries"]:
        said.append(
            f"{sitting['failed']:,} requests failed, {sitting['retries']:,} tries were repeated: {_first(sitting['faults'])}"
        )
    if right["judged"]:
        said.append(f"right: {right['right']:,} of {right['judged']:,} judged ({right['right'] / right['judged']:.1%})")
    for kind, reasons in told["rejected"].items():
        if reasons:
            said.append(f"rejected ({kind}): " + ", ".join(f"{reason} {count:,}" for reason, count in reasons.items()))
    tokens = told["tokens"]
    untold = f" ({tokens['untold']:,} answers told no usage)" if tokens["untold"] else ""
    said.append(f"tokens: {tokens['prompt']:,} in, {tokens['answer']:,} out{untold}; cost {told['cost']:,.4f}")
    made = f"{samples['r1']:,} r1 of {samples['problems_with_r1']:,} problems, {samples['original']:,} original"
    said.append(f"samples: {made}, in {told['out']}")
    return said


def _first(said: Sequence[str]) -> str:
    more = f"; and {len(said) - MOST_TOLD:,} more" if len(said) > MOST_TOLD else ""
    return "; ".join(said[:MOST_TOLD]) + more
