"""A code assistant: it fills a hole in a file (FIM), and mends a file until its tests pass, in a sandbox.

dsv3 serve runs/tiny
python examples/coder.py fill program.py          # where the file says <HOLE>
python examples/coder.py mend program.py tests.py # prints the mended file
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from openai import OpenAI

import dsv3

HOLE = "<HOLE>"
ASK = """The program below fails its tests. Answer with the whole mended program in one ```python block.

```python
{program}
```

The tests:

```python
{tests}
```

What they say:

{report}
"""


def fill(client: OpenAI, model: str, text: str) -> str:
    """The file with its hole filled: one line or block, by the tokens that V3 was trained with for it."""
    before, hole, after = text.partition(HOLE)
    if not hole:
        raise ValueError(f"the file has no {HOLE}: write it where code is missing")
    reply = client.completions.create(model=model, prompt=before, suffix=after, max_tokens=256, temperature=0)
    return before + reply.choices[0].text + after


def mend(client: OpenAI, model: str, program: str, tests: str, tries: int = 4) -> tuple[str, bool]:
    """(program, whether the tests pass). Each failed try goes back to the model with what the tests said."""
    messages: list = []
    with dsv3.Sandbox(workers=1) as box:  # what a model wrote runs nowhere else
        for left in range(tries, -1, -1):
            result = box.run(program, tests=tests)
            if result.ok or not left:
                return program, result.ok
            report = result.stderr[-2000:] or ("too slow" if result.timed_out else "no message")
            messages.append({"role": "user", "content": ASK.format(program=program, tests=tests, report=report)})
            reply = client.chat.completions.create(model=model, messages=messages, max_tokens=1024, temperature=0.2)
            answer = reply.choices[0].message.content or ""
            messages.append({"role": "assistant", "content": answer})
            program = code_in(answer) or program
    raise AssertionError("the loop returns")


def code_in(answer: str) -> str | None:
    """The last fenced block of an answer that names Python or nothing."""
    blocks = re.findall(r"```(\w*)\n(.*?)```", answer, re.DOTALL)
    return next((code for name, code in reversed(blocks) if name in ("", "python", "py")), None)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["fill", "mend"])
    parser.add_argument("program", type=Path)
    parser.add_argument("tests", type=Path, nargs="?")
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--api-key", default="unused")
    parser.add_argument("--model", default="deepseek-chat")
    asked = parser.parse_args()
    client, program = OpenAI(base_url=asked.base_url, api_key=asked.api_key), asked.program.read_text(encoding="utf-8")
    if asked.what == "fill":
        print(fill(client, asked.model, program))
    elif asked.tests is None:
        parser.error("mend needs the tests too")
    else:
        mended, passes = mend(client, asked.model, program, asked.tests.read_text(encoding="utf-8"))
        print(mended)
        raise SystemExit(0 if passes else 1)
