"""Context extension: what is switched, what goes on from where it stood, and what transformers makes of the result."""

import dataclasses
import random
from functools import partial

import pytest
import torch

from dsv3.data.loader import Loader, LoaderConfig
from dsv3.data.shards import open_shards, write_shards
from dsv3.data.tokenizer import Tokenizer
from dsv3.model.config import ModelConfig, YarnConfig
from dsv3.model.transformer import DeepseekV3
from dsv3.model.weights import load_model, save_model
from dsv3.parallel.degrees import ParallelConfig
from dsv3.parallel.mesh import Mesh
from dsv3.parallel.workers import Alone
from dsv3.train.checkpoint import latest_checkpoint, load_training, read_state
from dsv3.train.extend import ExtendConfig, extend, extend_from_shards, extended, longer
from dsv3.train.metrics import TIMING_FIELDS, read_metrics
from dsv3.train.optim import ScheduleConfig, build_optimizer
from dsv3.train.trainer import TrainConfig, Trainer
from tests.model.tiny import TINY, random_model
from tests.parallel.ranks import run_ranks

SHORT = 16
SMALL = ExtendConfig(
    lengths=(32, 64), steps=4, step_tokens=128, lr=1e-3, factor=8, precision="float32", save_every=3, keep_last=1
)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A run of a few steps at 16 tokens a row: (newest checkpoint, shards, tokenizer)."""
    folder = tmp_path_factory.mktemp("start")
    rng = random.Random(0)
    texts = [" ".join(rng.choices(["router", "expert", "token", "sends", "to", "the"], k=90)) for _ in range(12)]
    tokenizer = Tokenizer.train(texts, 300)
    shards = write_shards({"a": texts}, {"a": 1.0}, tokenizer, folder / "shards", fim_rate=0.0)
    model = random_model(dataclasses.replace(TINY, vocab_size=300, rope_scaling=None, max_position_embeddings=200))
    schedule = ScheduleConfig(steps=3, warmup_steps=1, peak_lr=1e-3, batch_size=2)
    train = TrainConfig(schedule=schedule, seq_len=SHORT, micro_batch=2, precision="float32")
    loader = Loader(shards, LoaderConfig(seq_len=SHORT, extra_tokens=1))
    Trainer(model, loader, train, folder / "run", tokenizer=tokenizer).run()
    checkpoint = latest_checkpoint(folder / "run")
    assert checkpoint is not None
    return checkpoint, open_shards(folder / "shards"), tokenizer


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """Both phases, run through: (folder, newest checkpoint)."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(start, folder)


def run(start, folder, config=SMALL):
    checkpoint, shards, tokenizer = start
    return extend_from_shards(checkpoint, config, shards, tokenizer, folder)


def curve(folder):
    records = [r for phase in ("phase-1", "phase-2") for r in read_metrics(folder / phase / "metrics.jsonl")]
    return [{k: v for k, v in record.items() if k not in TIMING_FIELDS} for record in records]


def test_the_switch_makes_v3s_own_config_of_its_pre_training_config():
    before = ModelConfig(rope_scaling=None, max_position_embeddings=4096)
    assert extended(before, factor=40, original=4096) == ModelConfig()
    assert extended(ModelConfig(), factor=40, original=4096) == ModelConfig()
    assert extended(before, factor=40, original=4096).softmax_scale == pytest.approx(0.1352337788608801, rel=1e-12)


def test_the_defaults_are_the_reports():
    config = ExtendConfig()
    trains = [config.train_config(phase) for phase in (0, 1)]
    assert [(t.seq_len, t.schedule.batch_size, t.schedule.steps) for t in trains] == [
        (32768, 1920, 1000),
        (131072, 480, 1000),
    ]
    assert {t.schedule.lr(step) for t in trains for step in (0, 500, 999)} == {7.3e-6}
    assert [(t.micro_batch, t.recompute) for t in trains] == [(1, True)] * 2


def test_two_phases_at_one_rate_and_equal_tokens_a_step_with_the_mtp_layer(whole):
    folder, newest = whole
    records = curve(folder)
    assert newest == latest_checkpoint(folder / "phase-2")
    assert [(r["step"], r["batch_size"]) for r in records] == [(i, 4) for i in (1, 2, 3, 4)] + [
        (i, 2) for i in (1, 2, 3, 4)
    ]
    assert {(r["lr"], r["gamma"], r["mtp_weight"]) for r in records} == {(1e-3, 0.0, 0.1)}
    assert [r["tokens"] for r in records] == [128, 256, 384, 512] * 2
    assert all(len(r["mtp_loss"]) == 1 for r in records)
    yarn = YarnConfig(factor=8, original_max_position_embeddings=SHORT, mscale=1.0, mscale_all_dim=1.0)
    for phase in ("phase-1", "phase-2"):
        written = ModelConfig.from_hf(latest_checkpoint(folder / phase))
        assert (written.rope_scaling, written.max_position_embeddings) == (yarn, SHORT * 8)


def test_a_phase_starts_from_the_float32_masters_and_the_moments_of_the_one_before(start, tmp_path):
    """At rate 0 the step's decay is 0 as well, so the masters that come out are those that went in."""
    checkpoint, *_ = start
    newest = run(start, tmp_path, dataclasses.replace(SMALL, lr=0.0, steps=1))
    before, after = (DeepseekV3(ModelConfig.from_hf(path)) for path in (checkpoint, newest))
    optimizers = [build_optimizer(list(model.parameters())) for model in (before, after)]
    for path, model, optimizer in ((checkpoint, before, optimizers[0]), (newest, after, optimizers[1])):
        load_training(path, Alone(model, precision="float32", recompute=False, compile_layers=False), optimizer)
    for (name, a), b in zip(before.state_dict().items(), after.state_dict().values()):
        assert torch.equal(a, b), name
    assert any(not torch.equal(a, a.bfloat16().float()) for a in before.state_dict().values())  # the test can fail
    steps = [int(next(iter(o.state.values()))["step"]) for o in optimizers]
    assert steps == [3, 5]


def test_a_run_that_was_stopped_and_resumed_is_the_same_to_the_bit(start, whole, tmp_path):
    """Stopped within the first phase, between the two, and within the second."""
    newest = None
    for sitting in (3, 1, 2, 9):
        newest = run(start, tmp_path, dataclasses.replace(SMALL, max_steps=sitting))
    assert newest is not None
    folder, through = whole
    assert curve(tmp_path) == curve(folder)
    assert (newest / "model.safetensors").read_bytes() == (through / "model.safetensors").read_bytes()
    assert run(start, tmp_path) == newest  # nothing is left to do, and nothing is done


def test_transformers_reads_the_extended_checkpoint_as_we_do_far_beyond_the_original_length(whole):
    from transformers import DeepseekV3ForCausalLM

    _, newest = whole
    ours = load_model(newest, dtype="float32")
    theirs = DeepseekV3ForCausalLM.from_pretrained(newest, dtype=torch.float32, attn_implementation="eager").eval()
    tokens = torch.randint(300, (2, 7 * SHORT), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        a, b = ours(tokens), theirs(tokens).logits
        short = DeepseekV3(dataclasses.replace(ours.config, rope_scaling=None))
        short.load_state_dict(ours.state_dict())
        unscaled = short(tokens)
    torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)
    assert (a - unscaled).abs().max() > 1e-2  # YaRN is on, and it matters


def test_weights_without_training_state_are_a_start_too(start, tmp_path):
    checkpoint, shards, _ = start
    model = load_model(checkpoint, dtype="float32")
    save_model(model, tmp_path / "plain")
    config = dataclasses.replace(SMALL, original=SHORT, steps=1)
    newest = extend(tmp_path / "plain", config, partial(Loader, shards), tmp_path / "out")
    rope = ModelConfig.from_hf(newest).rope_scaling
    assert rope is not None
    assert rope.original_max_position_embeddings == SHORT
    assert curve(tmp_path / "out")[0]["loss"] < 20
    more = dataclasses.replace(config, original=None)  # without the run's seq_len: max_position_embeddings
    newest = extend(tmp_path / "plain", more, partial(Loader, shards), tmp_path / "other")
    assert ModelConfig.from_hf(newest).max_position_embeddings == 1600


def test_refusals_name_both_values_and_the_cure(start, whole, tmp_path):
    checkpoint, shards, tokenizer = start
    folder, _ = whole
    with pytest.raises(ValueError, match=r"rows of 256 tokens exceed the 128 .* raise factor"):
        run(start, tmp_path, dataclasses.replace(SMALL, lengths=(64, 256), step_tokens=256))
    with pytest.raises(ValueError, match=r"step_tokens 100 is not a whole number of rows of 32"):
        dataclasses.replace(SMALL, step_tokens=100)
    with pytest.raises(ValueError, match="rising"):
        dataclasses.replace(SMALL, lengths=(64, 32))
    with pytest.raises(ValueError, match=r"extended already.* factor 4 of 16"):
        extend(
            folder / "phase-2" / "checkpoints" / "step-00000004",
            dataclasses.replace(SMALL, factor=4),
            partial(Loader, shards),
            tmp_path,
        )
    with pytest.raises(ValueError, match=r"cannot be resumed.*train\.schedule\.rate: 0\.001 there, 0\.002 now"):
        run(start, folder, dataclasses.replace(SMALL, lr=2e-3))
    other = random_model(ModelConfig.from_hf(checkpoint), seed=5)
    save_model(other, tmp_path / "other")
    with pytest.raises(ValueError, match=r"cannot be resumed.*start"):
        extend(
            tmp_path / "other",
            dataclasses.replace(SMALL, original=SHORT),
            partial(Loader, shards),
            folder,
            tokenizer=tokenizer,
        )
    with pytest.raises(ValueError, match=r"corpus has \d+ rows of 32 tokens, a batch needs 20,000"):
        run(start, tmp_path, dataclasses.replace(SMALL, step_tokens=640_000))
    with pytest.raises(ValueError, match="made with tokenizer"):
        extend_from_shards(checkpoint, SMALL, shards, Tokenizer.train(["other text"], 280), tmp_path)
    assert not list(tmp_path.glob("phase-*"))


def in_ranks(_group, folder, files, sitting, degrees):
    """One sitting of the run by several processes: the newest checkpoint of it."""
    checkpoint, shards, tokenizer = files
    config = dataclasses.replace(SMALL, max_steps=sitting)
    mesh = Mesh(ParallelConfig(**degrees), longer(checkpoint, config))
    return extend_from_shards(
        checkpoint, config, open_shards(shards), Tokenizer.from_file(tokenizer), folder, mesh=mesh
    )


@pytest.mark.dist
def test_several_processes_extend_as_one_does_and_go_on_in_another_layout(start, whole, tmp_path):
    # Float32 sums run in another order, and Adam's first steps are their signs: some millionths of the loss.
    checkpoint, _, _ = start
    files = (checkpoint, checkpoint.parents[2] / "shards", checkpoint)
    run_ranks(in_ranks, 2, tmp_path / "first", tmp_path / "out", files, 3, {"pipeline": 2})
    newest = run_ranks(in_ranks, 2, tmp_path / "second", tmp_path / "out", files, 9, {"expert": 2})[0]
    folder, _ = whole
    assert newest == tmp_path / "out" / "phase-2" / "checkpoints" / "step-00000004"
    found, expected = curve(tmp_path / "out"), curve(folder)
    assert [(r["step"], r["tokens"]) for r in found] == [(r["step"], r["tokens"]) for r in expected]
    for name in ("loss", "grad_norm"):
        assert [r[name] for r in found] == pytest.approx([r[name] for r in expected], rel=2e-4)
    assert run(start, tmp_path / "out") == newest  # one process sees that nothing is left to do


def from_plain(_group, folder, config, files):
    shards, tokenizer = files
    mesh = Mesh(ParallelConfig(sharding="fsdp"), longer(folder / "plain", config))
    rows = partial(Loader, open_shards(shards))
    extend(folder / "plain", config, rows, folder / "two", tokenizer=Tokenizer.from_file(tokenizer), mesh=mesh)


@pytest.mark.dist
def test_several_processes_start_from_plain_weights(start, tmp_path):
    checkpoint, shards, tokenizer = start
    save_model(load_model(checkpoint, dtype="float32"), tmp_path / "plain")
    config = dataclasses.replace(SMALL, original=SHORT, steps=1, lengths=(32,))
    extend(tmp_path / "plain", config, partial(Loader, shards), tmp_path / "one", tokenizer=tokenizer)
    run_ranks(from_plain, 2, tmp_path / "ranks", tmp_path, config, (checkpoint.parents[2] / "shards", checkpoint))
    one, two = (read_metrics(tmp_path / name / "phase-1" / "metrics.jsonl")[0] for name in ("one", "two"))
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-6)
    newest = [latest_checkpoint(tmp_path / name / "phase-1") for name in ("one", "two")]
    starts = [read_state(checkpoint)["identity"]["start"] for checkpoint in newest if checkpoint]
    assert starts[0] == starts[1]
