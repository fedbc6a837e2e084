"""Starts a recipe's pre-training as the recipe has it (schedule, degrees, precision), on whatever torchrun started.

    torchrun ... -m dsv3.cli.launch v3 --shards shards/ --tokenizer official --out runs/v3 --device cuda

launch/v3.sbatch and launch/torchrun.sh call it; `dsv3 plan RECIPE --dry-run` tries the layout on pretended ranks before.
The command again goes on from the newest checkpoint. Sizes of one's own: `dsv3 pretrain`.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from dsv3.cli.console import open_sides, open_tokenizer, together

if TYPE_CHECKING:
    from dsv3.plan.job import Job


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Pre-train a recipe, from shards that `dsv3 data` wrote with the same tokenizer."""

    recipe: tyro.conf.Positional[Literal["mini", "v3"]]
    shards: Path
    tokenizer: str
    """A folder with tokenizer.json, or `official`."""
    out: Path
    """Folder of the run, on a disk that all processes see."""
    device: str = "cuda"
    max_steps: int | None = None
    """Stop after so many steps of this sitting; the schedule stays the recipe's."""


def launch(verb: Launch) -> None:
    from dsv3.train.pretrain import build_trainer

    job, tokenizer = recipe_job(verb.recipe), open_tokenizer(verb.tokenizer)
    config = dataclasses.replace(job.train, max_steps=verb.max_steps)
    train, held = open_sides(verb.shards)
    with together(job.parallel, job.model, verb.device) as mesh:
        trainer = build_trainer(
            job.model, config, train, tokenizer, verb.out, held_out=held, device=verb.device, mesh=mesh
        )  # fmt: skip
        trainer.run()


def recipe_job(name: str) -> Job:
    from dsv3.recipes import mini, v3

    return {"mini": mini.job, "v3": v3.job}[name]()


def main(argv: Sequence[str] | None = None) -> None:
    """Exit code 1: a mistake, told in one line; 130: interrupted."""
    verb = tyro.cli(Launch, prog="python -m dsv3.cli.launch", args=argv)
    try:
        launch(verb)
    except KeyboardInterrupt:
        print("interrupted; what is finished is kept, the same command resumes", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        print(f"dsv3: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
