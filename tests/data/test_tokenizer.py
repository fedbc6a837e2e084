"""The tokenizer: published ids, lossless text, control tokens kept out of text, streams, files."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers
from transformers import AutoTokenizer

from dsv3.data.tokenizer import ASSISTANT, BOS, EOS, FIM_BEGIN, USER, Tokenizer

SAMPLE = ["hello world, def f(x):\n    return x**2\n", "the router; the experts!\n\n你好，世界 12345\n"] * 20
TEXTS = ["hello world", "  leading", "two  spaces\n\n", "你好，世界", "x = 1\r\n\ty", "naïve e\u0301 😀", "1234567"]


@pytest.fixture(scope="module")
def small():
    return Tokenizer.train(SAMPLE, 360)


@pytest.fixture(scope="module")
def official():
    return Tokenizer.official()


GOLDEN = {
    "Hello, world!": [19923, 14, 2058, 3],
    "你好，世界": [30594, 303, 3427],
    "今天是2025年3月24日，星期一。": [61409, 939, 23, 695, 21, 1266, 1173, 1080, 303, 84610, 320],
    "1234567890": [6895, 18009, 25744, 18],
    "def f(x):\n    return x**2\n": [3465, 285, 4042, 3395, 361, 1354, 1527, 666, 20, 201],
    "  two  spaces\n\n\n": [223, 1234, 223, 13564, 6328],
    "don't CAN'T": [20385, 1664, 36837, 67322],
    "naïve 😀 \u200bé": [2720, 91223, 53769, 225, 223, 35020, 619],
}


@pytest.mark.parametrize("text", GOLDEN)
def test_golden_ids(official, text):
    assert official.encode(text) == GOLDEN[text]
    assert official.decode(GOLDEN[text]) == text
    assert official.encode_batch([text, text]) == [GOLDEN[text]] * 2


def test_published_control_tokens(official):
    assert (official.bos_id, official.eos_id) == (0, 1)
    assert (official.fim_hole_id, official.fim_begin_id, official.fim_end_id) == (128800, 128801, 128802)
    assert official.encode(USER + "hi" + ASSISTANT, special=True) == [128803, 6366, 128804]
    assert official.vocab_size == 128815
    assert official.decode([129000]) == ""


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=60))
@pytest.mark.parametrize("which", ["small", "official"])
def test_any_text_comes_back(which, text, request):
    tokenizer = request.getfixturevalue(which)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    stream = tokenizer.stream()
    assert "".join(stream.push([i]) for i in ids) + stream.finish() == text


def test_text_never_yields_a_control_token(small, official):
    text = f"{BOS}{EOS}{USER}<think>{FIM_BEGIN}"
    for tokenizer in (small, official):
        assert not any(tokenizer.is_special(i) for i in tokenizer.encode(text))
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert all(tokenizer.is_special(i) for i in tokenizer.encode(text, special=True))


def test_stream_holds_back_half_a_character(small):
    ids = small.encode("😀")
    stream = small.stream()
    pieces = [stream.push([i]) for i in ids]
    assert len(ids) > 1
    assert pieces[-1] == "😀"
    assert not any(pieces[:-1])
    stream.push(ids[:1])
    assert stream.finish() == "\ufffd"


def test_trained_layout(small):
    assert (small.bos_id, small.eos_id, small.token_id("<｜▁pad▁｜>")) == (0, 1, 2)
    assert small.vocab_size <= 360
    assert small.is_special(small.vocab_size - 1)
    assert small.fim_begin_id == small.fim_hole_id + 1
    with pytest.raises(ValueError, match="vocab_size 200 cannot hold 256 bytes"):
        Tokenizer.train(SAMPLE, 200)


def test_training_is_deterministic(small):
    assert Tokenizer.train(SAMPLE, 360).fingerprint == small.fingerprint


def test_newline_splits_are_two_tokens_of_the_same_bytes(official):
    splits = official.newline_splits()
    assert len(splits) > 100
    for token, (head, tail) in splits.items():
        assert official.token_bytes(head) + official.token_bytes(tail) == official.token_bytes(token)


@pytest.mark.parametrize("which", ["small", "official"])
def test_autotokenizer_reads_what_we_save(which, tmp_path, request):
    tokenizer = request.getfixturevalue(which)
    tokenizer.save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "deepseek_v3"}))
    assert Tokenizer.from_file(tmp_path).fingerprint == tokenizer.fingerprint
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert theirs(text, add_special_tokens=False).input_ids == tokenizer.encode(text)
        assert theirs.decode(tokenizer.encode(text)) == text


def test_a_tokenizer_that_loses_spaces_is_refused(tmp_path):
    backend = Backend(models.WordLevel({"hello": 0, "world": 1, "[UNK]": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="this tokenizer turns 'hello world' into 'helloworld'"):
        Tokenizer.from_file(tmp_path)


def test_missing_and_damaged_files(tmp_path):
    with pytest.raises(ValueError, match="no tokenizer at"):
        Tokenizer.from_file(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is no tokenizer\.json"):
        Tokenizer.from_file(tmp_path)
