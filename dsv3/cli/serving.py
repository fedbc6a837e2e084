"""Verbs that answer: `chat` in the terminal, `serve` over HTTP."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from dsv3.cli.console import bytes_bar, checkpoint_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from dsv3.data.tokenizer import Tokenizer
    from dsv3.infer.engine import Engine
    from dsv3.serve.settings import ApiKey


@dataclass(frozen=True, kw_only=True)
class Chat:
    """Talk to a checkpoint in the terminal: answers stream, history is kept, /help lists what can be done.
    Example: dsv3 chat runs/tiny"""

    checkpoint: tyro.conf.Positional[Path]
    """A checkpoint folder, or a run folder (its newest checkpoint)."""
    system: str = ""
    """Who the model is to be; V3-0324's card recommends a name and the date."""
    max_tokens: int = 1024
    temperature: float = 0.3
    """The card's recommendation for V3-0324."""
    top_p: float = 1.0
    seed: int = 0
    drafts: int | None = None
    """Tokens that the MTP layer guesses ahead; 0: none. Default: one, where the model has an MTP layer."""
    dtype: Literal["bfloat16", "float32", "fp8"] = "bfloat16"
    device: str = "cpu"


@dataclass(frozen=True, kw_only=True)
class Serve:
    """Serve a checkpoint to clients of DeepSeek's and OpenAI's APIs, with a chat page at the same address.
    Example: dsv3 serve runs/tiny      then open http://127.0.0.1:8000, or point a client's base_url at http://127.0.0.1:8000/v1

    Only this machine can reach it unless --host says otherwise, and then clients need a key: put keys into a file, one a line
    (NAME SECRET [most requests at once] [tokens a minute]; - for no limit), and give it as --keys; or set DSV3_API_KEY."""

    checkpoint: tyro.conf.Positional[Path]
    """A checkpoint folder, or a run folder (its newest checkpoint)."""
    host: str = "127.0.0.1"
    port: int = 8000
    name: str = ""
    """The model's name in the API; deepseek-chat and deepseek-reasoner are accepted too. Default: the folder's name."""
    keys: Path | None = None
    """File of API keys; must not be readable by others."""
    dtype: Literal["bfloat16", "float32", "fp8"] = "bfloat16"
    """fp8: weights stay in FP8 (or are cast to it), a byte each."""
    device: str = "cpu"
    cache_gb: float = 1.0
    """Gigabytes for the latent cache: prompts, answers, and beginnings that the next request may share."""
    disk_cache: Path | None = None
    """Folder of a second cache of prompt beginnings that survives a restart."""
    disk_gb: float = 10.0
    max_running: int = 64
    """Most answers computed at once; others wait."""
    drafts: int | None = None
    """Tokens that the MTP layer guesses ahead; 0: none. Default: one, where the model has an MTP layer."""
    temperature_map: bool = False
    """DeepSeek's API: a temperature T up to 1 means 0.3 T, above it T - 0.7."""
    origins: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Web origin that may call the API from a browser; repeat for more."""
    replicas: int = 1
    """Copies of the model, each in a process of its own, behind one address (needs: pip install 'dsv3[ray]')."""


def chat(verb: Chat) -> None:
    from rich.console import Console

    from dsv3.data.chat import ChatFormat
    from dsv3.infer.sampling import SamplingParams
    from dsv3.serve.terminal import Conversation, talk

    params = SamplingParams(max_tokens=verb.max_tokens, temperature=verb.temperature, top_p=verb.top_p, seed=verb.seed)
    engine, tokenizer = _load(checkpoint_of(verb.checkpoint), verb.dtype, verb.device, drafts=verb.drafts)
    console = Console(highlight=False, markup=False)
    styles = {"content": "", "reasoning": "dim italic", "note": "dim", "error": "red"}
    console.print("/help lists what can be done", style="dim")
    _line_editing()
    talk(
        Conversation(engine, ChatFormat.of(tokenizer), params, verb.system),
        input,
        lambda text, kind: console.print(text, style=styles[kind], end="", soft_wrap=True),
    )


def serve(verb: Serve) -> None:
    # Before torch loads: threads that spin while they wait take the event loop's core.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from dsv3.serve.app import serve as serve_app
    from dsv3.serve.settings import ServeSettings, check_bind

    checkpoint = checkpoint_of(verb.checkpoint)
    settings = ServeSettings(
        model=verb.name or verb.checkpoint.resolve().name,
        keys=_keys(verb.keys),
        temperature_map=verb.temperature_map,
        origins=verb.origins,
    )
    check_bind(verb.host, settings)
    if verb.replicas < 1:
        raise ValueError(f"--replicas is {verb.replicas}: give 1 or more")
    load = _Loader(checkpoint, verb)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")

    def started(url: str) -> None:
        print(f"{url} (Ctrl-C ends it; running answers are finished first)", file=sys.stderr)

    try:
        if verb.replicas > 1:
            from dsv3.serve.replicas import serve_replicas

            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            serve_replicas(load, settings, verb.host, verb.port, replicas=verb.replicas, started=started)
        else:
            serve_app(load, settings, verb.host, verb.port, started=started)
    except RuntimeError as error:
        raise ValueError(str(error)) from error


@dataclass(frozen=True)
class _Loader:
    """Makes the engine, here or in another process. `number`: of the replica, which keeps a disk cache of its own."""

    checkpoint: Path
    verb: Serve

    def __call__(self, number: int = 0) -> tuple[Engine, Tokenizer]:
        from dsv3.infer.disk import DiskTier
        from dsv3.model.fingerprint import fingerprint

        verb = self.verb

        def tier(model: Any) -> DiskTier | None:
            if verb.disk_cache is None:
                return None
            folder = verb.disk_cache / f"replica-{number}" if verb.replicas > 1 else verb.disk_cache
            return DiskTier(folder, f"{fingerprint(model)} {verb.drafts}", verb.disk_gb / verb.replicas)

        return _load(
            self.checkpoint, verb.dtype, verb.device,
            drafts=verb.drafts, cache_gb=verb.cache_gb, max_running=verb.max_running, make_tier=tier,
        )  # fmt: skip


def _load(
    checkpoint: Path, dtype: str, device: str, *, make_tier: Callable[[Any], Any] = lambda model: None, **options: Any
) -> tuple[Engine, Tokenizer]:
    import dsv3

    with bytes_bar("loading") as progress:
        model, tokenizer = dsv3.load(checkpoint, dtype=dtype, device=device, progress=progress)
    return dsv3.Engine(model, tokenizer, tier=make_tier(model), **options), tokenizer


def _keys(path: Path | None) -> tuple[ApiKey, ...]:
    from dsv3.serve.settings import ApiKey

    found = [
        ApiKey(secret=secret, name=f"env{i}") for i, secret in enumerate(os.environ.get("DSV3_API_KEY", "").split())
    ]
    if path is None:
        return tuple(found)
    if path.stat().st_mode & 0o077:
        raise ValueError(f"{path} can be read by others: chmod 600 {path}")
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        words = re.split(r"(?:^|\s)#", line)[0].split()  # a comment; a # within a secret is part of it
        if not words:
            continue
        if not 2 <= len(words) <= 4 or not all(word == "-" or word.isdigit() for word in words[2:]):
            raise ValueError(f"{path}, line {number}: write NAME SECRET [most requests at once] [tokens a minute]")
        limits = [None if word == "-" else int(word) for word in words[2:]] + [None, None]
        found.append(ApiKey(name=words[0], secret=words[1], max_concurrent=limits[0], tokens_per_minute=limits[1]))
    if not found:
        raise ValueError(f"{path} holds no key: write NAME SECRET, one a line")
    return tuple(found)


def _line_editing() -> None:
    """Arrow keys and history at the prompt, where the platform has them."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401
