"""Checkpoints written and read by any number of processes in any layout; beside the training; damaged ones."""

import json
import resource
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import DTensor

from dsv3.model.fingerprint import fingerprint
from dsv3.model.weights import load_model
from dsv3.parallel.degrees import ParallelConfig
from dsv3.parallel.mesh import Mesh
from dsv3.train.checkpoint import checkpoints, consolidate, latest_checkpoint, training_tensors
from dsv3.train.saver import _has_room
from dsv3.train.trainer import Trainer
from tests.model.tiny import TINY
from tests.parallel.ranks import run_ranks
from tests.parallel.small import small_trainer

LAYOUTS: list[tuple[int, dict[str, Any] | None]] = [
    (1, None),
    (2, {"expert": 2}),
    (4, {"pipeline": 2, "expert": 2, "schedule": "zero-bubble"}),
    (2, {"sharding": "fsdp"}),
]


def state_of(run: Trainer) -> dict[str, torch.Tensor]:
    """Every master, bias and moment that is stored, whole."""
    found = {}
    for name, tensor in training_tensors(run.workers, run.optimizer):
        found[name] = (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()
    return found


def go_on(_group: Any, degrees: dict[str, Any] | None, folder: str, steps: int = 1) -> tuple[dict, dict]:
    """Restore what is there, take steps, save: the states after the first and after the last."""
    mesh = None if degrees is None else Mesh(ParallelConfig(**degrees), TINY)
    run = small_trainer(Path(folder), mesh, save_every=1, keep_last=9)
    resumed = latest_checkpoint(Path(folder))
    if resumed is not None:
        run.restore(resumed)
    before = state_of(run)
    for _ in range(steps):
        run.step()
        run.save(wait=False)
    run.saver.wait()
    return before, state_of(run)


@pytest.mark.dist
def test_a_run_goes_on_in_any_layout_from_the_very_bits(tmp_path):
    run = tmp_path / "run"
    last: dict[str, torch.Tensor] | None = None
    for turn, (ranks, degrees) in enumerate(LAYOUTS):
        if degrees is None:
            results = [go_on(None, None, str(run))]
        else:
            results = run_ranks(go_on, ranks, tmp_path / f"ranks-{turn}", degrees, str(run))
        before = {name: tensor for found, _ in results for name, tensor in found.items()}
        for found, _ in results:
            assert all(torch.equal(before[name], tensor) for name, tensor in found.items())
        if last is not None:
            assert before.keys() == last.keys()
            assert all(torch.equal(before[name], tensor) for name, tensor in last.items())
        last = {name: tensor for _, found in results for name, tensor in found.items()}
    assert [path.name[-1] for path in checkpoints(run)] == ["1", "2", "3", "4"]


@pytest.mark.dist
def test_the_same_layout_goes_on_as_if_never_stopped(tmp_path):
    degrees = {"expert": 2, "sharding": "fsdp"}
    whole = run_ranks(go_on, 2, tmp_path / "a", degrees, str(tmp_path / "whole"), 3)
    run_ranks(go_on, 2, tmp_path / "b", degrees, str(tmp_path / "parts"), 1)
    parts = run_ranks(go_on, 2, tmp_path / "c", degrees, str(tmp_path / "parts"), 2)
    for (_, a), (_, b) in zip(whole, parts, strict=True):
        assert all(torch.equal(b[name], tensor) for name, tensor in a.items())


def finish(_group: Any, folder: str) -> float:
    mesh = Mesh(ParallelConfig(pipeline=2), TINY)
    run = small_trainer(Path(folder), mesh, schedule={"steps": 2}, save_every=1)
    run.run()
    return run.saver.stalled


@pytest.mark.dist
def test_several_processes_leave_a_model_that_anyone_opens(tmp_path):
    run_ranks(finish, 2, tmp_path / "ranks", str(tmp_path / "run"))
    first, last = checkpoints(tmp_path / "run")
    assert not list(first.glob("*.safetensors"))
    with pytest.raises(ValueError, match=r"left it in shards, make it whole: dsv3 convert .*step-00000001 whole/"):
        load_model(first)
    consolidate(first, tmp_path / "first")
    for folder in (last, tmp_path / "first"):
        model = load_model(folder, dtype="float32")
        stored = {"model." + name: torch.empty_like(tensor) for name, tensor in model.state_dict().items()}
        dcp.load(stored, checkpoint_id=(last if folder == last else first) / "training", no_dist=True)
        for name, tensor in model.state_dict().items():
            kept = stored["model." + name]
            assert torch.equal(tensor, kept if "bias" in name else kept.bfloat16().float()), name
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2]


def one_step(_group: Any, folder: str) -> None:
    run = small_trainer(Path(folder), Mesh(ParallelConfig(expert=2, sharding="fsdp"), TINY))
    run.step()
    run.save()


@pytest.mark.dist
def test_a_model_is_made_whole_with_no_more_experts_in_memory_than_a_rank_had(tmp_path, monkeypatch):
    run_ranks(one_step, 4, tmp_path / "ranks", str(tmp_path / "run"))
    newest, sizes, load = checkpoints(tmp_path / "run")[-1], list[int](), dcp.load

    def watched(tensors: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        sizes.extend(len(tensor) for name, tensor in tensors.items() if ".experts." in name)
        return load(tensors, *args, **kwargs)

    monkeypatch.setattr(dcp, "load", watched)
    consolidate(newest, tmp_path / "model", dtype=torch.float32)
    layers = TINY.num_layers_with_mtp - TINY.first_k_dense_replace
    assert sizes == [TINY.n_routed_experts // 2] * (layers * 2 * 2)  # each half once, of two tensors a layer
    model = load_model(tmp_path / "model", dtype="float32")
    stored = {"model." + name: torch.empty_like(tensor) for name, tensor in model.state_dict().items()}
    load(stored, checkpoint_id=newest / "training", no_dist=True)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, stored["model." + name]), name


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    run, gate, save = small_trainer(tmp_path), threading.Event(), dcp.save
    run.step()

    def slow(*args: Any, **kwargs: Any) -> Any:
        assert gate.wait(20)
        return save(*args, **kwargs)

    monkeypatch.setattr(dcp, "save", slow)
    expected = state_of(run)
    target = run.save(wait=False)
    run.step()  # moves every tensor that is being written
    assert not target.exists()
    gate.set()
    run.saver.wait()
    again = small_trainer(tmp_path)
    again.restore(target)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state_of(again).items())
    assert again.step_index == 1


def test_a_disk_that_fills_up_beside_the_training_is_told_and_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    run = small_trainer(tmp_path)
    run.step()
    good = run.save()

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dcp, "save", full)
    run.step()
    run.save(wait=False)
    with pytest.raises(OSError, match=r"could not be written .No space left.*the checkpoints before it are whole"):
        run.saver.wait()
    assert checkpoints(tmp_path) == [good]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [good.name]


def test_a_damaged_checkpoint_is_refused_and_named(tmp_path):
    run = small_trainer(tmp_path, keep_last=3)
    for _ in range(2):
        run.step()
        run.save()
    newest = latest_checkpoint(tmp_path)
    part = next((newest / "training").glob("__0_*"))
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    before = fingerprint(run.model)
    with pytest.raises(
        ValueError, match=r"__0_0.distcp is not what was written.*the checkpoint before it .step-00000001"
    ):
        run.restore(newest)
    assert fingerprint(run.model) == before
    with pytest.raises(ValueError, match=r"__0_0.distcp is not what was written"):
        consolidate(newest, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    run.restore(checkpoints(tmp_path)[0])


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """The kernel refuses more, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("models", [0.5, 2], ids=["of the model's file", "of the shards"])
def test_a_write_that_the_kernel_refuses_is_an_error_of_the_disk_with_its_cure(tmp_path, models):
    run = small_trainer(tmp_path)
    run.step()
    good = run.save()
    run.step()
    with (
        files_of_at_most(int(models * (good / "model.safetensors").stat().st_size)),
        pytest.raises(OSError, match=r"step-00000002 could not be written .*bytes free.: make room and resume"),
    ):
        run.save()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [good.name]


def fill_up(_group: Any, folder: str) -> str:
    mesh = Mesh(ParallelConfig(), TINY)
    run = small_trainer(Path(folder), mesh)
    run.step()
    with files_of_at_most(30_000 if mesh.rank == 1 else 1 << 40), pytest.raises(OSError, match="make room") as raised:
        run.save()
    unshared = Path(folder) / f"of rank {mesh.rank}"
    run.saver.run = unshared
    unshared.mkdir()
    with pytest.raises((ValueError, RuntimeError), match="give a folder that all machines share"):
        run.save()
    assert not checkpoints(unshared)
    (unshared / "checkpoints" / f"step-0000000{mesh.rank}").mkdir(parents=True)
    run.folder = unshared
    with pytest.raises(ValueError, match=r"process 0 sees step-00000000 as the newest in .*, process 1 step-00000001"):
        run.run()
    return str(raised.value)


@pytest.mark.dist
def test_what_fails_on_one_process_is_told_on_all(tmp_path):
    """A disk that fills up on one; folders that are not shared."""
    for told in run_ranks(fill_up, 2, tmp_path / "ranks", str(tmp_path / "run")):
        assert "process 1" in told
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_killed_while_an_old_checkpoint_goes_no_half_of_it_passes_for_one(tmp_path, monkeypatch):
    run, remove, killed = small_trainer(tmp_path, keep_last=2), shutil.rmtree, []

    def dies(path: Path, **options: Any) -> None:
        if path.name.endswith("step-00000001") and (path / "training.json").exists() and not killed:
            killed.append(path)
            (path / "training.json").unlink()
            raise RuntimeError("killed")
        remove(path, **options)

    monkeypatch.setattr("dsv3.train.saver.shutil.rmtree", dies)
    for _ in range(2):
        run.step()
        run.save()
    run.step()
    with pytest.raises(RuntimeError, match="killed"):
        run.save()
    assert [path.name[-1] for path in checkpoints(tmp_path)] == ["2", "3"]
    run.step()
    run.save()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000003", "step-00000004"]


@pytest.mark.parametrize("damage", ["checksums gone", "checksums torn", "state changed", "state torn"])
def test_a_damaged_record_of_a_checkpoint_is_refused(tmp_path, damage):
    run = small_trainer(tmp_path)
    run.step()
    checkpoint = run.save()
    sums, state = checkpoint / "training" / "checksums.json", checkpoint / "training.json"
    if damage == "checksums gone":
        sums.unlink()
    elif damage == "checksums torn":
        sums.write_text(sums.read_text()[:-20])
    elif damage == "state changed":
        state.write_text(state.read_text().replace('"rows": 1', '"rows": 3'))
    else:
        state.write_text(state.read_text()[:-20])
    with pytest.raises(
        ValueError, match=r"(checksums|training)\.json is (not what was written|damaged).*remove step-00000001"
    ):
        run.restore(checkpoint)


def test_a_checkpoint_that_lacks_a_tensor_is_refused_by_name(tmp_path):
    run = small_trainer(tmp_path)
    run.step()
    checkpoint = run.save()
    run.workers.parts[0].register_buffer("more", torch.zeros(3))
    with pytest.raises(ValueError, match=r"step-00000001 is not readable as this run's: .*model\.more"):
        run.restore(checkpoint)


def test_a_copy_is_made_where_those_of_all_processes_of_the_machine_fit(monkeypatch):
    tensors = {"x": torch.zeros(1000)}
    monkeypatch.setattr("dsv3.train.saver.os.sysconf", lambda name: {"SC_AVPHYS_PAGES": 10, "SC_PAGE_SIZE": 1000}[name])
    assert _has_room(tensors, 1)
    assert not _has_room(tensors, 2)
    monkeypatch.setattr("dsv3.train.saver.os.sysconf_names", {})
    assert not _has_room(tensors, 1)
