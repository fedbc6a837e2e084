"""lm-eval's tasks on our engine: its LM class with loglikelihood, rolling and generate_until.

    from lm_eval import simple_evaluate
    simple_evaluate(engine_lm(engine), tasks=["hellaswag"])

Tokens, truncation and windows are those of lm-eval's own HFLM, so that the same checkpoint gives the same numbers there and here:
contexts lose their beginning when too long, a text is rolled over in windows that share one token, an empty context is BOS.
Source: lm-evaluation-harness 0.4 (extra `eval`), api/model.py, models/huggingface.py. Does not: images, several processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dsv3.data.chat import ChatFormat
from dsv3.data.tokenizer import BOS, EOS, PAD, Tokenizer
from dsv3.evals.models import scored
from dsv3.infer.engine import Engine, Request
from dsv3.infer.sampling import SamplingParams

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM

_HONOURED = frozenset(
    {"until", "max_gen_toks", "temperature", "do_sample", "top_p", "top_k", "min_p", "repetition_penalty", "seed"}
)


def engine_lm(
    engine: Engine,
    *,
    add_bos: bool | None = None,
    max_length: int | None = None,
    max_gen_toks: int = 256,
    batch: int = 64,
) -> TemplateLM:
    """An LM for lm_eval.simple_evaluate.

    Args:
        add_bos: put BOS before every prompt; None: as tokenizer_config.json's add_bos_token says.
        max_length: tokens that the model reads at once; None: its context less one.
        max_gen_toks: of an answer, where the task does not say.
        batch: requests in flight.

    Raises:
        ImportError: lm-eval is not installed (extra `eval`).
        ValueError: max_length beyond the model's context; the engine's tokenizer is no dsv3.Tokenizer.
    """
    from lm_eval.api.model import TemplateLM

    class EngineLM(_EngineLM, TemplateLM):
        """The mixin has the logic; lm-eval wants an instance of its own class."""

    return EngineLM(engine, add_bos=add_bos, max_length=max_length, max_gen_toks=max_gen_toks, batch=batch)


class _EngineLM:
    """What lm-eval calls, in its names."""

    backend = "causal"

    def __init__(
        self, engine: Engine, *, add_bos: bool | None, max_length: int | None, max_gen_toks: int, batch: int
    ) -> None:
        super().__init__()
        if not isinstance(engine.tokenizer, Tokenizer):
            raise ValueError(
                f"the engine's tokenizer is {type(engine.tokenizer).__name__}: lm-eval needs a dsv3.Tokenizer"
            )
        context = engine.model.config.max_position_embeddings
        if max_length is not None and not 2 <= max_length < context:
            raise ValueError(f"max_length is {max_length}, the model's context {context}: give 2 to {context - 1}")
        self.engine, self.codec, self.batch_size = engine, engine.tokenizer, batch
        self.max_length, self.max_gen_toks = max_length or context - 1, max_gen_toks
        self.add_bos = bool(self.codec.config.get("add_bos_token", False)) if add_bos is None else add_bos
        self._format: ChatFormat | None = None

    # -- tokens --------------------------------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        return self.engine.model.config.eos_token_ids[0]

    @property
    def prefix_token_id(self) -> int:
        bos = self.codec.bos_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return f"dsv3 {self.codec.fingerprint}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        add = self.add_bos if add_special_tokens is None else add_special_tokens
        if add_special_tokens is None and string.startswith(BOS) and self.codec.bos_id is not None:
            return [self.codec.bos_id, *self.codec.encode(string[len(BOS) :], special=True)]
        ids = self.codec.encode(string, special=True)  # a rendered chat comes as text, its control tokens in words
        return [self.prefix_token_id, *ids] if add and self.codec.bos_id is not None else ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text, by the one renderer; a last assistant's message is continued if nothing is to be generated."""
        self._format = self._format or ChatFormat.of(self.codec)
        messages = [{k: m[k] for k in ("role", "content") if k in m} for m in chat_history]
        return self._format.text(messages, generate=add_generation_prompt, continue_last=not add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return str(self.codec.config.get("chat_template") or "V3-0324") if chat_template else None

    # -- what lm-eval asks ---------------------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        prompts, starts = [], []
        for _, context, continuation in requests:
            ids = (context + continuation)[-(self.max_length + 1) :]
            if len(continuation) > self.max_length:
                raise ValueError(
                    f"a continuation of {len(continuation)} tokens does not fit max_length {self.max_length}"
                )
            prompts.append(ids)
            starts.append(len(ids) - len(continuation))
        params = SamplingParams(max_tokens=0, prompt_logprobs=1)
        done = self._finish(prompts, [params] * len(prompts))
        told = [scored(request, start) for (request, _), start in zip(done, starts)]
        return [(one.logprob, one.greedy) for one in told]

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        pieces: list[tuple[Any, list[int], list[int]]] = []
        counts = []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            made = [(None, *make_disjoint_window(pair)) for pair in windows]
            pieces += made
            counts.append(len(made))
        values = iter(self._loglikelihood_tokens(pieces))
        return [sum(next(values)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        from lm_eval.models.utils import normalize_gen_kwargs

        prompts, params, stops = [], [], []
        for context, options in (request.args for request in requests):
            wanted: dict[str, Any] = dict(normalize_gen_kwargs(options, self.max_gen_toks))
            unknown = sorted(set(wanted) - _HONOURED)
            if unknown:
                raise ValueError(
                    f"generation option {unknown[0]}={wanted[unknown[0]]!r} is not honoured: one of {sorted(_HONOURED)}"
                )
            limit = wanted["max_gen_toks"]
            if not 0 < limit < self.max_length:
                raise ValueError(f"max_gen_toks is {limit}, max_length {self.max_length}: give fewer")
            prompts.append(self.tok_encode(context)[-(self.max_length - limit) :])
            stops.append([stop for stop in wanted.get("until", ()) if stop])
            # Where a stop string is part of a flagged token's name, only the finished text, without them, can tell.
            early = tuple(stop for stop in stops[-1] if not any(stop in name for name in (BOS, EOS, PAD)))
            drawn = {k: wanted[k] for k in ("top_p", "top_k", "min_p", "repetition_penalty", "seed") if k in wanted}
            temperature = wanted.get("temperature", 1.0) if wanted.get("do_sample") else 0.0
            params.append(SamplingParams(max_tokens=limit, stop=early, temperature=temperature, **drawn))
        done = self._finish(prompts, params)
        return [self._text(ids, until) for (_, ids), until in zip(done, stops)]

    def _text(self, ids: Sequence[int], stops: Sequence[str]) -> str:
        """As HFLM reads an answer: without BOS, EOS and PAD, up to the first stop string."""
        flagged = (
            self.codec.bos_id,
            self.codec.eos_id,
            self.codec.pad_id,
        )  # V3's file flags these and no role as special
        text = self.codec.decode(i for i in ids if i not in flagged)
        return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]

    def _finish(
        self, prompts: Sequence[list[int]], params: Sequence[SamplingParams]
    ) -> list[tuple[Request, list[int]]]:
        """All requests, `batch_size` in flight, in their order; each with its answer's tokens."""
        waiting, running = iter(range(len(prompts))), dict[int, int]()
        done: list[tuple[Request, list[int]] | None] = [None] * len(prompts)
        requests: dict[int, Request] = {}
        answers: list[list[int]] = [[] for _ in prompts]
        while True:
            while len(running) < self.batch_size and (i := next(waiting, None)) is not None:
                requests[i] = self.engine.add(prompts[i], params[i])
                running[requests[i].id] = i
            if not running:
                return [one for one in done if one is not None]
            for delta in self.engine.step():
                if delta.request not in running:
                    continue
                if delta.error:
                    raise RuntimeError(f"request {running[delta.request]} failed: {delta.error}")
                answers[running[delta.request]] += delta.token_ids
                if delta.finish_reason is not None:
                    i = running.pop(delta.request)
                    done[i] = (requests.pop(i), answers[i])
