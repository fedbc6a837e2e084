"""A writer: a plan as JSON that obeys a schema, then each section, then the whole as Markdown and JSON.

dsv3 serve runs/tiny
python examples/writer.py "How a printing press works" --sections 3
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from openai import OpenAI


def schema(name: str, **properties: Any) -> dict[str, Any]:
    """The response_format that makes an answer an object with these properties, all of them and no other."""
    body = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    return {"type": "json_schema", "json_schema": {"name": name, "strict": True, "schema": body}}


def text(longest: int) -> dict[str, Any]:
    return {"type": "string", "minLength": 1, "maxLength": longest}


class Writer:
    def __init__(self, client: OpenAI, model: str, temperature: float = 0.7) -> None:
        self.client, self.model, self.temperature = client, model, temperature

    def write(self, subject: str, sections: int = 3, audience: str = "curious adults") -> dict[str, Any]:
        """{"title", "audience", "sections": [{"heading", "text", "key_points"}]}"""
        plan = self._ask(
            f"Plan an article on {subject!r} for {audience}, in {sections} sections.",
            schema(
                "plan",
                title=text(120),
                headings={"type": "array", "items": text(80), "minItems": sections, "maxItems": sections},
            ),
        )
        done: list[dict[str, Any]] = []
        for heading in plan["headings"]:
            so_far = "\n".join(f"{one['heading']}: {'; '.join(one['key_points'])}" for one in done) or "nothing yet"
            made = self._ask(
                f"Article: {plan['title']}\nWritten so far:\n{so_far}\n\nWrite the section {heading!r}, without repeating.",
                schema(
                    "section",
                    text=text(1200),
                    key_points={"type": "array", "items": text(100), "minItems": 1, "maxItems": 3},
                ),
            )
            done.append({"heading": heading, **made})
        return {"title": plan["title"], "audience": audience, "sections": done}

    def _ask(self, prompt: str, form: dict[str, Any]) -> dict[str, Any]:
        reply = self.client.chat.completions.create(
            model=self.model, messages=[{"role": "user", "content": prompt}], response_format=form,  # type: ignore[call-overload]
            temperature=self.temperature, max_tokens=2048,
        )  # fmt: skip
        if reply.choices[0].finish_reason == "length":
            raise ValueError("the answer was cut off: give the model more room, or ask for less")
        return json.loads(reply.choices[0].message.content)


def markdown(article: dict[str, Any]) -> str:
    parts = [f"# {article['title']}"]
    parts += [f"## {section['heading']}\n\n{section['text']}" for section in article["sections"]]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subject")
    parser.add_argument("--sections", type=int, default=3)
    parser.add_argument("--audience", default="curious adults")
    parser.add_argument("--json", action="store_true", help="the structure instead of Markdown")
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--api-key", default="unused")
    parser.add_argument("--model", default="deepseek-chat")
    asked = parser.parse_args()
    writer = Writer(OpenAI(base_url=asked.base_url, api_key=asked.api_key), asked.model)
    article = writer.write(asked.subject, asked.sections, asked.audience)
    print(json.dumps(article, ensure_ascii=False, indent=1) if asked.json else markdown(article), end="")
