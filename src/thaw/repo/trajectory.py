"""A session as training data: what was sampled, under which policy, with which log probabilities.

Everything from the first sampled token on is the completion; what was put in between (tool results, later user turns)
stands in it with mask 0. All lists of the completion have one entry a token, and prompt and completion together are the
session's tokens: the ids that the model saw, never text that was tokenised again.

A fork's child begins with its parent's tokens, and so does everything that continues a commit. Those are inherited: to
train on several sessions of one lineage, take `own_mask` of each, and every sampled token counts once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from thaw.core.kv_ranges import KVRange
from thaw.core.objects import Turn
from thaw.core.sampling import Sampling

_PLAIN = Sampling()
_HARMLESS = ("stop", "stop_token_ids", "ignore_eos", "max_tokens", "logprobs", "entropy", "seed")
"""What leaves the distribution that is drawn from the model's own. Whatever else is set makes it another one."""


class Trajectory(msgspec.Struct, frozen=True, kw_only=True):
    """`mask[i]` is 1 where completion token i was sampled, 0 where it was put in.

    `logprobs[i]` is the model's raw log probability of token i; 0.0 where the mask is 0, NaN where none was recorded.
    `policy_versions[i]` is the policy that sampled token i, or that ran when it was put in.

    `entropies[i]` is the entropy, in nats over the full vocabulary, of the raw distribution of token i; 0.0 where the
    mask is 0, NaN where none was recorded. None where no completion was sampled with `Sampling(entropy=True)`.

    `num_inherited_tokens`: how many leading tokens, of prompt and completion together, the session had when it began:
    where it was forked, or the point that it was hydrated from. 0 for one that began empty.

    `kv_ranges`: which weights computed the KV of which tokens, of prompt and completion together, where not all of it
    is of those that run (`stale_kv`); else empty. The last token may have no KV yet. `policy_versions[i]` sampled token
    i over the KV before it.

    `plain_sampling`: every sampled token was drawn at temperature 1, without filters, penalties, biases, bans or
    grammar, so `logprobs` are those of the distribution that was sampled as well. Where it is False they are not, and a
    trainer that corrects for the difference of two policies needs log probabilities of its own forward pass.
    """

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    mask: tuple[int, ...]
    policy_versions: tuple[str, ...]
    plain_sampling: bool = True
    num_inherited_tokens: int = 0
    entropies: tuple[float, ...] | None = None
    kv_ranges: tuple[KVRange, ...] = ()

    @property
    def own_mask(self) -> tuple[int, ...]:
        """As `mask`, and 0 where the token was inherited: 1 only for what this session sampled itself."""
        inherited = min(max(self.num_inherited_tokens - len(self.prompt_ids), 0), len(self.mask))
        return (0,) * inherited + self.mask[inherited:]


def of_turns(tokens: Sequence[int], turns: Sequence[Turn], num_inherited: int = 0) -> Trajectory:
    """The trajectory of these tokens and turns (in order), of a session that began with the first `num_inherited`
    tokens. A token that no turn covers yet was put in."""
    sampled = [turn for turn in turns if turn.kind == "completion"]
    first = sampled[0].start if sampled else len(tokens)
    logprobs, entropies, mask = [0.0] * len(tokens), [0.0] * len(tokens), [0] * len(tokens)
    policies = [turns[-1].policy if turns else ""] * len(tokens)
    for turn in turns:
        policies[turn.start : turn.end] = [turn.policy] * (turn.end - turn.start)
    for turn in sampled:
        count = turn.end - turn.start
        assert turn.logprobs is None or len(turn.logprobs) == count
        logprobs[turn.start : turn.end] = [math.nan] * count if turn.logprobs is None else turn.logprobs
        entropies[turn.start : turn.end] = turn.entropies or [math.nan] * count
        mask[turn.start : turn.end] = [1] * count
    return Trajectory(
        prompt_ids=tuple(tokens[:first]),
        completion_ids=tuple(tokens[first:]),
        logprobs=tuple(logprobs[first:]),
        mask=tuple(mask[first:]),
        policy_versions=tuple(policies[first:]),
        plain_sampling=all(_is_plain(turn.sampling) for turn in sampled),
        num_inherited_tokens=num_inherited,
        entropies=tuple(entropies[first:]) if any(turn.entropies for turn in sampled) else None,
    )


def _is_plain(sampling: Sampling | None) -> bool:
    """Whether tokens are drawn from the model's own distribution. Greedy (temperature 0) is not."""
    if sampling is None:
        return False
    usual = {name: getattr(_PLAIN, name) for name in _HARMLESS}
    all_tokens = sampling.top_k if sampling.top_k > 0 else _PLAIN.top_k  # 0 and -1 both say so
    return msgspec.structs.replace(sampling, **usual, top_k=all_tokens) == _PLAIN
