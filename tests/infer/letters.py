"""A vocabulary of a letter an id, for engines over the tests' small model."""

import dataclasses

import torch

from dsv3.infer.engine import Engine
from tests.model.tiny import TINY, random_model


class Letters:
    """Ids 0..94 are the printable characters from the space on; 95 is a control token."""

    bos_id = 0
    vocab_size = 96

    def encode(self, text: str) -> list[int]:
        return [ord(c) - 32 for c in text if " " <= c <= "~"]

    def decode(self, ids) -> str:
        return "".join(chr(i + 32) for i in ids)

    def token_bytes(self, token: int) -> bytes:
        return b"<end>" if token == 95 else bytes([token + 32])

    def is_special(self, token: int) -> bool:
        return token == 95

    def stream(self):
        return _Stream()


class _Stream:
    def push(self, ids) -> str:
        return "".join(chr(i + 32) for i in ids)

    def finish(self) -> str:
        return ""


def engine(seed: int = 0, model: dict | None = None, dtype: torch.dtype = torch.float32, **options) -> Engine:
    """Over a random model of TINY's sizes; `model`: fields to change."""
    config = dataclasses.replace(TINY, **({"eos_token_id": 95} | (model or {})))
    return Engine(random_model(config, seed).to(dtype), Letters(), **({"cache_gb": 0.01} | options))
