"""What a server is told by its caller: its name, who may use it, and its limits.

Does not: read files or the environment (dsv3.cli).
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class ApiKey:
    """One who may use the server.

    Attributes:
        name: what logs and metrics call it; never the secret.
        secret: what the client sends as `Authorization: Bearer SECRET`.
        max_concurrent: requests at once. tokens_per_minute: prompt and answer tokens together. None: no limit.
    """

    secret: str = field(repr=False)
    name: str = "key"
    max_concurrent: int | None = None
    tokens_per_minute: int | None = None

    def __post_init__(self) -> None:
        if len(self.secret) < 8 or not self.secret.isascii() or any(c.isspace() for c in self.secret):
            raise ValueError(f"the API key {self.name!r} needs at least 8 ASCII characters without spaces")
        for name in ("max_concurrent", "tokens_per_minute"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(
                    f"{name} of the API key {self.name!r} is {value}: give 1 or more, or None for no limit"
                )


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """
    Attributes:
        model: the name clients ask for; `aliases` are accepted too.
        fingerprint: system_fingerprint of every reply; empty: a hash of the config and a sample of the weights.
        keys: who may use it; none: everyone who reaches it, which then must be this machine alone.
        temperature_map: DeepSeek's: T_api <= 1 means 0.3 T_api, above T_api - 0.7.
        reasoning: whether replies begin with reasoning; None: as the chat format says.
        default_max_tokens: of answers that name no bound.
        max_choices: answers of one request (prompts times n). max_waiting: answers that may wait for a place.
        max_scores: log-probabilities that one request may be told, alternatives included: they take memory.
        max_text: characters that /tokenize takes, tokens that /detokenize takes.
        max_body_bytes, body_timeout_s: of a request's body. max_head_bytes, head_timeout_s: of its line and headers.
        keep_alive_s: silence after which a comment (stream) or a blank line (JSON) is sent. 0: never.
        request_timeout_s: longest life of a request. send_timeout_s: longest wait for a client to read.
        max_backlog: steps' worth of deltas that a slow client may leave unread.
        grammar_s: longest time to compile a grammar, schema or regular expression.
        drain_s: time that running requests get when the server is told to end.
        max_connections: open at once.
        origins: web origins that may call the API from a browser; none by default.
    """

    model: str = "dsv3"
    aliases: tuple[str, ...] = ("deepseek-chat", "deepseek-reasoner")
    fingerprint: str = ""
    keys: tuple[ApiKey, ...] = ()
    temperature_map: bool = False
    reasoning: bool | None = None
    default_max_tokens: int = 4096
    max_choices: int = 128
    max_waiting: int = 256
    max_scores: int = 2**20
    max_text: int = 2**20
    max_body_bytes: int = 8 * 2**20
    body_timeout_s: float = 30.0
    max_head_bytes: int = 64 * 2**10
    head_timeout_s: float = 15.0
    keep_alive_s: float = 10.0
    request_timeout_s: float = 1800.0
    send_timeout_s: float = 60.0
    max_backlog: int = 4096
    grammar_s: float = 5.0
    drain_s: float = 30.0
    max_connections: int = 1024
    origins: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        least = {
            "default_max_tokens": 1,
            "max_choices": 1,
            "max_waiting": 1,
            "max_scores": 1,
            "max_text": 1,
            "max_body_bytes": 1024,
            "max_head_bytes": 1024,
            "max_backlog": 1,
        }
        least |= {"max_connections": 1, "drain_s": 0, "keep_alive_s": 0}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} is {getattr(self, name)}: give {low} or more")
        for name in ("body_timeout_s", "head_timeout_s", "request_timeout_s", "send_timeout_s", "grammar_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}: give seconds above 0")
        if not self.model or len({key.secret for key in self.keys}) < len(self.keys):
            raise ValueError(
                "the model's name is empty" if not self.model else "two API keys have one secret: drop one"
            )
        if "*" in self.origins:
            raise ValueError(
                "origins holds '*', every web page there is: name the origins, as https://chat.example.org"
            )


def is_loopback(host: str) -> bool:
    """Whether an address or name can be reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_bind(host: str, settings: ServeSettings) -> None:
    """
    Raises:
        ValueError: others could reach the server and nobody would be asked for a key.
    """
    if not settings.keys and not is_loopback(host):
        raise ValueError(
            f"host {host!r} can be reached from other machines and there is no API key: give keys, or host 127.0.0.1"
        )
