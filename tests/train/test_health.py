"""Counters on values whose loss is known; an alarm that names the sick module while the loss is still well."""

import math

import pytest
import torch

from bench.common import RandomLoader
from dsv3.parallel.apply import refresh_copy
from dsv3.train.health import HealthMonitor, counters
from dsv3.train.optim import ScheduleConfig
from dsv3.train.trainer import TrainConfig, Trainer
from tests.model.test_fp8 import SMALL
from tests.model.tiny import random_model


def test_counters_of_known_values():
    torch.manual_seed(0)
    normal = counters(torch.randn(64, 256))
    assert normal["error"] == pytest.approx(0.0257, abs=0.0005)  # spec 6.2
    assert normal["flushed"] < 1e-3
    x = torch.full((1, 128), 2.0**-20)
    x[0, 0] = 1.0  # below 2^-10 / 448 of the largest: nothing stays of the others
    assert counters(x)["flushed"] == pytest.approx(127 / 128)
    assert counters(torch.ones(1, 128)) == {"amax": 1.0, "error": 0.0, "saturated": 1.0, "flushed": 0.0}
    zeros = counters(torch.zeros(2, 128))
    assert (zeros["amax"], zeros["error"], zeros["flushed"]) == (0.0, 0.0, 0.0)


def test_alarm_names_the_module_before_the_loss_rises(tmp_path):
    """A row of one matrix doubles every step, as when a unit runs away."""
    config = TrainConfig(
        schedule=ScheduleConfig(steps=100, peak_lr=1e-3, warmup_steps=2, batch_size=2), seq_len=24, precision="fp8",
        micro_batch=2,
    )  # fmt: skip
    trainer = Trainer(random_model(SMALL), RandomLoader(SMALL.vocab_size, 24, 1), config, tmp_path)
    monitor = HealthMonitor(trainer.twin)
    usual = 0.0
    for step in range(20):
        if step >= 8:
            with torch.no_grad():
                trainer.model.model.layers[1].self_attn.o_proj.weight[7] *= 2
            refresh_copy(trainer.twin, trainer.model)
        with monitor.watching():
            loss = trainer.step()["loss"]
        if step < 8:
            assert monitor.alarms() == []
            usual = max(usual, loss)
        elif said := monitor.alarms():
            assert "w of model.layers.1.self_attn.o_proj reaches" in said[0]
            assert loss < usual * 1.1
            return
    raise AssertionError("no alarm")


def test_metrics_hold_every_module(tmp_path):
    config = TrainConfig(
        schedule=ScheduleConfig(steps=3, warmup_steps=1, batch_size=4), seq_len=24, micro_batch=2, precision="fp8",
        log_counts_every=2,
    )  # fmt: skip
    trainer = Trainer(random_model(SMALL), RandomLoader(SMALL.vocab_size, 24, 1), config, tmp_path)
    records = [trainer.step() for _ in range(3)]
    assert "fp8" in records[0]
    assert "fp8" not in records[1]
    health = records[2]["fp8"]
    assert set(health["model.layers.1.mlp.experts"]) == {"x", "w_gate_up", "w_down", "dy"}
    assert set(health["model.layers.3.self_attn.kv_b_proj"]) == {"x", "w", "dy"}
    assert all(0.02 < parts["x"]["error"] < 0.04 for parts in health.values())


def test_looks_of_several_processes_are_one():
    monitor = HealthMonitor()
    fine = {"amax": 1.0, "error": 0.02, "saturated": 0.0, "flushed": 0.0}
    first = {"layers.0": {"x": fine, "dy": {**fine, "error": 0.5}}, "layers.1": {"x": fine}}
    other = {"layers.0": {"x": {**fine, "amax": math.inf}, "dy": fine}, "layers.2": {"x": fine}}
    monitor.join([first, other])
    assert monitor.health.keys() == {"layers.0", "layers.1", "layers.2"}
    assert monitor.health["layers.0"] == {"x": {**fine, "amax": math.inf}, "dy": {**fine, "error": 0.5}}
    assert [line.split(" of ")[0] for line in monitor.alarms()] == ["FP8: x", "FP8: dy"]
