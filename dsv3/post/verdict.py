"""What a round of rollouts says: its numbers, and in plain words whether anything can be learnt from it.

"Loss 0, reward 0: does it learn?" is the question users ask of GRPO most (TRL issues 2872, 3452). The answer is in the groups: a
group whose answers all have one reward has no advantage and teaches nothing.
Does not: decide anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dsv3.post.rollout import Answer, Tally

_MOST = 0.9  # share of groups without signal from which the words change


def round_metrics(
    good: Sequence[list[Answer]],
    flat: Sequence[list[Answer]],
    lost: Sequence[list[Answer]],
    counts: Mapping[str, int],
    tally: Tally,
    *,
    end: int,
) -> dict[str, Any]:
    """Of all groups drawn, trained on or not: means over what was drawn are not bent by what dynamic sampling leaves out.

    Args:
        good, flat, lost: groups with signal, with one reward for all, and those of which too little could be judged.
        counts: what the rewarder counted in this round. end: longest answer, tokens.
    """
    answers = [a for group in [*good, *flat] for a in group if a.reward is not None]
    groups = len(good) + len(flat)
    parts = sorted({name for a in answers for name in a.parts})
    right = [sum(a.parts.get("accuracy") == 1.0 for a in g if a.reward is not None) for g in flat]
    sizes = [sum(a.reward is not None for a in g) for g in flat]
    total = max(1, len(answers))
    spread = [abs(a.advantage) for g in good for a in g if a.reward is not None]
    return {
        "reward": sum(a.reward or 0.0 for a in answers) / total,
        "reward_parts": {
            name: sum(a.parts[name] for a in answers if name in a.parts) / max(1, sum(name in a.parts for a in answers))
            for name in parts
        },
        "groups": groups,
        "no_variance": len(flat) / max(1, groups),
        "all_right": sum(r == n for r, n in zip(right, sizes)) / max(1, groups),
        "all_wrong": sum(r == 0 for r in right) / max(1, groups),
        "advantage_mean_abs": sum(spread) / max(1, len(spread)),
        "length": sum(len(a.tokens) for a in answers) / total,
        "cut_off": sum(a.finish == "length" for a in answers) / total,
        "length_limit": end,
        "too_long": tally.too_long,
        "dropped": sum(a.reward is None for g in [*good, *flat, *lost] for a in g) + tally.failed,
        "unreadable_gold": counts.get("unreadable_gold", 0),
        "grader_crashes": counts.get("crashed", 0),
        "rollout_acceptance": tally.acceptance(),
    }


def verdict(told: Mapping[str, Any]) -> str:
    """One sentence on a round's metrics: "learning", or what stands in the way and what to do."""
    if told["cut_off"] > 0.5:
        return (
            f"{told['cut_off']:.0%} of the answers are cut off at {told['length_limit']} tokens and count as wrong: "
            "raise max_tokens, or teach the model to end its answers (SFT)"
        )
    if told["no_variance"] > _MOST:
        share = f"{told['no_variance']:.0%} of the groups have one reward for all answers"
        if told["all_wrong"] >= told["all_right"]:
            few = "nothing can be learnt" if told["no_variance"] == 1 else "hardly anything can be learnt"
            return (
                f"{few}: {share}, mostly all wrong. Give easier questions, more SFT on their form, or larger groups; "
                "see in the view whether right answers are judged wrong"
            )
        return f"the questions are too easy: {share}, mostly all right. Give harder ones"
    if told["dropped"] and told["unreadable_gold"] + told["grader_crashes"] > told["groups"]:
        return (
            f"{told['dropped']} answers were dropped: gold of {told['unreadable_gold']} cannot be read, the grader failed on "
            f"{told['grader_crashes']}. Mend the questions' answers"
        )
    return "learning"
