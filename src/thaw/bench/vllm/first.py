"""First tokens of children whose KV is in host memory alone, against what that must cost at least where nothing
overlaps: the load by itself, and then the same children with the KV on the device."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import msgspec

from thaw.bench.rounds import Rounds
from thaw.bench.sample import Ask, Sample
from thaw.bench.vllm.arms import Document
from thaw.bench.vllm.hydrate import live_child
from thaw.bench.vllm.inside import copy_alone
from thaw.bench.vllm.options import Options
from thaw.repo import Repository, Session

if TYPE_CHECKING:
    from thaw.bench.vllm.plain import Plain
    from thaw.engines.served.client.engine import ServedEngine


def measure(
    rounds: Rounds, options: Options, repo: Repository, engine: ServedEngine, plain: Plain, document: Document
) -> None:
    for length in options.lengths:
        rounds.progress(f"reading {length} tokens")
        with repo.session(seed=options.seed) as live:
            live.append(token_ids=document.session(length))
            for n in options.first_children:
                ask = Ask(n=n, suffixes=document.suffixes(n), max_tokens=1, temperature=0.0)
                arms = {
                    f"loaded.{length}.{n}": partial(_loaded, engine, plain, live, ask),
                    f"load-and-there.{length}.{n}": partial(_load_and_there, engine, live, ask),
                }
                rounds.alternate(options.first_rounds, arms)


def _loaded(engine: ServedEngine, plain: Plain, live: Session, ask: Ask) -> Sample:
    """Children of a session of which the engine's blocks hold nothing. `loaded_tokens` is the engine's count."""
    plain.forget_all()
    return _counted(engine, live, ask)


def _load_and_there(engine: ServedEngine, live: Session, ask: Ask) -> Sample:
    """The load alone, and the children with everything in the engine's blocks; both by themselves."""
    live_child(live, ask)
    there = _counted(engine, live, ask)
    load = copy_alone(engine, "load", live.num_tokens, look=False).values["copy_s"]
    first = there.values["first_token_s"]
    values = {**there.values, "first_token_s": load + first, "load_s": load, "there_s": first}
    return msgspec.structs.replace(there, values=values, stages_s={"load": load, **there.stages_s})


def _counted(engine: ServedEngine, live: Session, ask: Ask) -> Sample:
    before = engine.stats()["loaded_tokens"]
    sample = live_child(live, ask)
    loaded = float(engine.stats()["loaded_tokens"] - before)
    return msgspec.structs.replace(sample, values={**sample.values, "loaded_tokens": loaded})
