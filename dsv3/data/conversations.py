"""Conversations to learn from: JSON lines, a conversation each, rendered to token ids and a loss mask.

    {"messages": [{"role": "user", "content": ...}, ...], "tools": [...]}     OpenAI's form; reasoning_content is learnt too
    {"prompt": "..." | [messages], "response": "...", "reasoning_content": "...", "system": "..."}

`reasoning` of a line (true, false) says whether it is written with thinking; without it, what its last answer holds decides, so
reasoning and other samples mix freely. What is learnt is the assistant's: each turn with its end token (data/chat.py).

A line that cannot be read is left out, counted, and told with file, line and field; so is a sample longer than a row, which
is never cut: half an answer teaches to stop anywhere. A source without one good line is an error.
Does not: pack (data/packing.py) or download.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dsv3.data.chat import ChatFormat, Rendered
from dsv3.data.tokenizer import THINK_END

MOST_TOLD = 5  # lines that are told of a kind of fault
_SUFFIXES = (".jsonl", ".json", ".ndjson", ".jsonl.gz")


@dataclass(frozen=True, kw_only=True)
class ConversationSource:
    """Files of one kind of sample. `weight`: its share of the samples, in proportion to the others'; None: as many as it has."""

    name: str
    paths: tuple[Path, ...]
    weight: float | None = None

    def __post_init__(self) -> None:
        if not self.name or not self.paths:
            raise ValueError(f"source {self.name!r} has {len(self.paths)} files: give a name and at least one file")
        if self.weight is not None and not 0 < self.weight < float("inf"):
            raise ValueError(f"source {self.name!r} has weight {self.weight}: give a positive number")


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """One line, checked as far as JSON goes; `where` is "FILE line N"."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    reasoning: bool
    where: str


@dataclass
class ReadingReport:
    """What reading left out, and why."""

    read: int = 0
    faults: list[str] = field(default_factory=list)
    too_long: list[str] = field(default_factory=list)
    longest: int = 0

    def lines(self) -> list[str]:
        """For the user."""
        said = [f"{self.read:,} conversations read"]
        for found, what in ((self.faults, "lines are no conversation"), (self.too_long, "samples are too long")):
            if found:
                more = f", and {len(found) - MOST_TOLD:,} more" if len(found) > MOST_TOLD else ""
                said.append(f"left out: {len(found):,} {what}: {'; '.join(found[:MOST_TOLD])}{more}")
        return said


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Rendered conversations of one source, end to end: sample i is ids[offsets[i]:offsets[i + 1]]."""

    name: str
    weight: float | None
    ids: np.ndarray  # (N,) int32
    learn: np.ndarray  # (N,) bool
    offsets: np.ndarray  # (n + 1,) int64

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    @property
    def fingerprint(self) -> str:
        """Of everything in it: a run resumes on the same samples only."""
        digest = hashlib.sha256(f"{self.name} {self.weight}".encode())
        for part in (self.ids, self.learn, self.offsets):
            digest.update(np.ascontiguousarray(part).tobytes())
        return digest.hexdigest()


# -- reading -----------------------------------------------------------------------------------------------------------


def parse_conversation_sources(given: Sequence[str]) -> list[ConversationSource]:
    """`PATH`, or `NAME=WEIGHT:PATH[,PATH]`; a folder stands for its .jsonl files.

    Raises:
        ValueError: a path is missing, a weight is no number, a name occurs twice.
    """
    sources = []
    for text in given:
        name, weight, paths = Path(text).stem, None, text
        if "=" in text and not Path(text).exists():
            name, _, rest = text.partition("=")
            number, colon, paths = rest.partition(":")
            try:
                weight = float(number)
            except ValueError:
                colon = ""
            if not colon:
                raise ValueError(f"source {text!r} is not NAME=WEIGHT:PATH[,PATH]: for example reasoning=0.75:r1.jsonl")
        files = [file for path in paths.split(",") for file in _files(Path(path))]
        sources.append(ConversationSource(name=name, paths=tuple(files), weight=weight))
    names = [source.name for source in sources]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"sources share the name {sorted(twice)[0]!r}: give each its own, NAME=WEIGHT:PATH")
    if len({source.weight is None for source in sources}) > 1:
        raise ValueError(
            f"of the sources {', '.join(names)} some have a weight and some have none: give all or none one"
        )
    return sources


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.name.endswith(_SUFFIXES))
        if not found:
            raise ValueError(f"{path} holds no {', '.join(_SUFFIXES)} file")
        return found
    if not path.is_file():
        raise ValueError(f"{path} does not exist: give JSON lines of conversations, or a folder of them")
    return [path]


def read_json_lines(path: Path, faults: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """("FILE line N", object) of each line that is one; of the others a sentence each goes to `faults`. Empty lines are none."""
    opener = gzip.open if path.name.endswith(".gz") else open
    number = 0
    try:
        with opener(path, "rb") as file:
            for number, line in enumerate(file, 1):
                where = f"{path} line {number}"
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except UnicodeDecodeError as error:
                    faults.append(f"{where} is no UTF-8 ({error.reason} at byte {error.start})")
                    continue
                except (ValueError, RecursionError) as error:
                    faults.append(f"{where} is no JSON ({error})")
                    continue
                if isinstance(row, dict):
                    yield where, row
                else:
                    faults.append(f"{where} is a {type(row).__name__}, not an object")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        faults.append(f"{path} is damaged after line {number} ({error})")


def conversation_of(row: Mapping[str, Any], where: str) -> Conversation:
    """One line's object.

    Raises:
        ValueError: names `where`, the field and the cure. The messages' order and contents are the renderer's to check.
    """
    if "messages" in row:
        messages = _messages(row["messages"], f"{where}: messages")
    elif "prompt" in row and "response" in row:
        messages = _from_pair(row, where)
    else:
        raise ValueError(f"{where} has the fields {sorted(row)}: give messages, or prompt and response")
    if not any(message.get("role") == "assistant" for message in messages):
        raise ValueError(f"{where}: messages have no role 'assistant': nothing is there to learn")
    tools = row.get("tools")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise ValueError(f"{where}: tools is {_kind(tools)}: give a list of functions, or leave it out")
    reasoning = row.get("reasoning")
    if not isinstance(reasoning, bool | None):
        raise ValueError(f"{where}: reasoning is {reasoning!r:.80}: give true or false, or leave it out")
    if reasoning is None:
        last = next(m for m in reversed(messages) if m.get("role") == "assistant")
        reasoning = bool(last.get("reasoning_content")) or THINK_END in str(last.get("content"))
    return Conversation(messages=messages, tools=tools or None, reasoning=reasoning, where=where)


def _messages(value: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise ValueError(f'{where} is {_kind(value)}: give a list of {{"role": ..., "content": ...}}')
    return value


def _from_pair(row: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    prompt, response, system = row["prompt"], row["response"], row.get("system")
    if not isinstance(response, str) or not response:
        raise ValueError(f"{where}: response is {_kind(response)}: give the answer's text")
    if isinstance(prompt, str):
        if not prompt:
            raise ValueError(f"{where}: prompt is empty: give the question's text")
        before: list[dict[str, Any]] = [{"role": "user", "content": prompt}]
    else:
        before = _messages(prompt, f"{where}: prompt")
    if system is not None:
        if not isinstance(system, str):
            raise ValueError(f"{where}: system is {_kind(system)}: give a text, or leave it out")
        before = [{"role": "system", "content": system}, *before]
    answer: dict[str, Any] = {"role": "assistant", "content": response}
    if row.get("reasoning_content"):
        answer["reasoning_content"] = row["reasoning_content"]
    return [*before, answer]


def _kind(value: Any) -> str:
    return "null" if value is None else f"a {type(value).__name__} ({value!r:.80})"


def read_conversations(source: ConversationSource, report: ReadingReport) -> Iterator[Conversation]:
    """The good lines of a source; the rest is in the report."""
    for path in source.paths:
        for where, row in read_json_lines(path, report.faults):
            try:
                yield conversation_of(row, where)
            except ValueError as error:
                report.faults.append(str(error))


# -- rendering ---------------------------------------------------------------------------------------------------------


def render_conversations(
    conversations: Iterable[Conversation],
    chat: ChatFormat,
    *,
    name: str,
    weight: float | None,
    seq_len: int,
    held_out: float,
    seed: int,
    report: ReadingReport,
) -> tuple[Samples, Samples]:
    """(samples to train on, samples held out). Those that begin alike, up to the first answer, are on one side, whatever their
    system messages and tools: of a distilled problem both kinds of sample.

    Args:
        seq_len: most inputs of a sample, one less than its tokens.
        held_out: share of the samples to hold out, 0 to below 1.

    Raises:
        ValueError: nothing is left to train on; the message says what became of the lines.
    """
    parts = _Parts(), _Parts()
    for conversation in conversations:
        try:
            rendered = chat.render(
                conversation.messages, conversation.tools, generate=False, reasoning=conversation.reasoning
            )
        except ValueError as error:
            report.faults.append(f"{conversation.where}: {error}")
            continue
        if not any(rendered.mask):
            report.faults.append(f"{conversation.where}: no token of it is to be learnt")
            continue
        report.longest = max(report.longest, len(rendered.ids))
        if len(rendered.ids) - 1 > seq_len:
            report.too_long.append(f"{conversation.where} has {len(rendered.ids):,} tokens")
            continue
        report.read += 1
        parts[_draw(_question(conversation, rendered, chat), seed) < held_out].add(rendered.ids, rendered.mask)
    train, held = (part.samples(name, weight) for part in parts)
    if not len(train):
        cure = f"seq_len {seq_len} is too short for them" if report.too_long else "nothing could be read"
        raise ValueError(f"source {name!r} has no sample to train on ({cure}): {'; '.join(report.lines())}")
    return train, held


class _Parts:
    """Grows Samples."""

    def __init__(self) -> None:
        self._ids: list[np.ndarray] = []
        self._learn: list[np.ndarray] = []

    def add(self, ids: Sequence[int], learn: Sequence[bool]) -> None:
        self._ids.append(np.asarray(ids, dtype=np.int32))
        self._learn.append(np.asarray(learn, dtype=np.bool_))

    def samples(self, name: str, weight: float | None) -> Samples:
        lengths = [len(ids) for ids in self._ids]
        return Samples(
            name=name,
            weight=weight,
            ids=np.concatenate(self._ids) if lengths else np.zeros(0, np.int32),
            learn=np.concatenate(self._learn) if lengths else np.zeros(0, np.bool_),
            offsets=np.concatenate(([0], np.cumsum(lengths, dtype=np.int64))).astype(np.int64),
        )


def _question(conversation: Conversation, rendered: Rendered, chat: ChatFormat) -> list[int]:
    """Ids of what comes before the first answer, without system messages and tools."""
    spoken = [message for message in conversation.messages if message.get("role") != "system"]
    if len(spoken) < len(conversation.messages) or conversation.tools:
        rendered = chat.render(spoken, generate=False, reasoning=conversation.reasoning)
    return rendered.ids[: rendered.mask.index(True)]


def _draw(ids: Sequence[int], seed: int) -> float:
    """0 to below 1, from what comes before the first answer."""
    digest = hashlib.sha256(np.asarray([seed, *ids], dtype=np.int64).tobytes()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
