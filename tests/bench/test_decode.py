"""What bench.decode counts."""

import torch

from bench.decode import BFLOAT16, CONFIG, FLOAT32, FP8, active_bytes, build


def test_active_bytes_are_those_of_the_matrices_that_a_token_reads():
    whole = {kind: build(kind) for kind in (FLOAT32, BFLOAT16, FP8)}
    for kind, model in whole.items():
        read = 0.0
        for name, tensor in model.state_dict().items():
            part = CONFIG.num_experts_per_tok / CONFIG.n_routed_experts if ".experts." in name else 1.0
            if tensor.dim() > 1 and "embed_tokens" not in name and not name.endswith("scale_inv"):
                read += part * tensor.nbytes
        assert active_bytes(kind) == read, kind
    assert whole[FP8].lm_head.weight.dtype == torch.bfloat16
