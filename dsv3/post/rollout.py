"""Answers of the policy itself: sampled by the engine over the very tensors that are trained, kept, and read again.

    sample   G answers to each prompt, by chance that comes from (seed, question number, answer, position) alone: the same
             weights give the same answers, also after a crash
    keep     rollouts/round-00000012.jsonl, written whole or not at all: prompt, answer, log-probabilities, experts, reward,
             advantage. A run that stopped within a round reads it again, and so may anyone
    batch    rows for the objective (post/batch.py)

The end token is a token of the answer, with its log-probability and experts: the engine is told not to stop there, and each answer
is ended here.
Nothing is copied from the trainer to the engine. Pages of old weights are dropped before each round (`Engine.forget`).
Legend: G answers a group, n tokens of an answer, L MoE layers, K top-k, T tokens, M MTP depth. Does not: choose prompts or reward.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsv3.infer.engine import Engine, Request
from dsv3.infer.sampling import SamplingParams
from dsv3.infer.scheduler import Sequence as Running
from dsv3.model.transformer import DeepseekV3
from dsv3.post.batch import RolloutBatch
from dsv3.post.exact import EnginePass
from dsv3.post.grpo import token_logprobs
from dsv3.post.tasks import Problem
from dsv3.train.metrics import write_atomic


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A question as the model reads it. `opening`: text that the prompt ends with and the answer's text begins with (<think>)."""

    problem: Problem
    ids: list[int]
    opening: str = ""
    number: int = 0
    """Of the question in the run: chance comes from it."""


@dataclass(kw_only=True)
class Answer:
    """One sampled answer. finish: "stop", "length" or "error". The last token is the end token if it is "stop"."""

    number: int
    choice: int
    problem: str
    question: str
    gold: str
    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    """Of each token, nats, of the model's own distribution."""
    routes: np.ndarray | None = None
    """(n, L, K) int16: the experts behind each token."""
    finish: str = ""
    text: str = ""
    reward: float | None = None
    parts: dict[str, float] = field(default_factory=dict)
    note: str = ""
    advantage: float = 0.0
    reference: list[float] | None = None
    """Log-probabilities under the reference policy."""
    used: bool = False
    """Whether it is trained on; in the file, those that are stand in the order of training."""


@dataclass
class Tally:
    """What the engine did: MTP drafts looked at and accepted, by place in their chain; answers that failed, and why;
    questions that were too long."""

    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    failed: int = 0
    last_fault: str = ""
    too_long: int = 0

    def add(self, other: Tally) -> None:
        """What another engine did."""
        for mine, theirs in ((self.drafted, other.drafted), (self.accepted, other.accepted)):
            mine.extend([0] * (len(theirs) - len(mine)))
            for place, count in enumerate(theirs):
                mine[place] += count
        self.failed, self.too_long = self.failed + other.failed, self.too_long + other.too_long
        self.last_fault = other.last_fault or self.last_fault

    def acceptance(self) -> list[float]:
        return [a / d for a, d in zip(self.accepted, self.drafted) if d]


def sample(
    engine: Engine,
    prompts: Sequence[Prompt],
    *,
    group: int,
    max_tokens: int,
    seed: int,
    decode: Callable[[list[int]], str],
    temperature: float = 1.0,
    tally: Tally | None = None,
) -> list[list[Answer]]:
    """`group` answers to each prompt; answers that the engine failed on are left out and tallied.

    Args:
        decode: text of answer tokens.
        temperature: 0 is greedy. Log-probabilities are of temperature 1 whatever it is, so other temperatures train on
            answers that the policy itself would draw otherwise.

    Raises:
        ValueError: a prompt and max_tokens exceed the model's context.
    """
    tally = Tally() if tally is None else tally
    before = list(engine.stats.drafted), list(engine.stats.accepted)
    work: dict[tuple[int, int], tuple[Answer, Request, Running]] = {}
    groups: list[list[Answer]] = []
    for prompt in prompts:
        params = SamplingParams(
            max_tokens=max_tokens, temperature=temperature, seed=_seed(seed, prompt.number), n=group, ignore_eos=True,
            logprobs=0, routes=True,
        )  # fmt: skip
        request = engine.add(prompt.ids, params)
        groups.append([_blank(prompt, choice) for choice in range(group)])
        for answer, sequence in zip(groups[-1], request.sequences):
            work[request.id, sequence.choice] = answer, request, sequence
    try:
        _drive(engine, work, tally)
    finally:
        for _, request, _ in work.values():
            engine.abort(request)
    for prompt, answers in zip(prompts, groups):
        for answer in answers:
            said = answer.tokens[:-1] if answer.finish == "stop" else answer.tokens
            answer.text = prompt.opening + decode(said)
    now = engine.stats.drafted, engine.stats.accepted
    tally.drafted = [a - b + c for a, b, c in zip(now[0], before[0], tally.drafted or [0] * len(before[0]))]
    tally.accepted = [a - b + c for a, b, c in zip(now[1], before[1], tally.accepted or [0] * len(before[1]))]
    return [[answer for answer in answers if answer.finish != "error"] for answers in groups]


def _drive(engine: Engine, work: dict[tuple[int, int], tuple[Answer, Request, Running]], tally: Tally) -> None:
    """Step until every answer has ended."""
    ends, routes = engine.model.config.eos_token_ids, {key: [] for key in work}
    while work:
        for delta in engine.step():
            key = delta.request, delta.choice
            if key not in work:
                continue
            answer, request, sequence = work[key]
            count = next((i + 1 for i, token in enumerate(delta.token_ids) if token in ends), len(delta.token_ids))
            answer.tokens += delta.token_ids[:count]
            answer.logprobs += [score.logprob for score in delta.scores[:count]]
            routes[key] += delta.routes[:count]
            if answer.tokens and answer.tokens[-1] in ends:
                answer.finish = "stop"
                engine.abort(dataclasses.replace(request, sequences=[sequence]))  # this answer alone
            elif delta.error is not None:
                tally.failed, tally.last_fault, answer.finish = tally.failed + 1, delta.error, "error"
            elif delta.finish_reason is not None:
                answer.finish = "length"
            if answer.finish:
                answer.routes = np.array(routes.pop(key), dtype=np.int16) if engine.model.routers() else None
                del work[key]


def _blank(prompt: Prompt, choice: int) -> Answer:
    problem = prompt.problem
    return Answer(
        number=prompt.number,
        choice=choice,
        problem=problem.id,
        question=problem.prompt,
        gold=problem.answer,
        prompt=prompt.ids,
    )


def _seed(seed: int, number: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}/{number}".encode(), digest_size=7).digest(), "little")


# -- batches -------------------------------------------------------------------------------------------------------------


def make_batch(
    answers: Sequence[Answer], *, depth: int, layers: int, top_k: int, fresh: bool, even: int | None = None
) -> RolloutBatch:
    """Rows of answers.

    Args:
        depth: MTP layers. layers: MoE layers before them. fresh: whether the policy is the one that sampled.
        even: so many rows, blank ones behind the answers, and all of one length. None: as they are.
    """
    rows, spare = even or len(answers), depth + 1
    longest = max(len(a.prompt) + len(a.tokens) for a in answers) - 1
    ids = torch.zeros(rows, longest + spare, dtype=torch.int64)
    answer = torch.zeros(rows, longest, dtype=torch.bool)
    old, lengths = torch.zeros(rows, longest), torch.zeros(rows, dtype=torch.int64)
    referenced = all(a.reference is not None for a in answers)
    reference = torch.zeros(rows, longest) if referenced else None
    routed = layers > 0 and all(a.routes is not None for a in answers)
    experts = torch.full((rows, longest, layers, top_k), -1, dtype=torch.int16) if routed else None
    for row, a in enumerate(answers):
        start, end = len(a.prompt) - 1, len(a.prompt) + len(a.tokens) - 1
        ids[row, : end + 1] = torch.tensor([*a.prompt, *a.tokens])
        answer[row, start:end] = True
        old[row, start:end] = torch.tensor(a.logprobs)
        lengths[row] = end
        if reference is not None and a.reference is not None:
            reference[row, start:end] = torch.tensor(a.reference)
        if experts is not None and a.routes is not None:
            experts[row, start:end] = torch.from_numpy(a.routes)
    advantages = torch.tensor([a.advantage for a in answers] + [0.0] * (rows - len(answers)), dtype=torch.float32)
    return RolloutBatch(
        tokens=ids[:, :-1].contiguous(),
        targets=ids[:, 1:].contiguous(),
        answer=answer,
        lengths=lengths,
        advantages=advantages,
        old=old,
        reference=reference,
        experts=experts,
        fresh=fresh,
        even=even is not None,
    )


@torch.no_grad()
def add_reference(
    answers: Sequence[Answer], model: DeepseekV3, *, vocabulary: int, micro_batch: int, exact: bool = False
) -> None:
    """Fill `reference` with each token's log-probability under a model.

    Args:
        exact: by the engine's kernels, as the policy's own are (post/exact.py): a policy that is its reference has a KL of 0.
    """
    engine = EnginePass(model) if exact else None
    device = model.lm_head.weight.device
    for first in range(0, len(answers), micro_batch):
        some = answers[first : first + micro_batch]
        batch = make_batch(some, depth=0, layers=0, top_k=0, fresh=False)
        known = batch.answer.to(device)
        targets = batch.targets.to(device)[known]
        reading = None if engine is None else engine.read(batch.tokens)
        states = model.hidden(batch.tokens.to(device)).main[known] if reading is None else reading.states[known]
        logprobs, _ = token_logprobs(states, model.lm_head.weight[:vocabulary], targets, reading)
        for answer, own in zip(some, logprobs.cpu().split([len(a.tokens) for a in some])):
            answer.reference = own.tolist()


# -- the file ------------------------------------------------------------------------------------------------------------


def round_path(folder: Path, number: int) -> Path:
    return folder / "rollouts" / f"round-{number:08d}.jsonl"


def write_rollouts(path: Path, answers: Sequence[Answer]) -> None:
    """A line an answer; the file is there whole or not at all. Numbers come back to the bit."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, b"".join(json.dumps(_record(answer), ensure_ascii=False).encode() + b"\n" for answer in answers))


def read_rollouts(path: Path) -> list[Answer]:
    """
    Raises:
        ValueError: no such file, or a line that is no answer (names it).
    """
    if not path.exists():
        raise ValueError(
            f"no rollouts at {path}: they are written by dsv3 rl; a run resumes only with its own folder whole"
        )
    answers = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            answers.append(_answer(json.loads(line)))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} line {number} is no saved answer ({error}): the file was damaged") from None
    return answers


def _record(answer: Answer) -> dict[str, Any]:
    record = {f.name: getattr(answer, f.name) for f in dataclasses.fields(answer)}
    if answer.routes is not None:
        code = base64.b64encode(answer.routes.astype("<i2").tobytes()).decode()
        record["routes"] = {"shape": list(answer.routes.shape), "int16": code}
    return record


def _answer(record: dict[str, Any]) -> Answer:
    routes = record.pop("routes")
    if routes is not None:
        flat = np.frombuffer(base64.b64decode(routes["int16"]), dtype="<i2")
        routes = flat.astype(np.int16).reshape(routes["shape"])
    return Answer(**record, routes=routes)


def same_weights(engine: Engine, model: DeepseekV3) -> bool:
    """Whether the engine reads the very tensors of a model."""
    pairs: list[tuple[Tensor, Tensor]] = list(zip(engine.model.state_dict().values(), model.state_dict().values()))
    return all(a.data_ptr() == b.data_ptr() for a, b in pairs)
