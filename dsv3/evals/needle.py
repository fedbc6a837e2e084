"""Needle in a haystack: a sentence hidden in a long text, asked for at its end; every length by every depth, as a heat map.

    filler | ... The magic number of CITY is 7319204. ... | filler | question

As figure 8 of the V3 report (to 128K tokens). A prompt has its length in tokens as the tokenizer counts, question and needle
included, BOS not, give or take two where joints merge tokens. The engine reads it in chunks (`step_tokens`), so memory is the
latent cache (1,152 bytes a token and layer at V3's sizes in bfloat16) and one chunk's activations, whatever the length. An answer
is right if the first number in it is the needle's. Filler: texts of the caller's, repeated, or sentences made here. Does not:
train the model that finds it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsv3.evals.tasks import Item, Task, Tools
from dsv3.infer.text import Codec

LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072 - 64)
DEPTHS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
_CITIES = ("Lisbon", "Quito", "Hanoi", "Dakar", "Oslo", "Lima", "Turin", "Kyoto", "Accra", "Perth", "Riga", "Cairo")
_WHO = (
    "The gardener",
    "A sailor",
    "Her uncle",
    "The old clerk",
    "A tall boy",
    "The baker",
    "Our neighbour",
    "A student",
)
_DID = ("counted", "painted", "carried", "sold", "forgot", "described", "mended", "found")
_WHAT = (
    "a wooden chair",
    "three lamps",
    "the blue gate",
    "some letters",
    "an empty jar",
    "the long rope",
    "a pair of boots",
)
_WHEN = (
    "before noon",
    "in the rain",
    "after the fair",
    "on a Sunday",
    "near the bridge",
    "without a word",
    "late in spring",
)


def needle_task(
    tokenizer: Codec,
    *,
    lengths: Sequence[int] = LENGTHS,
    depths: Sequence[float] = DEPTHS,
    filler: str | None = None,
    seed: int = 0,
    max_tokens: int = 24,
    chat: bool = False,
) -> Task:
    """An item for every length (tokens) and depth (0: needle first, 1: last).

    Args:
        filler: text to hide it in, cut at tokens and repeated as needed; None: made sentences.

    Raises:
        ValueError: a length too short for needle and question, a depth outside 0 to 1, filler that says the number itself.
    """
    if any(not 0 <= depth <= 1 for depth in depths) or not depths or not lengths:
        raise ValueError(
            f"depths {list(depths)} at lengths {list(lengths)}: give depths from 0 to 1 and at least one of each"
        )
    longest = max(lengths)
    hay = _filler(tokenizer, filler, longest, random.Random(seed))
    made = []
    for length in lengths:
        for depth in depths:
            rng = random.Random(f"{seed}/{length}/{depth}")
            city, number = rng.choice(_CITIES), str(rng.randrange(1_000_000, 10_000_000))
            if filler is not None and number in filler:
                raise ValueError(f"the filler holds {number} itself: give other text or another seed")
            prompt = _hide(tokenizer, hay, length, depth, city, number, chat)
            about = {"length": length, "depth": depth, "city": city}
            name = f"needle/{length}/{depth:g}"
            made.append(
                Item(
                    id=name,
                    prompt=prompt,
                    gold=number,
                    chat=chat,
                    max_tokens=max_tokens,
                    group=str(length),
                    about=about,
                )
            )
    settings: dict[str, Any] = {
        "task": "needle", "lengths": list(lengths), "depths": list(depths), "seed": seed, "chat": chat,
        "filler": "own" if filler is None else "given", "max_tokens": max_tokens, "reported": "found",
    }  # fmt: skip
    return Task(name="needle", items=made, grade=grade, reported="found", settings=settings)


def grade(item: Item, text: str, tools: Tools) -> dict[str, bool]:
    """found: the first number said, of four digits or more, is the needle's. contained: it stands somewhere."""
    numbers = re.findall(r"\d{4,}", text.replace(",", ""))
    return {"found": numbers[:1] == [item.gold], "contained": item.gold in numbers}


def _filler(tokenizer: Codec, given: str | None, tokens: int, rng: random.Random) -> list[int]:
    """At least so many tokens of text."""
    if given is not None:
        ids = tokenizer.encode(given)
        if not ids:
            raise ValueError("the filler has no tokens: give some text")
        return (ids * (tokens // len(ids) + 1))[:tokens]
    sentences = [f"{rng.choice(_WHO)} {rng.choice(_DID)} {rng.choice(_WHAT)} {rng.choice(_WHEN)}." for _ in range(400)]
    each = [tokenizer.encode(" " + sentence) for sentence in sentences]
    ids: list[int] = []
    while len(ids) < tokens:
        ids += rng.choice(each)
    return ids[:tokens]


def _hide(tokenizer: Codec, hay: Sequence[int], length: int, depth: float, city: str, number: str, chat: bool) -> str:
    """Text of `length` tokens; cut and joined as text, so that its tokens are those that any reader makes of it."""
    needle = f" The magic number of {city} is {number}. "
    question = f"\n\nQuestion: What is the magic number of {city}?" + (
        " Answer with the number alone." if chat else f"\nAnswer: The magic number of {city} is"
    )
    fixed = len(tokenizer.encode(needle)) + len(tokenizer.encode(question))
    room = length - fixed
    if room < 2:
        raise ValueError(
            f"a length of {length} tokens holds no text beside needle and question ({fixed} tokens): give more"
        )
    for _ in range(12):  # joints may merge or split tokens: a few steps bring the count to the mark
        before = round(room * depth)
        text = tokenizer.decode(hay[:before]) + needle + tokenizer.decode(hay[before:room]) + question
        off = length - len(tokenizer.encode(text))
        if not off:
            break
        room = max(2, min(room + off, len(hay)))
    return text


def heat(
    rows: Sequence[Mapping[str, Any]], convention: str = "found"
) -> tuple[list[int], list[float], list[list[float]]]:
    """Lengths, depths and scores[depth][length] of a needle log's rows, the mean where a field has several; NaN where there is
    none. A row without samples failed: 0."""
    lengths = sorted({row["about"]["length"] for row in rows})
    depths = sorted({row["about"]["depth"] for row in rows})
    scores = [[float("nan")] * len(lengths) for _ in depths]
    fields: dict[tuple[int, int], list[float]] = {}
    for row in rows:
        field = depths.index(row["about"]["depth"]), lengths.index(row["about"]["length"])
        fields.setdefault(field, []).extend([float(s["grades"][convention]) for s in row.get("samples", ())] or [0.0])
    for (depth, length), values in fields.items():
        scores[depth][length] = sum(values) / len(values)
    return lengths, depths, scores


def draw_heat_map(rows: Sequence[Mapping[str, Any]], path: str | Path, *, title: str = "Needle in a haystack") -> Path:
    """Write the map as a picture (by its suffix: .png, .svg, .pdf): lengths across, depths down, the score in each field."""
    from matplotlib.figure import Figure

    lengths, depths, scores = heat(rows)
    figure = Figure(figsize=(1.6 + 0.75 * len(lengths), 1.6 + 0.36 * len(depths)), layout="constrained")
    axes = figure.add_subplot()
    picture = axes.imshow(scores, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    axes.set_xticks(range(len(lengths)), [f"{n / 1024:g}K" if n >= 1024 else str(n) for n in lengths], rotation=45)
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    axes.set(xlabel="context (tokens)", ylabel="depth of the needle", title=title)
    for y, line in enumerate(scores):
        for x, value in enumerate(line):
            if value == value:
                axes.text(x, y, f"{value:.0%}", ha="center", va="center", fontsize=7)
    figure.colorbar(picture, label="found")
    path = Path(path)
    figure.savefig(path, dpi=150)
    return path
