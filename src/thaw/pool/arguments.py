"""What callers ask of a round, checked and brought into one form before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from thaw.core.errors import InvalidRequest
from thaw.core.sampling import check_seed
from thaw.engines.session.children import replay_beside
from thaw.pool.round import Round
from thaw.pool.schedule.job import Job
from thaw.pool.values import Branch, LoadPolicy
from thaw.repo.params import as_sampling

SnapshotMode = Literal["behind", "before", "never"]
"""When a point that only a worker has is captured: beside the round's first batch, before it, or never."""
Branches = int | Sequence[str | Branch | Sequence[int]]


def make_job(
    round_: Round, index: int, branch: Branch, sampling: object, seed: int | None, timeout_s: float | None
) -> Job:
    if branch.prompt and branch.token_ids is not None:
        raise InvalidRequest(f"branch {index}: prompt and token_ids are both given; give one of the two")
    if branch.resume and (branch.prompt or branch.token_ids):
        raise InvalidRequest(f"branch {index}: resume goes on with the interrupted completion; it takes no prompt")
    return Job(
        round=round_,
        index=index,
        prompt=branch.prompt,
        token_ids=branch.token_ids,
        sampling=as_sampling(sampling if branch.sampling is None else branch.sampling),
        seed=branch.seed if branch.seed is not None else seed,
        resume=branch.resume,
        timeout_s=timeout_s if branch.timeout_s is None else branch.timeout_s,
    )


def as_branches(given: Branches) -> list[Branch]:
    if isinstance(given, str):
        raise InvalidRequest("branches is one text; give a list of prompts, or a number")
    if isinstance(given, int):
        if given < 1:
            raise InvalidRequest(f"branches={given}: at least 1")
        return [Branch() for _ in range(given)]
    found = [_branch(one) for one in given]
    if not found:
        raise InvalidRequest("no branches; give at least one")
    return found


def _branch(given: str | Branch | Sequence[int]) -> Branch:
    if isinstance(given, Branch):
        return given
    return Branch(prompt=given) if isinstance(given, str) else Branch(token_ids=tuple(given))


def check_seeds(branches: Sequence[Branch], seed: int | None, seeds: Sequence[int] | None, replay: bool) -> None:
    """Raises `InvalidRequest` for seeds that are not one for each branch, and for `replay` beside any seed;
    `BadSampling` for a seed that is none."""
    if seeds is not None and len(seeds) != len(branches):
        raise InvalidRequest(f"{len(seeds)} seeds for {len(branches)} branches; give one each")
    own = {i: branch.seed for i, branch in enumerate(branches) if branch.seed is not None}
    for number in (*(seeds or ()), *(() if seed is None else (seed,)), *own.values()):
        check_seed(number)
    if replay and seeds is not None:
        raise replay_beside(f"seeds={list(seeds)[:8]!r} gives each its own")
    if replay and seed is not None:
        raise replay_beside(f"seed={seed!r} is another one to derive theirs from")
    if replay and own:
        index = min(own)
        raise replay_beside(f"seed={own[index]!r} gives branch {index} its own")


def each_sampling(sampling: object, count: int) -> list[object]:
    if isinstance(sampling, (list, tuple)):
        if len(sampling) != count:
            raise InvalidRequest(f"{len(sampling)} samplings for {count} branches; give one for all, or one each")
        return list(sampling)
    return [sampling] * count


def check_policy(policy: LoadPolicy) -> LoadPolicy:
    if policy not in ("exact", "fast"):
        raise InvalidRequest(f"policy={policy!r}: must be 'exact' or 'fast' (the weights' version is policy_version)")
    return policy


def check_mode(snapshot: SnapshotMode) -> SnapshotMode:
    if snapshot not in ("behind", "before", "never"):
        raise InvalidRequest(f"snapshot={snapshot!r}: must be 'behind', 'before' or 'never'")
    return snapshot


def check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if not isinstance(value, int) or value < 1:
            raise InvalidRequest(f"{name}={value!r}: must be an integer of at least 1")
