"""Who asks: API keys, compared in constant time, and what each may use.

    limits     requests at once, and tokens a minute: a bucket that fills steadily; a request is charged its prompt when it is
               admitted and its answer when it ends, and refused while the bucket is empty
    salt       the key's hash: cached prefixes are shared among equal salts only, so nobody can probe another's prompts
Secrets are kept as hashes; neither they nor prompts are ever logged.
Does not: know HTTP's other headers, or the engine.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from dsv3.serve.errors import ApiError
from dsv3.serve.settings import ApiKey


@dataclass(eq=False)
class Owner:
    """One key and what runs for it. `digest`: of its secret; empty for a server without keys."""

    name: str = "anonymous"
    digest: bytes = b""
    max_concurrent: int | None = None
    tokens_per_minute: int | None = None
    running: int = 0
    tokens: float = 0.0  # left in the bucket
    filled_at: float = 0.0

    @property
    def salt(self) -> bytes:
        return self.digest


class Keys:
    """
    Args:
        clock: seconds; tests give their own.
    """

    def __init__(self, keys: tuple[ApiKey, ...], clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._owners = [
            Owner(
                key.name, _digest(key.secret.encode()), key.max_concurrent, key.tokens_per_minute,
                tokens=float(key.tokens_per_minute or 0), filled_at=clock(),
            )
            for key in keys
        ]  # fmt: skip
        self._anonymous = Owner()

    def owner(self, authorization: bytes | None) -> Owner:
        """
        Args:
            authorization: the header's value.

        Raises:
            ApiError: 401, there are keys and this is none of them.
        """
        if not self._owners:
            return self._anonymous
        if authorization is None:
            raise ApiError(401, "no API key: send the header Authorization: Bearer KEY")
        scheme, _, secret = authorization.partition(b" ")
        digest, found = _digest(secret.strip()), None
        for owner in self._owners:  # all of them, whichever it is
            if hmac.compare_digest(owner.digest, digest):
                found = owner
        if found is None or scheme.lower() != b"bearer":
            raise ApiError(401, "Authentication Fails: this API key is not known here: send Authorization: Bearer KEY")
        return found

    @contextmanager
    def use(self, owner: Owner, tokens: int, field: str = "messages") -> Iterator[None]:
        """A request of so many prompt tokens, from this field, runs inside.

        Raises:
            ApiError: 429, the key's limits.
        """
        if owner.max_concurrent is not None and owner.running >= owner.max_concurrent:
            message = f"this key runs {owner.running} requests, its limit: wait for one to end"
            raise ApiError(429, message, retry_after=1)
        self._charge(owner, tokens, field)
        owner.running += 1
        try:
            yield
        finally:
            owner.running -= 1

    def spend(self, owner: Owner, tokens: int) -> None:
        """Charge an answer; the bucket may go below empty."""
        owner.tokens -= tokens

    def _charge(self, owner: Owner, tokens: int, field: str) -> None:
        rate = owner.tokens_per_minute
        if rate is None:
            return
        now = self._clock()
        owner.tokens = min(float(rate), owner.tokens + (now - owner.filled_at) * rate / 60)
        owner.filled_at = now
        if tokens > rate:
            raise ApiError(
                400, f"the prompt has {tokens} tokens, this key may use {rate} a minute: shorten it", param=field
            )
        if owner.tokens < tokens or owner.tokens <= 0:
            wait = (max(tokens, 1) - owner.tokens) * 60 / rate
            raise ApiError(429, f"this key has used its {rate} tokens a minute: wait {wait:.0f} s", retry_after=wait)
        owner.tokens -= tokens


def _digest(secret: bytes) -> bytes:
    return hashlib.blake2b(secret, digest_size=16, person=b"dsv3 key").digest()
