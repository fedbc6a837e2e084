"""Agreement of drafts: known states, known counts."""

import dataclasses

import pytest
import torch

from dsv3.infer.engine import Engine
from dsv3.infer.sampling import SamplingParams
from dsv3.model.transformer import Hidden
from dsv3.train.acceptance import Agreement
from tests.infer.letters import Letters
from tests.model.tiny import TINY, random_model

TOKENS = torch.randint(0, 96, (3, 21), generator=torch.Generator().manual_seed(0))


def test_states_of_k_positions_on_agree_always_and_shifted_ones_by_chance():
    model = random_model(dataclasses.replace(TINY, num_nextn_predict_layers=2))
    with torch.no_grad():
        hidden = model.hidden(TOKENS, depth=2)
    main, length = hidden.main, hidden.main.shape[1]
    right = Hidden(main, (main.roll(-1, 1), main.roll(-2, 1)), hidden.routing)
    valid = [torch.ones(3, length - k, dtype=torch.bool) for k in (1, 2)]
    agreement = Agreement(2)
    agreement.add_hidden(model.lm_head, right, valid)
    assert agreement.drafts == [3 * (length - 1), 3 * (length - 2)]
    assert agreement.shares() == [1.0, 1.0]
    agreement.add_hidden(model.lm_head, Hidden(main, (main.roll(-2, 1), main.roll(-1, 1)), hidden.routing), valid)
    assert all(0.5 <= share < 0.7 for share in agreement.shares())
    none = Agreement(1)
    none.add_hidden(model.lm_head, Hidden(main, (main,), hidden.routing), [valid[0] & False])
    assert none.shares() == [0.0]


def test_only_positions_that_count_are_counted():
    model = random_model()
    with torch.no_grad():
        hidden = model.hidden(TOKENS, depth=1)
        greedy = [model.lm_head(state).argmax(-1) for state in (hidden.main, hidden.mtp[0])]
    valid = torch.rand(3, 19, generator=torch.Generator().manual_seed(1)) < 0.4
    agreement = Agreement(1)
    agreement.add_hidden(model.lm_head, hidden, [valid])
    wanted = (greedy[0][:, 1:] == greedy[1][:, :-1])[valid]
    assert (agreement.hits[0], agreement.drafts[0]) == (int(wanted.sum()), int(valid.sum()))


def test_given_its_own_greedy_text_it_is_what_generation_accepts():
    """On text that the model itself wrote, teacher-forced agreement of depth 1 and the engine's count look at the same drafts,
    but for those behind an accepted one, which generation never makes."""
    model = random_model(dataclasses.replace(TINY, rope_scaling=None))
    engine = Engine(model, Letters(), drafts=1)
    prompt = TOKENS[0, :5].tolist()
    sample = next(engine.complete([prompt], SamplingParams(max_tokens=80, ignore_eos=True)))
    tokens = torch.tensor([[*prompt, *sample.token_ids]])
    with torch.no_grad():
        hidden = model.hidden(tokens, depth=1)
        drafts, main = (model.lm_head(state[0]).argmax(-1) for state in (hidden.mtp[0], hidden.main))
    stands = (drafts[:-1] == main[1:]).tolist()
    at, drafted, accepted = len(prompt) - 1, 0, 0
    while at < len(stands):  # a draft for every token that the main model has just chosen
        drafted, accepted = drafted + 1, accepted + stands[at]
        at += 1 + stands[at]
    assert drafted > 30
    assert sample.drafted == pytest.approx(drafted, abs=2)
    assert sample.accepted == pytest.approx(accepted, abs=2)
