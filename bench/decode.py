"""Generation of dsv3 against transformers and llama.cpp on the 20M model of bench.train_step; one JSON line.

Sides hold the same random weights and take turns in one process: a prompt of 64 tokens and 128 new ones, greedily, one request
and eight; a prompt of 4,096 tokens. Float32 texts must be equal. Beside the rates stand the share of what the machine's memory
allows (each active weight read once a token), and what it costs to compute every row alone in one order. llama.cpp runs
where llama_cpp can be imported (it builds for minutes, so no extra of ours has it).
    python -m bench.decode [--rounds N] [--checkpoint RUN]      --checkpoint: also plain against speculative, on a trained model
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import json
import tempfile
import time
from collections.abc import Callable, Iterable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch

from bench.common import interleave, machine
from bench.train_step import MODEL
from dsv3.infer.engine import Engine
from dsv3.infer.runner import NativeRunner, Runner, Segment
from dsv3.infer.sampling import SamplingParams
from dsv3.kernels.quant import cast_blocks
from dsv3.model.stored import StoredExperts, StoredLinear, keep_fp8
from dsv3.model.transformer import DeepseekV3

CONFIG = dataclasses.replace(MODEL, max_position_embeddings=8192, eos_token_id=None)
PROMPT, NEW, LONG = 64, 128, 4096
FLOAT32, BFLOAT16, FP8 = "float32", "bfloat16", "fp8"


class Ids:
    """The tokenizer of a benchmark: an engine that only sees ids."""

    bos_id, vocab_size = None, CONFIG.vocab_size

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Iterable[int]) -> str:
        return ""

    def token_bytes(self, token: int) -> bytes:
        return b""

    def is_special(self, token: int) -> bool:
        return False

    def stream(self) -> Ids:
        return self

    def push(self, ids: Iterable[int]) -> str:
        return ""

    def finish(self) -> str:
        return ""


# -- sides -------------------------------------------------------------------------------------------------------------


def build(kind: str) -> DeepseekV3:
    """The model in float32, rounded to bfloat16, or kept in FP8."""
    torch.manual_seed(0)
    model = DeepseekV3(CONFIG)
    model.init_weights()
    if kind == FLOAT32:
        return model
    model = model.bfloat16()
    if kind == FP8:
        weights = {name: tensor.float() for name, tensor in model.state_dict().items()}
        keep_fp8(model)
        for path, module in model.named_modules():
            if isinstance(module, StoredLinear):
                fill(module, "weight", "weight_scale_inv", weights[f"{path}.weight"])
            elif isinstance(module, StoredExperts):
                for name in ("gate_up_proj", "down_proj"):
                    fill(module, name, f"{name}_scale_inv", weights[f"{path}.{name}"])
    return model


def fill(module: torch.nn.Module, name: str, scale: str, weight: torch.Tensor) -> None:
    parts = weight.chunk(2, -2) if name == "gate_up_proj" else (weight,)
    codes, scales = zip(*(cast_blocks(part) for part in parts))
    getattr(module, name).copy_(torch.cat(codes, -2))
    getattr(module, scale).copy_(torch.cat(scales, -2))


def prompts(count: int, length: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(2, CONFIG.vocab_size, (count, length), generator=generator).tolist()


def ours(model: DeepseekV3) -> Callable[[list[list[int]], int], list[list[int]]]:
    engine = Engine(model, Ids(), share=False, cache_gb=0.2)

    def run(asked: list[list[int]], new: int) -> list[list[int]]:
        return [s.token_ids for s in engine.complete(asked, SamplingParams(max_tokens=new, ignore_eos=True))]

    return run


def theirs(kind: str) -> Callable[[list[list[int]], int], list[list[int]]]:
    """transformers' generate."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = DeepseekV3Config(**CONFIG.to_hf(torch_dtype="float32"), attn_implementation="sdpa")
    model = DeepseekV3ForCausalLM(config).eval()
    model.load_state_dict(build(FLOAT32).state_dict(), strict=True)
    model = model.to(torch.float32 if kind == FLOAT32 else torch.bfloat16)

    def run(asked: list[list[int]], new: int) -> list[list[int]]:
        tokens = torch.tensor(asked)
        with torch.inference_mode():
            out = model.generate(
                tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=new, do_sample=False, pad_token_id=0
            )
        return out[:, tokens.shape[1] :].tolist()

    return run


def llama(folder: Path) -> dict[str, Callable[[list[list[int]], int], list[list[int]]]]:
    """llama.cpp on our GGUF export, in three precisions, on as many threads as torch; one request at a time."""
    from dsv3.data.tokenizer import Tokenizer
    from dsv3.model.convert import to_gguf
    from dsv3.model.weights import save_model

    library = import_module("llama_cpp")
    tokenizer = Tokenizer.train(["llama.cpp loads no model without words "] * 50, 400)
    save_model(build(BFLOAT16), folder / "model", tokenizer=tokenizer)
    to_gguf(folder / "model", folder / "bf16.gguf")
    to_gguf(folder / "model", folder / "q8_0.gguf", "q8_0")
    wish = library.llama_model_quantize_default_params()
    wish.ftype = 0  # LLAMA_FTYPE_ALL_F32
    library.llama_model_quantize(
        str(folder / "bf16.gguf").encode(), str(folder / "f32.gguf").encode(), ctypes.byref(wish)
    )

    def side(file: str) -> Callable[[list[list[int]], int], list[list[int]]]:
        threads = torch.get_num_threads()
        model = library.Llama(
            str(folder / file), n_ctx=512, n_threads=threads, n_threads_batch=threads, verbose=False, logits_all=False
        )

        def run(asked: list[list[int]], new: int) -> list[list[int]]:
            answers = []
            for tokens in asked:
                model.reset()
                out: list[int] = []
                model.eval(tokens)
                for _ in range(new):
                    logits = library.llama_get_logits(model.ctx)
                    row = torch.frombuffer(
                        (ctypes.c_float * CONFIG.vocab_size).from_address(ctypes.addressof(logits.contents)),
                        dtype=torch.float32,
                    )
                    out.append(int(row.argmax()))
                    if len(out) < new:
                        model.eval(out[-1:])
                answers.append(out)
            return answers

        return run

    return {name: side(f"{name}.gguf") for name in ("f32", "bf16", "q8_0")}


# -- measurements --------------------------------------------------------------------------------------------------------


def read_bandwidth() -> float:
    """Bytes a second that all threads read together from a gigabyte: the best of ten."""
    x = torch.ones(2**28)
    times = []
    for _ in range(10):
        start = time.perf_counter()
        x.sum()
        times.append(time.perf_counter() - start)
    return x.nbytes / min(times)


def active_bytes(kind: str) -> int:
    """Weights that one token reads."""
    c = CONFIG
    attention = c.hidden_size * (
        c.q_lora_rank + c.kv_lora_rank + c.qk_rope_head_dim + c.num_attention_heads * c.v_head_dim
    )
    attention += c.num_attention_heads * (
        c.q_lora_rank * c.qk_head_dim + c.kv_lora_rank * (c.qk_nope_head_dim + c.v_head_dim)
    )
    experts = 3 * (c.num_experts_per_tok + c.n_shared_experts) * c.hidden_size * c.moe_intermediate_size
    moe = c.num_hidden_layers - c.first_k_dense_replace
    stored = c.num_hidden_layers * attention + moe * experts
    stored += c.first_k_dense_replace * 3 * c.hidden_size * c.intermediate_size
    rest = moe * c.n_routed_experts * c.hidden_size + c.vocab_size * c.hidden_size
    size = {FLOAT32: (4, 4), BFLOAT16: (2, 2), FP8: (1, 2)}[kind]
    return stored * size[0] + rest * size[1]


def price_of_invariance(rounds: int) -> dict[str, float]:
    """How much faster the same work is where rows may go together in any order: torch's product, and the expanded attention."""
    model = build(FLOAT32)
    native, free = NativeRunner(model, 80, mtp=False), Runner(model, 80, mtp=False)
    tokens, states = prompts(1, LONG)[0], torch.randn(512, CONFIG.hidden_size)
    pages = list(range(1, 1 + LONG // 64))

    def read(runner: Runner) -> None:
        for start in range(0, LONG, 512):
            runner.forward([Segment(pages, start, tokens[start : start + 512])])

    sides = {
        "product": lambda: native.logits(states) is None,
        "torch product": lambda: free.logits(states) is None,
        "prefill": lambda: read(native),
        "torch prefill": lambda: read(free),
    }
    with torch.inference_mode():
        seconds = interleave(sides, rounds)
    return {
        "product_512_rows_to_torch": round(seconds["torch product"] / seconds["product"], 2),
        "prefill_to_torch_runner": round(seconds["torch prefill"] / seconds["prefill"], 2),
    }


def speculation(run: Path, rounds: int) -> dict[str, object]:
    """Plain against one MTP draft a step, on a trained model and its own kind of text."""
    from dsv3.data.tokenizer import Tokenizer
    from dsv3.model.weights import load_model
    from dsv3.recipes.tiny import PROMPTS
    from dsv3.train.checkpoint import latest_checkpoint

    checkpoint = latest_checkpoint(run) or run
    model, tokenizer = load_model(checkpoint), Tokenizer.from_file(checkpoint)
    out: dict[str, object] = {"dtype": str(model.lm_head.weight.dtype)[6:]}
    params = SamplingParams(max_tokens=256, ignore_eos=True)
    engines = {drafts: Engine(model, tokenizer, drafts=drafts, share=False, cache_gb=0.2) for drafts in (0, 1, 2, 3)}
    said: dict[int, list] = {}

    def generate(drafts: int) -> None:
        said[drafts] = [s for prompt in PROMPTS for s in engines[drafts].generate([prompt], params)]

    seconds = interleave({str(d): (lambda d=d: generate(d)) for d in engines}, rounds)
    for drafts in engines:
        assert [s.token_ids for s in said[drafts]] == [s.token_ids for s in said[0]], "speculation changed a text"
        tokens = sum(len(s.token_ids) for s in said[drafts])
        drafted, accepted = (sum(getattr(s, name) for s in said[drafts]) for name in ("drafted", "accepted"))
        out[f"{drafts} drafts"] = {
            "tokens_per_s": round(tokens / seconds[str(drafts)]),
            "speed_up": round(seconds["0"] / seconds[str(drafts)], 2),
            "accepted": round(accepted / drafted, 3) if drafted else None,
        }
    return out


def against_transformers(rounds: int) -> tuple[dict, dict]:
    """Tokens a second of each side and work, and which texts were equal in float32."""
    sides = {f"dsv3 {kind}": ours(build(kind)) for kind in (FLOAT32, BFLOAT16, FP8)}
    sides |= {f"transformers {kind}": theirs(kind) for kind in (FLOAT32, BFLOAT16)}
    work = {"batch 1": (1, PROMPT, NEW), "batch 8": (8, PROMPT, NEW), "prefill 4096": (1, LONG, 1)}
    said: dict[str, list[list[int]]] = {}

    def call(name: str, task: str) -> None:
        count, length, new = work[task]
        said[f"{name}, {task}"] = sides[name](prompts(count, length), new)

    calls = {f"{name}, {task}": (lambda name=name, task=task: call(name, task)) for task in work for name in sides}
    for name in sides:
        call(name, "batch 1")
    seconds = interleave(calls, rounds)
    rates: dict[str, dict[str, int]] = {}
    for task, (count, length, new) in work.items():
        tokens = length if new == 1 else count * new
        rates[task] = {name: round(tokens / seconds[f"{name}, {task}"]) for name in sides}
    equal = {task: said[f"dsv3 float32, {task}"] == said[f"transformers float32, {task}"] for task in work}
    return rates, equal


def against_llama(rounds: int) -> dict[str, object] | str:
    if find_spec("llama_cpp") is None:
        return "llama_cpp is not importable: pip install llama-cpp-python (it compiles for minutes)"
    with tempfile.TemporaryDirectory() as folder:
        models = {FLOAT32: build(BFLOAT16).float(), BFLOAT16: build(BFLOAT16), FP8: build(FP8)}  # the file's weights
        sides = {f"dsv3 {kind}": ours(model) for kind, model in models.items()}
        sides |= {f"llama.cpp {name}": side for name, side in llama(Path(folder)).items()}
        said: dict[str, list[list[int]]] = {}

        def call(name: str) -> None:
            said[name] = sides[name](prompts(1, PROMPT), NEW)

        for name in sides:
            call(name)
        seconds = interleave({name: (lambda name=name: call(name)) for name in sides}, rounds)
    rates: dict[str, object] = {name: round(NEW / value) for name, value in seconds.items()}
    pairs = ((FLOAT32, "f32"), (BFLOAT16, "bf16"), (FP8, "q8_0"))
    ratios = {a: round(seconds[f"llama.cpp {b}"] / seconds[f"dsv3 {a}"], 2) for a, b in pairs}
    agree = [a == b for a, b in zip(said["dsv3 float32"][0], said["llama.cpp f32"][0])]
    # llama.cpp keeps its cache in float16.
    return rates | {"ratio": ratios, "float32_texts_equal_until": agree.index(False) if False in agree else len(agree)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--checkpoint", type=Path, help="a run or checkpoint with an MTP layer")
    options = parser.parse_args()
    bandwidth = read_bandwidth()
    rates, equal = against_transformers(options.rounds)
    one = rates["batch 1"]
    result: dict[str, object] = {
        "bench": "decode",
        "tokens_per_s": rates,
        "ratio": {
            task: {kind: round(side[f"dsv3 {kind}"] / side[f"transformers {kind}"], 2) for kind in (FLOAT32, BFLOAT16)}
            for task, side in rates.items()
        },
        "texts_equal_in_float32": equal,
        "read_gb_per_s": round(bandwidth / 1e9, 1),
        "share_of_read_bandwidth": {
            kind: round(one[f"dsv3 {kind}"] * active_bytes(kind) / bandwidth, 2) for kind in (FLOAT32, BFLOAT16, FP8)
        },
        "price_of_invariance": price_of_invariance(options.rounds),
        "llama.cpp": against_llama(options.rounds),
    }
    if options.checkpoint:
        result["speculation"] = speculation(options.checkpoint, options.rounds)
    print(json.dumps(result | machine()))


if __name__ == "__main__":
    main()
