"""From a checked request to what the engine gets: prompts of token ids and SamplingParams, and how to read the answers.

    chat           messages, tools -> dsv3.data.chat -> ids; the last assistant message is continued if it says `prefix`
                   (DeepSeek, Mistral), or stands last without saying otherwise (Anthropic, OpenRouter), or the request says
                   continue_final_message (vLLM)
    completions    BOS and the text as text, or token ids as they are; with `suffix`, fill-in-the-middle
    max_tokens     4,096 by default; always capped by what is left of the context and of the cache (finish_reason "length")
    temperature    the API's 0..2; by DeepSeek's map if the server is told so
    logprobs       echo with logprobs and at most one token is scoring: the token drawn is always told, end token or not, since
                   harnesses count on it
Source: API references. Does not: speak HTTP, or wait.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import Any

from dsv3.data.chat import ChatFormat, Rendered
from dsv3.data.tokenizer import Tokenizer
from dsv3.infer.engine import Engine
from dsv3.infer.pages import PAGE
from dsv3.infer.sampling import MAX_LOGPROBS, SamplingParams
from dsv3.serve.errors import ApiError, refuse
from dsv3.serve.grammars import reply_grammar
from dsv3.serve.protocol import ChatRequest, CompletionRequest, Message, NamedTool, Sampling, TokenizeRequest
from dsv3.serve.settings import ServeSettings

_DEFAULT_PROMPT = "Once upon a time, "  # DeepSeek's


@dataclass(frozen=True, kw_only=True)
class Plan:
    """
    Attributes:
        prompts: token ids, one list a prompt. params: of all of them.
        thinking, reasoning, tools: how to parse a chat's answers. single_call: keep its first call only.
        echo: texts to put in front of a completion's answers. scoring: its last token may be an end token, which has no text.
        usage: send usage in a chunk of its own.
        asked, bound: the fields that prompts and grammar came from, for errors to name.
    """

    model: str
    prompts: list[list[int]]
    params: SamplingParams
    stream: bool = False
    usage: bool = False
    details: bool = False
    logprobs: int | None = None
    thinking: bool = False
    reasoning: bool = False
    tools: bool = False
    single_call: bool = False
    echo: list[str] = field(default_factory=list)
    echo_skip: int = 0  # prompt tokens in front that are no part of the echo
    scoring: bool = False
    asked: str = "messages"
    bound: str = "response_format"

    @property
    def answers(self) -> int:
        return len(self.prompts) * self.params.n


class Planner:
    """Knows the tokenizer, the chat format and the limits of one engine."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, settings: ServeSettings) -> None:
        self.tokenizer, self.settings = tokenizer, settings
        config = engine.model.config
        slots = engine.scheduler.book.total * PAGE - 2 * engine.drafts
        self.limit = min(config.max_position_embeddings, slots)  # tokens of prompt and answer
        self._vocab = min(tokenizer.vocab_size, config.vocab_size)
        self._longest = max(len(tokenizer.token_bytes(token)) for token in range(tokenizer.vocab_size))
        self.format: ChatFormat | None = None
        self.no_format = ""
        try:
            self.format = ChatFormat.of(tokenizer)
        except ValueError as error:
            self.no_format = str(error)

    # -- the two requests ----------------------------------------------------------------------------------------------

    def chat(self, request: ChatRequest) -> Plan:
        """
        Raises:
            ApiError: a field cannot be honoured.
        """
        model = self.check_model(request.model)
        if request.logprobs is not True and request.top_logprobs:
            raise refuse(
                "top_logprobs", f"top_logprobs is {request.top_logprobs} without logprobs: set logprobs to true"
            )
        top = self._count("top_logprobs", request.top_logprobs, 0, MAX_LOGPROBS)
        functions, choice = self._functions(request)
        rendered = self._render(request, [f.model_dump(exclude_none=True) for f in functions])
        if choice == "required" and isinstance(request.tool_choice, NamedTool):
            functions = [f for f in functions if f.name == request.tool_choice.function.name]
        single = request.parallel_tool_calls is False
        bound = _bound(request, functions, choice)
        try:
            grammar = reply_grammar(
                self.tokenizer,
                request.response_format,
                functions,
                choice=choice,
                single=single,
                thinking=rendered.thinking,
            )
        except ValueError as error:
            raise refuse(bound.split()[0], f"{bound}: {error}") from None
        logprobs = top or 0 if request.logprobs else None
        wanted = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
        if request.max_tokens is not None and wanted != request.max_tokens:
            raise refuse(
                "max_tokens", f"max_tokens is {request.max_tokens} and max_completion_tokens {wanted}: give one of them"
            )
        name = "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens"
        params = self._params(request, [rendered.ids], self._count(name, wanted, 1, None), logprobs, grammar=grammar)
        return Plan(
            model=model, prompts=[rendered.ids], params=params, logprobs=logprobs,
            thinking=rendered.thinking, reasoning=rendered.thinking or self._expects_reasoning(request), tools=bool(functions),
            single_call=single, bound=bound, **self._streaming(request),
        )  # fmt: skip

    def completion(self, request: CompletionRequest) -> Plan:
        """
        Raises:
            ApiError: a field cannot be honoured.
        """
        model = self.check_model(request.model)
        logprobs = self._count("logprobs", request.logprobs, 0, MAX_LOGPROBS)
        echo = bool(request.echo)
        prompts, texts, skip = self._prompts(request, echo)
        if echo and logprobs is not None and request.suffix is not None:
            raise refuse("echo", "echo with logprobs cannot score a prompt that has a suffix: drop one of them")
        least = 0 if echo else 1
        if request.max_tokens is not None and request.max_tokens < least:
            cure = "give 1 or more" if least else "give 0 or more"
            raise refuse("max_tokens", f"max_tokens is {request.max_tokens}: {cure} (0 needs echo)")
        scoring = echo and logprobs is not None and request.max_tokens is not None and request.max_tokens <= 1
        scored = logprobs if echo else None
        if request.max_tokens == 0 and scored is None:
            scored = 0  # the engine answers nothing only to those who want the prompt scored
        grammar = None
        if request.response_format is not None:
            try:
                grammar = reply_grammar(
                    self.tokenizer, request.response_format, [], choice="none", single=False, thinking=False
                )
            except ValueError as error:
                raise refuse("response_format", f"response_format: {error}") from None
        params = self._params(
            request, prompts, request.max_tokens, logprobs, grammar=grammar, prompt_logprobs=scored, ignore_eos=scoring
        )
        return Plan(
            model=model, prompts=prompts, params=params, logprobs=logprobs, echo=texts, echo_skip=skip,
            scoring=scoring, asked="prompt", **self._streaming(request),
        )  # fmt: skip

    def tokenize(self, request: TokenizeRequest) -> list[int]:
        """
        Raises:
            ApiError: neither prompt nor messages, or both.
        """
        if (request.prompt is None) == (request.messages is None):
            raise refuse("prompt", "give one of prompt and messages")
        if request.messages is not None:
            tools = [tool.function.model_dump(exclude_none=True) for tool in request.tools or []]
            generate = request.add_generation_prompt is not False
            return self._format_ids(request.messages, tools, generate, None, False).ids
        assert request.prompt is not None
        if len(request.prompt) > self.settings.max_text:
            raise refuse("prompt", self._too_much("prompt", len(request.prompt), "characters"))
        ids = self._encode("prompt", request.prompt, special=True, limited=False)
        bos = self.tokenizer.bos_id
        return [bos, *ids] if request.add_special_tokens is not False and bos is not None else ids

    def detokenize(self, tokens: list[int]) -> str:
        """
        Raises:
            ApiError: they are too many.
        """
        if len(tokens) > self.settings.max_text:
            raise refuse("tokens", self._too_much("tokens", len(tokens), "tokens"))
        return self.tokenizer.decode(tokens)

    def _too_much(self, field: str, size: int, unit: str) -> str:
        return f"{field} has {size:,} {unit}, {self.settings.max_text:,} may be sent at once: send it in parts"

    def check_model(self, name: str) -> str:
        """
        Raises:
            ApiError: 404, it is not served here.
        """
        names = (self.settings.model, *self.settings.aliases)
        if name not in names:
            known = ", ".join(names)
            message = f"Model Not Exist: {name!r:.200} is not served here: use one of {known}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return name

    # -- parts ---------------------------------------------------------------------------------------------------------

    def _streaming(self, request: Sampling) -> dict[str, Any]:
        stream = bool(request.stream)
        usage = request.stream_options is not None and request.stream_options.include_usage is True
        if usage and not stream:
            raise refuse("stream_options", "stream_options.include_usage needs a stream: set stream to true")
        return dict(stream=stream, usage=usage, details=bool(request.details))

    def _functions(self, request: ChatRequest) -> tuple[list[Any], str]:
        """The functions to tell the model of, and "none", "auto" or "required"."""
        functions, choice = [tool.function for tool in request.tools or []], request.tool_choice
        if choice is None:
            return functions, "auto" if functions else "none"
        if choice == "none":
            return [], "none"
        if not functions and choice != "auto":
            raise refuse(
                "tool_choice", "tool_choice asks for a call and tools is empty: give tools, or tool_choice 'none'"
            )
        if isinstance(choice, NamedTool):
            name = choice.function.name
            if name not in [f.name for f in functions]:
                known = ", ".join(f.name for f in functions)
                raise refuse(
                    "tool_choice", f"tool_choice names {name!r:.100}, tools holds {known:.500}: name one of them"
                )
            return functions, "required"
        return functions, choice if functions else "none"

    def _reasons(self, request: ChatRequest) -> bool | None:
        """What the request says about reasoning; None: nothing."""
        if request.thinking is not None:
            return request.thinking.type == "enabled"
        if request.reasoning_effort in ("none",):
            return False
        return self.settings.reasoning

    def _expects_reasoning(self, request: ChatRequest) -> bool:
        asked = self._reasons(request)
        return self.format is not None and self.format.reasoning if asked is None else asked

    def _render(self, request: ChatRequest, functions: list[dict[str, Any]]) -> Rendered:
        last, further = request.messages[-1], request.continue_final_message
        if further and request.add_generation_prompt:
            raise refuse(
                "continue_final_message",
                "continue_final_message and add_generation_prompt are both true: set one to false",
            )
        if further is None and last.role == "assistant" and not last.tool_calls:
            further = last.prefix is not False and not request.add_generation_prompt
        if request.add_generation_prompt is False and not further and not last.prefix:
            raise refuse(
                "add_generation_prompt",
                "add_generation_prompt is false and the last message is not continued: set continue_final_message to true",
            )
        return self._format_ids(request.messages, functions, True, self._reasons(request), bool(further))

    def _format_ids(
        self, messages: list[Message], functions: list[Any], generate: bool, reasoning: bool | None, further: bool
    ) -> Rendered:
        if self.format is None:
            raise refuse("messages", f"this checkpoint cannot chat ({self.no_format}): use /completions")
        if functions and not self.format.has_tools:
            raise refuse("tools", "this checkpoint's tokenizer has no tool tokens: send no tools, or use another one")
        if reasoning and not self.format.has_think:
            raise refuse("thinking", "this checkpoint's tokenizer has no <think> token: do not ask for reasoning")
        size = sum(len(_text(message)) for message in messages)
        self._check_text("messages", size)
        tools = [{"type": "function", "function": function} for function in functions] or None
        try:
            rendered = self.format.render(
                [_plain(message) for message in messages],
                tools,
                generate=generate,
                reasoning=reasoning,
                continue_last=further,
            )
        except ValueError as error:
            said = str(error)
            raise refuse(said.split(" ")[0] if said.startswith(("messages", "tools")) else "messages", said) from None
        return rendered

    def _prompts(self, request: CompletionRequest, echo: bool) -> tuple[list[list[int]], list[str], int]:
        """Prompts, their texts if they are to be echoed, and how many tokens in front are not."""
        prompt = _DEFAULT_PROMPT if request.prompt is None else request.prompt
        listed: list[Any] = (
            [prompt] if isinstance(prompt, str) or not prompt or isinstance(prompt[0], int) else list(prompt)
        )
        if request.suffix is not None:
            if not isinstance(prompt, str):
                raise refuse("suffix", "suffix needs one prompt of text: send the others in requests of their own")
            self._check_text("prompt", len(prompt) + len(request.suffix))
            if self.format is None:
                raise refuse("suffix", f"this checkpoint cannot fill in the middle ({self.no_format}): drop suffix")
            try:
                return [self.format.fim(prompt, request.suffix)], [prompt] if echo else [], 0
            except ValueError as error:
                raise refuse("suffix", str(error)) from None
        if isinstance(listed[0], str):
            bos = [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]
            prompts = [[*bos, *self._encode("prompt", text)] for text in listed]
            if not all(prompts):
                raise refuse("prompt", "prompt is empty and the tokenizer has no BOS token: give some text")
            return prompts, listed if echo else [], len(bos)
        for at, ids in enumerate(listed):
            if not ids:
                raise refuse("prompt", f"prompt[{at}] has no tokens: give at least one")
            if max(ids) >= self._vocab:
                raise refuse(
                    "prompt",
                    f"prompt[{at}] holds token {max(ids)}, the vocabulary ends at {self._vocab - 1}: /tokenize gives ids",
                )
        return listed, [self.tokenizer.decode(ids) for ids in listed] if echo else [], 0

    def _encode(self, field: str, text: str, *, special: bool = False, limited: bool = True) -> list[int]:
        if limited:
            self._check_text(field, len(text))
        try:
            return self.tokenizer.encode(text, special=special)
        except ValueError as error:
            raise refuse(field, f"{field}: {error}") from None

    def _check_text(self, field: str, characters: int) -> None:
        """Refuse what cannot fit before any work is spent on it."""
        if characters > self._longest * self.limit:
            raise refuse(
                field,
                f"{field} has {characters:,} characters, which cannot fit the {self.limit:,} tokens that this server reads: "
                "shorten it",
                code="context_length_exceeded",
            )

    def _params(
        self, request: Sampling, prompts: list[list[int]], wanted: int | None, logprobs: int | None, **more: Any
    ) -> SamplingParams:
        n = 1 if request.n is None else request.n
        if not 1 <= n * len(prompts) <= self.settings.max_choices:
            raise refuse(
                "n", f"n is {n} for {len(prompts)} prompts: ask for 1 to {self.settings.max_choices} answers in all"
            )
        temperature = self._number("temperature", request.temperature, 0.0, 2.0, 1.0)
        if self.settings.temperature_map:
            temperature = 0.3 * temperature if temperature <= 1 else temperature - 0.7
        ignore_eos = more.pop("ignore_eos", False) or bool(request.ignore_eos)
        try:
            params = SamplingParams(
                max_tokens=self._room(
                    prompts, wanted, "prompt" if isinstance(request, CompletionRequest) else "messages"
                ),
                min_tokens=request.min_tokens or 0,
                temperature=temperature,
                top_p=1.0 if request.top_p is None else request.top_p,
                top_k=0 if request.top_k in (None, -1) else request.top_k,
                min_p=request.min_p or 0.0,
                presence_penalty=request.presence_penalty or 0.0,
                frequency_penalty=request.frequency_penalty or 0.0,
                repetition_penalty=1.0 if request.repetition_penalty is None else request.repetition_penalty,
                logit_bias=self._biases(request.logit_bias or {}),
                seed=secrets.randbits(62) if request.seed is None else request.seed,
                n=n,
                stop=_stops(request.stop),
                ignore_eos=ignore_eos,
                logprobs=max(logprobs or 0, 4) if request.details else logprobs,
                routes=bool(request.details),
                **more,
            )
        except ValueError as error:
            raise refuse(str(error).split(" ")[0], str(error)) from None
        self._check_scores(prompts, params)
        return params

    def _check_scores(self, prompts: list[list[int]], params: SamplingParams) -> None:
        scores = 0 if params.logprobs is None else len(prompts) * params.n * params.max_tokens * (params.logprobs + 1)
        if params.prompt_logprobs is not None:
            scores += sum(map(len, prompts)) * (params.prompt_logprobs + 1)
        if scores > self.settings.max_scores:
            raise refuse(
                "logprobs",
                f"logprobs would be {scores:,} for all tokens and alternatives, {self.settings.max_scores:,} may be told in one "
                "request: ask for fewer alternatives, tokens or answers",
            )

    def _room(self, prompts: list[list[int]], wanted: int | None, field: str) -> int:
        """max_tokens: what was asked for, within what is left."""
        longest = max(map(len, prompts))
        left = self.limit - longest
        if left < (0 if wanted == 0 else 1):
            raise refuse(
                field,
                f"the prompt has {longest:,} tokens and this server reads {self.limit:,} with the answer: shorten it",
                code="context_length_exceeded",
            )
        return min(left, self.settings.default_max_tokens if wanted is None else wanted)

    def _biases(self, biases: dict[str, float]) -> dict[int, float]:
        read = {}
        for name, bias in biases.items():
            token = int(name) if name.isascii() and name.isdigit() and len(name) < 10 else -1
            if not 0 <= token < self._vocab:
                raise refuse(
                    "logit_bias", f"logit_bias names {name!r:.50}: give token ids from 0 to {self._vocab - 1} as text"
                )
            if not -100 <= bias <= 100:
                raise refuse("logit_bias", f"logit_bias[{name}] is {bias}: give a value from -100 to 100")
            read[token] = bias
        return read

    def _number(self, name: str, value: float | None, low: float, high: float, default: float) -> float:
        if value is None:
            return default
        if not low <= value <= high:
            raise refuse(name, f"{name} is {value}: give a value from {low:g} to {high:g}")
        return value

    def _count(self, name: str, value: int | None, low: int, high: int | None) -> int | None:
        if value is not None and not low <= value <= (value if high is None else high):
            cure = f"{low} or more" if high is None else f"a value from {low} to {high}"
            raise refuse(name, f"{name} is {value}: give {cure}")
        return value


def _bound(request: ChatRequest, functions: list[Any], choice: str) -> str:
    """Which fields a reply's grammar is made of."""
    form = request.response_format is not None and request.response_format.type != "text"
    if choice == "required" or (functions and not form):
        return "tools"
    return "response_format and tools" if functions and form else "response_format"


def _stops(stop: str | list[str | None] | None) -> tuple[str, ...]:
    listed = [stop] if isinstance(stop, str) else [text for text in stop or [] if text is not None]
    if len(listed) > 16:
        raise refuse("stop", f"stop holds {len(listed)} strings: give at most 16")
    if any(len(text) > 1024 for text in listed):
        raise refuse("stop", "stop holds a string of more than 1,024 characters: give shorter ones")
    return tuple(listed)


_ROLES = {"developer": "system", "function": "tool"}


def _plain(message: Message) -> dict[str, Any]:
    """As dsv3.data.chat reads it."""
    plain = message.model_dump(exclude_none=True, exclude={"content"})
    plain["role"] = _ROLES.get(message.role, message.role)
    if isinstance(message.content, list):
        parts = []
        for part in message.content:
            if not isinstance(part, str) and part.type not in ("text", "refusal"):
                raise refuse(
                    "messages", f"messages hold a part of type {part.type!r:.50}: this model reads text parts only"
                )
            text = part if isinstance(part, str) else part.text if part.type == "text" else part.refusal
            parts.append({"type": "text", "text": text or ""})
        plain["content"] = parts
    else:
        plain["content"] = message.content
    return plain


def _text(message: Message) -> str:
    if isinstance(message.content, list):
        return "".join(part if isinstance(part, str) else part.text or "" for part in message.content)
    return message.content or ""
