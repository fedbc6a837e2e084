"""A small corpus of real text (Python's language reference and some of its sources), with planted documents that must go."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

from dsv3.data.corpus import Source
from dsv3.data.pipeline import BuildConfig
from dsv3.data.tokenizer import Tokenizer

ADDRESS = "maria.keller@fabrikam-labs.com"
PHONE = "+49 30 901820"
ITEM = (
    "A lighthouse keeper trims eleven wicks each evening and burns nine litres of oil for every seven wicks she trims."
)
ANSWER = "In four evenings she trims 44 wicks, so she burns about 56.6 litres of oil in all before the boat comes."
DUPLICATED = "Every reader who is called ZYXWV"
GERMAN = "Die Wirtin stellte den Krug auf den Tisch und sagte, dass es an diesem Abend keine Suppe mehr gibt, weil der "
SHORT = "Too short to learn from."
PROGRAM = "def quillon(values):\n    total = 0\n    for value in values:\n        total += value * value\n    return total\n\n\n"
MATHS = r"""For $n \geq 1$ we have $\sum_{k=1}^n k = \frac{n(n+1)}{2}$, which is seen by pairing the first with the last term.
The induction begins with $n = 1$, where both sides are $1$, and goes from $n$ to $n + 1$ by adding $n + 1$ to each side:
$\frac{n(n+1)}{2} + (n+1) = \frac{(n+1)(n+2)}{2}$. Of squares, $\sum_{k=1}^n k^2 = \frac{n(n+1)(2n+1)}{6}$ is proved alike,
and that of cubes is the square of the first, $\sum_{k=1}^n k^3 = \left(\frac{n(n+1)}{2}\right)^2$, as was to be shown."""
CHINESE = (
    "晋太元中，武陵人捕鱼为业。缘溪行，忘路之远近。忽逢桃花林，夹岸数百步，中无杂树，芳草鲜美，落英缤纷，渔人甚异之。"
)
CHINESE_END = (
    "复前行，欲穷其林。林尽水源，便得一山，山有小口，仿佛若有光。便舍船，从口入。初极狭，才通人。复行数十步，豁然开朗。"
)


@dataclass(frozen=True)
class Planted:
    """config builds it; lines: documents in the .jsonl file, the broken line included."""

    config: BuildConfig
    lines: int


def plant(folder: Path, *, task_mb: float = 0.08) -> Planted:
    """Write the corpus, the evaluation set and a tokenizer."""
    pool = [_first(text, 5000) for name, text in sorted(topics.items()) if len(text) > 600]
    inner, texts = pool[:4], pool[4:50]
    twice = f"{DUPLICATED} should know this.\n\n{inner[0]}\n\n{inner[1]}"
    planted = [
        twice,
        f"To whom it may concern.\n\n{inner[2]}\n\nWrite to {ADDRESS} or call {PHONE} if the pages above are not enough.",
        f"{inner[3][:1500]}\n\n{ITEM} {ANSWER}",
        GERMAN + "Koch nach Hause gegangen ist und die Küche schon geputzt war. " * 6,
        SHORT,
        MATHS,
        CHINESE + CHINESE_END,
        twice.replace("should know this", "had better know this"),
    ]
    documents = [text for at, text in enumerate(texts) for text in (text, *planted[at // 5 : at // 5 + (at % 5 == 4)])]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in documents]
    lines.insert(7, '{"text": "an unfinished li')
    (folder / "pages.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "code").mkdir()
    for name in ("heapq", "bisect", "textwrap"):
        source = Path(json.__file__).parents[1] / f"{name}.py"
        (folder / "code" / f"{name}.py").write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    (folder / "code" / "quillon.py").write_text(PROGRAM * 3 + "\n".join(f"q{n} = quillon([{n}])" for n in range(9)))
    (folder / "bench.jsonl").write_text(json.dumps({"question": ITEM, "answer": ANSWER}) + "\n")
    Tokenizer.train(texts[:20], 420).save(folder / "tokenizer")
    config = BuildConfig(
        sources=(
            Source(name="web", paths=(str(folder / "pages.jsonl"),), weight=3.0),
            Source(name="files", paths=(str(folder / "code"),)),
        ),
        tokenizer=str(folder / "tokenizer"),
        against=(folder / "bench.jsonl",),
        held_out=0.2,
        task_mb=task_mb,
    )
    return Planted(config, len(lines))


def _first(text: str, size: int) -> str:
    """About so many characters, up to a paragraph's end, without the rulers that Gopher's rules rightly dislike."""
    text = re.sub(r"[*=-]{4,}\n", "", text)
    return text if len(text) <= size else text[: text.rfind("\n\n", 0, size) if "\n\n" in text[:size] else size]
