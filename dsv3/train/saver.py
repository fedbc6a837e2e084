"""Writing checkpoints beside the training: what is to be written is copied, and a thread writes the copy.

    all processes    copy their shards -> torch.distributed.checkpoint -> checksums of their files
    the first        model files if they are due -> checksums.json, training.json -> sync -> rename -> older checkpoints go

Training goes on meanwhile; the next save waits for the one before. Where a copy would not fit into memory (the state on a CPU
is as large as training itself) the thread is waited for instead. The processes meet in a group of their own, so that a
write never comes between a step's collectives. Killed in between, a run has the checkpoint before.
Does not: know what is in a checkpoint (checkpoint.py).
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from dsv3.data.tokenizer import Tokenizer
from dsv3.model import folder as disk
from dsv3.model.lora import LoraConfig, merged_state, save_adapters
from dsv3.model.weights import save_checkpoint, write_config
from dsv3.parallel.fsdp import local
from dsv3.parallel.workers import Workers
from dsv3.train.checkpoint import CHECKSUMS, STATE, TENSORS, cause, checkpoints, consolidate, training_tensors
from dsv3.train.optim import AdamW


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
        self.group = None if workers.mesh is None else workers.mesh.patient_group()
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
            mesh = self.workers.mesh
            room = _has_room(tensors, 1 if mesh is None else mesh.neighbours)
            beside = not wait and self.lora is None and room  # adapters' files are made of the live model
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
        except (OSError, SafetensorError) as error:
            free = shutil.disk_usage(next(path for path in target.absolute().parents if path.exists())).free
            number, text = getattr(error, "errno", None) or errno.EIO, getattr(error, "strerror", None) or error
            self._fault = OSError(
                number,
                f"checkpoint {target.name} could not be written ({text}; {free:,} bytes free): "
                "make room and resume; the checkpoints before it are whole",
            )
        except BaseException as error:
            self._fault = error
        if self._fault is not None and self.workers.leads:
            self._sweep()

    def _sweep(self) -> None:
        """What was begun and not ended, here or by a process that was killed."""
        for rest in (*self.run.glob("checkpoints/.tmp-*"), *self.run.glob("checkpoints/.old-*")):
            shutil.rmtree(rest, ignore_errors=True)

    def _write(self, target: Path, tensors: dict[str, Tensor], state: dict[str, Any], whole: bool) -> None:
        temporary, folder = _temporary(target), _temporary(target) / TENSORS

        def begin() -> None:
            if self.workers.leads:
                self._sweep()
                self._write_model(temporary, tensors, whole)
                folder.mkdir()

        def write() -> dict[str, str]:
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore"
                )  # torch remarks that no process group exists, where there is one process
                try:
                    dcp.save(tensors, checkpoint_id=folder, process_group=self.group, no_dist=self.group is None)
                except CheckpointException as error:  # which every process gets, and is no Exception
                    raise cause(error) from None
            rank = 0 if self.group is None else dist.get_rank()
            names = [f"__{rank}_*", *([".metadata"] if self.workers.leads else [])]
            return {path.name: disk.sha256(path) for name in names for path in folder.glob(name)}

        def finish() -> None:
            if not self.workers.leads:
                return
            digests = {name: digest for mine in written for name, digest in mine.items()}
            if unseen := [name for name in digests if not (folder / name).exists()]:
                raise ValueError(
                    f"the first process does not see {len(unseen)} of {len(digests)} files that others wrote to {folder} "
                    f"({unseen[0]}): give a folder that all machines share"
                )
            complete = self._consolidate(temporary) if whole and self.group is not None else temporary
            content = json.dumps({**state, "checksums": True}, indent=1).encode()
            (complete / STATE).write_bytes(content)
            digests[STATE] = hashlib.sha256(content).hexdigest()
            (complete / TENSORS / CHECKSUMS).write_text(json.dumps(digests, indent=1), encoding="utf-8")
            _sync(complete)
            os.replace(complete, target)
            _sync_one(target.parent)
            for old in checkpoints(self.run)[: -self.keep_last]:
                _remove(old)

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


def _remove(checkpoint: Path) -> None:
    """Under another name first: killed in the middle, no half of it passes for a checkpoint. The rest goes at the next save."""
    aside = checkpoint.with_name(f".old-{checkpoint.name}")
    os.replace(checkpoint, aside)
    shutil.rmtree(aside, ignore_errors=True)


def _has_room(tensors: Mapping[str, Tensor], processes: int) -> bool:
    """Whether a copy, and one of each other process of this machine, takes at most half of the memory that is free."""
    needed = sum(local(tensor).nbytes for tensor in tensors.values()) * processes
    if "SC_AVPHYS_PAGES" not in os.sysconf_names:  # macOS does not tell
        return False
    return needed < os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _copy(tensor: Tensor) -> Tensor:
    """The same values in memory of the CPU that nobody changes."""
    if not isinstance(tensor, DTensor):
        return tensor.detach().to("cpu", copy=True)
    # Not from_local, which would send it back to the mesh's device.
    return DTensor(tensor.to_local().detach().to("cpu", copy=True), tensor._spec, requires_grad=False)


def _sync(folder: Path) -> None:
    for path in (*sorted(folder.rglob("*"), reverse=True), folder):
        _sync_one(path)


def _sync_one(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
