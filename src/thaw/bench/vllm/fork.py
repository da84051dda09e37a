"""Forks in an engine that has room, against vLLM's own prefix cache: same engine, same children, one right after the
other.

Nothing has to be brought back here, so thaw can only cost. Greedy children, and seeded ones whose tokens thaw's logits
processor chooses in both arms; `native-own` are seeded by vLLM itself. A session's tokens have log probabilities:
`native-logprobs` ask for theirs too, the others don't.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from thaw.bench.rounds import Rounds, Thunk
from thaw.bench.sample import Ask, Clock, Sample, children
from thaw.bench.vllm.arms import Document, fresh_salt, plain_children, read_trunk
from thaw.bench.vllm.options import Options
from thaw.core.sampling import Sampling, derive
from thaw.repo import Repository, Session

if TYPE_CHECKING:
    from thaw.bench.vllm.plain import Plain


def measure(rounds: Rounds, options: Options, repo: Repository, plain: Plain, document: Document) -> None:
    rounds.progress(f"reading {options.fork_tokens} tokens twice")
    trunk, salt = document.session(options.fork_tokens), fresh_salt()
    read_trunk(plain, trunk, salt)
    with repo.session(seed=options.seed) as live:
        live.append(token_ids=trunk)
        for n in options.children:
            for arms in _arms(options, live, plain, salt, document, n):
                rounds.alternate(options.rounds, arms)


def _arms(
    options: Options, live: Session, plain: Plain, salt: str, document: Document, n: int
) -> tuple[dict[str, Thunk], ...]:
    """Those that are compared, together: their difference is smaller than what a minute changes on a busy machine."""
    suffixes, trunk = document.suffixes(n), live.tokens
    greedy = Ask(n=n, suffixes=suffixes, max_tokens=options.child_tokens, temperature=0.0)
    seeded = Ask(n=n, suffixes=suffixes, max_tokens=options.child_tokens)
    native = partial(plain_children, plain, trunk, salt, num_wanted=live.num_kv)
    return (
        {
            f"fork.{n}.greedy": partial(_fork, live, greedy),
            f"native.{n}.greedy": partial(native, greedy),
            f"native-logprobs.{n}.greedy": partial(native, greedy, fields=_with_logprobs([{}] * n)),
        },
        {
            f"fork.{n}.seeded": partial(_fork, live, seeded),
            f"native.{n}.seeded": partial(native, seeded, fields=_as_thaw(live, seeded)),
            f"native-logprobs.{n}.seeded": partial(native, seeded, fields=_with_logprobs(_as_thaw(live, seeded))),
            f"native-own.{n}.seeded": partial(native, seeded, fields=_own(seeded)),
        },
    )


def _fork(live: Session, ask: Ask) -> Sample:
    return children(live, ask, Clock(), num_wanted=live.num_kv)


def _as_thaw(live: Session, ask: Ask) -> list[dict[str, Any]]:
    """Child i draws as child i of the fork does."""
    from thaw.bench.vllm.plain import as_thaw_samples

    sampling = Sampling(temperature=ask.temperature, max_tokens=ask.max_tokens, ignore_eos=True)
    start = live.num_tokens
    return [
        as_thaw_samples(sampling, seed=derive(live.seed, start, i), output_start=start + len(ask.suffixes[i]))
        for i in range(ask.n)
    ]


def _own(ask: Ask) -> list[dict[str, Any]]:
    return [{"temperature": ask.temperature, "seed": i} for i in range(ask.n)]


def _with_logprobs(fields: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of the chosen token alone."""
    return [{**one, "logprobs": 0} for one in fields]
