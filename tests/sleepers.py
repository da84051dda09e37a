"""Sessions of an engine that sleeps between their turns, and what the same ones say where nothing sleeps."""

from __future__ import annotations

from thaw import Sampling
from thaw.repo import Repository, Session

PROMPT = [(7 * i + 3) % 256 for i in range(300)]
ANSWER = Sampling(temperature=0.8, max_tokens=6, ignore_eos=True)
CYCLES = 20


def family(repo: Repository) -> list[Session]:
    """A parent, its fork, and one that is parked between its turns."""
    trunk, parked = repo.session(seed=1), repo.session(seed=2)
    trunk.append(token_ids=PROMPT)
    parked.append(token_ids=PROMPT[9:])
    return [trunk, trunk.fork(1)[0], parked]


def turn(sessions: list[Session], i: int) -> list[tuple[object, ...]]:
    """What each says next, to the bit. What was read is not read again."""
    told = [one.generate(token_ids=[i + 5, 9], sampling=ANSWER) for one in sessions]
    assert all(one.usage.num_prefilled_tokens <= 3 for one in told)
    sessions[-1].park()
    return [(one.token_ids, one.logprobs) for one in told]


def undisturbed(repo: Repository, cycles: int) -> list[list[tuple[object, ...]]]:
    """By turns, what a family says in an engine that does not sleep meanwhile."""
    sessions = family(repo)
    told = [turn(sessions, i) for i in range(cycles)]
    for one in sessions:
        one.close()
    return told
