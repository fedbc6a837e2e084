"""A pipeline's step against the same step in one process; how layers are dealt out; what is refused."""

import dataclasses
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsv3.model.config import ModelConfig
from dsv3.model.transformer import DeepseekV3, Hidden, Routing
from dsv3.parallel.apply import compute_copy, prepare
from dsv3.parallel.pipeline import Pipeline, micro_batches
from dsv3.parallel.stage import STAGES_A_RANK, Part, Stage, _cuts, split
from dsv3.train.loss import PretrainObjective, Step
from tests.model.tiny import TINY, random_model
from tests.parallel.ranks import run_ranks

LENGTH, ALPHA, MTP_WEIGHT = 12, 0.1, 0.3  # alpha as large as shows in a gradient
DEEP = dataclasses.replace(TINY, num_hidden_layers=7, num_nextn_predict_layers=2)


class Rows:
    """Made-up rows, one a micro-batch, packed documents masked, in shares that differ; a stage.Feed."""

    def __init__(self, config: ModelConfig, number: int) -> None:
        draw = torch.Generator().manual_seed(number)
        self.depth, self.objective = config.num_nextn_predict_layers, PretrainObjective(mask_documents=True)
        tokens = torch.randint(config.vocab_size, (number, LENGTH + self.depth + 1), generator=draw)
        documents = torch.randint(2, (number, LENGTH + self.depth), generator=draw).cumsum(1)
        self.batch = SimpleNamespace(tokens=tokens[:, :-1], targets=tokens[:, 1:], doc_ids=documents)
        shares = torch.rand(number, generator=draw)
        self.shares = (shares / shares.sum()).tolist()

    def inputs(self, micro: int) -> tuple[Tensor, Tensor | None]:
        rows = slice(micro, micro + 1)
        return self.objective.inputs(self.batch, rows, depth=self.depth, device=torch.device("cpu"))

    def loss(self, micro: int, hidden: Hidden, head: Tensor) -> tuple[Tensor, Step]:
        rows = slice(micro, micro + 1)
        step = self.objective.losses(hidden, head, self.batch, rows, mtp_weight=MTP_WEIGHT, alpha=ALPHA)
        return step.losses.total * self.shares[micro], step

    def counts(self, micro: int, routing: Routing) -> Tensor:
        return routing.counts


def alone(model: DeepseekV3, rows: Rows) -> tuple[list[Step], Tensor, dict[str, Tensor]]:
    """Records, counts and float32 gradients of the step in one process."""
    records, grads = [], dict[str, Tensor]()
    for micro in range(len(rows.shares)):
        tokens, mask = rows.inputs(micro)
        hidden = model.hidden(tokens, depth=rows.depth, mask=mask, balance=True)
        loss, step = rows.loss(micro, hidden, model.lm_head.weight)
        loss.backward()
        records.append(step)
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            grads[name] = grads.get(name, 0) + parameter.grad.float()
            parameter.grad = None
    return records, sum(step.counts for step in records), grads


def piped(group: Any, config: ModelConfig, cases: list[tuple[str, str, int]]) -> list[tuple[list[Step], Tensor, list]]:
    """Of each (schedule, kind of model, micro-batches) the records, the counts, and the gradients of each stage of the rank."""
    results = []
    for schedule, kind, number in cases:
        parts = [p for p in split(config, group.size(), schedule) if p.rank == dist.get_rank(group)]
        stages = [Stage.cut(random_model(config), part) for part in parts]
        if kind == "bfloat16":
            stages = [compute_copy(stage, kind) for stage in stages]
        for stage in stages:
            prepare(stage, recompute=kind == "recompute", compile_layers=False)
        stream = torch.bfloat16 if kind == "bfloat16" else torch.float32
        pipeline = Pipeline(stages, group, schedule, stream=stream)
        for _ in range(2):  # the second finds buffers and gradients of the first
            records, counts = pipeline.step(Rows(config, number), number)
        grads = [{name: p.grad for name, p in stage.named_parameters()} for stage in stages]
        results.append((records, counts, grads))
    return results


def check(config: ModelConfig, cases: list[tuple[str, str, int]], ranks: list[list[Any]], limit: float) -> None:
    for case, *results in zip(cases, *ranks, strict=True):
        _, kind, number = case
        model = random_model(config)
        model = compute_copy(model, kind) if kind == "bfloat16" else model
        records, counts, grads = alone(model, Rows(config, number))
        found = dict[str, list[Tensor]]()
        for got_records, got_counts, stages in results:
            assert torch.equal(got_counts, counts), case
            for step, want in zip(got_records, records, strict=True):
                torch.testing.assert_close(step.losses, want.losses, rtol=limit, atol=0)
            for name, grad in (item for stage in stages for item in stage.items()):
                found.setdefault(name, []).append(grad)
        assert found.keys() == grads.keys()
        for name, copies in found.items():
            assert copies[0].dtype == torch.float32
            assert len(copies) == 1 + ("embed_tokens" in name), name
            assert torch.equal(copies[0], copies[-1]), (case, name)
            error = (copies[0] - grads[name]).norm() / grads[name].norm()
            assert error < limit, (case, name, error)


@pytest.mark.dist
@pytest.mark.parametrize("kind", ["plain", "recompute", "bfloat16"])
def test_two_ranks_take_the_step_of_one_under_every_schedule(kind: str, tmp_path: Path) -> None:
    cases = [("1f1b", kind, 3), ("zero-bubble", kind, 4), ("dualpipev", kind, 5)]
    results = run_ranks(piped, 2, tmp_path, TINY, cases)
    check(TINY, cases, results, 1e-6 if kind != "bfloat16" else 2e-2)
