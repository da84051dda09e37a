"""A small receipt to take apart in tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from thaw import receipt as r
from thaw.core.ids import digest

MACHINE = r.Machine(cpu="test cpu", cores=2, memory_nbytes=1 << 34, system="Linux x86_64")
MODEL = r.Model(name="m", architecture="Fake", dtype="uint8", identity=digest(b"m"), kv_token_nbytes=32)


def sample(slow: tuple[float, ...] = (2.0, 2.2, 1.9), fast: tuple[float, ...] = (0.1, 0.11, 0.09)) -> r.Receipt:
    """Two arms, one number of each kind, one check of each kind, two goals (both held)."""
    return r.make(
        kind="bench.test",
        command="thaw bench test --rounds 3",
        versions={"thaw": "0.0.1"},
        machine=MACHINE,
        model=MODEL,
        parameters={"rounds": 3, "seed": 7, "scale": 1.5, "quick": False, "note": None},
        arms=(_arm("slow", slow, cached=0), _arm("fast", fast, cached=40)),
        derived=(
            r.median("fast.first", "first token of fast", "s", r.Term(arm="fast", value="first_token_s")),
            r.ratio("gain", "fast is sooner", _first("slow"), _first("fast")),
            r.quotient("part", "less a part", "share", _first("slow", minus="own_s"), _first("slow")),
        ),
        checks=(
            r.equal_outputs("same", "same tokens", "fast", "slow", "tokens", promised=True),
            r.all_hit("hit", "all tokens found", "fast"),
        ),
        goals=(
            r.at_least("gain", "at least 5 times sooner", "gain", 5.0),
            r.at_most("soon", "under a second", "fast.first", 1.0),
        ),
        notes=("made up",),
        time_s=0.0,
    )


def _first(arm: str, minus: str | None = None) -> r.Term:
    return r.Term(arm=arm, value="first_token_s", minus=minus)


def _arm(name: str, seconds: tuple[float, ...], *, cached: int) -> r.Arm:
    rounds = tuple(
        r.Round(
            pair=i,
            values={"first_token_s": s, "own_s": s / 4},
            stages_s={"load": s / 2},
            hits=r.Hits(
                num_prompt_tokens=44,
                num_wanted_tokens=cached,
                num_cached_tokens=cached,
                num_prefilled_tokens=44 - cached,
            ),
            outputs={"tokens": digest(b"tokens")},
        )
        for i, s in enumerate(seconds)
    )
    return r.Arm(name=name, title=f"{name} arm", text="from start to first token", rounds=rounds)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """(path, value) of every leaf of a JSON value."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from places(inner, (*path, key))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from places(inner, (*path, i))
    else:
        yield path, value


def put(value: Any, path: tuple[Any, ...], new: Any) -> None:
    for step in path[:-1]:
        value = value[step]
    value[path[-1]] = new
