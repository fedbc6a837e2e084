"""One run trains into a folder at a time."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.parallel.small import small_trainer

HOLD = """
import sys
from pathlib import Path
from types import SimpleNamespace
from dsv3.train.claim import claimed
with claimed(Path(sys.argv[1]), SimpleNamespace(leads=True, leading=lambda mine: mine)):
    print("held", flush=True)
    sys.stdin.read()
"""
ROOT = Path(__file__).parents[2]


def test_a_folder_that_another_process_trains_into_is_refused_until_that_is_gone(tmp_path):
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert other.stdout is not None
    assert other.stdout.readline() == b"held\n"
    run = small_trainer(tmp_path, schedule={"steps": 2})
    with pytest.raises(
        ValueError, match=r"another process trains into .*: let it end or stop it, or give another folder"
    ):
        run.run()
    assert run.step_index == 0
    other.kill()
    other.communicate()
    run.run()
    assert run.step_index == 2
