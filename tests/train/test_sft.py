"""Fine-tuning: what is learnt and what is not, packing without a trace in the loss, adapters, resume, the numbers of the stage."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from dsv3.data.chat import ChatFormat
from dsv3.data.packing import PackedBatch, PackingConfig, pack
from dsv3.data.tokenizer import Tokenizer
from dsv3.kernels.cross_entropy import cross_entropy_reference
from dsv3.model.lora import LoraConfig, merge_lora
from dsv3.model.transformer import DeepseekV3
from dsv3.model.weights import load_model, save_model
from dsv3.parallel.degrees import ParallelConfig
from dsv3.parallel.mesh import Mesh
from dsv3.parallel.workers import Alone
from dsv3.train.checkpoint import checkpoints, read_state
from dsv3.train.loss import document_mask
from dsv3.train.metrics import TIMING_FIELDS, read_metrics
from dsv3.train.optim import CosineConfig
from dsv3.train.sft import SftConfig, SftObjective, build_sft, measure, run_sft
from dsv3.train.trainer import TrainConfig, Trainer
from tests.data.test_conversations import made
from tests.model.tiny import TINY, random_model
from tests.parallel.ranks import run_ranks

NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight"]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A folder with `model` (random weights and a tokenizer) and `data.jsonl` (sums; a third of them with reasoning)."""
    folder = tmp_path_factory.mktemp("sft")
    rows = []
    for i, a in enumerate(NUMBERS):
        for j, b in enumerate(NUMBERS[: 8 - i]):
            answer = {"role": "assistant", "content": f"{(NUMBERS * 2)[i + j + 1]}"}
            if (i + j) % 3 == 0:
                answer["reasoning_content"] = f"{a} and {b}"
            rows.append({"messages": [{"role": "user", "content": f"{a} plus {b}?"}, answer]})
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = Tokenizer.train([" ".join(NUMBERS) + " plus? and\n"] * 20, 320)
    config = dataclasses.replace(TINY, vocab_size=tokenizer.vocab_size, rope_scaling=None)
    save_model(random_model(config).to(torch.bfloat16), folder / "model", tokenizer=tokenizer)
    return folder


def alone(model: DeepseekV3) -> Alone:
    return Alone(model, precision="float32", recompute=False, compile_layers=False)


def config_for(base: Path, out: Path, **changes) -> SftConfig:
    settings = {
        "seq_len": 40,
        "batch_size": 4,
        "micro_batch": 2,
        "first_lr": 3e-3,
        "held_out": 0.2,
        "save_every": 2,
        "eval_every": 4,
    }
    return SftConfig(checkpoint=base / "model", data=(str(base / "data.jsonl"),), out=out, **{**settings, **changes})


def packed(lengths: list[int], seq_len: int = 20, rows: list[list[int]] | None = None) -> PackedBatch:
    samples = made(lengths)
    rows = rows or [[i] for i in range(len(lengths))]
    config = PackingConfig(seq_len=seq_len, extra_tokens=1)
    return pack([[(0, i) for i in row] for row in rows], [samples], config)


def random_tokens(batch: PackedBatch) -> PackedBatch:
    """The same layout with tokens that differ within a sample."""
    flow = torch.randint(
        0, 96, (int((batch.doc_ids >= 0).sum()) * 2,), generator=torch.Generator().manual_seed(1)
    ).tolist()
    tokens, targets = batch.tokens.clone(), batch.targets.clone()
    for row in range(len(tokens)):
        for at in range(tokens.shape[1]):
            if batch.doc_ids[row, at] >= 0:
                first = at == 0 or batch.doc_ids[row, at - 1] != batch.doc_ids[row, at]
                tokens[row, at] = flow.pop() if first else targets[row, at - 1]
                targets[row, at] = flow.pop()
    return dataclasses.replace(batch, tokens=tokens, targets=targets)


def step_of(batch: PackedBatch, micro: int, alpha: float = 1e-2):
    schedule = CosineConfig(steps=2, batch_size=4)
    config = TrainConfig(schedule=schedule, seq_len=20, micro_batch=micro, precision="float32", alpha=alpha)
    model = random_model(dataclasses.replace(TINY, rope_scaling=None))
    run = Trainer(model, None, config, Path("unused"), objective=SftObjective())  # type: ignore[arg-type]
    return run._accumulate(batch, 0.3), run


# -- the objective -----------------------------------------------------------------------------------------------------


def test_the_loss_is_the_mean_over_learnt_targets_of_each_depth_and_nothing_else():
    batch = random_tokens(packed([9, 5, 7, 14, 3], rows=[[0, 1], [2], [3, 4]]))
    (losses, _, _), run = step_of(batch, 3)
    hidden = run.twin.hidden(batch.tokens, depth=1, mask=document_mask(batch.doc_ids[:, :20]))
    for k, (state, mean) in enumerate(zip((hidden.main, *hidden.mtp), (losses.main, *losses.mtp))):
        each = []
        for row, col in batch.learn.nonzero().tolist():
            i = col - k
            if i >= 0 and batch.doc_ids[row, i] == batch.doc_ids[row, col]:
                each.append(
                    cross_entropy_reference(
                        state[row, i : i + 1], run.twin.lm_head.weight, batch.targets[row, col : col + 1]
                    )
                )
        assert len(each) == sum(n - 1 - k for n in (9, 5, 7, 14, 3))
        assert mean.item() == pytest.approx(torch.stack(each).mean().item(), rel=1e-5)


@pytest.mark.parametrize("micro", [1, 2, 3])
def test_neither_micro_batches_nor_unequal_rows_change_loss_or_gradient(micro):
    batch = random_tokens(packed([18, 3, 3, 11], rows=[[0], [1], [2, 3]]))
    (whole, counts, _), one = step_of(batch, 4)
    (parts, counted, _), other = step_of(batch, micro)
    assert parts.main.item() == pytest.approx(whole.main.item(), rel=1e-5)
    assert parts.mtp[0].item() == pytest.approx(whole.mtp[0].item(), rel=1e-5)
    assert parts.total.item() == pytest.approx(whole.total.item(), rel=1e-5)
    assert torch.equal(counts, counted)
    for a, b in zip(one.workers.grads, other.workers.grads):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)


def test_packed_samples_are_learnt_as_if_each_had_its_own_row():
    """Positions run on through the row: RoPE sees differences only, so not even they tell the samples apart."""
    lengths = [6, 8, 5, 4]
    together = random_tokens(packed(lengths, rows=[[0, 1, 2, 3]]))
    apart = packed(lengths)
    tokens, targets, at = apart.tokens.clone(), apart.targets.clone(), 0
    for row, n in enumerate(lengths):
        tokens[row, : n - 1], targets[row, : n - 1] = (
            together.tokens[0, at : at + n - 1],
            together.targets[0, at : at + n - 1],
        )
        at += n - 1
    apart = dataclasses.replace(apart, tokens=tokens, targets=targets)
    (one, counts, _), a = step_of(together, 1, alpha=0.0)  # the balance loss is of rows, and these are not the same
    (four, counted, _), b = step_of(apart, 4, alpha=0.0)
    assert one.main.item() == pytest.approx(four.main.item(), rel=1e-5)
    assert one.mtp[0].item() == pytest.approx(four.mtp[0].item(), rel=1e-5)
    assert torch.equal(counts[:2], counted[:2])  # padding is not counted; the MTP layer reads one token of it a sample
    for x, y in zip(a.workers.grads, b.workers.grads):
        torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-2)


def test_what_stands_in_another_sample_or_in_padding_changes_nothing():
    batch = random_tokens(packed([6, 8], rows=[[0, 1]]))
    tokens = batch.tokens.clone()
    tokens[0, 5:12] = (tokens[0, 5:12] + 7) % 96  # the second sample
    tokens[0, 12:] = 5  # padding
    learn = batch.learn.clone()
    learn[0, 5:] = False
    first = dataclasses.replace(batch, learn=learn)
    (a, _, _), _ = step_of(first, 1)
    (b, _, _), _ = step_of(dataclasses.replace(first, tokens=tokens), 1)
    assert a.main.item() == pytest.approx(b.main.item(), rel=1e-6)
    assert a.mtp[0].item() == pytest.approx(b.mtp[0].item(), rel=1e-6)


# -- the run -----------------------------------------------------------------------------------------------------------


def test_a_run_lowers_the_held_out_loss_and_ends_in_a_checkpoint_that_chats(base, tmp_path):
    said: list[str] = []
    result = run_sft(config_for(base, tmp_path, epochs=10, save_every=99), said.append)
    assert result["after"]["heldout_loss"] < result["before"]["heldout_loss"] - 1
    assert result["after"]["acceptance"][0] > result["before"]["acceptance"][0]
    text = "\n".join(said)
    assert "36 conversations read" in text
    assert "filled" in text
    assert "tokens are learnt (green)" in text
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert len(records) == result["steps"]
    assert records[0]["lr"] == pytest.approx(3e-3)
    assert records[-1]["lr"] == pytest.approx(6e-4)
    assert {"heldout_loss", "acceptance", "mtp_loss"} <= set(records[-1])
    tokenizer = Tokenizer.from_file(result["checkpoint"])
    assert ChatFormat.of(tokenizer).render([{"role": "user", "content": "two?"}]).ids
    assert "chat_template" in tokenizer.config
    opened = load_model(result["checkpoint"])
    numbers = measure(alone(opened), build_sft(config_for(base, tmp_path / "again")).held_out)
    assert numbers["heldout_loss"] == pytest.approx(result["after"]["heldout_loss"], rel=0.05)


def test_every_assistant_end_token_of_a_batch_is_learnt(base, tmp_path):
    run = build_sft(config_for(base, tmp_path))
    batch, eos = run.trainer.loader.next_batch(4), run.tokenizer.eos_id
    ends = (batch.targets == eos) & (batch.doc_ids >= 0)
    assert ends.sum() > 8
    assert batch.learn[ends].all()
    assert not batch.learn[batch.targets == run.tokenizer.user_id].any()
    assert 0 < batch.learn.float().mean() < 0.7


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2)])
def test_a_run_cut_and_resumed_is_the_run_that_was_not(base, tmp_path, lora):
    for name, cuts in (("whole", [None]), ("cut", [3, None])):
        for steps in cuts:
            run_sft(config_for(base, tmp_path / name, max_steps=steps, lora=lora, first_lr=1e-3, save_every=99))
    curves = [
        [
            {k: v for k, v in r.items() if k not in TIMING_FIELDS}
            for r in read_metrics(tmp_path / name / "metrics.jsonl")
        ]
        for name in ("whole", "cut")
    ]
    plain = [[{k: v for k, v in r.items() if "held" not in k and k != "acceptance"} for r in curve] for curve in curves]
    assert plain[0] == plain[1]
    last = [checkpoints(tmp_path / name)[-1] for name in ("whole", "cut")]
    assert (last[0] / "model.safetensors").read_bytes() == (last[1] / "model.safetensors").read_bytes()


@pytest.mark.parametrize("base_fp8", [False, True])
def test_lora_learns_and_the_last_checkpoint_is_a_plain_merged_model(base, tmp_path, base_fp8):
    said: list[str] = []
    config = config_for(
        base, tmp_path, epochs=12, lora=LoraConfig(rank=4), base_fp8=base_fp8, keep_last=50, first_lr=1e-2
    )
    run = build_sft(config, said.append)
    before = measure(run.trainer.workers, run.held_out)["heldout_loss"]
    frozen = {n: p.detach().clone() for n, p in run.trainer.model.named_parameters() if not p.requires_grad}
    run.trainer.run()
    after = measure(run.trainer.workers, run.held_out)["heldout_loss"]
    assert after < before - 0.3
    assert all(torch.equal(frozen[n], p) for n, p in run.trainer.model.named_parameters() if not p.requires_grad)
    assert any(line.startswith("LoRA: ") and "routed" in line for line in said)
    found = checkpoints(tmp_path)
    assert not (found[0] / "model.safetensors").exists()
    assert (found[0] / "adapter" / "adapter.safetensors").exists()
    opened = load_model(found[-1])
    assert measure(alone(opened), run.held_out)["heldout_loss"] == pytest.approx(after, abs=0.1)
    for a, b in zip(opened.parameters(), merge_lora(run.trainer.model).parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_router_bias_follows_or_keeps_every_bit(base, tmp_path):
    for update in (True, False):
        run = build_sft(config_for(base, tmp_path / str(update), update_router_bias=update))
        before = [router.e_score_correction_bias.clone() for router in run.trainer.model.routers()]
        run.trainer.step()
        same = [torch.equal(a, r.e_score_correction_bias) for a, r in zip(before, run.trainer.model.routers())]
        assert same == [not update] * 3


def test_resuming_on_other_data_is_refused(base, tmp_path):
    run_sft(config_for(base, tmp_path, max_steps=1))
    (tmp_path / "more.jsonl").write_text((base / "data.jsonl").read_text() * 2)
    with pytest.raises(ValueError, match=r"cannot be resumed.*steps: \d+ there, \d+ now"):
        run_sft(dataclasses.replace(config_for(base, tmp_path), data=(str(tmp_path / "more.jsonl"),)))


def test_contradictions_are_refused_before_anything_is_loaded(base, tmp_path):
    for changes, match in (
        ({"base_fp8": True}, "without LoRA none are frozen"),
        ({"lora": LoraConfig(), "precision": "fp8"}, "with LoRA use base_fp8"),
        ({"held_out": 1.0}, "held_out is 1.0"),
    ):
        with pytest.raises(ValueError, match=match):
            config_for(base, tmp_path, **changes)
    with pytest.raises(ValueError, match="seq_len 999 exceeds max_position_embeddings 256"):
        build_sft(config_for(base, tmp_path, seq_len=999))
    assert config_for(base, tmp_path, first_lr=None).rates == pytest.approx((5e-6, 1e-6))
    assert config_for(base, tmp_path, first_lr=None, lora=LoraConfig()).rates == pytest.approx((1e-4, 2e-5))


def tune(_group: object, base: Path, out: Path, degrees: dict) -> dict:
    config = config_for(base, out, precision="float32")
    return run_sft(config, mesh=Mesh(ParallelConfig(**degrees), TINY))


@pytest.mark.dist
@pytest.mark.parametrize("degrees", [{"expert": 2}, {"pipeline": 2}], ids=str)
def test_processes_fine_tune_as_one_does(base, tmp_path, degrees):
    told = run_sft(config_for(base, tmp_path / "one", precision="float32"))
    for result in run_ranks(tune, 2, tmp_path / "ranks", base, tmp_path / "two", degrees):
        assert result["before"]["heldout_loss"] == pytest.approx(told["before"]["heldout_loss"], rel=1e-5)
        assert result["before"]["acceptance"] == told["before"]["acceptance"]
        assert result["after"]["heldout_loss"] == pytest.approx(told["after"]["heldout_loss"], rel=2e-2)
        assert result["steps"] == told["steps"]
    one, two = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert two[0]["expert_counts"] == one[0]["expert_counts"]  # without the padding, whoever counts
    assert [r["loss"] for r in two[:2]] == pytest.approx([r["loss"] for r in one[:2]], rel=1e-4)
    ends = [checkpoints(tmp_path / name)[-1] for name in ("one", "two")]
    assert read_state(ends[0])["identity"] == read_state(ends[1])["identity"]  # so either goes on with the other's run
    load_model(ends[1])
    assert (ends[1] / "tokenizer.json").exists()
