"""Conversations to token ids and a loss mask: the one renderer that SFT, RL and serving share.

    messages, tools -> turns (data/messages.py) -> pieces (text | control token, learnt or not) -> ids, mask

Format, of V3-0324 (B = begin of sentence, U = User, A = Assistant, E = end of sentence; nothing stands between turns):

    start               B, all system messages joined by an empty line (later ones too: they move to the front), tools
    user                U content A
    assistant           content E
      with calls        content <calls begin> call \\n call ... <calls end> E
      one call          <call begin>function<sep>NAME\\n```json\\nARGUMENTS\\n```<call end>
    tool results        <outputs begin> output \\n output ... <outputs end>, one output: <output begin>content<output end>
                        (the end is left out where a user's message follows, as in the published template)
    generation prompt   nothing after a user (A stands already) or a tool's result, else A

With reasoning, as R1, `<think>\\n` opens the answer unless a tool's result was last, and reasoning_content is written

    <think>\\nREASONING\\n</think>\\n\\nCONTENT

in the current turn (the messages after the last user's); earlier turns lose it, and of a content that holds </think>
only what follows the last one is kept. A content of the current turn that holds </think>, without reasoning_content, is
taken apart there, so that raw R1 samples are learnt with real think tokens. Without reasoning it is dropped everywhere.

Tools are appended to the system text, after an empty line if there is any, in the wording of DeepSeek-V2.5's card:

    ## Tools\\n\\n### Function\\n\\nYou have the following functions available:\\n\\n
    - `NAME`:\\n```json\\nFUNCTION\\n```          FUNCTION: JSON, indented by 4; several are parted by an empty line

The template runs as code. CHAT_TEMPLATE and REASONING_TEMPLATE say the same in Jinja, for other software to run.
A message's text is encoded as text: it can never become a control token.
Source: chat templates of DeepSeek-V3-0324 and R1. Does not: parse replies (data/reply.py) or know December 2024's V3.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dsv3.data.messages import Turn, read_messages, read_tools
from dsv3.data.tokenizer import (
    ASSISTANT,
    BOS,
    EOS,
    FIM_BEGIN,
    FIM_END,
    FIM_HOLE,
    THINK_BEGIN,
    THINK_END,
    TOOLS,
    USER,
    Tokenizer,
)

CALLS_BEGIN, CALLS_END, CALL_BEGIN, CALL_END, OUTPUTS_BEGIN, OUTPUTS_END, OUTPUT_BEGIN, OUTPUT_END, TOOL_SEP = TOOLS
FENCE_BEGIN, FENCE_END = "\n```json\n", "\n```"
_TOOLS_HEAD = "## Tools\n\n### Function\n\nYou have the following functions available:\n\n"

_TEMPLATE = """\
{%- set thinking = thinking | default(__THINKING__) -%}
{%- macro flat(content) -%}
{%- if content is string -%}{{ content }}{%- elif content -%}
{%- for part in content -%}{{ part.text }}{%- endfor -%}{%- endif -%}
{%- endmacro -%}
{%- set ns = namespace(system=[], user=-1, last='') -%}
{%- for message in messages -%}
{%- if message.role == 'system' -%}{%- set ns.system = ns.system + [flat(message.content)] -%}
{%- elif message.role == 'user' -%}{%- set ns.user = loop.index0 -%}
{%- elif message.role not in ['assistant', 'tool'] -%}
{{- raise_exception('unknown role ' ~ message.role ~ ': use system, user, assistant or tool') -}}
{%- endif -%}
{%- endfor -%}
{%- set system = ns.system | join('\\n\\n') -%}
{{- '__BOS__' ~ system -}}
{%- if tools -%}
{{- ('\\n\\n' if system else '') ~ '__HEAD__' -}}
{%- for tool in tools -%}
{{- ('' if loop.first else '\\n\\n') ~ '- `' ~ tool.function.name ~ '`:\\n```json\\n' -}}
{{- (tool.function | tojson(indent=4)) ~ '\\n```' -}}
{%- endfor -%}
{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}
{{- '__USER__' ~ flat(message.content) ~ '__ASSISTANT__' -}}
{%- set ns.last = 'user' -%}
{%- elif message.role == 'tool' -%}
{{- '\\n' if ns.last == 'tool' else '__OUTPUTS_BEGIN__' -}}
{{- '__OUTPUT_BEGIN__' ~ flat(message.content) ~ '__OUTPUT_END__' -}}
{%- set ns.last = 'tool' -%}
{%- elif message.role == 'assistant' -%}
{{- '__OUTPUTS_END__' if ns.last == 'tool' else '' -}}
{%- set open = message.prefix or message.partial -%}
{%- set content = flat(message.content) -%}
{%- set thought = (message.reasoning_content or '') if thinking and loop.index0 > ns.user else '' -%}
{%- if thinking and '__THINK_END__' in content -%}
{%- set split = content.split('__THINK_END__') -%}
{%- set content = split[-1] -%}
{%- if loop.index0 > ns.user and not thought -%}
{%- set thought = (split[:-1] | join('__THINK_END__')).strip('\\n') -%}
{%- if thought.startswith('__THINK_BEGIN__') -%}{%- set thought = thought[7:].strip('\\n') -%}{%- endif -%}
{%- set content = content.lstrip('\\n') -%}
{%- endif -%}
{%- endif -%}
{%- if thinking and open and not content -%}
{{- '__THINK_BEGIN__\\n' ~ thought -}}
{%- elif thought -%}
{{- '__THINK_BEGIN__\\n' ~ thought ~ '\\n__THINK_END__\\n\\n' -}}
{%- endif -%}
{{- content -}}
{%- for call in message.tool_calls or [] -%}
{{- '__CALLS_BEGIN__' if loop.first else '\\n' -}}
{{- '__CALL_BEGIN__function__TOOL_SEP__' ~ call.function.name ~ '\\n```json\\n' -}}
{{- call.function.arguments if call.function.arguments is string else (call.function.arguments | tojson) -}}
{{- '\\n```__CALL_END__' ~ ('__CALLS_END__' if loop.last else '') -}}
{%- endfor -%}
{{- '' if open else '__EOS__' -}}
{%- set ns.last = 'open' if open else 'assistant' -%}
{%- endif -%}
{%- endfor -%}
{{- '__OUTPUTS_END__' if ns.last == 'tool' else '' -}}
{%- if add_generation_prompt and ns.last not in ['tool', 'open'] -%}
{{- '' if ns.last == 'user' else '__ASSISTANT__' -}}
{{- '__THINK_BEGIN__\\n' if thinking else '' -}}
{%- endif -%}"""


def _template(thinking: bool) -> str:
    names = {
        **dict(THINKING=str(thinking).lower(), BOS=BOS, EOS=EOS, USER=USER, ASSISTANT=ASSISTANT),
        **dict(THINK_BEGIN=THINK_BEGIN, THINK_END=THINK_END, HEAD=_TOOLS_HEAD.replace("\n", "\\n")),
        **dict(CALLS_BEGIN=CALLS_BEGIN, CALLS_END=CALLS_END, CALL_BEGIN=CALL_BEGIN, CALL_END=CALL_END),
        **dict(OUTPUTS_BEGIN=OUTPUTS_BEGIN, OUTPUTS_END=OUTPUTS_END, TOOL_SEP=TOOL_SEP),
        **dict(OUTPUT_BEGIN=OUTPUT_BEGIN, OUTPUT_END=OUTPUT_END),
    }
    return re.sub(r"__([A-Z_]+?)__", lambda match: names[match[1]], _TEMPLATE)


CHAT_TEMPLATE = _template(thinking=False)
"""Jinja for tokenizer_config.json, the same as ChatFormat.text; `thinking=true` there is `reasoning=True` here."""
REASONING_TEMPLATE = _template(thinking=True)
"""CHAT_TEMPLATE of a model that reasons unless told `thinking=false`."""


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """ids (T,), and mask (T,): True where the token is an assistant's to learn, each turn's end token included."""

    ids: list[int]
    mask: list[bool]
    thinking: bool
    """Whether the ids end inside an open <think>: the reply starts with reasoning (ReplyParser asks for it)."""


class ChatFormat:
    """The format of one tokenizer's checkpoint. `reasoning`: whether it opens <think> by default, as R1 does.
    `stop_ids`: what ends a reply. `has_tools`, `has_think`: whether the tokenizer has these control tokens."""

    def __init__(self, tokenizer: Tokenizer, *, reasoning: bool = False) -> None:
        """
        Raises:
            ValueError: the tokenizer lacks the tokens of the roles, or, with reasoning, of thinking.
        """
        self._tokenizer = tokenizer
        self._need("chat", (BOS, EOS, USER, ASSISTANT))
        if reasoning:
            self._need("reasoning", (THINK_BEGIN, THINK_END))
        self.reasoning = reasoning
        self.has_tools = not self._missing(TOOLS)
        self.has_think = not self._missing((THINK_BEGIN, THINK_END))
        self.stop_ids: tuple[int, ...] = (self._id(EOS),)

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> ChatFormat:
        """The format that the checkpoint's own chat_template asks for; V3-0324's where it has none.

        Raises:
            ValueError: a control token is missing, or the template is V3.1's or later, which write turns differently.
        """
        template = tokenizer.config.get("chat_template")
        template = template if isinstance(template, str) else CHAT_TEMPLATE
        ours = template in (CHAT_TEMPLATE, REASONING_TEMPLATE)
        if not ours and re.search(r"\{\{-? *['\"]</think>", template):
            raise ValueError(
                "this checkpoint's chat_template answers with a bare </think> (V3.1 or later), which is not V3-0324's "
                "format: use /completions with your own prompt, or remove chat_template from tokenizer_config.json"
            )
        opens = template == REASONING_TEMPLATE or (not ours and f"{ASSISTANT}{THINK_BEGIN}" in template)
        return cls(tokenizer, reasoning=opens)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        generate: bool = True,
        reasoning: bool | None = None,
        continue_last: bool = False,
    ) -> Rendered:
        """Token ids and loss mask of a conversation in OpenAI's form.

        A last assistant message with `prefix: true` or `partial: true` is a beginning: no end token follows, it is not
        learnt, and the reply continues it. To continue reasoning, give it as reasoning_content and leave content empty.

        Args:
            generate: end with the generation prompt. False is for training, and refuses an assistant's message that
                follows neither a user's nor a tool's, since nothing would ask for it.
            reasoning: write and ask for reasoning; None: what the checkpoint does.
            continue_last: treat a last assistant message as if it said `prefix: true`.

        Raises:
            ValueError: a message is not of this form (names message, field, both values and the cure), or a control
                token it needs is missing.
        """
        pieces, thinking = self._pieces(messages, tools, generate, reasoning, continue_last)
        texts = iter(self._tokenizer.encode_batch([text for text, control, _ in pieces if not control]))
        ids: list[int] = []
        mask: list[bool] = []
        for text, control, learn in pieces:
            piece = [self._id(text)] if control else next(texts)
            ids += piece
            mask += [learn] * len(piece)
        return Rendered(ids=ids, mask=mask, thinking=thinking)

    def text(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        generate: bool = True,
        reasoning: bool | None = None,
        continue_last: bool = False,
    ) -> str:
        """What `render` encodes, as a string. In it, a message's text and a control token look alike."""
        pieces, _ = self._pieces(messages, tools, generate, reasoning, continue_last)
        return "".join(text for text, _, _ in pieces)

    def fim(self, prompt: str, suffix: str) -> list[int]:
        """Ids that ask for what stands between prompt and suffix, in the order PSM, BOS first as in the shards.

        Raises:
            ValueError: the tokenizer has no FIM tokens.
        """
        self._need("fill-in-the-middle", (FIM_BEGIN, FIM_HOLE, FIM_END))
        before, after = self._tokenizer.encode_batch([prompt, suffix])
        return [
            *(self._id(BOS), self._id(FIM_BEGIN), *before),
            *(self._id(FIM_HOLE), *after, self._id(FIM_END)),
        ]

    # -- inside --------------------------------------------------------------------------------------------------------

    def _missing(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if self._tokenizer.token_id(name) is None]

    def _need(self, what: str, names: Sequence[str]) -> None:
        if missing := self._missing(names):
            raise ValueError(
                f"{what} needs the control tokens {', '.join(names)}, and this tokenizer has no {', '.join(missing)}: "
                "use a tokenizer made by dsv3 tokenizer, or DeepSeek-V3's"
            )

    def _id(self, name: str) -> int:
        token = self._tokenizer.token_id(name)
        assert token is not None, name  # _need has looked
        return token

    def _pieces(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        generate: bool,
        reasoning: bool | None,
        continue_last: bool,
    ) -> tuple[list[tuple[str, bool, bool]], bool]:
        """Pieces (text, is control, is learnt) and whether they end inside <think>."""
        turns = read_messages(messages, continue_last, generate)
        reasoning = self.reasoning if reasoning is None else reasoning
        if reasoning:
            self._need("reasoning", (THINK_BEGIN, THINK_END))
        if any(turn.calls for turn in turns):
            self._need("a conversation with tool calls", TOOLS)
        out = _Pieces()
        out.control(BOS)
        out.text(_system_text(turns, tools))
        turns = [turn for turn in turns if turn.role != "system"]
        last_user = max((at for at, turn in enumerate(turns) if turn.role == "user"), default=-1)
        last, thinking = "", False
        for at, turn in enumerate(turns):
            if turn.role == "user":
                out.control(USER)
                out.text(turn.content)
                out.control(ASSISTANT)
            elif turn.role == "tool":
                if last == "tool":
                    out.text("\n")
                else:
                    out.control(OUTPUTS_BEGIN)
                out.control(OUTPUT_BEGIN)
                out.text(turn.content)
                out.control(OUTPUT_END)
            else:
                if last == "tool":
                    out.control(OUTPUTS_END)
                thinking = _write_assistant(out, turn, reasoning, current=at > last_user)
            last = "open" if turn.open else turn.role
        if last == "tool":
            out.control(OUTPUTS_END)
        if generate and last not in ("tool", "open"):
            if last != "user":
                out.control(ASSISTANT)
            if reasoning:
                out.control(THINK_BEGIN)
                out.text("\n")
                thinking = True
        return out.pieces, thinking


def with_template(tokenizer: Tokenizer, *, reasoning: bool = False) -> Tokenizer:
    """The same tokenizer, whose saved tokenizer_config.json holds our template (and so tells ChatFormat.of)."""
    template = REASONING_TEMPLATE if reasoning else CHAT_TEMPLATE
    return tokenizer.with_config(chat_template=template)


def preview(ids: Sequence[int], mask: Sequence[bool], tokenizer: Tokenizer) -> str:
    """A sample for the terminal, with ANSI colours: what is learnt green, the rest dim, control tokens inverse; line
    breaks are shown as ⏎, other control characters by their codes. The last line counts the learnt tokens.

    Raises:
        ValueError: ids and mask differ in length.
    """
    if len(ids) != len(mask):
        raise ValueError(f"{len(ids)} ids and {len(mask)} mask values: give one of each per token")
    out, run = [], list[int]()
    for at, (token, learn) in enumerate(zip(ids, mask)):
        run.append(token)
        special = tokenizer.is_special(token)
        if at + 1 < len(ids) and mask[at + 1] == learn and not special and not tokenizer.is_special(ids[at + 1]):
            continue  # decode runs, so that a character of several tokens is whole
        text = re.sub(r"[^\S\n ]|[\x00-\x09\x0b-\x1f\x7f-\x9f]", lambda m: ascii(m[0])[1:-1], tokenizer.decode(run))
        style = ("32" if learn else "2") + (";7" if special else "")
        out.append(f"\x1b[{style}m{text}\x1b[0m".replace("\n", "⏎\n"))
        run = []
    return f"{''.join(out)}\n{sum(map(bool, mask))} of {len(ids)} tokens are learnt (green)"


class _Pieces:
    """Grows (text, is control, is learnt); neighbouring texts of one kind are one, as a template would encode them."""

    def __init__(self) -> None:
        self.pieces: list[tuple[str, bool, bool]] = []

    def control(self, name: str, learn: bool = False) -> None:
        self.pieces.append((name, True, learn))

    def text(self, text: str, learn: bool = False) -> None:
        if self.pieces and self.pieces[-1][1:] == (False, learn):
            text = self.pieces.pop()[0] + text
        if text:
            self.pieces.append((text, False, learn))


def _write_assistant(out: _Pieces, turn: Turn, reasoning: bool, current: bool) -> bool:
    """Whether the turn is left open inside <think>."""
    learn, content, thought = not turn.open, turn.content, turn.reasoning if reasoning and current else ""
    if reasoning and THINK_END in content:
        before, _, content = content.rpartition(THINK_END)
        if current and not thought:
            thought = before.strip("\n")
            thought = thought[len(THINK_BEGIN) :].strip("\n") if thought.startswith(THINK_BEGIN) else thought
            content = content.lstrip("\n")
    thinking = reasoning and turn.open and not content
    if thought or thinking:
        out.control(THINK_BEGIN, learn)
        out.text(f"\n{thought}", learn)
        if not thinking:
            out.text("\n", learn)
            out.control(THINK_END, learn)
            out.text("\n\n", learn)
    out.text(content, learn)
    for at, (name, arguments) in enumerate(turn.calls):
        if at:
            out.text("\n", learn)
        else:
            out.control(CALLS_BEGIN, learn)
        out.control(CALL_BEGIN, learn)
        out.text("function", learn)
        out.control(TOOL_SEP, learn)
        out.text(f"{name}{FENCE_BEGIN}{arguments}{FENCE_END}", learn)
        out.control(CALL_END, learn)
    if turn.calls:
        out.control(CALLS_END, learn)
    if not turn.open:
        out.control(EOS, learn)
    return thinking


def _system_text(turns: Sequence[Turn], tools: Sequence[Mapping[str, Any]] | None) -> str:
    system = "\n\n".join(turn.content for turn in turns if turn.role == "system")
    if not tools:
        return system
    listed = [f"- `{name}`:\n```json\n{schema}\n```" for name, schema in read_tools(tools)]
    return (f"{system}\n\n" if system else "") + _TOOLS_HEAD + "\n\n".join(listed)
