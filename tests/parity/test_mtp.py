"""The MTP layer against transformers' own MtpModel, read from a checkpoint that we saved."""

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel

from dsv3.model.weights import save_model
from tests.model.tiny import random_model


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mtp") / "checkpoint"
    ours = random_model()
    save_model(ours, folder)
    main = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    # The class knows V3's own layer 61 only; ours is layer 3.
    main._keys_to_ignore_on_load_unexpected = [r"model\.layers\.3\..*"]
    return ours, main, MtpModel.from_pretrained(main)


def test_states_and_logits(sides):
    ours, main, mtp = sides
    tokens = torch.randint(0, 96, (1, 41))
    positions = torch.arange(1, 41).unsqueeze(0)  # theirs count the token read, ours the state's row: RoPE is relative
    with torch.no_grad():
        state = main.model(tokens[:, :40]).last_hidden_state
        cache = MtpCache(config=main.config.get_mtp_config())
        theirs = mtp.forward_layer(0, state, positions, cache, input_ids=tokens[:, 1:])
        mine = ours.hidden(tokens, depth=1)
        assert (mine.main - state).abs().max() <= 1e-4
        assert (mine.mtp[0] - theirs).abs().max() <= 1e-4
        assert (ours.lm_head(mine.mtp[0]) - mtp.shared_head(theirs)).abs().max() <= 1e-4
