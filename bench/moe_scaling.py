"""Time of the MoE layer at 8, 32, 128 and 256 experts against a dense MLP of equal FLOPs, forward and backward; one JSON line.

Every size activates the same parameters: 8 experts of width 128 a token, hidden 512, no shared expert, bfloat16; the dense
layer is one SwiGLU of width 1,024. Router, sorting and permutations are in the MoE times. Sides take turns.
    python -m bench.moe_scaling [--tokens 4096] [--rounds 7]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

import torch

from bench.common import interleave, machine, peak_memory_mib
from dsv3.model.config import ModelConfig
from dsv3.model.transformer import MLP, Context, MoE

HIDDEN, WIDTH, TOP_K = 512, 128, 8


def layer(experts: int) -> MoE | MLP:
    """The MoE layer, or for 0 the dense one; a router of random weights spreads the tokens as at the start of training."""
    torch.manual_seed(0)
    if experts == 0:
        module: MoE | MLP = MLP(HIDDEN, WIDTH * TOP_K)
    else:
        module = MoE(
            ModelConfig(
                hidden_size=HIDDEN,
                moe_intermediate_size=WIDTH,
                n_routed_experts=experts,
                num_experts_per_tok=TOP_K,
                n_shared_experts=0,
                n_group=1,
                topk_group=1,
            )
        )
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.02)
    return module.to(torch.bfloat16)


def side(experts: int, tokens: int) -> Callable[[], None]:
    module = layer(experts)
    x = torch.randn(1, tokens, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
    gradient = torch.randn_like(x)
    context = Context(torch.zeros(1), torch.zeros(1))

    def step() -> None:
        module(x, context)[0].backward(gradient)
        for parameter in module.parameters():
            parameter.grad = None

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    sides = {"dense": side(0, options.tokens)} | {str(n): side(n, options.tokens) for n in (8, 32, 128, 256)}
    for call in sides.values():
        call()
        call()
    seconds = interleave(sides, options.rounds)
    result = {
        "bench": "moe_scaling",
        "tokens": options.tokens,
        "ratio_to_dense": {name: round(value / seconds["dense"], 3) for name, value in seconds.items()},
        "milliseconds": {name: round(1000 * value, 2) for name, value in seconds.items()},
        "peak_mib": round(peak_memory_mib()),
        **machine(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
