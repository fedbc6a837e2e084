"""A trainer of the tests' small model over made-up rows, in one process or as a rank of a mesh."""

from pathlib import Path
from typing import Any

import torch

from dsv3.data.loader import Batch
from dsv3.model.config import ModelConfig
from dsv3.parallel.mesh import Mesh
from dsv3.train.optim import ScheduleConfig
from dsv3.train.trainer import TrainConfig, Trainer
from tests.model.tiny import TINY, random_model

LENGTH = 24


class MadeUp:
    """Rows of random tokens: batch n is drawn from seed n."""

    def __init__(self, config: ModelConfig) -> None:
        self.config, self.drawn = config, 0

    def next_batch(self, rows: int) -> Batch:
        depth = self.config.num_nextn_predict_layers
        draw = torch.Generator().manual_seed(self.drawn)
        tokens = torch.randint(self.config.vocab_size, (rows, LENGTH + depth + 1), generator=draw)
        self.drawn += 1
        positions = torch.arange(LENGTH + depth).expand(rows, -1)
        return Batch(tokens[:, :-1], tokens[:, 1:], positions, torch.zeros_like(positions))

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.drawn}

    def load_state_dict(self, state: Any) -> None:
        self.drawn = state["rows"]


def small_trainer(folder: Path, mesh: Mesh | None = None, config: ModelConfig = TINY, **changes: Any) -> Trainer:
    schedule = {"steps": 20, "warmup_steps": 1, "peak_lr": 1e-2, "batch_size": 8} | changes.pop("schedule", {})
    options = {"precision": "float32", "micro_batch": 2, "alpha": 1e-3, "seq_len": LENGTH, **changes}
    train = TrainConfig(schedule=ScheduleConfig(**schedule), **options)
    return Trainer(random_model(config), MadeUp(config), train, folder, mesh=mesh)
