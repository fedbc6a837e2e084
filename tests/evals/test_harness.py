"""lm-eval gets the same numbers from our engine as from its own HFLM on the checkpoint that we saved."""

import dataclasses

import pytest

pytest.importorskip("lm_eval")
pytest.importorskip("accelerate")  # HFLM imports it

from lm_eval.api.instance import Instance

from dsv3 import load, save
from dsv3.data.tokenizer import Tokenizer
from dsv3.evals.harness import engine_lm
from dsv3.infer.engine import Engine
from tests.infer.letters import engine as letters
from tests.model.tiny import TINY, random_model

TEXTS = [
    "The baker counted three lamps before noon. ",
    "A sailor sold the blue gate in the rain; nobody knew why, and nobody asked. " * 6,
    "Question: what is 2 + 2?\nAnswer:",
    "naïve 你好 \U0001f600 end",
    "x",
]
LENGTH = 64


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(ours, lm-eval's own) on one tiny checkpoint: saved by dsv3, opened by transformers."""
    transformers = pytest.importorskip("transformers")
    from lm_eval.models.huggingface import HFLM

    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    tokenizer = Tokenizer.train(TEXTS * 3, 340)
    config = dataclasses.replace(TINY, vocab_size=tokenizer.vocab_size, bos_token_id=0, eos_token_id=1)
    save(random_model(config), folder, tokenizer=tokenizer)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    words = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    other = HFLM(pretrained=theirs.eval(), tokenizer=words, batch_size=3, max_length=LENGTH, device="cpu")
    model, own = load(folder, dtype="float32", mtp=True)
    return engine_lm(Engine(model, own, cache_gb=0.02), max_length=LENGTH, batch=4), other


def asked(kind, arguments):
    return [Instance(request_type=kind, doc={}, arguments=args, idx=i) for i, args in enumerate(arguments)]


@pytest.mark.filterwarnings("ignore")
def test_loglikelihoods_equal_hflms(pair):
    ours, theirs = pair
    choices = [" A", " four", " 4.\n", "\U0001f600", " a long continuation of several words"]
    requests = asked("loglikelihood", [(text, choice) for text in (*TEXTS, "") for choice in choices])
    a, b = ours.loglikelihood(requests), theirs.loglikelihood(requests)
    assert [p for p, _ in a] == pytest.approx([p for p, _ in b], abs=2e-4)
    assert [g for _, g in a] == [g for _, g in b]


@pytest.mark.filterwarnings("ignore")
def test_the_likeliest_continuation_is_told_greedy(pair):
    ours, theirs = pair
    (said,) = ours.generate_until(asked("generate_until", [(TEXTS[0], {"max_gen_toks": 3})]))
    requests = asked("loglikelihood", [(TEXTS[0].rstrip(), said), (TEXTS[0].rstrip(), said[:-1] + "q")])
    assert [g for _, g in ours.loglikelihood(requests)] == [g for _, g in theirs.loglikelihood(requests)]


@pytest.mark.filterwarnings("ignore")
def test_rolling_equals_hflms(pair):
    ours, theirs = pair
    requests = asked("loglikelihood_rolling", [(text,) for text in TEXTS])
    assert ours.loglikelihood_rolling(requests) == pytest.approx(theirs.loglikelihood_rolling(requests), rel=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_generation_equals_hflms(pair):
    ours, theirs = pair
    free = ours.generate_until(asked("generate_until", [(text, {"max_gen_toks": 20}) for text in TEXTS]))
    stops = sorted({text[4:6] for text in free if len(text) > 6})[:2]
    options = [
        {"max_gen_toks": 20},
        {"max_gen_toks": 12, "until": stops},
        {"until": "e", "do_sample": False, "max_gen_toks": 40},
    ]
    requests = asked("generate_until", [(text, option) for text in TEXTS for option in options])
    a, b = ours.generate_until(requests), theirs.generate_until(requests)
    assert a == b
    assert len({len(text) for text in a}) > 2


def test_a_task_runs_through_lm_evals_own_loop(pair):
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.evaluator import evaluate

    rows = [{"question": f"What is {i} + 1?", "answer": i % 2} for i in range(4)]
    import datasets

    task = ConfigurableTask(
        config={
            "task": "own",
            "custom_dataset": lambda **kwargs: {"test": datasets.Dataset.from_list(rows)},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": ["no", "yes"],
            "doc_to_target": "answer",
            "metric_list": [{"metric": "acc"}],
        }
    )
    scores = [evaluate(lm, {"own": task}, bootstrap_iters=0)["results"]["own"]["acc,none"] for lm in pair]
    assert scores[0] == scores[1]


def test_chats_are_rendered_and_read_back_with_their_control_tokens(pair):
    ours, _ = pair
    text = ours.apply_chat_template([{"role": "user", "content": "hello", "type": "text"}])
    tokenizer = ours.codec
    assert ours.tok_encode(text) == [
        tokenizer.bos_id,
        tokenizer.user_id,
        *tokenizer.encode("hello"),
        tokenizer.assistant_id,
    ]


def test_what_is_not_honoured_is_refused(pair):
    ours, _ = pair
    with pytest.raises(ValueError, match=r"typical_p=0\.5 is not honoured"):
        ours.generate_until(asked("generate_until", [("x", {"typical_p": 0.5, "max_gen_toks": 4})]))
    with pytest.raises(ValueError, match="max_gen_toks is 64, max_length 64"):
        ours.generate_until(asked("generate_until", [("x", {"max_gen_toks": 64})]))
    with pytest.raises(ValueError, match="max_length is 256, the model's context 256"):
        engine_lm(ours.engine, max_length=256)
    with pytest.raises(ValueError, match="is Letters"):
        engine_lm(letters())
