"""`dsv3 data`: what is in memory, what is at scale by a TOML file, and mistakes told in one line."""

import dataclasses
import json
from pathlib import Path
from typing import get_type_hints

import pytest

from dsv3.cli import main
from dsv3.cli.data import _WHERE, Data, read_config
from dsv3.data.machines import Machines
from dsv3.data.shards import open_shards
from tests.data.planted import Planted, plant

CONFIG = """
tokenizer = "tokenizer"
against = ["bench.jsonl"]
held_out = 0.2
task_mb = 0.08
[sources.web]
paths = ["pages.jsonl"]
weight = 3
[sources.files]
paths = ["code"]
"""


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Planted]:
    folder = tmp_path_factory.mktemp("planted")
    made = plant(folder)
    (folder / "corpus.toml").write_text(CONFIG)
    return folder, made


def told(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The line that a mistake is answered with."""
    with pytest.raises(SystemExit) as left:
        main(["data", *map(str, arguments)])
    assert left.value.code == 1
    err = capsys.readouterr().err
    assert err.startswith("dsv3: ")
    assert err.count("\n") == 1
    return err


def test_a_file_of_toml_is_the_config_that_it_says(planted):
    folder, made = planted
    assert read_config(folder / "corpus.toml") == made.config


def test_every_key_is_read_as_its_kind(tmp_path):
    (tmp_path / "c.toml").write_text(
        'tokenizer = "official"\nlanguages = ["en"]\nlanguage_model = "lid.bin"\nleast_confidence = 1\nfim_rate = 0\nseed = 7\n'
        'ngram = 9\nsources.python.paths = ["python:code", "/elsewhere"]\nrecall.physics = "seeds.jsonl"\n'
    )
    config = read_config(tmp_path / "c.toml")
    assert config.tokenizer == "official"
    assert config.sources[0].paths == ("python:code", "/elsewhere")
    assert config.recall == (("physics", tmp_path / "seeds.jsonl"),)
    assert config.language_model == tmp_path / "lid.bin"
    assert (config.seed, config.ngram, config.least_confidence, config.fim_rate) == (7, 9, 1, 0)


def test_at_scale_it_tells_what_became_of_every_document_and_goes_on(planted, tmp_path, capsys, monkeypatch):
    folder, made = planted
    monkeypatch.setenv("COLUMNS", "160")
    main(["data", "--config", str(folder / "corpus.toml"), "--out", str(tmp_path / "out")])
    out = capsys.readouterr().out
    assert f"{made.lines + 4} documents read, " in out
    for step in ("read", "language", "quality", "decontaminate", "near-duplicates", "pack"):
        assert f"│ {step}" in out
    assert "personal data replaced: 2 of kind e-mail, 1 of kind phone" in out
    assert "web-maths" in out
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert open_shards(tmp_path / "out" / "train").fingerprint == report["shards"]["train"]["fingerprint"]
    main(["data", "--config", str(folder / "corpus.toml"), "--out", str(tmp_path / "out")])
    assert f"{made.lines + 4} documents read, " in capsys.readouterr().out


def test_in_memory_it_packs_what_it_reads(planted, tmp_path, capsys):
    folder, _ = planted
    arguments = ["--data", f"web=1:{folder / 'pages.jsonl'}", "--tokenizer", folder / "tokenizer"]
    bad = told(capsys, *arguments, "--out", tmp_path / "out")
    assert "pages.jsonl:8" in bad  # the broken line, which at scale is dropped and told
    main(
        [
            "data",
            "--data",
            f"files=1:{folder / 'code'}",
            "--tokenizer",
            str(folder / "tokenizer"),
            "--out",
            str(tmp_path / "out"),
        ]
    )
    assert "files" in capsys.readouterr().out
    assert [source.name for source in open_shards(tmp_path / "out" / "train").sources] == ["files"]


def test_options_that_would_be_ignored_are_refused(planted, tmp_path, capsys):
    config = planted[0] / "corpus.toml"
    error = told(capsys, "--config", config, "--out", tmp_path, "--seed", 3, "--tokenizer", "tok")
    assert f"--tokenizer, --seed: with --config these belong in {config}" in error
    assert "--executor: without --config" in told(capsys, "--out", tmp_path, "--tokenizer", "tok", "--executor", "ray")
    assert "--tokenizer is missing" in told(capsys, "--out", tmp_path)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("tokenizer = ", "is no TOML"),
        ('tokenizer = "t"\nsource = 1\n', "unknown keys ['source']; known are sources, tokenizer"),
        ('tokenizer = "t"\n', "sources must be given"),
        (
            'tokenizer = 3\nsources.a.paths = ["x"]\n',
            'tokenizer = 3 is of another kind than expected: write it as "tok/"',
        ),
        ('tokenizer = "t"\nsources.a.paths = "x"\n', "paths = 'x' is of another kind"),
        ('tokenizer = "t"\nsources.a.path = ["x"]\n', "[sources.a] must have paths and may have weight"),
        (
            'tokenizer = "t"\nngram = 1.5\nsources.a.paths = ["x"]\n',
            "ngram = 1.5 is of another kind than expected: write it as 13",
        ),
        ('tokenizer = "t"\nheld_out = true\nsources.a.paths = ["x"]\n', "held_out = True is of another kind"),
        ('tokenizer = "t"\nlanguages = ["tlh"]\nsources.a.paths = ["x"]\n', "languages ['tlh'] are not known"),
    ],
)
def test_a_mistake_in_the_file_is_told_with_its_cure(tmp_path, capsys, text, error):
    (tmp_path / "c.toml").write_text(text)
    assert error in told(capsys, "--config", tmp_path / "c.toml", "--out", tmp_path / "out")


def test_a_failed_task_is_one_line_with_its_log(planted, tmp_path, capsys, monkeypatch):
    from dsv3.data.steps import Split

    monkeypatch.setattr(Split, "run", lambda *_: 1 / 0)
    with pytest.raises(SystemExit):
        main(["data", "--config", str(planted[0] / "corpus.toml"), "--out", str(tmp_path / "out")])
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("dsv3: ")
    assert "stage split did not finish (division by zero): see" in last


def test_where_a_build_runs_has_the_flags_and_defaults_of_machines():
    """The verb repeats the fields, so that its help does not import datatrove."""
    flags = {field.name: field for field in dataclasses.fields(Data) if field.name in _WHERE}
    machines = {field.name: field for field in dataclasses.fields(Machines)}
    assert flags.keys() == machines.keys()
    for name in flags.keys() - {"activate"}:  # whose default is this environment's, found when it runs
        assert flags[name].default == machines[name].default
        assert get_type_hints(Data)[name] == get_type_hints(Machines)[name]


def test_a_file_that_is_not_there_is_told_with_where_an_example_is(tmp_path, capsys):
    line = told(capsys, "--config", tmp_path / "none.toml", "--out", tmp_path / "out")
    assert "none.toml is no file" in line
    assert "dsv3 data --help" in line
