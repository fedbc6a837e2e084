"""A look at a loaded model's predictions on a fixed prompt: a conversion that went wrong shows at once.

Dropped scales, swapped halves or mixed-up layers leave logits that are not finite, that say nothing (as good as uniform), or that
are certain of every token. A model that was never trained says nothing either, and is told so in the same words.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from dsv3.model.transformer import DeepseekV3

PROMPT = "The capital of France is Paris. The capital of Germany is"
UNIFORM, CERTAIN = 0.97, 0.02  # of ln V; nats, mean over the prompt's positions


@torch.no_grad()
def doubts(model: DeepseekV3, tokens: Sequence[int]) -> str | None:
    """What is suspicious about the model's predictions after each of `tokens`, or None."""
    device, vocab = model.lm_head.weight.device, model.config.vocab_size
    logits = model(torch.tensor([list(tokens)], device=device)).float()[0]
    if not bool(logits.isfinite().all()):
        return "its predictions on a fixed prompt are not finite: weights or scales are damaged or of another model"
    log = logits.log_softmax(-1)
    entropy = -(log.exp() * log).sum(-1).mean().item()
    if entropy > UNIFORM * math.log(vocab):
        return (
            f"its predictions on a fixed prompt are as good as uniform (entropy {entropy:.2f} of {math.log(vocab):.2f} nats): "
            "it is untrained, or its conversion is broken"
        )
    if entropy < CERTAIN:
        return (
            f"it is certain of every token of a fixed prompt (entropy {entropy:.4f} nats): its conversion is probably broken, "
            "for example FP8 codes without their scales"
        )
    return None
