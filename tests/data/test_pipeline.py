"""A corpus built whole: what was planted is gone, every document is accounted for, and no executor changes a byte."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsv3.data.corpus import Source
from dsv3.data.language import words
from dsv3.data.ledger import dropped, table
from dsv3.data.machines import Machines
from dsv3.data.pipeline import STAGES, BuildConfig, build, plan_tasks, progress
from dsv3.data.shards import open_shards
from dsv3.data.tokenizer import Tokenizer
from tests.data.planted import (
    ADDRESS,
    ANSWER,
    CHINESE,
    DUPLICATED,
    GERMAN,
    MATHS,
    PHONE,
    PROGRAM,
    SHORT,
    Planted,
    plant,
)  # fmt: skip


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    return plant(tmp_path_factory.mktemp("planted"))


@pytest.fixture(scope="module")
def built(planted: Planted, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("built") / "corpus"
    report = build(planted.config, out)
    assert report is not None
    return out, report


def texts_of(out: Path, config: BuildConfig) -> dict[str, list[str]]:
    """side/part -> the documents that a reader of the shards sees, fill-in-the-middle put right."""
    tokenizer = Tokenizer.from_file(config.tokenizer)
    begin, hole, end = (
        tokenizer.decode([i]) for i in (tokenizer.fim_begin_id, tokenizer.fim_hole_id, tokenizer.fim_end_id)
    )
    found: dict[str, list[str]] = {}
    for side in ("train", "held_out"):
        for source in open_shards(out / side, verify=True).sources if (out / side).exists() else ():
            listed = found.setdefault(f"{side}/{source.name}", [])
            for ids in np.split(np.asarray(source.tokens), source.offsets[1:]):
                text = tokenizer.decode([int(i) for i in ids[1:-1]])
                if text.startswith(begin):
                    prefix, rest = text.removeprefix(begin).split(hole)
                    suffix, middle = rest.split(end)
                    text = prefix + middle + suffix
                listed.append(text)
    return found


def test_the_planted_duplicate_benchmark_item_and_address_are_gone(planted, built):
    out, _ = built
    texts = [text for listed in texts_of(out, planted.config).values() for text in listed]
    assert sum(DUPLICATED in text for text in texts) == 1
    assert not any(ANSWER in text for text in texts)
    assert not any(ADDRESS in text or PHONE in text for text in texts)
    [scrubbed] = [text for text in texts if "To whom it may concern." in text]
    assert "Write to email@example.com or call <phone> if" in scrubbed
    assert not any(GERMAN in text or text == SHORT for text in texts)


def test_what_went_is_kept_with_its_reason_and_every_document_is_accounted_for(planted, built):
    out, report = built
    source = planted.config.sources[0].paths[0]
    files = sum(1 for _ in Path(planted.config.sources[1].paths[0]).iterdir())
    assert report["documents"]["read"] == planted.lines + files
    lost = {step: list(dropped(out / "work" / "dropped" / step)) for step in report["examples"]}
    assert report["documents"]["read"] - sum(map(len, lost.values())) == report["documents"]["packed"]
    assert [d["text"][:20] for d in lost["language"]] == [GERMAN[:20]]
    assert [d["metadata"]["touches"] for d in lost["decontaminate"]] == ["bench.jsonl record 1"]
    assert sum(DUPLICATED in d["text"] for d in lost["near-duplicates"]) == 1
    [broken] = lost["read"]
    assert broken["id"] == f"{source}:8"
    assert "no JSON" in report["examples"]["read"]["malformed"][0]["why"]
    assert report["replaced"] == {"e-mail": 2, "phone": 1}  # textwrap.py names its author
    [language] = [row for row in report["steps"] if row["step"] == "language"]
    assert language["dropped"] == {"de": 1}
    assert all(len(row) == 7 for row in table(report))


def test_code_maths_and_languages_become_parts_that_share_their_sources_weight(planted, built):
    out, _ = built
    texts = texts_of(out, planted.config)
    where = {
        planted: [key.partition("/")[2] for key, listed in texts.items() if any(planted in text for text in listed)]
        for planted in (PROGRAM, MATHS, CHINESE)
    }
    assert where == {PROGRAM: ["files-code"], MATHS: ["web-maths"], CHINESE: ["web-zh"]}
    weights = {source.name: source.weight for source in open_shards(out / "train").sources}
    assert sum(w for name, w in weights.items() if name.startswith("web-")) == pytest.approx(3.0)
    assert sum(w for name, w in weights.items() if name.startswith("files-")) == pytest.approx(1.0)


def test_no_held_out_document_is_like_one_of_train(planted, built):
    """By shingles of five words, MinHash's own; of such a pair it misses one in 500."""
    out, _ = built
    sides: dict[str, list[set[tuple[str, ...]]]] = {"train": [], "held_out": []}
    for key, listed in texts_of(out, planted.config).items():
        for text in listed:
            found = words(text)
            sides[key.partition("/")[0]].append({tuple(found[i : i + 5]) for i in range(len(found) - 4)})
    assert len(sides["held_out"]) >= 2
    assert all(len(a & b) < 0.87 * len(a | b) for a in sides["held_out"] for b in sides["train"])


def test_two_local_workers_give_the_same_bytes(planted, built, tmp_path):
    _, report = built
    again = build(planted.config, tmp_path / "two", Machines(workers=2))
    assert again is not None
    assert again["shards"] == report["shards"]
    assert again["parts"] == report["parts"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:placement_group:DeprecationWarning")  # datatrove's use of Ray
def test_two_ray_workers_give_the_same_bytes(planted, built, tmp_path):
    _, report = built
    again = build(planted.config, tmp_path / "ray", Machines(executor="ray", workers=2, memory_gb=1))
    assert again is not None
    assert again["shards"] == report["shards"]
    assert again["examples"] == report["examples"]


def test_a_build_that_was_killed_goes_on_and_gives_the_same_bytes(planted, built, tmp_path):
    """As a kill leaves it: a task of `split` half written, without its mark, and nothing of what comes behind."""
    _, report = built
    out = tmp_path / "killed"
    shutil.copytree(built[0], out)
    for name in ("report.json", "work/logs/split/completions/00001", "work/logs/split/stats/00001.json"):
        (out / name).unlink()
    for name in ("train", "held_out", "work/pieces", "work/logs/pack", "work/logs/finish"):
        shutil.rmtree(out / name, ignore_errors=True)
    for path in (out / "work/text").rglob("00001.jsonl.zst"):
        path.write_bytes(path.read_bytes()[:40])
    said: list[str] = []
    again = build(planted.config, out, say=said.append)
    assert again is not None
    assert again["shards"] == report["shards"]
    tasks = progress(out)[0][2]
    assert said[:2] == [f"clean: 0 of {tasks} tasks to do", f"pairs: 0 of {tasks} tasks to do"]
    assert f"split: 1 of {tasks} tasks to do" in said


def test_a_finished_build_is_not_done_again_and_tells_how_far_it_is(planted, built, tmp_path):
    out, report = built
    said: list[str] = []
    assert build(planted.config, out, say=said.append) == json.loads(json.dumps(report))
    assert said == [f"{out} is finished: nothing to do"]
    assert [name for name, _, _ in progress(out)] == list(STAGES)
    assert all(done == of for name, done, of in progress(out) if name != "finish")
    assert progress(tmp_path) == []


def test_another_setting_or_changed_input_is_refused(planted, built, tmp_path):
    out, _ = built
    with pytest.raises(ValueError, match=r"another build.*least_words: 50 then, 60 now"):
        build(dataclasses.replace(planted.config, least_words=60), out)
    copy = plant(tmp_path)
    (tmp_path / "code" / "more.py").write_text("x = 1\n")
    elsewhere = dataclasses.replace(copy.config, sources=(planted.config.sources[0], copy.config.sources[1]))
    with pytest.raises(ValueError, match=r"another build.*input"):
        build(elsewhere, out)


def test_a_failed_task_names_its_log_and_the_same_call_goes_on(planted, tmp_path, monkeypatch):
    from dsv3.data.steps import Split

    def fail(self: Any, data: Any, rank: int = 0, world_size: int = 1) -> Any:
        raise KeyError("a fault")

    config = dataclasses.replace(planted.config, sources=planted.config.sources[1:], task_mb=10)
    with monkeypatch.context() as patch:
        patch.setattr(Split, "run", fail)
        with pytest.raises(RuntimeError, match=r"1 tasks of stage split did not finish.*task_00000\.log"):
            build(config, tmp_path / "out")
    assert "a fault" in (tmp_path / "out/work/logs/split/logs/task_00000.log").read_text()
    assert build(config, tmp_path / "out") is not None


def test_documents_that_a_classifier_recognises_become_a_part(planted, tmp_path):
    recipe = (
        "Take {} onions, chop them and fry them in butter with salt until they are soft, then add the {} and two cups of "
        "stock, stir the pot and let it cook for {} minutes before you serve it with herbs and the cheese of the {}."
    )
    seeds = [
        recipe.format(n, ["rice", "peas", "beans"][n % 3], 20 + n, ["cow", "goat", "sheep"][n % 3]) for n in range(15)
    ]
    pages = Path(planted.config.sources[0].paths[0]).read_text(encoding="utf-8").splitlines()[8:30]
    found = (
        "The cook says: "
        + recipe.format("nine", "barley", "ninety", "neighbour")
        + " It is a dish that guests ask for."
    )
    (tmp_path / "seeds.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in seeds))
    (tmp_path / "pages.jsonl").write_text("\n".join([*pages, json.dumps({"text": found})]) + "\n", encoding="utf-8")
    config = dataclasses.replace(
        planted.config, sources=(Source(name="web", paths=(str(tmp_path / "pages.jsonl"),)),), against=(), held_out=0.0,
        recall=(("cooking", tmp_path / "seeds.jsonl"),), task_mb=10,
    )  # fmt: skip
    report = build(config, tmp_path / "out")
    assert report is not None
    assert texts_of(tmp_path / "out", config)["train/web-cooking"] == [found]
    assert "held_out" not in report["shards"]


def test_a_plan_covers_every_file_once_and_small_ones_share_a_task(tmp_path):
    for n in range(6):
        (tmp_path / f"{n}.txt").write_text("a" * 400)
    (tmp_path / "big.jsonl").write_text("b" * 2500)
    (tmp_path / "picture.png").write_bytes(b"\0")
    plan = plan_tasks([Source(name="all", paths=(str(tmp_path),))], 1000)
    slices = [piece for task in plan["tasks"] for piece in task]
    assert [(Path(p["path"]).name, p["start"], p["end"]) for p in slices if p["end"] >= 0] == [
        ("big.jsonl", 0, 833), ("big.jsonl", 833, 1666), ("big.jsonl", 1666, 2500),
    ]  # fmt: skip
    assert [[Path(p["path"]).name for p in task] for task in plan["tasks"]] == [
        ["0.txt", "1.txt"], ["2.txt", "3.txt"], ["4.txt", "5.txt"], ["big.jsonl"], ["big.jsonl"], ["big.jsonl"],
    ]  # fmt: skip
    assert plan["left_out"] == {".png files": 1}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"languages": ("en", "tlh")}, r"languages \['tlh'\] are not known"),
        ({"least_words": 3}, "least_words 3 is below 5"),
        ({"held_out": 0.7}, "held_out 0.7 must be from 0 to 0.5"),
        ({"task_mb": 0}, "task_mb 0 must be positive"),
        ({"sources": ()}, "sources is empty"),
        ({"recall": (("maths", Path("seeds")),)}, "recall name 'maths'"),
    ],
)
def test_settings_of_no_use_are_refused_with_their_value(planted, change, told):
    with pytest.raises(ValueError, match=told):
        dataclasses.replace(planted.config, **change)


def test_input_of_no_use_is_refused_before_any_task_runs(planted, tmp_path):
    (tmp_path / "picture.png").write_bytes(b"\0")
    for path, told in (
        (tmp_path / "gone", "does not exist"),
        (tmp_path / "picture.png", "of a kind"),
        (tmp_path, "no file"),
    ):
        config = dataclasses.replace(planted.config, sources=(Source(name="web", paths=(str(path),)),))
        with pytest.raises(ValueError, match=told):
            build(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_corpus_of_which_nothing_is_left_says_where_it_went(planted, tmp_path):
    (tmp_path / "short.txt").write_text(SHORT)
    config = dataclasses.replace(planted.config, sources=(Source(name="web", paths=(str(tmp_path / "short.txt"),)),))
    with pytest.raises(ValueError, match=r"no document is left.*too short"):
        build(config, tmp_path / "out")
