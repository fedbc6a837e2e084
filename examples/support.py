"""A support assistant: it looks things up with tools, and remembers what a customer told it, also after a restart.

dsv3 serve runs/tiny
python examples/support.py --customer ada
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from openai import OpenAI

ORDERS = {"1001": "shipped on Monday, arrives on Thursday", "1002": "waiting for payment"}
SYSTEM = "You are the support desk of a bookshop. Look orders up before you speak of them. Remember what will matter later.\n"


def tool(name: str, description: str, **properties: str) -> dict[str, Any]:
    fields = {key: {"type": "string", "description": text} for key, text in properties.items()}
    schema = {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


TOOLS = [
    tool("look_up_order", "State of an order.", order="its number"),
    tool("remember", "Keep a fact about this customer for later conversations.", fact="one sentence"),
]


class Desk:
    """One customer's conversation. `memory`: a JSON file of facts, one list a customer."""

    def __init__(self, client: OpenAI, model: str, customer: str, memory: Path) -> None:
        self.client, self.model, self.customer, self.memory = client, model, customer, memory
        facts = self._facts().get(customer, [])
        known = "What you know of the customer:\n" + "\n".join(f"- {fact}" for fact in facts) if facts else ""
        self.messages: list[Any] = [{"role": "system", "content": SYSTEM + known}]

    def say(self, text: str, most_calls: int = 4) -> str:
        """The customer's turn; the assistant's answer, after as many calls of tools as it wants."""
        self.messages.append({"role": "user", "content": text})
        for turn in range(most_calls + 1):
            choice = "auto" if turn < most_calls else "none"  # a model that only calls must come to an answer
            reply = self.client.chat.completions.create(
                model=self.model, messages=self.messages, tools=TOOLS, tool_choice=choice, max_tokens=512
            )
            message = reply.choices[0].message
            self.messages.append(message.model_dump(exclude_none=True, include={"role", "content", "tool_calls"}))
            if not message.tool_calls:
                return message.content or ""
            for call in message.tool_calls:
                result = self._call(call.function.name, call.function.arguments)
                self.messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
        raise AssertionError("tool_choice none gives no calls")

    def _call(self, name: str, arguments: str) -> str:
        try:
            given = json.loads(arguments)
            if name == "look_up_order":
                return ORDERS.get(given["order"], "there is no such order")
            if name == "remember":
                facts = self._facts()
                facts.setdefault(self.customer, []).append(given["fact"])
                self.memory.write_text(json.dumps(facts, ensure_ascii=False, indent=1), encoding="utf-8")
                return "kept"
        except (ValueError, KeyError, TypeError):
            return f"arguments {arguments!r} do not fit {name}"  # the model reads it and may try again
        return f"there is no tool {name}"

    def _facts(self) -> dict[str, list[str]]:
        return json.loads(self.memory.read_text(encoding="utf-8")) if self.memory.exists() else {}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--api-key", default="unused")
    parser.add_argument("--model", default="deepseek-chat")
    parser.add_argument("--customer", default="ada")
    parser.add_argument("--memory", type=Path, default=Path("memory.json"))
    asked = parser.parse_args()
    desk = Desk(OpenAI(base_url=asked.base_url, api_key=asked.api_key), asked.model, asked.customer, asked.memory)
    while text := input("> "):
        print(desk.say(text))
