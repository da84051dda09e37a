"""The other arms, run where the engine is: its own batch over its own cache, and prefilling again. Nothing of the pool.

These are called in a worker's process (`module:function`) and give plain values. In vLLM they are plain requests, as
any program of vLLM's own sends them; in an embedded engine one session's forks, generated as one batch.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any

from thaw.bench.sample import tokens_digest
from thaw.core.sampling import Sampling
from thaw.engines.base import Completion, Engine, GenerateRequest, Handle, SessionRef

_READ: dict[str, tuple[Any, ...]] = {}
"""What this process has read for `native`, by the run's name."""


def read(engine: Engine, *, name: str, trunk: Sequence[int]) -> None:
    """Prefill the trunk, so that the engine has it in its own cache."""
    if _is_vllm(engine):
        from thaw.bench.vllm.arms import read_trunk
        from thaw.bench.vllm.plain import beside

        plain, salt = beside(engine), f"bench:{secrets.token_hex(16)}"
        read_trunk(plain, tuple(trunk), salt)
        _READ[name] = (plain, salt, tuple(trunk))
    else:
        _READ[name] = (_prefilled(engine, trunk),)


def forget(engine: Engine, *, name: str) -> None:
    """Keep nothing more of what was read under that name."""
    kept = _READ.pop(name, ())
    if kept and not _is_vllm(engine):
        engine.close_session(kept[0])


def native(
    engine: Engine, *, name: str, suffixes: Sequence[Sequence[int]], max_tokens: int, num_wanted: int
) -> dict[str, Any]:
    """The same branches by the engine's own prefix cache."""
    if _is_vllm(engine):
        plain, salt, trunk = _READ[name]
        return _plain(plain, trunk, salt, suffixes, max_tokens, num_wanted)
    return _batch(engine, _READ[name][0], suffixes, max_tokens, num_wanted, time.monotonic(), 0)


def again(
    engine: Engine, *, trunk: Sequence[int], suffixes: Sequence[Sequence[int]], max_tokens: int
) -> dict[str, Any]:
    """The trunk prefilled again, nothing of it cached, and the branches on it."""
    if _is_vllm(engine):
        from thaw.bench.vllm.plain import beside

        salt = f"bench:{secrets.token_hex(16)}"
        return _plain(beside(engine), tuple(trunk), salt, suffixes, max_tokens, 0, first=True)
    began = time.monotonic()
    session = _prefilled(engine, trunk)
    try:
        return _batch(engine, session, suffixes, max_tokens, 0, began, len(trunk))
    finally:
        engine.close_session(session)


def _is_vllm(engine: Engine) -> bool:
    return engine.info.name == "vllm"


def _prefilled(engine: Engine, trunk: Sequence[int]) -> SessionRef:
    session = engine.open(seed=7)
    engine.append(session, list(trunk)).result()
    return session


def _batch(
    engine: Engine, session: SessionRef, suffixes: Sequence[Sequence[int]], max_tokens: int, num_wanted: int,
    began: float, prefilled: int,
) -> dict[str, Any]:  # fmt: skip
    sampling = Sampling(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    kids = engine.fork(session, len(suffixes)).result()
    requests = [
        GenerateRequest(session=kid, prompt=tuple(ids), sampling=sampling)
        for kid, ids in zip(kids, suffixes, strict=True)
    ]
    handle = engine.generate(requests)
    first_s = _until_all_began(handle, len(kids), began)
    done = handle.result()
    total_s = time.monotonic() - began
    for kid in kids:
        engine.close_session(kid)
    return {
        "first_token_s": first_s, "total_s": total_s, "wanted": num_wanted * len(done),
        "prompt": sum(c.usage.num_prompt_tokens for c in done),
        "cached": sum(c.usage.num_cached_tokens for c in done) if num_wanted else 0,
        "prefilled": prefilled + sum(c.usage.num_prefilled_tokens for c in done),
        "tokens": tokens_digest([c.token_ids for c in done]),
    }  # fmt: skip


def _until_all_began(handle: Handle[list[Completion]], count: int, began: float) -> float:
    waiting = set(range(count))
    for delta in handle:
        if delta.token_ids:
            waiting.discard(delta.index)
        if not waiting:
            break
    return time.monotonic() - began


def _plain(
    plain: Any, trunk: tuple[int, ...], salt: str, suffixes: Sequence[Sequence[int]], max_tokens: int, num_wanted: int,
    *, first: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """`first`: the trunk is read by a request of its own, so that the branches share what it leaves in the cache."""
    from thaw.bench.sample import Ask
    from thaw.bench.vllm.arms import plain_children, read_trunk

    began = time.monotonic()
    if first:
        read_trunk(plain, trunk, salt)
    before = time.monotonic() - began
    ask = Ask(n=len(suffixes), suffixes=tuple(map(tuple, suffixes)), max_tokens=max_tokens, temperature=0.0)
    sample = plain_children(plain, trunk, salt, ask, num_wanted=num_wanted)
    hits = sample.hits
    assert hits is not None
    return {
        "first_token_s": before + sample.values["first_token_s"], "total_s": before + sample.values["total_s"],
        "wanted": hits.num_wanted_tokens, "prompt": hits.num_prompt_tokens,
        "cached": hits.num_cached_tokens if num_wanted else 0,
        "prefilled": hits.num_prefilled_tokens + (len(trunk) if first else 0), "tokens": sample.outputs["tokens"],
    }  # fmt: skip
