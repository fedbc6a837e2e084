"""Fields of the APIs that this server does not honour: each is refused by name, with the cure.

A value that asks for nothing (null, false, an empty list, the only thing there is) passes and is dropped.
"""

from __future__ import annotations

from typing import Any

_NOTHING: tuple[Any, ...] = (None, False, [], {}, "")
_GUIDED = "use response_format: json_schema, regex or grammar"
# field -> (values that ask for nothing more, cure)
_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "functions": (_NOTHING, "use tools"),
    "function_call": ((*_NOTHING, "none", "auto"), "use tool_choice"),
    "audio": (_NOTHING, "this model writes text only: leave it out"),
    "modalities": ((*_NOTHING, ["text"]), "this model writes text only: give ['text'] or leave it out"),
    "web_search_options": (_NOTHING, "there is no search here: put what was found into the messages"),
    "verbosity": ((*_NOTHING, "medium"), "say in the messages how long the answer should be"),
    "best_of": ((*_NOTHING, 1), "ask for n answers and choose among them"),
    "chat_template": (_NOTHING, "templates of users are not run: send messages, or token ids to /completions"),
    "chat_template_kwargs": (_NOTHING, "use thinking: {'type': 'enabled'} or 'disabled'"),
    "guided_json": (_NOTHING, _GUIDED),
    "guided_regex": (_NOTHING, _GUIDED),
    "guided_choice": (_NOTHING, _GUIDED),
    "guided_grammar": (_NOTHING, _GUIDED),
    "structured_outputs": (_NOTHING, _GUIDED),
    "use_beam_search": (_NOTHING, "ask for n samples"),
    "stop_token_ids": (_NOTHING, "use stop"),
    "prompt_logprobs": (_NOTHING, "use echo with logprobs on /completions"),
    "truncate_prompt_tokens": (_NOTHING, "cut the prompt yourself: /tokenize tells its tokens"),
    "skip_special_tokens": ((*_NOTHING, True), "leave it out: control tokens are parsed into the reply's fields"),
    "spaces_between_special_tokens": ((*_NOTHING, True), "leave it out"),
    "documents": (_NOTHING, "put them into the messages"),
    "priority": ((*_NOTHING, 0), "leave it out: keys take turns, each in its order of arrival"),
}


def check_refused(data: dict[str, Any]) -> dict[str, Any]:
    """A request's body without these fields.

    Raises:
        ValueError: one of them asks for something.
    """
    for name, (nothing, cure) in _REFUSED.items():
        if name in data and not any(data[name] == value and type(data[name]) is type(value) for value in nothing):
            raise ValueError(f"{name} is not supported: {cure}")
    return {name: value for name, value in data.items() if name not in _REFUSED}
