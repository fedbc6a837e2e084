"""The verbs after pre-training as a user types them, one after the other: sft, distill, rl, eval."""

import contextlib
import dataclasses
import json
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch

from dsv3.cli import main
from dsv3.data.tokenizer import Tokenizer
from dsv3.evals.sandbox import IsolationError
from dsv3.model.weights import load_model, save_model
from dsv3.train.checkpoint import latest_checkpoint
from dsv3.train.metrics import read_metrics
from tests.model.tiny import TINY, random_model
from tests.serve.browser import chromium, opened, say

SUMS = [(a, b) for a in range(3) for b in range(2)]


def lines(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory) -> Path:
    """`dsv3 sft` of random weights until six sums are known; the run's folder, files beside it."""
    folder = tmp_path_factory.mktemp("verbs")
    tokenizer = Tokenizer.train(["What is 0 + 1? 2 3\n"] * 20, 300)
    config = dataclasses.replace(
        TINY, vocab_size=tokenizer.vocab_size, rope_scaling=None, eos_token_id=tokenizer.eos_id, bos_token_id=tokenizer.bos_id
    )  # fmt: skip
    save_model(random_model(config).to(torch.bfloat16), folder / "model", tokenizer=tokenizer)
    talks = [
        [{"role": "user", "content": f"What is {a} + {b}?"}, {"role": "assistant", "content": str(a + b)}]
        for a, b in SUMS
    ]
    chats = lines(folder / "chats.jsonl", [{"messages": talk} for talk in talks * 30])
    lines(folder / "problems.jsonl", [{"prompt": f"What is {a} + {b}?", "answer": str(a + b)} for a, b in SUMS])
    main([
        "sft", str(folder / "model"), "--data", chats, "--out", str(folder / "sft"), "--seq-len", "64", "--batch-size", "4",
        "--micro-batch", "4", "--first-lr", "2e-2", "--epochs", "8", "--held-out", "0", "--precision", "float32",
    ])  # fmt: skip
    return folder


def test_sft_learns_and_says_what_is_next(tuned, tmp_path, capsys):
    losses = [record["loss"] for record in read_metrics(tuned / "sft" / "metrics.jsonl")]
    assert losses[-1] < 0.1 < losses[0]
    main([
        "sft", str(tuned / "sft"), "--data", str(tuned / "chats.jsonl"), "--out", str(tmp_path / "lora"), "--seq-len", "64",
        "--lora-rank", "2", "--max-steps", "1", "--held-out", "0.1",
    ])  # fmt: skip
    told = capsys.readouterr().out
    assert "LoRA:" in told
    assert "try it with `dsv3 chat" in told


def test_the_chat_page_answers_what_was_taught(tuned):
    """`dsv3 serve` on the run, as a person has it: the page in a real Chromium."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "dsv3.cli", "serve", str(tuned / "sft"), "--port", str(port), "--cache-gb", "0.05"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            assert server.poll() is None, server.stderr.read()
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/ready") as answer:
                if answer.status == 200:
                    break
            time.sleep(0.1)
        with chromium() as browser, opened(browser, url) as page:
            page.locator("#open-settings").click()
            page.get_by_label("Temperature", exact=True).fill("0")
            page.get_by_role("button", name="Done").click()
            say(page, "What is 2 + 1?")
            assert page.locator(".turn.assistant > .body > .prose").text_content().strip() == "3"
    finally:
        server.terminate()
        server.wait(30)


def test_distill_keeps_right_answers_and_asks_nothing_twice(tuned, capsys):
    command = [
        "distill", "--checkpoint", str(tuned / "sft"), "--prompts", str(tuned / "problems.jsonl"), "--out",
        str(tuned / "distilled"), "--thoughts", "drop", "--sampling.temperature", "0", "--sampling.max-tokens", "8",
        "--no-originals",
    ]  # fmt: skip
    main(command)
    out = Path(capsys.readouterr().out.strip().splitlines()[-1])
    kept = [json.loads(line)["messages"] for line in (tuned / "distilled" / "sft.jsonl").read_text().splitlines()]
    assert out.exists()
    assert len(kept) >= 4
    answers = {f"What is {a} + {b}?": str(a + b) for a, b in SUMS}
    assert all(answers[talk[-2]["content"]] == talk[-1]["content"] for talk in kept)
    asked = (tuned / "distilled" / "requests.jsonl").read_bytes()
    main(command)
    assert (tuned / "distilled" / "requests.jsonl").read_bytes() == asked


def test_rl_runs_resumes_and_leaves_rollouts_to_look_at(tuned, capsys):
    command = [
        "rl", str(tuned / "sft"), "--out", str(tuned / "rl"), "--task", "arithmetic:terms=2,digits=1", "--prompts", "2", "--group",
        "4", "--minibatches", "1", "--max-tokens", "8", "--lr", "1e-4", "--eval-problems", "4", "--eval-every", "1", "--save-every",
        "1", "--cache-gb", "0.05", "--steps", "2",
    ]  # fmt: skip
    main([*command, "--max-steps", "1"])
    main(command)
    told = capsys.readouterr().out
    assert "held-out accuracy after" in told
    assert (tuned / "rl" / "rollouts.html").exists()
    assert [record["step"] for record in read_metrics(tuned / "rl" / "metrics.jsonl")] == [1, 2]
    load_model(latest_checkpoint(tuned / "rl"))


def test_rl_wants_a_sandbox_for_code_alone_and_says_what_to_do_without_one(tuned, tmp_path, capsys, monkeypatch):
    def none_here(*args, **options):
        raise IsolationError("no isolation for programs here: run where user namespaces are allowed")

    monkeypatch.setattr("dsv3.evals.sandbox.Sandbox", none_here)
    sums = [{"prompt": f"What is {a} + {b}?", "answer": str(a + b)} for a in range(6) for b in range(4)]
    code = [{**row, "kind": "code", "tests": "assert f() == 1"} for row in sums]
    small = [
        "--prompts",
        "2",
        "--group",
        "2",
        "--minibatches",
        "1",
        "--max-tokens",
        "4",
        "--steps",
        "1",
        "--cache-gb",
        "0.05",
    ]
    for name, rows in (("sums", sums), ("code", code)):
        task = lines(tmp_path / f"{name}.jsonl", rows)
        command = [
            "rl",
            str(tuned / "sft"),
            "--out",
            str(tmp_path / name),
            "--task",
            task,
            "--eval-problems",
            "2",
            *small,
        ]
        if name == "sums":
            main(command)
            continue
        with pytest.raises(SystemExit):
            main(command)
    assert "the questions are code: no isolation" in capsys.readouterr().err


def test_eval_scores_a_benchmark_and_prints_a_table(tuned, tmp_path, capsys):
    rows = [{"question": f"What is {a} + {b}?", "answer": f"{a} + {b} = {a + b}\n#### {a + b}"} for a, b in SUMS]
    (tmp_path / "gsm8k").mkdir()
    lines(tmp_path / "gsm8k" / "test.jsonl", rows)
    command = [
        "eval", str(tuned / "sft"), "--tasks", "gsm8k", "--data", f"gsm8k={tmp_path / 'gsm8k' / 'test.jsonl'}", "--shots", "0",
        "--out", str(tmp_path / "evals"), "--max-tokens", "8", "--cache-gb", "0.05",
    ]  # fmt: skip
    main(command)
    assert "gsm8k" in capsys.readouterr().out
    told = json.loads((tmp_path / "evals" / "results.json").read_text())["tasks"]["gsm8k"]
    assert (told["items"], told["errors"]) == (6, 0)
    assert 0 <= told["score"] <= 1
    for unheard in (["--concurrency", "2"], ["--model", "m"], ["--compare", "a", "b"], ["--harness", "hellaswag"]):
        with pytest.raises(SystemExit):
            main([*command, *unheard])
        assert "does not look at --" in capsys.readouterr().err
    with pytest.raises(SystemExit):  # the same checkpoint in another dtype is another model
        main([*command, "--dtype", "float32"])
    assert "is of another run: its model is" in capsys.readouterr().err
