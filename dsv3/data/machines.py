"""Where the stages of a corpus build run: this machine, Ray or Slurm, by datatrove's executors; changes no byte of the result.

    local    tasks in processes of this machine; a stage begins when the one before is done
    ray      the same with tasks as Ray's actors: on a cluster that is joined, or on a Ray of this machine
    slurm    all stages are submitted as job arrays, each waiting for the one before (afterok); the call comes back at once

A finished task leaves a mark, logs/STAGE/completions/TASK, so that the next call runs what is left. Its log is in
logs/STAGE/logs.
Source: datatrove 0.10 (executor/). Does not: start a cluster, or copy files to it: all machines must see one file system.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor
from datatrove.executor.base import PipelineExecutor
from datatrove.pipeline.base import PipelineStep
from loguru import logger


@dataclass(frozen=True, kw_only=True)
class Machines:
    """Where it runs; changes no byte of the result."""

    executor: Literal["local", "ray", "slurm"] = "local"
    workers: int = 1
    """Tasks at once."""
    memory_gb: float = 2
    """Of a task (Ray, Slurm)."""
    ray_address: str | None = None
    """`auto` joins the cluster that this machine belongs to; None starts a Ray of this machine."""
    partition: str = "cpu"
    """Slurm's."""
    time: str = "24:00:00"
    """Slurm's limit of a stage's job."""
    activate: str = f"source {Path(sys.prefix) / 'bin' / 'activate'}"
    """Command with which a Slurm job finds Python and dsv3."""

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ValueError(f"workers {self.workers} must be at least 1")
        if self.executor == "slurm" and shutil.which("sbatch") is None:
            raise ValueError("executor slurm needs sbatch, which is not here: run this on a login node of the cluster")


@dataclass(frozen=True)
class Stage:
    """Steps that a document passes in one task, and how many tasks there are."""

    name: str
    tasks: int
    steps: list[PipelineStep]


def run(stages: Sequence[Stage], work: Path, machines: Machines, say: Callable[[str], None]) -> None:
    """Run what is left of each stage, here or on Ray.

    Raises:
        RuntimeError: a task failed; names its log.
    """
    with _quiet(), _ray(machines):
        for stage in stages:
            _run(stage, work / "logs" / stage.name, machines, say)


def _run(stage: Stage, logs: Path, machines: Machines, say: Callable[[str], None]) -> None:
    executor = _executor(stage, logs, machines)
    left = executor.get_incomplete_ranks()
    say(f"{stage.name}: {len(left)} of {stage.tasks} tasks to do")
    if not left:
        return
    cause: Exception | None = None
    try:
        executor.run()
    except Exception as error:  # whatever a task raised; Ray's executor raises nothing
        cause = error
    if left := executor.get_incomplete_ranks():
        raise RuntimeError(
            f"{len(left)} tasks of stage {stage.name} did not finish{f' ({cause})' if cause else ''}: see "
            f"{logs / 'logs'}/task_{left[0]:05d}.log; the same command goes on from here"
        ) from cause


def submit(stages: Sequence[Stage], work: Path, machines: Machines, say: Callable[[str], None]) -> None:
    """Hand all stages to Slurm, each waiting for the one before; unless jobs of this build are still in its queue."""
    known = work / "slurm.json"
    before = json.loads(known.read_text(encoding="utf-8")) if known.exists() else []
    if before and (waiting := _queued(before)):
        say(f"jobs {', '.join(waiting)} are still in Slurm's queue: wait for them (squeue), or scancel them")
        return
    executors: list[Any] = []
    with _quiet():
        for stage in stages:
            depends = executors[-1] if executors else None
            executors.append(_executor(stage, work / "logs" / stage.name, machines, depends))
        executors[-1].run()  # submits what it depends on first
    jobs = {stage.name: str(each.job_id) for stage, each in zip(stages, executors, strict=True) if each.job_id != -1}
    known.write_text(json.dumps(list(jobs.values())), encoding="utf-8")
    say("submitted: " + ", ".join(f"{name} as job {job}" for name, job in jobs.items()))


def _queued(jobs: Sequence[str]) -> list[str]:
    asked = ["squeue", "--noheader", "--format=%A", f"--jobs={','.join(jobs)}"]
    found = subprocess.run(
        asked, capture_output=True, text=True, check=False
    )  # fails if it knows none of them any more
    return sorted(set(found.stdout.split())) if found.returncode == 0 else []


# -- executors -------------------------------------------------------------------------------------------------------


class _Silent(PipelineExecutor):
    """Tasks tell stderr of errors alone; everything is in their log files."""

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> Any:
        logger.enable("datatrove.executor")  # for the log file; the task's logger keeps it off stderr
        try:
            return super()._run_for_rank(rank, max(1, local_rank), node_rank)
        finally:
            logger.disable("datatrove.executor")


class _Local(_Silent, LocalPipelineExecutor):
    pass


class _Ray(_Silent, RayPipelineExecutor):
    pass


def _executor(stage: Stage, logs: Path, machines: Machines, depends: Any = None) -> Any:
    """datatrove's executor of a stage. Local and Ray stages are run one after another by `build`, Slurm's wait for each other."""
    shared: dict[str, Any] = {"pipeline": stage.steps, "tasks": stage.tasks, "logging_dir": str(logs)}
    workers = min(machines.workers, stage.tasks)
    if machines.executor == "local":
        return _Local(**shared, workers=workers)
    if machines.executor == "ray":
        # One task a job: of several, datatrove's process pool may be ended while its last processes start, and then waits
        # for ever (Ray's handler of SIGTERM raises an exception, which is lost in a process that is not running yet).
        return _Ray(**shared, workers=workers, mem_per_cpu_gb=machines.memory_gb, tasks_per_job=1)
    return SlurmPipelineExecutor(
        **shared, workers=workers, time=machines.time, partition=machines.partition, qos="",
        mem_per_cpu_gb=math.ceil(machines.memory_gb), job_name=f"dsv3-{stage.name}", env_command=machines.activate,
        depends=depends,
    )  # fmt: skip


@contextmanager
def _ray(machines: Machines) -> Iterator[None]:
    """The cluster, or a Ray of this machine, for as long as tasks run; one that is there already is used and left alone."""
    if machines.executor != "ray":
        yield
        return
    try:
        import ray
    except ImportError:
        raise ValueError("executor ray needs Ray: pip install 'dsv3[data,ray]'") from None
    if ray.is_initialized():
        yield
        return
    shared: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
    if machines.ray_address is None:
        # As much as the tasks ask for: with less, they would wait for ever.
        memory = math.ceil(machines.workers * machines.memory_gb * (1 << 30))
        shared |= {"num_cpus": machines.workers, "include_dashboard": False, "_memory": memory}
        shared |= {"_node_ip_address": "127.0.0.1", "object_store_memory": 100 << 20}  # tasks talk by files alone
    ray.init(address=machines.ray_address or "local", **shared)
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without datatrove's own messages about executors on this process's stderr."""
    logger.disable("datatrove.executor")
    try:
        yield
    finally:
        logger.enable("datatrove.executor")
