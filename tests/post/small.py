"""What the tests of RL share: a small model that answers by letters, and a run over it."""

import dataclasses
from pathlib import Path

import torch

from dsv3.data.chat import with_template
from dsv3.data.tokenizer import Tokenizer
from dsv3.model.transformer import DeepseekV3
from dsv3.post.rl import RlConfig, Rounds, build_rl
from dsv3.post.tasks import Problem
from dsv3.train.trainer import Trainer
from tests.model.tiny import TINY, random_model

TOKENIZER = with_template(Tokenizer.train(["Say a letter, please. Number of it: "] * 3, 290))


@dataclasses.dataclass(frozen=True)
class Letters:
    """Asks for anything, pays for answers that hold a byte below a bound: a policy of random weights pleases it by half."""

    name: str = "letters"

    def problem(self, index: int) -> Problem:
        return Problem(
            id=f"letters-{index}",
            prompt=f"Say a letter. {index % 64}",
            answer="",
            kind="checked",
            check=lambda said: float(len(said.encode()) > 4),
        )


def policy(seed: int = 0, **changes) -> DeepseekV3:
    config = dataclasses.replace(
        TINY, vocab_size=TOKENIZER.vocab_size, eos_token_id=TOKENIZER.eos_id, bos_token_id=TOKENIZER.bos_id, **changes
    )
    model = random_model(config, seed)
    with torch.no_grad():
        model.lm_head.weight[config.eos_token_id] *= 8  # an answer ends soon
    return model


def rl_config(**changes) -> RlConfig:
    plain = dict(
        steps=4, prompts=3, group=4, minibatches=1, max_tokens=6, lr=1e-3, precision="float32", micro_batch=5, eval_every=2,
        eval_problems=4, save_every=1, keep_last=10, cache_gb=0.01,
    )  # fmt: skip
    return RlConfig(**(plain | changes))


def rl(folder: Path, *, seed: int = 0, model: dict | None = None, **changes) -> tuple[Trainer, Rounds]:
    torch.manual_seed(0)
    return build_rl(policy(seed, **(model or {})), TOKENIZER, Letters(), rl_config(**changes), folder)
