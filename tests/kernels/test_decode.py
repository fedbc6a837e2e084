"""Generation's kernels: against the model's own forward in every shape and kind of weight, and row by row to the last bit."""

import dataclasses

import pytest
import torch

from dsv3.infer import native
from dsv3.infer.pages import PageStore
from dsv3.kernels import decode
from dsv3.kernels.decode import Decoder, Pace, Segment
from dsv3.kernels.quant import cast_blocks
from dsv3.model.config import ModelConfig, YarnConfig
from dsv3.model.stored import StoredExperts, StoredLinear, keep_fp8
from dsv3.model.transformer import DeepseekV3
from tests.kernels.distance import distance
from tests.model.tiny import TINY, random_model

YARN = YarnConfig(factor=8, original_max_position_embeddings=32, mscale=0.7)
# Widths around the vectors' and the tiles': less than one, not a multiple, several, more than an FP8 block.
SHAPES = {
    "v3": {},
    "plain_queries": dict(q_lora_rank=None),
    "one_group": dict(n_group=1, topk_group=1),
    "no_shared_experts": dict(n_shared_experts=0),
    "two_shared_experts": dict(n_shared_experts=2, norm_topk_prob=False),
    "wide_values": dict(v_head_dim=28, num_attention_heads=5),
    "narrow_values": dict(v_head_dim=4, qk_nope_head_dim=20),
    "yarn_only_mscale": dict(rope_scaling=YARN, rope_theta=5e4),
    "no_yarn": dict(rope_scaling=None),
    "all_dense": dict(first_k_dense_replace=3, num_nextn_predict_layers=0),
    "all_experts": dict(first_k_dense_replace=0, num_experts_per_tok=1),
    "odd_widths": dict(
        hidden_size=72, q_lora_rank=9, kv_lora_rank=23, qk_nope_head_dim=7, qk_rope_head_dim=10, v_head_dim=11,
        intermediate_size=37, moe_intermediate_size=13, vocab_size=101,
    ),
    "more_than_a_block": dict(
        hidden_size=200, q_lora_rank=136, kv_lora_rank=144, intermediate_size=264, moe_intermediate_size=136,
        num_attention_heads=3, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=24,
    ),
    "many_heads": dict(num_attention_heads=70, qk_nope_head_dim=4, v_head_dim=4, qk_rope_head_dim=2),
}  # fmt: skip
KINDS = ("float32", "bfloat16", "fp8")


def build(kind: str, **changes) -> tuple[DeepseekV3, DeepseekV3]:
    """A model of that kind, and the float32 model of the same weights."""
    config = dataclasses.replace(TINY, **changes)
    wanted = random_model(config)
    if kind == "float32":
        return wanted, wanted
    model = DeepseekV3(config).bfloat16()
    model.load_state_dict(wanted.state_dict())
    wanted.load_state_dict(model.state_dict())
    if kind == "fp8":
        keep_fp8(model)
        for path, module in model.named_modules():
            names = ("gate_up_proj", "down_proj") if isinstance(module, StoredExperts) else ("weight",)
            if isinstance(module, (StoredLinear, StoredExperts)):
                for name in names:
                    fill(module, wanted.get_submodule(path), name)
    return model, wanted


def fill(module, like, name: str) -> None:
    """Cast one weight, gate and up each in blocks of their own, and give the float32 model what the codes mean."""
    weight = getattr(like, name).data
    parts = weight.chunk(2, -2) if name == "gate_up_proj" else (weight,)
    codes, scales = zip(*(cast_blocks(part) for part in parts))
    getattr(module, name).copy_(torch.cat(codes, -2))
    scale = "weight_scale_inv" if name == "weight" else f"{name}_scale_inv"
    getattr(module, scale).copy_(torch.cat(scales, -2))
    for part, code, by in zip(parts, codes, scales):
        rows, width = part.shape[-2:]
        part.copy_(code.float() * by.repeat_interleave(128, -2)[..., :rows, :].repeat_interleave(128, -1)[..., :width])


class Pages:
    """A decoder over pages of its own."""

    def __init__(self, model: DeepseekV3, pages: int = 40, dtype: torch.dtype | None = None) -> None:
        config = model.config
        dtype = dtype or model.lm_head.weight.dtype
        self.store = PageStore(config, pages, layers=config.num_layers_with_mtp, dtype=dtype, device="cpu")
        self.decoder = Decoder(*native.describe(model), self.store.latents)
        moe = sum(config.is_moe(i) for i in range(config.num_hidden_layers))
        self.counts = torch.zeros(moe, config.n_routed_experts, dtype=torch.int64)
        self.shape = (moe, config.num_experts_per_tok)

    def step(self, *segments: Segment, streams: torch.Tensor | None = None) -> torch.Tensor:
        rows = sum(len(s.tokens) for s in segments)
        self.chosen = torch.zeros(self.shape[0], rows, self.shape[1], dtype=torch.int64)
        return self.decoder.step(segments, chosen=self.chosen, counts=self.counts, streams=streams)


def ids(config: ModelConfig, count: int, seed: int = 0) -> list[int]:
    return torch.randint(0, config.vocab_size, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def test_states_logits_and_experts_are_the_float32_models(shape, kind):
    """Float32 all the way, latents too: what is left are other orders of addition, of sums up to 300 long, over 4 layers."""
    model, wanted = build(kind, **SHAPES[shape])
    tokens = ids(model.config, 91)
    pages = Pages(model, dtype=torch.float32)
    got = torch.cat([pages.step(Segment([5, 9], 0, tokens[:70])), pages.step(Segment([5, 9], 70, tokens[70:]))])
    depth = model.config.num_nextn_predict_layers
    out = wanted.hidden(torch.tensor([tokens]), depth=depth)
    main = wanted.hidden(torch.tensor([tokens]))
    assert distance(got, main.main[0]) < 5e-6
    logits = pages.decoder.logits(got[-9:])
    assert distance(logits, wanted.lm_head(main.main[0, -9:])) < 5e-6
    if len(pages.counts):
        assert torch.equal(pages.chosen.sort(-1).values, main.routing.experts[:, 70:].sort(-1).values)
        assert torch.equal(pages.counts, main.routing.counts)
    if depth:
        rows = Segment([5, 9], 1, tokens[1:])
        draft = pages.decoder.step([rows], mtp=0, previous=got[:-1].contiguous())
        # The model's own depth-1 pass counts positions from 0, and its first key is the pair (state 0, token 1).
        assert draft.shape == out.mtp[0][0].shape
        assert distance(draft, drafted(wanted, main.main, tokens)) < 5e-6


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_streams_are_told_behind_each_layer(kind):
    model, wanted = build(kind)
    tokens = ids(model.config, 75)
    outs: list[torch.Tensor] = []
    for layer in wanted.model.main_layers:
        layer.register_forward_hook(lambda module, inputs, out: outs.append(out[0][0]))
    wanted.hidden(torch.tensor([tokens]))
    pages, streams = Pages(model, dtype=torch.float32), torch.full((len(outs), 75, model.config.hidden_size), torch.nan)
    states = pages.step(Segment([5, 9], 0, tokens), streams=streams)
    for stream, out in zip(streams, outs, strict=True):
        assert distance(stream, out) < 5e-6
    assert torch.equal(states, pages.step(Segment([5, 9], 0, tokens)))


def drafted(model: DeepseekV3, states: torch.Tensor, tokens: list[int]) -> torch.Tensor:
    """The MTP layer over pairs (state j-1, token j) in slots j from 1 on."""
    cache = model.new_cache(1, len(tokens), mtp=True)
    cache.lengths += 1
    cache.used, cache.first = 1, 1
    return model.draft(states[:, :-1], torch.tensor([tokens[1:]]), cache=cache)[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", ["v3", "odd_widths", "more_than_a_block"])
@torch.inference_mode()
def test_a_rows_bits_do_not_depend_on_what_runs_beside_it(shape, kind):
    model, _ = build(kind, **SHAPES[shape])
    lengths, tables = (131, 7, 70, 1), ([1, 2, 3], [4], [5, 6], [7])
    prompts = [ids(model.config, n, seed) for seed, n in enumerate(lengths)]
    alone, together, cut, single = (Pages(model) for _ in range(4))
    wanted = [alone.step(Segment(table, 0, prompt)) for table, prompt in zip(tables, prompts)]
    got = together.step(*(Segment(table, 0, prompt) for table, prompt in zip(tables, prompts)))
    assert torch.equal(got, torch.cat(wanted))
    # Other pages, other chunks, other threads, and tokens one by one at the end.
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3 - min(threads, 2))
        first = cut.step(Segment([30, 20, 10], 0, prompts[0][:67]), Segment([8], 0, prompts[1][:3]))
        rest = cut.step(Segment([8], 3, prompts[1][3:]), Segment([30, 20, 10], 67, prompts[0][67:129]))
        last = [cut.step(Segment([30, 20, 10], i, [prompts[0][i]])) for i in (129, 130)]
        assert torch.equal(torch.cat([first[:67], rest[4:], *last]), wanted[0])
        assert torch.equal(torch.cat([first[67:], rest[:4]]), wanted[1])
        ones = [single.step(Segment([3, 4], i, [t])) for i, t in enumerate(prompts[2])]
        assert torch.equal(torch.cat(ones), wanted[2])
        logits = alone.decoder.logits(got)
    finally:
        torch.set_num_threads(threads)
    for n in (1, 2, 3, 7, 8, 9):
        assert torch.equal(alone.decoder.logits(got[-n:].contiguous()), logits[-n:])
    drafts = together.decoder.step([Segment([1, 2, 3], 1, prompts[0][1:])], mtp=0, previous=got[:130].contiguous())
    pieces = [
        together.decoder.step(
            [Segment([11, 12, 13], i, prompts[0][i:j])], mtp=0, previous=got[i - 1 : j - 1].contiguous()
        )
        for i, j in ((1, 2), (2, 66), (66, 131))
    ]
    assert torch.equal(torch.cat(pieces), drafts)


@torch.inference_mode()
def test_what_an_unread_slot_holds_is_nothing():
    """Slots behind a row, slot 0 of the MTP layers, and pages of others may hold anything."""
    model, _ = build("bfloat16")
    tokens = ids(model.config, 80)
    clean, dirty = Pages(model), Pages(model)
    dirty.store.latents.fill_(torch.nan)
    states = clean.step(Segment([1, 2], 0, tokens))
    assert torch.equal(dirty.step(Segment([1, 2], 0, tokens)), states)
    assert torch.equal(states.bfloat16().float(), states), "a page keeps a state without loss"
    drafts = [
        x.decoder.step([Segment([1, 2], 1, tokens[1:])], mtp=0, previous=states[:-1].contiguous())
        for x in (clean, dirty)
    ]
    assert torch.equal(*drafts)


@torch.inference_mode()
def test_a_row_that_is_not_finite_stays_alone():
    model, _ = build("float32")
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = torch.nan
    tokens = [t if t != 7 else 8 for t in ids(model.config, 20)]
    wanted = Pages(model).step(Segment([1], 0, tokens))
    together = Pages(model)
    got = together.step(Segment([2], 0, [3, 7, 4]), Segment([1], 0, tokens))
    assert got[1:3].isnan().all()
    assert torch.equal(got[3:], wanted)
    assert torch.equal(got[:1], Pages(model).step(Segment([1], 0, [3])))
    assert int(together.chosen.min()) >= 0, "something is chosen"


@torch.inference_mode()
def test_equal_scores_choose_the_first_experts():
    """A router of zeros without bias ties all; the rows behind a group's edge are out."""
    model = random_model()
    for router in model.routers():
        router.weight.zero_()
        router.e_score_correction_bias.zero_()
    pages = Pages(model)
    pages.step(Segment([1], 0, [1, 2]))
    assert pages.chosen.unique().tolist() == [0, 1, 2]


@torch.inference_mode()
def test_weights_that_change_in_place_are_seen():
    model = random_model()
    pages = Pages(model)
    before = pages.step(Segment([1], 0, [1, 2, 3]))
    model.model.layers[1].input_layernorm.weight.mul_(1.5)
    after = pages.step(Segment([1], 0, [1, 2, 3]))
    assert distance(after, model.hidden(torch.tensor([[1, 2, 3]])).main[0]) < 5e-6
    assert not torch.equal(before, after)


def test_no_compiler_no_library(monkeypatch, recwarn):
    monkeypatch.setattr(decode.native.shutil, "which", lambda name: None)
    assert decode.library.__wrapped__() is None
    assert "generation runs several times slower" in str(recwarn.pop().message)


def test_a_step_takes_the_threads_that_make_it_faster():
    pace, quiet, busy = Pace(), {True: 0.6, False: 1.0}, {True: 9.0, False: 2.0}

    def run(seconds: dict[bool, float], steps: int) -> list[bool]:
        taken = []
        for _ in range(steps):
            taken.append(pace.together())
            pace.took(taken[-1], seconds[taken[-1]])
        return taken

    first = run(quiet, 1000)
    assert first.count(False) < 12, "one thread alone is tried now and then"
    assert False in first[:64]
    loaded = run(busy, 1000)
    assert loaded.count(True) < 30, "threads that wait for each other are soon given up"
    assert run(quiet, 300)[-16:] == [True] * 16, "and taken again when they are faster"


@torch.inference_mode()
def test_numbers_do_not_depend_on_pace(monkeypatch):
    model = random_model()
    got = []
    for together in (True, False):
        monkeypatch.setattr(Pace, "together", lambda self, together=together: together)
        pages = Pages(model)
        states = pages.step(Segment([1], 0, [1, 2, 3]), Segment([2], 0, [4]))
        got.append(torch.cat((states, pages.decoder.logits(states)), 1))
    assert torch.equal(*got)
