"""Writing checkpoints beside the training: what is to be written is copied, and a thread writes the copy.

    all processes    copy their shards -> torch.distributed.checkpoint -> checksums of their files
    the first        model files if they are due -> training.json -> sync -> rename -> older checkpoints go

Training goes on meanwhile; the next save waits for the one before. Where a copy would not fit into memory (the state on a CPU
is as large as training itself) the thread is waited for instead. The processes meet in a group of their own, so that a
write never comes between a step's collectives. Killed in between, a run has the checkpoint before.
Does not: know what is in a checkpoint (checkpoint.py).
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.tensor import DTensor

from dsv3.data.tokenizer import Tokenizer
from dsv3.model import folder as disk
from dsv3.model.lora import LoraConfig, merged_state, save_adapters
from dsv3.model.weights import save_checkpoint, write_config
from dsv3.parallel.fsdp import local
from dsv3.parallel.workers import Workers
from dsv3.train.checkpoint import CHECKSUMS, STATE, TENSORS, checkpoints, consolidate, training_tensors
from dsv3.train.optim import AdamW

_PATIENCE = timedelta(hours=24)  # of the processes that wait for the first one's model files


class Saver:
    """Writes the checkpoints of one run. With several processes each has one, and they call it together.

    Args:
        lora: of a model with adapters.
    """

    def __init__(
        self,
        run: Path,
        workers: Workers,
        optimizer: AdamW,
        tokenizer: Tokenizer | None,
        *,
        keep_last: int,
        lora: LoraConfig | None = None,
    ) -> None:
        self.run, self.workers, self.optimizer, self.tokenizer = run, workers, optimizer, tokenizer
        self.keep_last, self.lora = keep_last, lora
        self.group = None if workers.mesh is None else dist.new_group(backend="gloo", timeout=_PATIENCE)
        self.stalled = 0.0
        """Seconds that the last save kept the training waiting."""
        self._thread: threading.Thread | None = None
        self._fault: BaseException | None = None

    def save(self, state: Mapping[str, Any], *, whole: bool, wait: bool = True) -> Path:
        """Write checkpoint `state["step"]` and remove all but the newest `keep_last`. An existing one of that step stays.

        Args:
            whole: with the model's own files, where they are not in every checkpoint (see checkpoint.py).
            wait: until it is there.

        Raises:
            OSError: the disk is full or unwritable, at this save or the one before; earlier checkpoints are untouched.
        """
        began = time.monotonic()
        self.wait()
        target = self.run / "checkpoints" / f"step-{state['step']:08d}"
        if not target.exists():
            tensors = dict(reversed(training_tensors(self.workers, self.optimizer)))
            beside = not wait and self.lora is None and _has_room(tensors)  # adapters' files are made of the live model
            if beside:
                tensors = {name: _copy(tensor) for name, tensor in tensors.items()}
            self._thread = threading.Thread(
                target=self._guarded, args=(target, tensors, dict(state), whole), name="dsv3-saver"
            )
            self._thread.start()
            if not beside:
                self.wait()
        self.stalled = time.monotonic() - began
        return target

    def wait(self) -> None:
        """Until what was begun is written.

        Raises:
            OSError: it could not be.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._fault is not None:
            fault, self._fault = self._fault, None
            raise fault

    def _guarded(self, target: Path, *args: Any) -> None:
        try:
            self._write(target, *args)
        except OSError as error:
            free = shutil.disk_usage(self.run).free
            self._fault = OSError(
                error.errno,
                f"checkpoint {target.name} could not be written ({error.strerror or error}; {free:,} bytes free): "
                "make room and resume; the checkpoints before it are whole",
            )
        except BaseException as error:
            self._fault = error
        if self._fault is not None and self.workers.leads:
            shutil.rmtree(_temporary(target), ignore_errors=True)

    def _write(self, target: Path, tensors: dict[str, Tensor], state: dict[str, Any], whole: bool) -> None:
        temporary, folder = _temporary(target), _temporary(target) / TENSORS

        def begin() -> None:
            if self.workers.leads:
                shutil.rmtree(temporary, ignore_errors=True)
                self._write_model(temporary, tensors, whole)
                folder.mkdir()

        def write() -> dict[str, str]:
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore"
                )  # torch remarks that no process group exists, where there is one process
                dcp.save(tensors, checkpoint_id=folder, process_group=self.group, no_dist=self.group is None)
            rank = 0 if self.group is None else dist.get_rank()
            names = [f"__{rank}_*", *([".metadata"] if self.workers.leads else [])]
            return {path.name: disk.sha256(path) for name in names for path in folder.glob(name)}

        def finish() -> None:
            if not self.workers.leads:
                return
            content = json.dumps({name: digest for mine in written for name, digest in mine.items()}, indent=1)
            (folder / CHECKSUMS).write_text(content, encoding="utf-8")
            complete = self._consolidate(temporary) if whole and self.group is not None else temporary
            (complete / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
            _sync(complete)
            os.replace(complete, target)
            for old in checkpoints(self.run)[: -self.keep_last]:
                shutil.rmtree(old)

        self._all(begin)
        written = self._all(write)
        self._all(finish)

    def _all(self, work: Callable[[], Any]) -> list[Any]:
        """What every process made of its share; if one failed, all raise."""
        result, fault, text = None, None, ""
        try:
            result = work()
        except Exception as error:
            fault, text = error, str(error) or type(error).__name__
        told: list[tuple[Any, str]] = [(result, text)]
        if self.group is not None:
            told *= dist.get_world_size()
            dist.all_gather_object(told, (result, text), group=self.group)
        if fault is not None:
            raise fault
        for rank, (_, text) in enumerate(told):
            if text:
                raise RuntimeError(f"the checkpoint could not be written by process {rank}: {text}")
        return [result for result, _ in told]

    def _write_model(self, folder: Path, tensors: Mapping[str, Tensor], whole: bool) -> None:
        """The model's own files, or of a model in parts its config alone."""
        model = self.workers.model
        if self.group is None and (self.lora is None or whole):
            state = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
            save_checkpoint(
                state if self.lora is None else merged_state(model), model.config, folder, dtype=torch.bfloat16
            )
        else:
            folder.mkdir(parents=True)
            write_config(folder, model.config, torch.bfloat16)
        if self.lora is not None:
            save_adapters(model, self.lora, folder / "adapter")
        if self.tokenizer is not None:
            self.tokenizer.save(folder)

    def _consolidate(self, temporary: Path) -> Path:
        """The same folder with the model's files, made of the written shards."""
        complete = temporary.with_name(f"{temporary.name}-whole")
        shutil.rmtree(complete, ignore_errors=True)
        consolidate(temporary, complete, tokenizer=self.tokenizer)
        os.replace(temporary / TENSORS, complete / TENSORS)
        shutil.rmtree(temporary)
        return complete


def _temporary(target: Path) -> Path:
    return target.with_name(f".tmp-{target.name}")


def _has_room(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a copy takes at most half of the memory that is free."""
    needed = sum(local(tensor).nbytes for tensor in tensors.values())
    return needed < os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _copy(tensor: Tensor) -> Tensor:
    """The same values in memory of the CPU that nobody changes."""
    if not isinstance(tensor, DTensor):
        return tensor.detach().to("cpu", copy=True)
    # Not from_local, which would send it back to the mesh's device.
    return DTensor(tensor.to_local().detach().to("cpu", copy=True), tensor._spec, requires_grad=False)


def _sync(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
