"""A session as training data: what was sampled, under which policy, with which log probabilities.

Everything from the first sampled token on is the completion; what was put in between (tool results, later user turns)
stands in it with mask 0. All lists of the completion have one entry a token.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from thaw.core.objects import Turn


class Trajectory(msgspec.Struct, frozen=True, kw_only=True):
    """`mask[i]` is 1 where completion token i was sampled. Where it is 0, `logprobs[i]` is 0.0. `policy_versions[i]` is
    the policy that sampled token i or whose KV holds it."""

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    mask: tuple[int, ...]
    policy_versions: tuple[str, ...]


def of_turns(tokens: Sequence[int], turns: Sequence[Turn]) -> Trajectory:
    """The trajectory of a session with these tokens and turns."""
    first = next((turn.start for turn in turns if turn.kind == "completion"), len(tokens))
    logprobs: list[float] = []
    mask: list[int] = []
    policies: list[str] = []
    for turn in turns:
        n = turn.end - turn.start
        if turn.start < first:
            continue
        sampled = turn.kind == "completion"
        recorded = turn.logprobs if sampled and turn.logprobs is not None else (0.0,) * n
        logprobs += recorded
        mask += [int(sampled)] * n
        policies += [turn.policy] * n
    return Trajectory(
        prompt_ids=tuple(tokens[:first]),
        completion_ids=tuple(tokens[first : first + len(mask)]),
        logprobs=tuple(logprobs),
        mask=tuple(mask),
        policy_versions=tuple(policies),
    )
