"""A needle in a haystack up to 131,072 tokens: a very small model, pre-trained on rows of 1,024 tokens, extended by YaRN.

    filler (Zipf) with facts `<mark> key value` in it, and questions `<ask> key` -> the value
    learning    retrieval from noise, in two minutes: see `learn`
    training    1,024-token rows, then dsv3.train.extend in two phases; every fact of a row is asked once, somewhere behind it
    measuring   one haystack of 131,072 tokens holds the facts of every cell (length by depth), `--each` a cell; there are several
                haystacks. A cell's prompt is the haystack's first tokens and its question; the engine reads it by chunks of 512
                and finds the pages of shorter prompts again, so a map costs little more than one reading of the longest. Greedy
    arms        short: as pre-trained, plain RoPE; switched: the same weights under YaRN, untrained; extended: both phases;
                plain: both phases of the same rows, but RoPE left as it is. Each is measured in a process of its own, the
                extended one on all haystacks, the others on the first

Retrieval needs two attention heads that work together: one looks at the token before, the other finds where that was the token
at hand. From noise no loss on answers leads there within hours of this CPU: each head is worth nothing without the other. So
the first is asked for on its own, "say the token before", until it is there, and goes on being asked for in every step while rows
of facts grow from 4 facts to 63. The second head then appears within some hundred steps.

    python -m bench.needle [--work runs/needle] [--part learn train extend plain measure plot]    resumes; docs/evidence/needle.*
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import functools
import gc
import itertools
import json
import multiprocessing
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from bench.common import machine, peak_memory_mib, write_csv
from dsv3.data.loader import Batch, LoaderConfig
from dsv3.evals.needle import draw_heat_map
from dsv3.infer.engine import Engine
from dsv3.infer.sampling import SamplingParams
from dsv3.model.config import ModelConfig
from dsv3.model.transformer import DeepseekV3
from dsv3.model.weights import load_model
from dsv3.parallel.apply import refresh_copy
from dsv3.train.checkpoint import latest_checkpoint, load_training
from dsv3.train.extend import ExtendConfig, extend, extended
from dsv3.train.metrics import write_atomic
from dsv3.train.optim import ScheduleConfig
from dsv3.train.trainer import TrainConfig, Trainer

MARK, ASK, KEYS, VALUES, FILLER = 0, 1, 512, 64, 126
FIRST_KEY, FIRST_VALUE, FIRST_FILLER = 2, 2 + KEYS, 2 + KEYS + VALUES
VOCAB = FIRST_FILLER + FILLER
SHORT, LONGEST = 1024, 131072
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
DEPTHS = tuple(i / 10 for i in range(11))
MODEL = ModelConfig(
    vocab_size=VOCAB, hidden_size=128, intermediate_size=128, moe_intermediate_size=32, num_hidden_layers=2,
    num_nextn_predict_layers=0, num_attention_heads=2, q_lora_rank=None, kv_lora_rank=48, qk_nope_head_dim=32,
    qk_rope_head_dim=32, v_head_dim=32, n_routed_experts=8, num_experts_per_tok=2, n_group=1, topk_group=1,
    first_k_dense_replace=1, max_position_embeddings=SHORT, rope_scaling=None, bos_token_id=None, eos_token_id=None,
    initializer_range=0.09,
)  # fmt: skip
EXTEND = ExtendConfig(
    lengths=(8192, 32768), steps=30, step_tokens=32768, lr=1e-3, factor=LONGEST / SHORT, original=SHORT, save_every=5
)
DOCS = Path("docs/evidence")


class Codes:
    """The engine's tokenizer of a vocabulary without text: an id is written as its number."""

    bos_id, vocab_size = None, VOCAB

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: Any) -> str:
        return "".join(f" {i}" for i in ids)

    def stream(self) -> Codes:
        return self

    def push(self, ids: Any) -> str:
        return self.decode(ids)

    def finish(self) -> str:
        return ""

    def token_bytes(self, token: int) -> bytes:
        return f" {token}".encode()

    def is_special(self, token: int) -> bool:
        return False


def filler(length: int, rng: np.random.Generator) -> np.ndarray:
    weights = 1 / (np.arange(FILLER) + 10.0)
    return FIRST_FILLER + rng.choice(FILLER, size=length, p=weights / weights.sum())


class Rows:
    """The trainer's loader: row i of a seed is always the same. A sixteenth of a row's tokens are facts, as many questions."""

    def __init__(self, config: LoaderConfig) -> None:
        self.config, self.rows = config, 0

    def next_batch(self, rows: int) -> Batch:
        made = np.stack([self.row(self.rows + i) for i in range(rows)])
        self.rows += rows
        tokens = torch.from_numpy(made)
        positions = torch.arange(made.shape[1] - 1).expand(rows, -1)
        return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), positions, torch.zeros_like(positions))

    def row(self, number: int) -> np.ndarray:
        rng = np.random.default_rng([self.config.seed, number])
        length = self.config.seq_len + self.config.extra_tokens + 1
        count = min(KEYS, length // 16)
        row = filler(length, rng)
        places = rng.choice((length - 2) // 3, size=(count, 2), replace=False) * 3 + rng.integers(3)
        places.sort(axis=1)
        keys, values = rng.permutation(KEYS)[:count], rng.integers(VALUES, size=count)
        for column, sign in zip(places.T, (MARK, ASK)):
            row[column], row[column + 1], row[column + 2] = sign, FIRST_KEY + keys, FIRST_VALUE + values
        return row

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows = state["rows"]


def learn(work: Path, seed: int) -> Path:
    """Retrieval from noise, float32 -> the weights' file. Three lessons, each gone on with in the next: the token before; values
    behind keys, in rows of 4 to 63 facts; and the very rows of training, 256 and then 1,024 tokens long."""
    model, rng = DeepseekV3(MODEL), np.random.default_rng([11, seed])
    model.init_weights(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    lessons = [lambda: _say_before(model, rng, 64)]
    lessons += [functools.partial(_say_value, model, rng, facts) for facts in (4, 6, 9, 13, 19, 28, 42, 63)]
    lessons += [
        functools.partial(_say_all, model, Rows(LoaderConfig(seq_len=n, seed=100 + seed))) for n in (256, SHORT)
    ]
    number, lately, steps = 0, list[float](), 0
    while number < len(lessons):
        loss, right = lessons[number]()
        if number:
            loss = loss + _say_before(model, rng, 24)[0]
        steps += 1
        optimizer.param_groups[0]["lr"] = (2e-3 if number < len(lessons) - 2 else 1e-3) * min(1.0, steps / 30)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        lately = [*lately[-39:], right]
        if len(lately) == 40 and sum(lately) / 40 > 0.93:
            print(f"step {steps}: lesson {number}, {sum(lately) / 40:.2f} right", flush=True)
            number, lately = number + 1, []
        if steps % 200 == 0:
            print(f"step {steps}: lesson {number}, loss {float(loss.detach()):.3f}, right {right:.2f}", flush=True)
        if steps == 4000:
            raise SystemExit(f"seed {seed} is at lesson {number} after {steps} steps: try another")
    path = work / "learned.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), path)
    return path


def _say_before(model: DeepseekV3, rng: np.random.Generator, rows: int) -> tuple[torch.Tensor, float]:
    """Loss and accuracy of naming the token before, at every place of rows of 32 random tokens."""
    tokens = torch.from_numpy(rng.integers(VOCAB, size=(rows, 32)))
    logits = model.lm_head(model.hidden(tokens).main[:, 1:])
    return _scored(logits, tokens[:, :-1])


def _say_value(model: DeepseekV3, rng: np.random.Generator, facts: int) -> tuple[torch.Tensor, float]:
    """The same of values behind keys that were there before, in rows of `key value` pairs, each fact about three times."""
    slots = 3 * facts
    rows = max(1, 1536 // (2 * slots))
    drawn = rng.integers(facts, size=(rows, slots))
    keys = np.stack([rng.permutation(KEYS)[:facts] for _ in range(rows)])
    values = rng.integers(VALUES, size=(rows, facts))
    pairs = [FIRST_KEY + np.take_along_axis(keys, drawn, 1), FIRST_VALUE + np.take_along_axis(values, drawn, 1)]
    tokens = torch.from_numpy(np.stack(pairs, axis=2).reshape(rows, 2 * slots))
    known = torch.from_numpy((drawn[:, :, None] == drawn[:, None, :]).argmax(2) < np.arange(slots))
    states = model.hidden(tokens).main[:, ::2]
    return _scored(model.lm_head(states[known]), tokens[:, 1::2][known])


def _say_all(model: DeepseekV3, rows: Rows) -> tuple[torch.Tensor, float]:
    """The loss of every token of training's rows, and once more that of the answers; accuracy of the answers."""
    batch = rows.next_batch(2048 // rows.config.seq_len)
    asked = _asked(batch.tokens)
    logits = model.lm_head(model.hidden(batch.tokens).main)
    answers, right = _scored(logits[asked], batch.targets[asked])
    return _scored(logits, batch.targets)[0] + answers, right


def _asked(tokens: torch.Tensor) -> torch.Tensor:
    """Where a question's key stands."""
    asked = (tokens == ASK).roll(1, 1)
    asked[:, 0] = False
    return asked


def _scored(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, float]:
    loss = F.cross_entropy(logits.flatten(0, -2), targets.flatten())
    return loss, float((logits.argmax(-1) == targets).float().mean())


def train(work: Path, steps: int) -> Path:
    """Pre-training on rows of SHORT tokens -> its checkpoint."""
    schedule = ScheduleConfig(
        steps=steps, peak_lr=1e-3, warmup_steps=10, constant_until=0.6, cosine_until=0.95, second_constant_from=0.98,
        batch_size=8, gamma=1e-3,
    )  # fmt: skip
    config = TrainConfig(schedule=schedule, seq_len=SHORT, micro_batch=4, save_every=20)
    model = DeepseekV3(MODEL)
    model.load_state_dict(torch.load(work / "learned.pt", weights_only=True))
    Trainer(model, Rows(LoaderConfig(seq_len=SHORT)), config, work / "short").run()
    checkpoint = latest_checkpoint(work / "short")
    assert checkpoint is not None
    return checkpoint


def extend_plainly(work: Path) -> None:
    """The control: what `extend` does, without YaRN."""
    start = latest_checkpoint(work / "short")
    for phase, length in enumerate(EXTEND.lengths):
        assert start is not None, "run --part train first"
        config, loader = EXTEND.train_config(phase), Rows(LoaderConfig(seq_len=length, seed=EXTEND.seed + phase))
        model = DeepseekV3(dataclasses.replace(MODEL, max_position_embeddings=LONGEST))
        trainer = Trainer(model, loader, config, work / "plain" / f"phase-{phase + 1}")
        load_training(start, trainer.workers, trainer.optimizer)
        refresh_copy(trainer.twin, model)
        trainer.run()
        start = latest_checkpoint(trainer.folder)


@torch.no_grad()
def recall(model: DeepseekV3, length: int, rows: int = 2) -> float:
    """Share of the questions in new rows whose answer is the likeliest token."""
    batch = Rows(LoaderConfig(seq_len=length, seed=999)).next_batch(rows)
    asked = _asked(batch.tokens)
    states = torch.cat([model.hidden(row.unsqueeze(0)).main[0, where] for row, where in zip(batch.tokens, asked)])
    return float((model.lm_head(states).argmax(-1) == batch.targets[asked]).float().mean())


def haystack(each: int, lengths: tuple[int, ...], seed: int) -> tuple[np.ndarray, dict[tuple[int, float], list[int]]]:
    """One text for the whole map, and for each cell the places of its facts; places that are taken move back by three."""
    rng = np.random.default_rng([7, seed])
    text, taken, cells = filler(max(lengths), rng), set(), {}
    keys = iter(rng.permutation(KEYS))
    for length in lengths:
        for depth in DEPTHS:
            cells[length, depth] = []
            for _ in range(each):
                place, step = round(depth * (length - 9) / 3), 1 if depth < 0.5 else -1
                while place in taken:
                    place += step
                taken.add(place)
                cells[length, depth].append(3 * place)
                text[3 * place : 3 * place + 3] = MARK, FIRST_KEY + next(keys), FIRST_VALUE + rng.integers(VALUES)
    return text, cells


def measure(model: DeepseekV3, arm: str, each: int, lengths: tuple[int, ...], seed: int) -> list[dict[str, Any]]:
    """A row for each cell of a haystack, and the process's peak memory when its length was done."""
    text, cells = haystack(each, lengths, seed)
    engine = Engine(model, Codes(), cache_gb=0.1, max_running=4, step_tokens=512)
    rows, empty = [], peak_memory_mib()
    for length in lengths:
        started = time.perf_counter()
        for depth in DEPTHS:
            samples = []
            for place in cells[length, depth]:
                prompt = [*text[: length - 3].tolist(), ASK, int(text[place + 1])]
                (answer,) = engine.complete([prompt], SamplingParams(max_tokens=1, ignore_eos=True))
                samples.append({"grades": {"found": answer.token_ids == [int(text[place + 2])]}})
                gc.collect()  # request and sequence hold each other: 44 long prompts would wait here for the collector
            about = {"length": length, "depth": depth}
            rows.append({"arm": arm, "haystack": seed, "about": about, "samples": samples})
        seconds, peak = time.perf_counter() - started, peak_memory_mib()
        for row in rows[-len(DEPTHS) :]:
            row |= {"seconds": seconds, "peak_mib": peak, "empty_mib": empty}
        found = [s["grades"]["found"] for row in rows[-len(DEPTHS) :] for s in row["samples"]]
        print(
            f"{arm}, haystack {seed}, {length}: {sum(found)} of {len(found)}, {seconds:.0f} s, peak {peak:.0f} MiB",
            flush=True,
        )
    return rows


def arm_model(work: Path, arm: str) -> DeepseekV3:
    """In bfloat16, as it stands on disk; of the short one, the config is changed and the weights are not."""
    last = f"phase-{len(EXTEND.lengths)}"
    run = {"extended": work / "long" / last, "plain": work / "plain" / last}.get(arm, work / "short")
    checkpoint = latest_checkpoint(run)
    if checkpoint is None:
        raise SystemExit(f"{run} holds no trained model: run --part train extend plain first")
    model = load_model(checkpoint)
    if arm in ("extended", "plain"):
        return model
    # Plain RoPE knows no limit, the engine keeps the config's; for "short" that alone is raised.
    longer = dataclasses.replace(model.config, max_position_embeddings=LONGEST)
    config = longer if arm == "short" else extended(model.config, factor=EXTEND.factor, original=SHORT)
    other = DeepseekV3(config).to(torch.bfloat16)
    other.load_state_dict(model.state_dict())
    return other.eval()


def measure_arm(work: Path, arm: str, each: int, longest: int, threads: int, haystack_: int) -> None:
    """In a new process: its peak memory is this arm's own."""
    torch.set_num_threads(threads)
    lengths = tuple(n for n in LENGTHS if n <= longest)
    rows = measure(arm_model(work, arm), arm, each, lengths, haystack_)
    write_atomic(work / f"arm-{arm}-{haystack_}.json", json.dumps(rows, indent=1).encode())


def plot(work: Path) -> None:
    """docs/evidence/needle.csv, and the map of each arm as needle.png (extended) and needle-ARM.png."""
    results = [row for path in sorted(work.glob("arm-*.json")) for row in json.loads(path.read_text())]
    header = ["arm", "haystack", "length", "depth", "found", "asked", "seconds_of_length", "peak_mib", "empty_mib"]
    write_csv(DOCS / "needle.csv", header, (
        [r["arm"], r["haystack"], r["about"]["length"], r["about"]["depth"], sum(s["grades"]["found"] for s in r["samples"]),
         len(r["samples"]), f"{r['seconds']:.1f}", f"{r['peak_mib']:.0f}", f"{r['empty_mib']:.0f}"] for r in results
    ))  # fmt: skip
    titles = {
        "extended": f"YaRN, trained to {EXTEND.lengths[-1] // 1024}K",
        "short": f"plain RoPE, trained at {SHORT // 1024}K",
        "switched": "YaRN, untrained",
        "plain": f"plain RoPE, trained to {EXTEND.lengths[-1] // 1024}K",
    }
    for arm in {r["arm"] for r in results}:
        mine = [r for r in results if r["arm"] == arm]
        name = "needle.png" if arm == "extended" else f"needle-{arm}.png"
        draw_heat_map(mine, DOCS / name, title=f"Needle in a haystack: {titles[arm]}")
    with (DOCS / "needle.csv").open() as file:
        print(f"{sum(1 for _ in csv.reader(file)) - 1} cells in {DOCS / 'needle.csv'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/needle"))
    parser.add_argument("--part", nargs="*", default=["learn", "train", "extend", "plain", "measure", "plot"])
    parser.add_argument("--steps", type=int, default=120, help="of pre-training")
    parser.add_argument("--each", type=int, default=4, help="questions a cell")
    parser.add_argument("--arms", nargs="*", default=["extended", "plain", "short", "switched"])
    parser.add_argument("--longest", type=int, default=LONGEST)
    parser.add_argument("--haystacks", type=int, default=3, help="for the extended arm; the others are shown the first")
    parser.add_argument("--seed", type=int, default=0, help="of the weights that learning starts from")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(json.dumps(machine()), flush=True)
    if "learn" in options.part and not (options.work / "learned.pt").exists():
        learn(options.work, options.seed)
    if "train" in options.part:
        checkpoint = train(options.work, options.steps)
        print(f"pre-trained: recall {recall(load_model(checkpoint), SHORT):.3f} at {SHORT}", flush=True)
    if "extend" in options.part:
        checkpoint = latest_checkpoint(options.work / "short")
        assert checkpoint is not None, "run --part train first"
        newest = extend(checkpoint, EXTEND, Rows, options.work / "long", say=functools.partial(print, flush=True))
        model = load_model(newest)
        for length in (SHORT, EXTEND.lengths[-1]):
            print(f"extended: recall {recall(model, length, rows=1):.3f} at {length}", flush=True)
        print(f"peak memory of training {peak_memory_mib():.0f} MiB", flush=True)
    if "plain" in options.part:
        extend_plainly(options.work)
    if "measure" in options.part:
        for arm, number in itertools.product(options.arms, range(options.haystacks)):
            wanted = arm == "extended" or number == 0
            if wanted and not (options.work / f"arm-{arm}-{number}.json").exists():
                given = (options.work, arm, options.each, options.longest, options.threads, number)
                process = multiprocessing.get_context("spawn").Process(target=measure_arm, args=given)
                process.start()
                process.join()
                if process.exitcode:
                    raise SystemExit(f"measuring {arm} ended with {process.exitcode}")
    if "plot" in options.part:
        plot(options.work)


if __name__ == "__main__":
    main()
