"""The loop: what a killed run loses (nothing), what a non-finite loss changes (nothing), what accumulation changes (rounding)."""

import dataclasses
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from dsv3.data.loader import Loader, LoaderConfig
from dsv3.data.shards import open_shards, write_shards
from dsv3.data.tokenizer import Tokenizer
from dsv3.train.checkpoint import checkpoints, latest_checkpoint
from dsv3.train.metrics import TIMING_FIELDS, read_metrics
from dsv3.train.optim import ScheduleConfig
from dsv3.train.trainer import NonFiniteError, TrainConfig, Trainer
from tests.model.tiny import TINY, random_model

WORDS = ["the", "router", "sends", "every", "token", "to", "its", "experts", "and", "none", "is", "dropped", ";"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A folder with a tokenizer and shards."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = random.Random(0)
    texts = [" ".join(rng.choices(WORDS, k=80)) + ".\n" for _ in range(60)]
    tokenizer = Tokenizer.train(texts, 340)
    tokenizer.save(folder / "tokenizer")
    write_shards({"a": texts[:40], "b": texts[40:]}, {"a": 2.0, "b": 1.0}, tokenizer, folder / "shards")
    return folder


def trainer(corpus: Path, run: Path, *, schedule=None, vocab: int = 340, **changes) -> Trainer:
    tokenizer = Tokenizer.from_file(corpus / "tokenizer")
    model = random_model(dataclasses.replace(TINY, vocab_size=vocab, rope_scaling=None))
    schedule = schedule or ScheduleConfig(
        steps=12, warmup_steps=2, peak_lr=3e-3, batch_size=4, batch_ramp_from=2, batch_ramp_until=0.5
    )
    settings = {"seq_len": 24, "micro_batch": 2, "save_every": 3, "log_counts_every": 4, **changes}
    loader = Loader(open_shards(corpus / "shards"), LoaderConfig(seq_len=24, extra_tokens=1))
    return Trainer(model, loader, TrainConfig(schedule=schedule, **settings), run, tokenizer=tokenizer)


def curve(run: Path) -> list[dict]:
    return [
        {k: v for k, v in record.items() if k not in TIMING_FIELDS} for record in read_metrics(run / "metrics.jsonl")
    ]


def test_training_lowers_the_loss_and_keeps_the_newest(corpus, tmp_path):
    run = trainer(corpus, tmp_path, schedule=ScheduleConfig(steps=20, warmup_steps=2, peak_lr=1e-2, batch_size=4))
    run.run()
    losses = [record["loss"] for record in read_metrics(tmp_path / "metrics.jsonl")]
    assert len(losses) == 20
    assert losses[-1] < losses[0] - 1
    assert [p.name for p in checkpoints(tmp_path)] == ["step-00000018", "step-00000020"]


def test_micro_batches_give_the_whole_batch_gradient(corpus, tmp_path):
    grads = []
    for micro in (4, 2, 3):
        run = trainer(corpus, tmp_path, micro_batch=micro, precision="float32", alpha=0.0)
        counts = run._accumulate(run.loader.next_batch(4), 0.3).counts
        grads.append((run.workers.grads, counts))
    for other, counts in grads[1:]:
        assert torch.equal(counts, grads[0][1])
        for a, b in zip(grads[0][0], other):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)  # float32 sums in another order


def test_bfloat16_and_fp8_follow_float32(corpus, tmp_path):
    last = []
    for precision in ("float32", "bfloat16", "fp8"):
        run = trainer(corpus, tmp_path / precision, precision=precision)
        assert all(p.dtype == torch.float32 for p in run.model.parameters())
        last.append([run.step()["loss"] for _ in range(6)])
    assert last[0] == pytest.approx(last[1], rel=2e-2)
    assert last[0] == pytest.approx(last[2], rel=2e-2)


def test_recompute_changes_nothing(corpus, tmp_path):
    a, b = (trainer(corpus, tmp_path, recompute=flag) for flag in (False, True))
    for _ in range(3):
        first, second = a.step(), b.step()
        assert first["loss"] == second["loss"]
        assert first["load"] == second["load"]


@pytest.mark.parametrize("precision", ["bfloat16", "fp8"])
def test_resume_is_bit_identical_in_process(corpus, tmp_path, precision):
    trainer(corpus, tmp_path / "whole", precision=precision).run()
    trainer(corpus, tmp_path / "cut", max_steps=5, precision=precision).run()
    trainer(corpus, tmp_path / "cut", precision=precision).run()
    assert curve(tmp_path / "whole") == curve(tmp_path / "cut")


SCRIPT = """
    import sys
    from pathlib import Path
    import torch
    torch.set_num_threads(1)
    from tests.train.test_trainer import trainer
    trainer(Path(sys.argv[1]), Path(sys.argv[2])).run()
"""


def test_sigkill_at_random_moments(corpus, tmp_path):
    """Each life is killed at a random moment after it began to write; the last one ends by itself."""

    def life(run: Path) -> subprocess.Popen:
        command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(corpus), str(run)]
        root = Path(__file__).parents[2]
        return subprocess.Popen(command, cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, stderr=subprocess.PIPE)

    whole = life(tmp_path / "whole")
    _, errors = whole.communicate(timeout=300)
    assert whole.returncode == 0, errors.decode()
    rng = random.Random(1)
    for _ in range(3):
        process = life(tmp_path / "killed")
        file = tmp_path / "killed" / "metrics.jsonl"
        size = file.stat().st_size if file.exists() else 0
        deadline = time.time() + 60
        while process.poll() is None and time.time() < deadline and (not file.exists() or file.stat().st_size <= size):
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.25))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    last = life(tmp_path / "killed")
    _, errors = last.communicate(timeout=300)
    assert last.returncode == 0, errors.decode()
    assert curve(tmp_path / "killed") == curve(tmp_path / "whole")
    a, b = (latest_checkpoint(tmp_path / name) for name in ("whole", "killed"))
    assert a is not None
    assert b is not None
    assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()


def test_non_finite_stops_before_the_optimizer(corpus, tmp_path):
    run = trainer(corpus, tmp_path)
    run.step()
    run.save()
    with torch.no_grad():
        run.twin.model.layers[1].self_attn.o_proj.weight[0, 0] = float("nan")
        run.model.model.layers[1].self_attn.o_proj.weight[0, 0] = float("nan")
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    with pytest.raises(
        NonFiniteError, match=r"loss is nan \(first in model.layers.1.self_attn.o_proj\) at step 2, batch rows 0 to 1"
    ):
        run.step()
    assert all(torch.equal(before[n], t) or "o_proj" in n for n, t in run.model.state_dict().items())
    assert [p.name for p in checkpoints(tmp_path)] == ["step-00000001"]


def test_resume_with_another_config_shows_what_differs(corpus, tmp_path):
    trainer(corpus, tmp_path, max_steps=1).run()
    with pytest.raises(ValueError, match=r"train.alpha: 0.0001 there, 0.5 now"):
        trainer(corpus, tmp_path, alpha=0.5).run()
    with pytest.raises(ValueError, match=r"model.vocab_size: 340 there, 400 now"):
        trainer(corpus, tmp_path, vocab=400).run()


def test_full_disk_leaves_the_last_checkpoint(corpus, tmp_path, monkeypatch):
    run = trainer(corpus, tmp_path)
    run.step()
    run.save()
    run.step()

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dsv3.train.checkpoint.dcp.save", full)
    with pytest.raises(
        OSError, match=r"step-00000002 could not be written \(No space left on device; [\d,]+ bytes free\)"
    ):
        run.save()
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


def test_ctrl_c_saves(corpus, tmp_path):
    run = trainer(corpus, tmp_path, save_every=100)
    with pytest.raises(KeyboardInterrupt):
        run.run(on_eval=[lambda t: os.kill(os.getpid(), signal.SIGINT) or {} if t.step_index == 2 else {}])
    assert [p.name for p in checkpoints(tmp_path)] == ["step-00000002"]


def test_fp8_with_masked_documents_and_with_full_recomputation(corpus, tmp_path):
    """The loss of a step is the same however its backward is prepared; what is recomputed whole keeps no rounded copies."""
    runs = [
        trainer(corpus, tmp_path, precision="fp8", mask_documents=True, recompute=recompute)
        for recompute in (False, True)
    ]
    first = [run.step() for run in runs]
    assert first[0]["loss"] == first[1]["loss"]
    assert first[0]["grad_norm"] == pytest.approx(first[1]["grad_norm"], rel=0.1)
    assert runs[0].step()["loss"] == pytest.approx(runs[1].step()["loss"], rel=0.02)


def test_fp8_and_compile_exclude_each_other(corpus, tmp_path):
    schedule = ScheduleConfig(steps=2, warmup_steps=1, batch_size=4)
    with pytest.raises(ValueError, match="compile=True with precision 'fp8'"):
        trainer(corpus, tmp_path, precision="fp8", compile=True, schedule=schedule)
    with pytest.raises(ValueError, match=r"precision is 'int4': train in one of bfloat16, float32, fp8"):
        trainer(corpus, tmp_path, precision="int4")
