"""The recipe's whole life on a small scale, through the command line as a user has it; the checkpoint in transformers."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import dsv3
from dsv3.recipes import tiny
from dsv3.train.checkpoint import latest_checkpoint
from tests.model.tiny import TINY

ROOT = Path(__file__).parents[2]


def dsv3_command(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "dsv3.cli", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    rng = random.Random(0)
    words = [
        *[
            "a",
            "model",
            "reads",
            "text",
            "and",
            "writes",
            "text",
            ",",
            "the",
            "cache",
            "holds",
            "what",
            "it",
            "read",
            ";",
        ],
        "你好",
        "é",
        "12345",
        "def",
        "return",
    ]
    for i in range(60):
        (folder / f"{i}.txt").write_text(" ".join(rng.choices(words, k=150)) + ".\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def life(texts, tmp_path_factory):
    """(run folder, results) of six steps."""
    import dataclasses

    out = tmp_path_factory.mktemp("runs") / "tiny"
    model = dataclasses.replace(TINY, vocab_size=400, rope_scaling=None, max_position_embeddings=512)
    config = tiny.TinyConfig(out=out, data=(str(texts),), steps=6, model=model)
    return out, tiny.run(config, say=lambda text: None)


def test_the_life_leaves_all_it_promises(life):
    out, results = life
    assert 0 < results["held-out bits per byte"] < 20
    assert results["uniform bits per byte"] == 8.0
    assert 0 < results["gzip bits per byte"] < 8
    assert 0 <= results["MTP drafts accepted (greedy)"] <= 1
    assert results["speculative text equals plain text"] in (True, False)  # bfloat16: see test_greedy_text for float32
    assert (out / "report.html").stat().st_size > 10_000
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 6
    assert any((out / "tensorboard").iterdir())


def test_transformers_opens_the_checkpoint_and_writes_the_same_text(life):
    checkpoint = latest_checkpoint(life[0])
    assert checkpoint is not None
    theirs, info = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    their_tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model, tokenizer = dsv3.load(checkpoint, dtype="float32")
    engines = [dsv3.Engine(model, tokenizer, drafts=drafts) for drafts in (0, 1)]
    for prompt in ("a model reads", "the cache  holds\n", "你好 é 123"):
        ids = their_tokenizer(their_tokenizer.bos_token + prompt, return_tensors="pt").input_ids
        assert [tokenizer.bos_id, *tokenizer.encode(prompt)] == ids[0].tolist()
        out = theirs.generate(ids, max_new_tokens=32, do_sample=False, pad_token_id=2)[0, ids.shape[1] :].tolist()
        for engine in engines:
            sample = next(engine.generate([prompt], dsv3.SamplingParams(max_tokens=32)))
            kept = [t for t in out if t != tokenizer.eos_id]
            assert sample.token_ids == kept
            assert sample.text == their_tokenizer.decode(kept)


def test_save_and_load_are_inverse(life, tmp_path):
    model, tokenizer = dsv3.load(latest_checkpoint(life[0]))
    dsv3.save(model, tmp_path / "again", tokenizer=tokenizer)
    again, _ = dsv3.load(tmp_path / "again")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_verbs_in_a_row(texts, tmp_path):
    made = dsv3_command("tokenizer", "--data", texts, "--vocab-size", 400, "--out", tmp_path / "tok")
    assert made.returncode == 0, made.stderr
    packed = dsv3_command(
        "data", "--data", f"words=1:{texts}", "--tokenizer", tmp_path / "tok", "--out", tmp_path / "sh"
    )
    assert packed.returncode == 0, packed.stderr
    (tmp_path / "model.json").write_text(json.dumps({"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 400}))
    sizes = ("--steps", 4, "--warmup-steps", 1, "--batch-size", 4, "--micro-batch", 2, "--seq-len", 64)
    trained = dsv3_command(
        "pretrain", "--shards", tmp_path / "sh", "--tokenizer", tmp_path / "tok", "--out", tmp_path / "run",
        "--model", tmp_path / "model.json", *sizes,
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr
    seen = dsv3_command("inspect", tmp_path / "run", "--json")
    assert seen.returncode == 0, seen.stderr
    assert isinstance(json.loads(seen.stdout), dict)
    said = dsv3_command("generate", tmp_path / "run", "--prompt", "a model", "--max-tokens", 5)
    assert said.returncode == 0, said.stderr
    assert said.stdout.startswith("a model")


def test_conversions_in_a_row(life, tmp_path):
    """FP8, back, GGUF, and the text that each writes; FP8 kept in memory writes what FP8 on disk means."""
    steps = [("fp8", life[0], "f8"), ("bfloat16", tmp_path / "f8", "b16"), ("q8_0", tmp_path / "f8", "m.gguf")]
    for dtype, source, target in steps:
        made = dsv3_command("convert", source, tmp_path / target, "--dtype", dtype)
        assert made.returncode == 0, made.stderr
    assert "without its MTP" in made.stdout
    verified = dsv3_command("inspect", tmp_path / "b16", "--verify", "--json")
    assert verified.returncode == 0, verified.stderr
    assert "tensors are what was written" in verified.stderr
    texts = [
        dsv3_command("generate", tmp_path / folder, "--prompt", "a model", "--max-tokens", 4, "--dtype", dtype).stdout
        for folder, dtype in (("f8", "float32"), ("b16", "float32"), ("f8", "fp8"))
    ]
    assert texts[0] == texts[1]
    assert texts[2].startswith("a model")
    refused = dsv3_command("convert", life[0], tmp_path / "b16")
    assert refused.returncode == 1
    assert "exists: choose another folder" in refused.stderr


def test_pretraining_in_fp8(life, tmp_path):
    """The command line's --precision, its health in the metrics and the report."""
    sizes = ("--steps", 3, "--warmup-steps", 1, "--batch-size", 2, "--micro-batch", 2, "--seq-len", 64)
    done = dsv3_command(
        "pretrain", "--shards", life[0] / "shards", "--tokenizer", life[0] / "tokenizer", "--out", tmp_path / "run",
        "--precision", "fp8", *sizes,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert 0.02 < first["fp8"]["model.layers.0.self_attn.o_proj"]["x"]["error"] < 0.04
    assert "FP8 health" in (tmp_path / "run" / "report.html").read_text()


def test_shards_of_another_corpus_are_refused(texts, tmp_path):
    from dsv3.data.tokenizer import Tokenizer
    from dsv3.recipes.corpus import build_shards, parse_sources, read_texts

    read = read_texts(parse_sources([str(texts)]))
    tokenizer = Tokenizer.train(["hello world"], 300)
    first, _ = build_shards(read, tokenizer, tmp_path / "sh")
    again, _ = build_shards(read, tokenizer, tmp_path / "sh")
    assert first.fingerprint == again.fingerprint
    with pytest.raises(ValueError, match=r"fim_rate: 0.1 there, 0.5 now"):
        build_shards(read, tokenizer, tmp_path / "sh", fim_rate=0.5)


@pytest.mark.parametrize("verb", ["run", "tokenizer", "data", "pretrain", "inspect", "convert", "generate"])
def test_help_teaches(verb):
    shown = dsv3_command(verb, "--help")
    assert shown.returncode == 0
    assert "xample" in shown.stdout or "dsv3 run tiny" in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tokenizer", "--data", "missing.txt", "--out", "OUT"), "missing.txt does not exist"),
        (("tokenizer", "--data", "EMPTY", "--out", "OUT"), "holds no text"),
        (("run", "tiny", "--data", "SHORT", "--out", "OUT"), "tokens"),
        (("generate", "EMPTY", "--prompt", "x"), "config"),
        (("inspect", "EMPTY"), "config"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_one(arguments, message, tmp_path):
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "SHORT").mkdir()
    for i in range(40):
        (tmp_path / "SHORT" / f"{i}.txt").write_text(f"text number {i}")
    done = dsv3_command(*(tmp_path / a if a.isupper() else a for a in arguments))
    assert done.returncode == 1, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert lines[-1].startswith("dsv3: ")
    assert message in lines[-1]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "OUT" / "checkpoints").exists()
