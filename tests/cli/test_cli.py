"""The entry point: what it refuses before a verb's work begins."""

import pytest

from dsv3.cli import TOGETHER, VERBS, main


def test_a_verb_of_one_process_is_refused_under_torchrun(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(SystemExit) as ended:
        main(["distill"])
    assert ended.value.code == 1
    assert "distill runs in one process, and torchrun started 4: only pretrain, sft, rl" in capsys.readouterr().err


def test_verbs_that_run_together_exist():
    assert set(TOGETHER) <= VERBS.keys()


def test_an_unknown_verb_is_told_with_those_there_are(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["pretain"])
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert "there is no verb 'pretain'" in told
    assert all(verb in told for verb in VERBS)


def test_tasks_of_eval_are_apart_by_spaces_or_commas(monkeypatch):
    from dsv3.cli import evaluate

    seen = []
    monkeypatch.setattr(evaluate, "_run", seen.append)
    main(["eval", "model", "--tasks", "mmlu,gsm8k,needle", "bpb,", "--out", "out"])
    assert seen[0].tasks == ("mmlu", "gsm8k", "needle", "bpb")


def test_what_an_extension_does_not_heed_is_refused(capsys):
    needed = ["--shards", "shards", "--tokenizer", "tok", "--out", "run", "--extend", "before"]
    with pytest.raises(SystemExit) as ended:
        main(["pretrain", *needed, "--micro-batch", "2"])
    assert ended.value.code == 1
    assert "--extend takes no --micro-batch (2): the model is the checkpoint's" in capsys.readouterr().err
