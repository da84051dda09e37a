"""A crossing from its first engine to its last: one process each, one repository, and a receipt of what was seen."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

import thaw
from thaw import receipt as r
from thaw.bench.cross.options import Arrived, CrossBenchOptions, Distance, Leg
from thaw.core.errors import EngineDied, TimedOut
from thaw.data.fresh_process import with_this_thaw
from thaw.engines.registry import kind_of
from thaw.receipt.machine import software, this_machine

NOTES = (
    "Each engine runs in a process of its own, takes up `main` from disk, writes a turn and commits; the next goes on.",
    "kv: a digest of every token's keys and values, by layer and head: as stored, and as the receiver captures them "
    "again out of its own memory.",
    "The likeliest next tokens at the points, computed by the receiver on the KV it was given, against what the giver "
    "saw there (against_giver), and against the receiver on KV that it prefilled itself (against_own). noise: the "
    "latter, a hit in its own cache, against its own prefill of the same tokens; no other engine is in that number.",
)


def run(options: CrossBenchOptions, say: Callable[[str], None]) -> r.Receipt:
    """Run it and seal the receipt. Raises `EngineDied` with what a process said last, `TimedOut`."""
    with tempfile.TemporaryDirectory(prefix="thaw-cross-") as folder:
        repository = Path(folder) / "repo"
        thaw.init(repository).close()
        legs = [_leg(options, number, repository, say) for number in range(len(options.route))]
    return _receipt(options, legs)


def _leg(options: CrossBenchOptions, number: int, repository: Path, say: Callable[[str], None]) -> Arrived:
    engine = options.route[number]
    say(f"{engine} {'reads the document' if number == 0 else f'goes on from {options.route[number - 1]}'}")
    common = {"dtype": options.dtype} if options.dtype else {}
    load = {"model": options.model, **common, **options.engine_options.get(engine, {})}
    answer = repository.with_name(f"leg-{number}.json")
    leg = Leg(number=number, engine=engine, load=load, repository=str(repository), options=options, answer=str(answer))
    python = options.pythons.get(engine, sys.executable)
    try:
        done = subprocess.run(
            [python, "-m", "thaw.bench.cross.leg"], input=msgspec.json.encode(leg), capture_output=True,
            timeout=options.timeout_s, env=_environment(engine), check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise TimedOut(f"{engine} took over {options.timeout_s:g} s; allow more, or measure less") from None
    if done.returncode or not answer.exists():
        last = "\n".join(done.stderr.decode(errors="replace").strip().splitlines()[-5:])
        raise EngineDied(f"the process of {engine} ended with code {done.returncode}: {last}")
    return msgspec.json.decode(answer.read_bytes(), type=Arrived)


def _environment(engine: str) -> dict[str, str]:
    """This process's environment, with this thaw importable, and the engine content with a part of the memory."""
    return with_this_thaw({**kind_of(engine).modest_environment, **os.environ})


def _receipt(options: CrossBenchOptions, legs: Sequence[Arrived]) -> r.Receipt:
    arms: list[r.Arm] = []
    derived: list[r.Derived] = []
    checks: list[r.Check] = []
    for number, leg in enumerate(legs[1:], 1):
        name, title = f"{number}.{leg.engine}", f"{leg.giver} to {leg.engine}"
        arms += _arms(name, title, leg)
        text = f"{title}: KV captured out of the receiver equals what is stored, byte for byte"
        checks.append(r.equal_outputs(f"bytes.{name}", text, f"{name}.captured", f"{name}.stored", "kv", promised=True))
        checks.append(r.all_hit(f"hit.{name}", f"{title}: all cached, by the receiver's count", f"{name}.stored"))
        derived += _numbers(name, title)
    return r.make(
        kind="bench.cross",
        command=f"thaw bench cross --route {','.join(options.route)}{_dtype(options)}",
        versions={**software("msgspec"), **{leg.engine: leg.version for leg in legs}},
        machine=this_machine(None),
        model=legs[0].model,
        parameters={
            "route": " > ".join(options.route), "num_tokens": options.num_tokens, "turn_tokens": options.turn_tokens,
            "points": options.points, "top": options.top, "seed": options.seed,
            "dtype": legs[0].dtype,
            **{f"{leg.engine}.{name}": value for leg in legs for name, value in leg.numerics.items()},
        },
        arms=arms,
        derived=derived,
        checks=checks,
        notes=NOTES,
    )  # fmt: skip


def _dtype(options: CrossBenchOptions) -> str:
    return f" --dtype {options.dtype}" if options.dtype else ""


def _arms(name: str, title: str, leg: Arrived) -> list[r.Arm]:
    values = {"hydrate_s": leg.hydrate_s, "read_nbytes": float(leg.nbytes)}
    seen = (("against_giver", leg.against_giver), ("against_own", leg.against_own), ("noise", leg.noise))
    for what, found in seen:
        assert found is not None
        values |= _values(what, found)
    hits = r.Hits(
        num_prompt_tokens=leg.num_kv, num_wanted_tokens=leg.num_kv, num_cached_tokens=leg.num_cached,
        num_prefilled_tokens=leg.num_kv - leg.num_cached,
    )  # fmt: skip
    stored = r.Round(pair=0, values=values, hits=hits, outputs={"kv": leg.taken})
    captured = r.Round(pair=0, values={"num_kv": float(leg.num_kv)}, outputs={"kv": leg.given})
    return [
        r.Arm(name=f"{name}.stored", title=title, text="hydrate from disk, and look", rounds=(stored,)),
        r.Arm(name=f"{name}.captured", title=f"{title}, again", text="capture what was hydrated", rounds=(captured,)),
    ]


def _values(what: str, found: Distance) -> dict[str, float]:
    return {
        f"{what}_largest": found.largest, f"{what}_mean": found.mean, f"{what}_other_first": float(found.other_first)
    }  # fmt: skip


def _numbers(name: str, title: str) -> list[r.Derived]:
    arm = f"{name}.stored"
    return [
        r.median(f"hydrate.{name}", f"{title}: hydrate", "s", r.Term(arm=arm, value="hydrate_s")),
        *(
            r.median(f"{what}.{name}", f"{title}: {text}", "nat", r.Term(arm=arm, value=f"{what}_largest"))
            for what, text in (
                ("against_giver", "largest difference of a log probability to the giver's"),
                ("against_own", "largest difference to the receiver on KV of its own"),
                ("noise", "the receiver's own hit against its own prefill"),
            )
        ),
    ]
