"""What a run of dma, first and gap asks of its rounds: words, numbers, checks and goals, as `report` for the others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from thaw import receipt as r
from thaw.bench.sample import Sample

Measured = Mapping[str, Sequence[tuple[int, Sample]]]

SINGLE = {
    "load": (
        "load of {0} tokens alone",
        "thaw's copy from pinned host memory into the engine's blocks, called and waited for in the worker",
    ),
    "save": (
        "save of {0} tokens alone",
        "thaw's copy from the engine's blocks into pinned host memory, called and waited for in the worker",
    ),
    "bus-in": (
        "{0} tokens over the bus, inward",
        "the bytes of the load, from the same host memory, in one copy to a buffer of the device's",
    ),
    "bus-out": (
        "{0} tokens over the bus, outward",
        "the bytes of the save, to the same host memory, in one copy from a buffer of the device's",
    ),
    "loaded": (
        "{1} hydrated of {0} tokens",
        "children of a session that is in pinned host memory alone: fork, suffix of 4 tokens, until all have a token",
    ),
    "load-and-there": (
        "the load of {0} tokens, and {1} with the KV there",
        "two measurements added: the load alone, and the same children with the session's KV in the engine's blocks",
    ),
}
GAPS = {
    "none": ("others alone", "the largest gap between tokens of one of the others, all of them decoding"),
    "admit": (
        "others beside a request that vLLM admits",
        "the same while a plain request is admitted whose tokens but the last few are in vLLM's own prefix cache",
    ),
    "capture": (
        "others beside a capture",
        "the same while a session as long, that decodes as well and was never captured, is committed",
    ),
    "hydrate": (
        "others beside a hydrate",
        "the same while a session as long is hydrated from its commit, and a child of it has its first token",
    ),
}
COPIES, FIRSTS = ("load", "save", "bus-in", "bus-out"), ("loaded", "load-and-there")
METHODS = (*COPIES, *FIRSTS, "gap")
MIN_SHARE = {"load": ("bus-in", 0.95), "save": ("bus-out", 0.90)}
NOTES = (
    "dma: the engine is idle. Each copy runs once before it is timed. The blocks are zeroed before a load, and read"
    " back and compared with what was loaded after it.",
    "first: before a load vLLM's prefix cache is reset, so that its blocks hold nothing of the session.",
    "gap: arrivals are those at the client, which is one process for the others and for thaw. A capture takes hundreds"
    " of steps, an admission a few, so more tokens are looked at beside a capture.",
)  # fmt: skip


def words(name: str) -> tuple[str, str]:
    method, *details = name.split(".")
    if method == "gap":
        return GAPS[details[0]]
    title, text = SINGLE[method]
    return title.format(*details), text.format(*details)


def derived(name: str) -> Iterator[r.Derived]:
    """Of one arm."""
    method, title = name.partition(".")[0], words(name)[0]
    if method in COPIES:
        yield r.median(f"{name}.time", f"{title}: takes", "s", r.Term(arm=name, value="copy_s"))
        yield r.median(f"{name}.rate", f"{title}: bytes a second", "bytes/s", r.Term(arm=name, value="rate"))
    elif method in FIRSTS:
        yield r.median(f"{name}.first", f"{title}: first tokens", "s", r.Term(arm=name, value="first_token_s"))
        loaded = r.Term(arm=name, value="loaded_tokens")
        yield r.median(f"{name}.loaded", f"{title}: tokens that the engine loaded", "tokens", loaded)
        if method == "load-and-there":
            yield r.median(f"{name}.load", f"{title}: the load", "s", r.Term(arm=name, value="load_s"))
            yield r.median(f"{name}.there", f"{title}: the children", "s", r.Term(arm=name, value="there_s"))
    else:
        for value, text in (("largest_gap_s", "largest gap"), ("step_s", "median gap"), ("event_s", "the event")):
            yield r.median(f"{name}.{value[:-2]}", f"{title}: {text}", "s", r.Term(arm=name, value=value))


def ratios(measured: Measured) -> Iterator[r.Derived]:
    for name in measured:
        method, _, rest = name.partition(".")
        if method in MIN_SHARE:
            bus, _ = MIN_SHARE[method]
            text = f"{words(name)[0]}: share of the bus's speed"
            yield r.ratio(f"share.{name}", text, _copy(f"{bus}.{rest}"), _copy(name))
        if method == "loaded":
            other, text = f"load-and-there.{rest}", f"{words(name)[0]}: first tokens take × load and KV there"
            over, under = (r.Term(arm=arm, value="first_token_s") for arm in (name, other))
            yield r.ratio(f"cost.{name}", text, over, under)
        if name in ("gap.capture", "gap.hydrate"):
            text = f"{words(name)[0]}: largest gap is × that beside an admission, and one step"
            over = r.Term(arm=name, value="largest_gap_s")
            yield r.ratio(f"cost.{name}", text, over, r.Term(arm="gap.admit", value="with_a_step_s"))
            inside = r.Term(arm=name, value="inside")
            yield r.median(f"inside.{name}", f"{words(name)[0]}: over before any of the others ended", "rounds", inside)


def checks(name: str) -> Iterator[r.Check]:
    method, _, rest = name.partition(".")
    if method == "load":
        text = f"{words(name)[0]}: the bytes in the blocks are those that were saved"
        yield r.equal_outputs(f"same-bytes.{name}", text, name, f"save.{rest}", "bytes", promised=True)
    if name in ("gap.admit", "gap.hydrate"):
        yield r.all_hit(f"hit.{name}", f"{words(name)[0]}: nothing prefilled again", name)
    if method == "loaded":
        yield r.all_hit(f"hit.{name}", f"{words(name)[0]}: nothing prefilled again", name)
        alone = rest.endswith(".1")  # siblings may begin in other steps than where nobody loads, so in other batches
        for output in ("tokens", "first_logprobs"):
            text = f"{words(name)[0]}: {output} equal those with the KV there, bit for bit"
            yield r.equal_outputs(f"same-{output}.{name}", text, name, f"load-and-there.{rest}", output, promised=alone)


def goals(number: r.Derived) -> Iterator[r.Goal]:
    kind, _, name = number.name.partition(".")
    method = name.partition(".")[0]
    if kind == "share":
        bound = MIN_SHARE[method][1]
        yield r.at_least(number.name, f"{words(name)[0]} at {bound} of the bus's speed", number.name, bound)
    if kind == "cost" and method == "loaded":
        text = f"{words(name)[0]}: first tokens no later than load and KV there"
        yield r.at_most(number.name, text, number.name, 1)
    if kind == "cost" and method == "gap":
        text = f"{words(name)[0]}: no gap larger than beside an admission, and one step"
        yield r.at_most(number.name, text, number.name, 1)
    if kind == "inside":
        yield r.at_least(number.name, f"{words(name)[0]}: the others decoded to its end", number.name, 1)


def _copy(arm: str) -> r.Term:
    return r.Term(arm=arm, value="copy_s")
