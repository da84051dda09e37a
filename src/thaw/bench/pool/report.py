"""What a run of `thaw bench pool` asks of its rounds: the arms' words, numbers, checks and goals. No measuring here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from thaw import receipt as r
from thaw.bench.rounds import arms_of
from thaw.bench.sample import Sample

Measured = Mapping[str, Sequence[tuple[int, Sample]]]
WORDS = {
    "same": (
        "round of {0}, worker that has the point",
        "pool.fork of a live session in its worker, from the call to the results; suffixes of 4 tokens",
    ),
    "native": (
        "{0} branches by the engine's own prefix cache",
        "the same branches in the same worker without the pool: vLLM's plain requests submitted at once, or one batch"
        " of an embedded engine's forks",
    ),
    "arena": (
        "round of {0}, second worker from the arena",
        "pool.fork of the same point in a worker that holds nothing of it: read from the arena, hashed, loaded, forked",
    ),
    "prefill": (
        "round of {0}, second worker prefilling again",
        "the same branches in that worker without the pool: its own prefill of the trunk, then the branches on it",
    ),
    "edge-same": (
        "round of {0} from inside a block, worker that has the point",
        "as same, from 11 tokens before the point's end, 4 tokens each: the bits at the fork boundary",
    ),
    "edge-arena": (
        "round of {0} from inside a block, second worker",
        "the same in the worker that holds nothing of it; both run the same tokens, so their batches have one shape",
    ),
    "cold": ("round of {0}, cold boot", "a fresh process: boot, prefill, the branches"),
    "boot-pool": ("boot of a pool of one worker", "from the call until it can take a round"),
    "boot-engine": ("boot of the engine alone", "from the start of a fresh process until it is loaded"),
    "pressure-first": (
        "first rounds under pressure",
        "a round from each point right after it was read; a row is one pass through all points",
    ),
    "pressure-native-first": (
        "first branches under pressure, the engine's own prefix cache",
        "the same without the pool",
    ),
    "pressure": (
        "returns under pressure",
        "a round from each point, in shuffled order, in a worker whose KV pool holds a part of the points; a row is one"
        " sweep through all of them",
    ),
    "pressure-native": (
        "returns under pressure, the engine's own prefix cache",
        "the same branches in the same worker without the pool, found by vLLM's prefix cache (LRU) or prefilled again",
    ),
    "queue": (
        "one point of those queued at once",
        "each row a point: seconds from the first submission to its first and last starts and ends",
    ),
}
ORDER = tuple(WORDS)
MAX_SAME, MAX_ARENA, MAX_BOOT, MIN_PRESSURE = 1.02, 0.5, 1.05, 1.0


def arms(measured: Measured) -> tuple[r.Arm, ...]:
    return arms_of(measured, _place, _words)


def derived(measured: Measured) -> list[r.Derived]:
    out = []
    for name in sorted(measured, key=_place):
        title = _words(name)[0]
        if name.startswith("boot"):
            out.append(r.median(f"{name}.s", title, "s", _value(name, "boot_s")))
        elif name.startswith("pressure"):
            for value, said in (("p50_first_s", "first tokens, median"), ("p95_first_s", "first tokens, p95")):
                out.append(r.median(f"{name}.{value[:3]}", f"{title}: {said}", "s", _value(name, value)))
            if not name.endswith("-first"):
                said = f"{title}: tokens prefilled again in a sweep"
                out.append(r.median(f"{name}.recomputed", said, "tokens", _value(name, "recomputed")))
        elif name == "queue":
            for value in ("first_start_s", "median_end_s", "p95_end_s", "last_end_s"):
                said = f"{title}: {value[:-2].replace('_', ' ')}"
                out.append(r.median(f"queue.{value}", said, "s", _value(name, value)))
        else:
            out.append(r.median(f"{name}.first", f"{title}: first tokens", "s", _value(name, "first_token_s")))
            out.append(r.median(f"{name}.total", f"{title}: all tokens", "s", _value(name, "total_s")))
    return out + list(_ratios(measured))


def _ratios(measured: Measured) -> Iterator[r.Derived]:
    for name in sorted(measured, key=_place):
        kind, _, n = name.partition(".")
        for base, other, text in (
            ("same", "native", "a round of {0} in the same worker takes × the engine's own prefix cache"),
            ("arena", "prefill", "a round of {0} in a second worker from the arena takes × prefilling there again"),
            ("arena", "cold", "a round of {0} in a second worker takes × a cold boot"),
        ):
            if kind == base and f"{other}.{n}" in measured:
                for what, value in (("first", "first_token_s"), ("total", "total_s")):
                    said = f"{text.format(n)}, to the {'first tokens' if what == 'first' else 'last token'}"
                    over, under = _value(name, value), _value(f"{other}.{n}", value)
                    yield r.ratio(f"{base}-{other}.{n}.{what}", said, over, under)
    if {"pressure", "pressure-native"} <= set(measured):
        for value, said in (("p50_first_s", "median"), ("p95_first_s", "95th percentile")):
            text = f"under pressure first tokens come × sooner than by the engine's own prefix cache, {said}"
            over, under = _value("pressure-native", value), _value("pressure", value)
            yield r.ratio(f"gain.pressure.{value[:3]}", text, over, under)
    if {"boot-pool", "boot-engine"} <= set(measured):
        text = "booting a pool of one worker takes × booting the engine alone"
        yield r.ratio("boot", text, _value("boot-pool", "boot_s"), _value("boot-engine", "boot_s"))


def checks(measured: Measured, *, native_equal: bool) -> list[r.Check]:
    """`native_equal`: whether the engine's own batch is of the same shape and bits, so that tokens must be equal."""
    out = []
    for name in sorted(measured, key=_place):
        title, (kind, _, n) = _words(name)[0], name.partition(".")
        if kind in ("same", "arena", "edge-same", "edge-arena", "pressure-first", "pressure"):
            out.append(r.all_hit(f"hit.{name}", f"{title}: nothing prefilled again", name))
        if kind == "pressure" and "pressure-first" in measured:
            for output in ("first_logprobs", "logprobs", "tokens"):
                out.append(_equal(name, "pressure-first", title, "the first rounds'", output, promised=True))
        if kind == "arena" and f"same.{n}" in measured:
            for output in ("first_logprobs", "tokens"):
                out.append(_equal(name, f"same.{n}", title, "the first worker's", output, promised=native_equal))
        if kind == "edge-arena" and f"edge-same.{n}" in measured:
            for output in ("first_logprobs", "logprobs", "tokens"):
                out.append(_equal(name, f"edge-same.{n}", title, "the first worker's", output, promised=True))
        if kind == "same" and f"native.{n}" in measured:
            out.append(_equal(name, f"native.{n}", title, "the engine's own", "tokens", promised=native_equal))
    return out


def _equal(arm: str, reference: str, title: str, whose: str, output: str, *, promised: bool) -> r.Check:
    text = f"{title}: {output} equal {whose}, bit for bit"
    return r.equal_outputs(f"same-{output}.{arm}.{reference}", text, arm, reference, output, promised=promised)


def goals(numbers: Sequence[r.Derived]) -> list[r.Goal]:
    out = []
    for number in numbers:
        name = number.name
        kind, n, _ = name.split(".") if name.count(".") == 2 else (name, "", "")
        if kind == "same-native" and name.endswith(".total"):
            text = f"a round of {n} costs at most {MAX_SAME} × the engine's own"
            out.append(r.at_most(name, text, name, MAX_SAME))
        if kind == "arena-prefill" and name.endswith(".total"):
            text = f"a round of {n} in a second worker takes at most {MAX_ARENA} × prefilling there"
            out.append(r.at_most(name, text, name, MAX_ARENA))
        if name == "pressure.recomputed":
            out.append(r.at_most(name, "under pressure nothing is prefilled again", name, 0))
        if name == "gain.pressure.p95":
            text = "under pressure the 95th percentile of first tokens is better than the engine's own"
            out.append(r.at_least(name, text, name, MIN_PRESSURE))
        if name == "boot":
            out.append(r.at_most(name, f"a pool boots in at most {MAX_BOOT} × the engine's own time", name, MAX_BOOT))
    return out


NOTES = (
    "Arms that are compared take turns in one run, in an order that is shuffled and then reversed, and each ran once"
    " before without a record; ratios are of arms in one round. The round in the worker that has the point and the"
    " engine's own batch alternate by themselves (same_rounds), the other arms after them. Cold boots ran fewer times,"
    " for the time they take.",
    "Each arm begins settle_s after the one before: a worker's threads spin for a while after its last step, and what"
    " runs in the other worker then shares the cores with them.",
    "Branches are greedy, with suffixes of their own. Plain requests carry a cache_salt of their own, as sessions do.",
    "Bits are promised at equal batch shape. A point at a block's end is found whole in vLLM's prefix cache, while"
    " a worker that loaded it runs its last token again: the batches differ by a token. The edge arms have one shape.",
    "Both workers share the machine's cores; while one is measured the other one is idle.",
    "Points at once: both workers compute at the same time, so on a CPU each vLLM has cores of its own"
    " (VLLM_CPU_OMP_THREADS_BIND), where there are enough.",
    "The capture of the point into the arena was done before the rounds; its time is the parameter capture_s.",
    "Under pressure the two arms run one after the other, each with the KV pool to itself, the first of them in turn;"
    " a row's percentiles are over the rounds of one sweep. The engine's own offload tier needs a GPU, and is an arm of"
    " `thaw bench vllm`.",
)


def _words(name: str) -> tuple[str, str]:
    kind, _, n = name.partition(".")
    title, text = WORDS[kind]
    return title.format(n), text.format(n)


def _place(name: str) -> tuple[int, int]:
    kind, _, n = name.partition(".")
    return ORDER.index(kind), int(n) if n else 0


def _value(arm: str, value: str) -> r.Term:
    return r.Term(arm=arm, value=value)
