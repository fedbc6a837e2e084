"""Verbs on checkpoints: `inspect`, `convert`, `generate`."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from dsv3.cli.console import bytes_bar, checkpoint_of, table


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """Table of a checkpoint or config.json: architecture, parameters total and active, bytes per dtype, cache bytes a token.
    Reads headers, never weights, unless you ask to --verify. Example: dsv3 inspect runs/tiny --json"""

    path: tyro.conf.Positional[Path]
    """A checkpoint folder, a run folder (its newest checkpoint), or a config.json."""
    json: bool = False
    """Exact integers as JSON."""
    verify: bool = False
    """Compare every tensor of a checkpoint that dsv3 wrote with its checksum."""


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Write a checkpoint anew: FP8 to bfloat16 or back, other shards, experts fused as transformers 5 holds them, GGUF for
    llama.cpp or from it. Works on any machine with a shard of memory; cut off, the same command goes on. FP8 that stays FP8 is
    copied bit for bit. What several processes trained, kept in their shards, becomes a model here too.
    Examples: dsv3 convert DeepSeek-V3-0324/ v3-bf16/ --dtype bfloat16
    dsv3 convert runs/tiny tiny.gguf --dtype q8_0"""

    source: tyro.conf.Positional[Path]
    """A checkpoint folder, a run folder (its newest checkpoint), or a .gguf file."""
    target: tyro.conf.Positional[Path]
    """A folder that does not exist yet, or a name that ends in .gguf."""
    dtype: Literal["keep", "float32", "bfloat16", "float16", "fp8", "q8_0"] = "keep"
    """fp8: Linears as e4m3 with a scale a 128x128 block, as DeepSeek publishes. GGUF: bfloat16 (keep) or q8_0."""
    shard_gb: float = 5.0
    """Most gigabytes (10^9 bytes) a file holds."""
    fused: bool = False
    """One tensor a layer for all experts' gate and up projections, one for down."""
    overwrite: bool = False
    """Replace a checkpoint that is there."""


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Complete a prompt with a checkpoint. Greedy unless --temperature; MTP speculation where the model has an MTP layer.
    Example: dsv3 generate runs/tiny --prompt 'import '"""

    checkpoint: tyro.conf.Positional[Path]
    """A checkpoint folder, or a run folder (its newest checkpoint)."""
    prompt: Annotated[tuple[str, ...], tyro.conf.arg(name="prompt")] = field(default=("",))
    """One or more prompts."""
    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    drafts: int | None = None
    """Tokens that the MTP layer guesses ahead; 0: none. Default: one, where the model has an MTP layer."""
    dtype: Literal["bfloat16", "float32", "fp8"] = "bfloat16"
    """fp8: weights stay in FP8 (or are cast to it), a byte each."""
    device: str = "cpu"


def inspect(verb: Inspect) -> None:
    from dsv3.model.census import inspect

    path = checkpoint_of(verb.path)
    found = inspect(path)
    if verb.verify:
        from dsv3.model.weights import verify_checkpoint

        with bytes_bar("verifying") as progress:
            count = verify_checkpoint(path, progress)
        print(f"{count:,} tensors are what was written", file=sys.stderr)
    if verb.json:
        print(json.dumps(found.to_json(), indent=1))
        return
    from rich.console import Console

    shown = table(str(verb.path), ("", "", ""))
    section = None
    for name, key, value in found.rows():
        shown.add_row(name if name != section else "", key, f"{value:,}" if isinstance(value, int) else str(value))
        section = name
    Console().print(shown)


def convert(verb: Convert) -> None:
    from dsv3.data.tokenizer import Tokenizer
    from dsv3.model.convert import convert, to_gguf
    from dsv3.model.shards import Form
    from dsv3.model.weights import config_of, dtype_named
    from dsv3.train.checkpoint import consolidate, in_shards_alone

    if not 0 < verb.shard_gb < float("inf"):
        raise ValueError(f"--shard-gb is {verb.shard_gb}: give a positive number of gigabytes")
    source = checkpoint_of(verb.source, gguf=True)
    if verb.target.suffix == ".gguf":
        kind = {"keep": "bf16", "bfloat16": "bf16", "q8_0": "q8_0"}.get(verb.dtype)
        if kind is None or verb.fused or verb.overwrite:
            raise ValueError("GGUF is written as --dtype bfloat16 or q8_0, without --fused or --overwrite")
        layers = config_of(source).num_nextn_predict_layers if source.is_dir() else 0
        with bytes_bar("converting") as progress:
            to_gguf(source, verb.target, kind, progress=progress)
        print(f"{verb.target}" + (f", without its MTP ({layers}): llama.cpp has no place for it" if layers else ""))
        return
    if verb.dtype == "q8_0":
        raise ValueError(f"--dtype q8_0 is GGUF's: give a target that ends in .gguf instead of {verb.target}")
    form = Form(None if verb.dtype == "keep" else dtype_named(verb.dtype), verb.fused)
    size = max(1, int(verb.shard_gb * 10**9))
    if in_shards_alone(source):
        if verb.fused:
            raise ValueError(f"{source} is in the shards of a training: write it without --fused, and convert that")
        with bytes_bar("consolidating") as progress:
            consolidate(
                source, verb.target, dtype=form.dtype or "bfloat16", shard_bytes=size, overwrite=verb.overwrite,
                tokenizer=Tokenizer.from_file(source), progress=progress,
            )  # fmt: skip
        print(f"{verb.target}: look at it with `dsv3 inspect {verb.target}`")
        return
    with bytes_bar("converting") as progress:
        convert(source, verb.target, form, shard_bytes=size, overwrite=verb.overwrite, progress=progress)
    print(f"{verb.target}: look at it with `dsv3 inspect {verb.target}`")


def generate(verb: Generate) -> None:
    import dsv3

    params = dsv3.SamplingParams(
        max_tokens=verb.max_tokens, temperature=verb.temperature, top_p=verb.top_p, seed=verb.seed
    )
    with bytes_bar("loading") as progress:
        model, tokenizer = dsv3.load(
            checkpoint_of(verb.checkpoint), dtype=verb.dtype, device=verb.device, progress=progress
        )
    engine = dsv3.Engine(model, tokenizer, drafts=verb.drafts)
    for prompt, sample in zip(verb.prompt, engine.generate(verb.prompt, params)):
        print(f"{prompt}{sample.text}")
        if sample.drafted:
            print(
                f"[{sample.accepted} of {sample.drafted} MTP drafts accepted: {sample.acceptance:.0%}]", file=sys.stderr
            )
