"""What a run of `thaw bench vllm` asks of its rounds: the arms' words, numbers, checks and goals. No measuring here.

Everything follows from the names of the arms that were measured, so a run of some parts gives a receipt of those.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from thaw import receipt as r
from thaw.bench.rounds import arms_of
from thaw.bench.sample import Sample
from thaw.bench.vllm import report_more as more
from thaw.core.errors import InvalidRequest

Measured = Mapping[str, Sequence[tuple[int, Sample]]]
"""By arm: (pair number, sample)."""

SINGLE = {
    "live": (
        "child of a live session of {0} tokens",
        "the engine that read the session: fork, suffix of 4 tokens, first token",
    ),
    "hydrate": (
        "hydrate of {0} tokens in another process",
        "an engine that never saw the session: read the commit and hash it, load it, fork, suffix of 4 tokens, first"
        " token",
    ),
    "prefill": (
        "prefill of {0} tokens again",
        "the same engine, a plain request of the same tokens and suffix, nothing of it cached, first token",
    ),
    "fork": ("fork of {0}, {1}", "{0} children of a live session, in an engine with room: fork, suffixes, all tokens"),
    "native": (
        "{0} plain requests, {1}",
        "the same children as plain requests submitted at once; vLLM's prefix cache has their common tokens",
    ),
    "native-logprobs": (
        "{0} plain requests with log probabilities, {1}",
        "as native, and every token with its log probability, as a session's tokens have it",
    ),
    "native-own": ("{0} plain requests, {1} by vLLM", "as native, with vLLM's own seeded sampling"),
    "idle": ("plain requests, thaw idle", "a batch of plain requests in an engine with thaw's connector"),
    "stock": ("plain requests, no thaw", "the same batch in an engine with nothing of thaw"),
}
PRESSURE = {
    "pressure.thaw.first": ("first visits, thaw", "children of a session that was just read, until all have a token"),
    "pressure.native.first": ("first visits, vLLM's cache", "the same as plain requests, right after a plain prefill"),
    "pressure.thaw": (
        "returns, thaw",
        "children of a parked session whose blocks others have used since, until all have a token",
    ),
    "pressure.native": ("returns, vLLM's cache", "the same as plain requests to vLLM's prefix cache (LRU)"),
    "pressure.offload.first": ("first visits, vLLM's offload tier", "the same in an engine with vLLM's offload tier"),
    "pressure.offload": ("returns, vLLM's offload tier", "the same as plain requests, found in vLLM's own host tier"),
}
ROUNDS = ("fork", "native", "native-logprobs", "native-own")
ORDER = ("live", "hydrate", "prefill", *ROUNDS, "pressure", "idle", "stock", *more.METHODS)
OTHERS = {
    "native-logprobs": "plain requests with log probabilities",
    "native-own": "plain requests that vLLM samples itself, without log probabilities",
}
"""What a fork is compared with besides `native`."""
PROMISED = {"last": "vLLM's own prefix cache", "native-logprobs": "vLLM's own prefix cache with log probabilities"}
"""Which of a fork's ratios have a goal, and what it is against."""
MAX_FORK = 1.02
MIN_PRESSURE = 3.0
MIN_OFFLOAD = 1.2
MIN_IDLE = 0.99


def arms(measured: Measured) -> tuple[r.Arm, ...]:
    return arms_of(measured, _place, _words)


def derived(measured: Measured) -> list[r.Derived]:
    names = sorted(measured, key=_place)
    out: list[r.Derived] = []
    for name in names:
        if _method(name) in more.METHODS:
            out += more.derived(name)
            continue
        if name in ("idle", "stock"):
            out.append(
                r.median(f"{name}.rate", f"{_words(name)[0]}: generated", "tokens/s", _value(name, "tokens_per_s"))
            )
            continue
        out.append(r.median(f"{name}.first", f"{_words(name)[0]}: first token", "s", _value(name, "first_token_s")))
        if _method(name) in ROUNDS:
            out.append(r.median(f"{name}.total", f"{_words(name)[0]}: all tokens", "s", _value(name, "total_s")))
        if name.startswith("pressure"):
            text = f"{_words(name)[0]}: tokens prefilled again"
            out.append(r.median(f"{name}.recomputed", text, "tokens", _value(name, "recomputed")))
    return [*out, *_ratios(measured), *more.ratios({name: measured[name] for name in names})]


def _ratios(measured: Measured) -> Iterator[r.Derived]:
    for name in sorted(measured, key=_place):
        method, _, rest = name.partition(".")
        if method == "hydrate" and f"prefill.{rest}" in measured:
            text = f"prefilling {rest} tokens again takes × hydrating them, to the first token"
            yield r.ratio(f"gain.hydrate.{rest}", text, _first(f"prefill.{rest}"), _first(name))
        if method == "fork" and f"native.{rest}" in measured:
            text = f"{_words(name)[0]} takes × plain requests, to the {{}} token"
            for what, value in (("last", "total_s"), ("first", "first_token_s")):
                over, under = _value(name, value), _value(f"native.{rest}", value)
                yield r.ratio(f"cost.{name}.{what}", text.format(what), over, under)
        for other, whose in OTHERS.items():
            if method == "fork" and f"{other}.{rest}" in measured:
                text = f"{_words(name)[0]} takes × {whose}, to the last token"
                over, under = _value(name, "total_s"), _value(f"{other}.{rest}", "total_s")
                yield r.ratio(f"cost.{name}.{other}", text, over, under)
        if method == "native-own":
            text = f"thaw's choice of tokens takes × vLLM's own, {_words(name)[0]}, to the last token"
            over, under = _value(f"native.{rest}", "total_s"), _value(name, "total_s")
            yield r.ratio(f"cost.sampler.{rest}", text, over, under)
    if {"pressure.thaw", "pressure.native"} <= set(measured):
        text = "returning by vLLM's cache takes × returning to a parked session, to the first tokens"
        yield r.ratio("gain.pressure", text, _first("pressure.native"), _first("pressure.thaw"))
    if {"pressure.thaw", "pressure.offload"} <= set(measured):
        text = "returning by vLLM's offload tier takes × returning to a parked session, to the first tokens"
        yield r.ratio("gain.pressure.offload", text, _first("pressure.offload"), _first("pressure.thaw"))
    if {"idle", "stock"} <= set(measured):
        text = "throughput of plain requests with thaw idle, in that without thaw"
        yield r.ratio("cost.idle", text, _value("idle", "tokens_per_s"), _value("stock", "tokens_per_s"))


def checks(measured: Measured) -> list[r.Check]:
    out = []
    for name in sorted(measured, key=_place):
        title, (method, _, rest) = _words(name)[0], name.partition(".")
        if method in ("live", "hydrate", "fork") or name.startswith("pressure.thaw"):
            out.append(r.all_hit(f"hit.{name}", f"{title}: nothing prefilled again", name))
        if method == "hydrate" and f"live.{rest}" in measured:
            out += _equal(name, f"live.{rest}", title, "the live session's", ("first_logprobs",), promised=True)
        if name == "pressure.thaw":
            outputs = ("first_logprobs", "tokens", "logprobs")
            out += _equal(name, "pressure.thaw.first", title, "the first visits'", outputs, promised=True)
        if method == "fork" and f"native.{rest}" in measured:
            out += _equal(name, f"native.{rest}", title, "plain requests'", ("tokens",), promised=False)
        out += more.checks(name)
    return out


def _equal(
    arm: str, reference: str, title: str, whose: str, outputs: Sequence[str], *, promised: bool
) -> list[r.Check]:
    return [
        r.equal_outputs(
            f"same-{output}.{arm}", f"{title}: {output} equal {whose}, bit for bit", arm, reference, output,
            promised=promised,
        )
        for output in outputs
    ]  # fmt: skip


def goals(numbers: Sequence[r.Derived]) -> list[r.Goal]:
    out: list[r.Goal] = []
    for number in numbers:
        name = number.name
        out += more.goals(number)
        if name.startswith("gain.hydrate."):
            out.append(r.at_least(name, f"hydrating {name[13:]} tokens is sooner than prefilling again", name, 1))
        if name.startswith("cost.fork."):
            n, kind, what = name.removeprefix("cost.fork.").split(".")
            if what in PROMISED:
                text = f"{n} {kind} forks cost at most {MAX_FORK} × {PROMISED[what]}"
                out.append(r.at_most(name, text, name, MAX_FORK))
        if name == "pressure.thaw.recomputed":
            out.append(r.at_most(name, "under pressure nothing is prefilled again", name, 0))
        if name == "gain.pressure":
            text = f"under pressure first tokens come {MIN_PRESSURE:g} × sooner than by vLLM's cache"
            out.append(r.at_least(name, text, name, MIN_PRESSURE))
        if name == "gain.pressure.offload":
            text = f"under pressure first tokens come {MIN_OFFLOAD:g} × sooner than by vLLM's offload tier"
            out.append(r.at_least(name, text, name, MIN_OFFLOAD))
        if name == "cost.idle":
            out.append(r.at_least(name, f"idle, thaw leaves {MIN_IDLE} of the throughput", name, MIN_IDLE))
    return out


NOTES = (
    "Arms that are compared take turns in one run, in an order that is shuffled and then reversed, each ran once before"
    " without a record; ratios are of arms in one round. Forks of one number and kind alternate with their own other"
    " arms alone. The two arms of pressure run one after the other instead,"
    " each with the pool to itself; pairs are visits of the same session in the same order.",
    "Plain requests carry a cache_salt as a session does, so neither arm finds blocks of the other.",
    "num_cached_tokens is vLLM's own count. Of children that start in one step vLLM counts blocks as cached that the"
    " first of them fills in that step: under pressure one child in four of vLLM's own prefills the session again.",
    "Children of the pressure arms are greedy; the first visit to a session comes right after it was read, when the"
    " engine's blocks still hold it.",
    "A round of the idle part is a boot of both engines, which of them first changing from one to the next; its figures"
    " are medians over the batches of that boot.",
    "On a CPU, vLLM with any connector computes on one core less than without one; here both engines of the idle part"
    " keep the same number of cores free.",
    "The engine that hydrates was booted after the one that wrote the commits had ended; packs are in the page cache.",
    *more.NOTES,
)


def joined(receipts: Sequence[r.Receipt], *, command: str) -> r.Receipt:
    """One receipt of the rounds of several, which were measured one after another. Raises `InvalidRequest` where they
    are of different engines or models."""
    first = receipts[0]
    if any((one.versions, one.model) != (first.versions, first.model) for one in receipts):
        raise InvalidRequest("the receipts are of different engines or models; measure all of it anew")
    measured: dict[str, list[tuple[int, Sample]]] = {}
    for one in receipts:
        for arm in one.arms:
            measured.setdefault(arm.name, []).extend((taken.pair, Sample.of_round(taken)) for taken in arm.rounds)
    numbers = derived(measured)
    return r.make(
        kind=first.kind, command=command, versions=first.versions, machine=first.machine, model=first.model,
        parameters={**first.parameters, "idle_boots": len(receipts)}, arms=arms(measured), derived=numbers,
        checks=checks(measured), goals=goals(numbers) if any(one.goals for one in receipts) else (), notes=first.notes,
    )  # fmt: skip


def _words(name: str) -> tuple[str, str]:
    if name in PRESSURE:
        return PRESSURE[name]
    if _method(name) in more.METHODS:
        return more.words(name)
    method, *details = name.split(".")
    title, text = SINGLE[method]
    return title.format(*details), text.format(*details)


def _place(name: str) -> tuple[int, int, str]:
    method, *details = name.split(".")
    return ORDER.index(method), int(details[0]) if details and details[0].isdigit() else 0, name


def _method(name: str) -> str:
    return name.partition(".")[0]


def _first(arm: str) -> r.Term:
    return _value(arm, "first_token_s")


def _value(arm: str, value: str) -> r.Term:
    return r.Term(arm=arm, value=value)
