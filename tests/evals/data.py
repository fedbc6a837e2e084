"""Where the benchmarks lie, beside the repository; and items of our own for machines without them."""

import gzip
import json
from pathlib import Path

import pytest

SHARED = Path(__file__).parents[3] / "shared" / "data"
GSM8K, HUMANEVAL = SHARED / "gsm8k" / "test.jsonl", SHARED / "humaneval" / "HumanEval.jsonl.gz"


def benchmark(path: Path) -> list[dict]:
    """Items of a benchmark file; skips the test where the file is not."""
    if not path.exists():
        pytest.skip(f"../shared/data/{path.parent.name}/{path.name} is not beside the repository")
    content = path.read_bytes()
    return [json.loads(line) for line in (gzip.decompress(content) if path.suffix == ".gz" else content).splitlines()]


OWN_GSM8K = [
    {"question": "Tom has 3 apples and buys 4. How many has he?", "answer": "3 + 4 = <<3+4=7>>7.\n#### 7"},
    {"question": "A car costs 1200 dollars, one twice that. Both?", "answer": "1200 + 2400 = <<1200+2400=3600>>3600\n#### 3,600"},
    {"question": "It was 5 degrees and fell by 8. Now?", "answer": "5 - 8 = -3\n#### -3"},
    {"question": "Half of 5?", "answer": "5/2 = 2.5\n#### 2.5"},
]  # fmt: skip

OWN_CODE = [
    {
        "task_id": "Own/0",
        "prompt": 'from typing import List\n\n\ndef total(xs: List[int]) -> int:\n    """Sum of xs."""\n',
        "entry_point": "total",
        "canonical_solution": "    result = 0\n    for x in xs:\n        result += x\n    return result\n",
        "test": "\n\ndef check(candidate):\n    assert candidate([]) == 0\n    assert candidate([1, 2, 5]) == 8\n",
    },
    {
        "task_id": "Own/1",
        "prompt": 'def shout(text: str) -> str:\n    """In capitals, with a mark.\n    """\n',
        "entry_point": "shout",
        "canonical_solution": "    return text.upper() + '!'\n",
        "test": "def check(candidate):\n    assert candidate('a') == 'A!'\n",
    },
]
