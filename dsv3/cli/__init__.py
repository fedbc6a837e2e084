"""The command line: parses, builds, hands down. `python -m dsv3.cli VERB` is `dsv3 VERB`.

The only place that prints, reads the environment, and turns a user's mistake into one line and exit code 1.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated, Any

import tyro

from dsv3.cli import checkpoints, make, serving

_VERBS: dict[str, tuple[type, Any]] = {
    "run": (make.Run, make.run),
    "tokenizer": (make.TokenizerVerb, make.tokenizer),
    "data": (make.Data, make.data),
    "pretrain": (make.Pretrain, make.pretrain),
    "inspect": (checkpoints.Inspect, checkpoints.inspect),
    "convert": (checkpoints.Convert, checkpoints.convert),
    "generate": (checkpoints.Generate, checkpoints.generate),
    "chat": (serving.Chat, serving.chat),
    "serve": (serving.Serve, serving.serve),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point. Exit code 0: done; 1: a mistake or a full disk, told in one line; 130: interrupted."""
    verbs: Any = None
    for name, (kind, _) in _VERBS.items():
        one = Annotated[kind, tyro.conf.subcommand(name)]
        verbs = one if verbs is None else verbs | one
    verb = tyro.cli(verbs, prog="dsv3", args=argv, description=__doc__.splitlines()[0])
    handlers = dict(_VERBS.values())
    try:
        handlers[type(verb)](verb)
    except KeyboardInterrupt:
        print("interrupted; the last checkpoint is whole, the same command resumes", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        print(f"dsv3: {error}", file=sys.stderr)
        sys.exit(1)
