"""Shards: round trip, FIM and split semantics, determinism, atomicity, and what is refused."""

import errno
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.data.shards import INDEX, join_shards, open_shards, write_shards


class FakeTokenizer:
    """Bytes, FIM tokens, and one combined token for ".\\n"."""

    bos_id = 0
    eos_id = 1
    fim_begin_id, fim_hole_id, fim_end_id = 259, 260, 261
    combined_id = 262
    fingerprint = "fake"

    def __init__(self, vocab_size: int = 263) -> None:
        self.vocab_size = vocab_size

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self._encode(text) for text in texts]

    def _encode(self, text: str) -> list[int]:
        parts = [[3 + byte for byte in part] for part in text.encode().split(b".\n")]
        return [i for number, part in enumerate(parts) for i in ([self.combined_id] * (number > 0) + part)]

    def token_bytes(self, token: int) -> bytes:
        return b".\n" if token == self.combined_id else bytes([token - 3]) if 3 <= token < 259 else b""

    def newline_splits(self) -> dict[int, tuple[int, int]]:
        return {self.combined_id: (3 + ord("."), 3 + ord("\n"))}

    def decode(self, ids: list[int]) -> str:
        return b"".join(self.token_bytes(token) for token in ids).decode()


TOKENIZER = FakeTokenizer()
TEXTS = {"code": ["def f():\n    return 1.\n", "x", ""], "prose": ["Zażółć gęślą jaźń.\nOnce.\n", "Two 😀"]}
WEIGHTS = {"code": 1.0, "prose": 3.0}


def documents_of(source) -> list[list[int]]:
    return [part.tolist() for part in np.split(np.asarray(source.tokens), source.offsets[1:])]


def restored(ids: list[int]) -> str:
    """The text of one packed document, whichever form it is in."""
    assert ids[-1] == TOKENIZER.eos_id
    assert ids.count(TOKENIZER.eos_id) == 1
    assert ids[0] == TOKENIZER.bos_id
    assert ids.count(TOKENIZER.bos_id) == 1
    ids = ids[1:-1]
    if TOKENIZER.fim_begin_id not in ids:
        return TOKENIZER.decode(ids)
    assert ids[0] == TOKENIZER.fim_begin_id
    hole, end = ids.index(TOKENIZER.fim_hole_id), ids.index(TOKENIZER.fim_end_id)
    assert hole < end
    return TOKENIZER.decode(ids[1:hole] + ids[end + 1 :] + ids[hole + 1 : end])


@settings(max_examples=25, deadline=None)
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), min_size=1, max_size=8),
    fim_rate=st.sampled_from([0.0, 0.5, 1.0]),
    split_rate=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 3),
)
def test_every_document_is_restored_from_its_tokens(tmp_path_factory, texts, fim_rate, split_rate, seed) -> None:
    folder = tmp_path_factory.mktemp("shards") / "out"
    rates = {"fim_rate": fim_rate, "split_rate": split_rate, "seed": seed}
    shards = write_shards({"a": [t + ".\n" for t in texts]}, {"a": 1}, TOKENIZER, folder, **rates)
    documents = documents_of(shards.sources[0])
    assert [restored(ids) for ids in documents] == [t + ".\n" for t in texts]
    is_fim = [TOKENIZER.fim_begin_id in ids for ids in documents]
    assert all(is_fim) if fim_rate == 1 else not any(is_fim) if fim_rate == 0 else True
    if split_rate == 1:
        assert TOKENIZER.combined_id not in shards.sources[0].tokens


def test_index_and_views(tmp_path: Path) -> None:
    calls = []
    shards = write_shards(
        TEXTS, WEIGHTS, TOKENIZER, tmp_path / "s", fim_rate=0, split_rate=0, progress=lambda *call: calls.append(call)
    )
    index = json.loads((tmp_path / "s" / INDEX).read_text())
    assert [(s.name, s.weight) for s in shards.sources] == [("code", 1.0), ("prose", 3.0)]
    for source in shards.sources:
        entry = index["sources"][source.name]
        assert entry["bytes"] == source.text_bytes == sum(len(t.encode()) for t in TEXTS[source.name])
        assert (entry["tokens"], entry["documents"]) == (len(source.tokens), len(TEXTS[source.name]))
        assert source.offsets.dtype == np.int64
        assert isinstance(source.tokens, np.memmap)
        assert source.tokens.dtype == np.dtype("<u2")
    assert shards.total_tokens == sum(len(s.tokens) for s in shards.sources)
    assert shards.tokenizer_fingerprint == "fake"
    assert calls == [(s.name, len(s.offsets), len(s.tokens)) for s in shards.sources]
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


def test_large_vocabulary_takes_uint32(tmp_path: Path) -> None:
    limit = write_shards({"a": ["x"]}, {"a": 1}, FakeTokenizer(65536), tmp_path / "1")
    over = write_shards({"a": ["x"]}, {"a": 1}, FakeTokenizer(65537), tmp_path / "2")
    assert (limit.sources[0].tokens.dtype, over.sources[0].tokens.dtype) == (np.dtype("<u2"), np.dtype("<u4"))


def test_rates_are_met(tmp_path: Path) -> None:
    texts = ["abc.\ndef.\n"] * 2000
    (source,) = write_shards({"a": texts}, {"a": 1}, TOKENIZER, tmp_path / "s").sources
    tokens = np.asarray(source.tokens)
    assert 150 < (tokens == TOKENIZER.fim_begin_id).sum() < 250
    fim_free = [d for d in documents_of(source) if TOKENIZER.fim_begin_id not in d]
    whole = sum(d.count(TOKENIZER.combined_id) for d in fim_free)
    assert 0.88 < whole / (2 * len(fim_free)) < 0.92


def test_a_document_depends_on_seed_source_and_number_alone(tmp_path: Path) -> None:
    def pack(name: str, sources: dict[str, list[str]], seed: int = 0) -> dict[str, list[list[int]]]:
        rates = {"fim_rate": 0.5, "split_rate": 0.5, "seed": seed}
        shards = write_shards(sources, dict.fromkeys(sources, 1), TOKENIZER, tmp_path / name, **rates)
        return {source.name: documents_of(source) for source in shards.sources}

    texts = ["some.\ntext.\nhere.\n"] * 600  # more than two chunks
    alone, beside = pack("1", {"a": texts}), pack("2", {"b": texts, "a": texts[:300]})
    assert beside["a"] == alone["a"][:300]
    assert beside["b"] != alone["a"]
    assert pack("3", {"a": texts}, seed=1)["a"] != alone["a"]


def test_fingerprint_names_tokens_weights_and_settings(tmp_path: Path) -> None:
    def fingerprint(name: str, texts=TEXTS, weights=WEIGHTS, **options) -> str:
        return write_shards(texts, weights, TOKENIZER, tmp_path / name, **options).fingerprint

    base = fingerprint("base")
    assert fingerprint("same") == base
    others = [
        fingerprint("seed", seed=1),
        fingerprint("weight", weights={"code": 2.0, "prose": 3.0}),
        fingerprint("text", texts={**TEXTS, "code": ["y"]}),
        fingerprint("order", texts=dict(reversed(TEXTS.items()))),
    ]
    assert len({base, *others}) == 5


@pytest.mark.parametrize(
    ("texts", "weights", "options", "message"),
    [
        ({}, {}, {}, "corpus is empty"),
        ({"a": []}, {"a": 1}, {}, "'a' has no documents"),
        ({"a": ["x"]}, {"b": 1}, {}, r"\['a'\] and weights \['b'\]"),
        ({"a": ["x"]}, {"a": 0}, {}, "weight 0 of source 'a'"),
        ({"a": ["x"]}, {"a": float("nan")}, {}, "weight nan"),
        ({"../a": ["x"]}, {"../a": 1}, {}, "cannot name a file"),
        ({"a": ["x"]}, {"a": 1}, {"fim_rate": 1.5}, "fim_rate 1.5"),
        ({"a": ["x"]}, {"a": 1}, {"seed": -1}, "seed -1"),
    ],
)
def test_bad_input_is_refused_and_leaves_nothing(tmp_path: Path, texts, weights, options, message) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        write_shards(texts, weights, TOKENIZER, tmp_path / "s", **options)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_fim_needs_its_tokens(tmp_path: Path) -> None:
    tokenizer = FakeTokenizer()
    tokenizer.fim_hole_id = None
    with pytest.raises(ValueError, match="set fim_rate to 0"):
        write_shards({"a": ["x"]}, {"a": 1}, tokenizer, tmp_path / "s")
    assert write_shards({"a": ["x"]}, {"a": 1}, tokenizer, tmp_path / "s", fim_rate=0).total_tokens == 3  # BOS, x, EOS


def test_documents_need_an_end(tmp_path: Path) -> None:
    tokenizer = FakeTokenizer()
    tokenizer.eos_id = None
    with pytest.raises(ValueError, match="no end-of-sentence token"):
        write_shards({"a": ["x"]}, {"a": 1}, tokenizer, tmp_path / "s")


def test_id_beyond_the_vocabulary_is_refused_not_wrapped(tmp_path: Path) -> None:
    tokenizer = FakeTokenizer()
    tokenizer.encode_batch = lambda texts: [[70000] for _ in texts]
    with pytest.raises(ValueError, match=r"70000 .* 263"):
        write_shards({"a": ["x"]}, {"a": 1}, tokenizer, tmp_path / "s", fim_rate=0)


def test_existing_folder_is_refused_untouched(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(ValueError, match="remove it or name another"):
        write_shards(TEXTS, WEIGHTS, TOKENIZER, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_full_disk_leaves_nothing_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("dsv3.data.shards.os.fsync", full)
    with pytest.raises(OSError, match=r"No space left.*bytes free") as caught:
        write_shards(TEXTS, WEIGHTS, TOKENIZER, tmp_path / "s")
    assert caught.value.errno == errno.ENOSPC
    assert str(tmp_path / "s") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_interrupt_midway_leaves_nothing(tmp_path: Path) -> None:
    def texts() -> Iterator[str]:
        yield from ["x"] * 300
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards({"a": texts()}, {"a": 1}, TOKENIZER, tmp_path / "s")
    assert not list(tmp_path.iterdir())


def test_damage_is_found(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    write_shards(TEXTS, WEIGHTS, TOKENIZER, folder)
    path = folder / "code.bin"
    good = path.read_bytes()

    path.write_bytes(good[:-2])
    with pytest.raises(ValueError, match=f"{len(good) - 2} bytes, its index says {len(good)}"):
        open_shards(folder)

    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    open_shards(folder)
    with pytest.raises(ValueError, match="SHA-256"):
        open_shards(folder, verify=True)

    path.write_bytes(good)
    open_shards(folder, verify=True)
    offsets = folder / "prose.offsets.npy"
    kept = offsets.read_bytes()
    offsets.write_bytes(kept[:-8])
    with pytest.raises(ValueError, match="bytes, its index says"):
        open_shards(folder)
    offsets.unlink()
    with pytest.raises(ValueError, match="missing"):
        open_shards(folder)
    offsets.write_bytes(kept)

    index = json.loads((folder / INDEX).read_text())
    index["sources"]["code"]["weight"] = 2.0
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match="was changed"):
        open_shards(folder)
    (folder / INDEX).write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        open_shards(folder)
    with pytest.raises(ValueError, match="holds no shards"):
        open_shards(tmp_path)


# -- parts -------------------------------------------------------------------------------------------------------------


def write_parts(
    folder: Path, texts: dict[str, list[str]], cuts: list[dict[str, int]], **settings: object
) -> list[Path]:
    """Shards of consecutive parts of each source, a part ending where `cuts` says; numbered on."""
    parts, first = [], dict.fromkeys(texts, 0)
    for number, cut in enumerate([*cuts, {name: len(listed) for name, listed in texts.items()}]):
        part = {name: texts[name][first[name] : cut[name]] for name in texts if cut[name] > first[name]}
        if part:
            parts.append(folder / f"part{number}")
            write_shards(part, dict.fromkeys(part, 1.0), TOKENIZER, parts[-1], first=first, **settings)
        first = {name: max(first[name], cut[name]) for name in texts}
    return parts


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.text(max_size=8), min_size=1, max_size=6),
    st.lists(st.text(max_size=8), min_size=1, max_size=6),
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=3),
)
def test_joined_parts_are_byte_for_byte_what_one_writer_writes(tmp_path_factory, code, prose, cuts):
    folder = tmp_path_factory.mktemp("parts")
    texts = {"code": code, "prose": prose}
    limits = [{"code": min(a, len(code)), "prose": min(b, len(prose))} for a, b in cuts]
    options = {"fim_rate": 0.5, "split_rate": 0.5, "seed": 3}
    parts = write_parts(folder, texts, limits, **options)
    joined = join_shards(parts, WEIGHTS, folder / "joined")
    whole = write_shards(texts, WEIGHTS, TOKENIZER, folder / "whole", **options)
    assert joined.fingerprint == whole.fingerprint
    files = sorted(path.name for path in (folder / "whole").iterdir())
    assert files == sorted(path.name for path in (folder / "joined").iterdir())
    assert all((folder / "whole" / name).read_bytes() == (folder / "joined" / name).read_bytes() for name in files)


def test_parts_that_do_not_fit_or_are_damaged_are_not_joined(tmp_path):
    parts = write_parts(tmp_path, TEXTS, [{"code": 1, "prose": 1}], fim_rate=0.0)
    (other,) = write_parts(tmp_path / "other", TEXTS, [], fim_rate=0.5)
    with pytest.raises(ValueError, match=r"fim_rate': 0\.5.*fim_rate': 0\.0"):
        join_shards([*parts, other], WEIGHTS, tmp_path / "joined")
    with pytest.raises(ValueError, match="no parts to join"):
        join_shards([], WEIGHTS, tmp_path / "joined")
    with pytest.raises(ValueError, match="give each source a weight"):
        join_shards(parts, {"code": 1.0}, tmp_path / "joined")
    path = parts[1] / "prose.bin"
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"prose\.bin is not what its index says"):
        join_shards(parts, WEIGHTS, tmp_path / "joined")
    assert not (tmp_path / "joined").exists()
    path.write_bytes(content[:-2])
    with pytest.raises(ValueError, match=r"prose\.bin has .* bytes"):
        join_shards(parts, WEIGHTS, tmp_path / "joined")
