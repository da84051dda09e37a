"""What a bench run asks of its rounds: the arms' words, the numbers, the checks and the goals. No measuring here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from thaw import receipt as r
from thaw.bench.rounds import arms_of
from thaw.bench.sample import Sample

Measured = Mapping[str, Sequence[tuple[int, Sample]]]
"""By arm: (pair number, sample)."""

METHODS = {
    "live": ("live fork", "the engine that holds the session: fork, suffix, first token"),
    "hydrate-warm": (
        "hydrate, warm process",
        "a booted engine, the snapshot in the page cache: load and hash, fork, suffix",
    ),
    "hydrate-cold": (
        "hydrate, warm process, cold disk",
        "as hydrate-warm, its packs dropped from the page cache before",
    ),
    "hydrate-fresh": (
        "hydrate, fresh process",
        "from before the process is made: start, boot, load and hash, fork, suffix",
    ),
    "prefill-warm": ("prefill again, warm process", "thaw's engine reads all tokens again (once for all children)"),
    "prefill-stock": (
        "stock model's prefill, warm process",
        "the model's own forward pass, default attention, no thaw code",
    ),
    "prefill-fresh": (
        "cold start and prefill",
        "from before the process is made: start, boot, read all tokens, fork, suffix",
    ),
}
OTHERS = {
    "hydrate-read": ("hydrate's read, cold disk", "the session's blobs into fresh pages of the engine, hashed"),
    "plain-read": ("plain read, cold disk", "the packs' bytes into fresh memory, dropped from the page cache before"),
    "commit-write": (
        "commit's write",
        "the whole session into a pack: gather, hash, write, fsync, rename, fsync of the folder",
    ),
    "plain-write": ("plain write", "the same bytes: write, fsync, rename, fsync of the folder"),
    "pack-write": ("pack, written", "random blobs into a pack: hash, write, fsync, rename"),
    "file-write": ("file, written", "the same blobs into a plain file: write, fsync"),
    "pack-read": ("pack, read cold", "the pack's blobs into memory, hashed"),
    "file-read": ("file, read cold", "the plain file into memory"),
    "disk": ("forks on disk", "bytes of the repository with one snapshot, and after the forks were committed"),
    "memory": (
        "client memory while loading",
        "growth of a fresh process's peak memory during two hydrates; extra: less the KV",
    ),
}


def arms(measured: Measured) -> tuple[r.Arm, ...]:
    """The arms that were measured, in the order of the tables above."""
    return arms_of(measured, _place, _words)


def _place(name: str) -> tuple[int, int]:
    method, _, n = name.partition(".")
    return [*METHODS, *OTHERS].index(method), int(n or 0)


def _words(name: str) -> tuple[str, str]:
    method, _, n = name.partition(".")
    if method in OTHERS:
        return OTHERS[method]
    title, text = METHODS[method]
    who = "1 child" if n == "1" else f"{n} children"
    return f"{title}, {who}", f"{text}, until {'it has a token' if n == '1' else 'all have a token'}"


def derived(measured: Measured, children: int) -> list[r.Derived]:
    many, out = str(children), []
    for name in sorted((a for a in measured if _is_method(a)), key=_place):
        out.append(r.median(f"{name}.first", f"{_words(name)[0]}: first token", "s", _first(name)))
    for name in sorted((a for a in measured if _is_method(a) and a.endswith(f".{many}")), key=_place):
        total = r.Term(arm=name, value="total_s")
        out.append(r.median(f"{name}.total", f"{_words(name)[0]}: all tokens", "s", total))
    out += [r.ratio(name, text, _first(a), _first(b)) for name, text, a, b in _ratios(many) if {a, b} <= set(measured)]
    return out + _storage(measured)


def _ratios(many: str) -> list[tuple[str, str, str, str]]:
    """(name, words, arm above, arm below)."""
    return [
        ("gain.hydrate", "prefilling again takes × hydrating, to the first token", "prefill-warm.1", "hydrate-warm.1"),
        (
            "gain.hydrate-stock",
            "stock prefill takes × hydrating, to the first token",
            "prefill-stock.1",
            "hydrate-warm.1",
        ),
        ("gain.live", "prefilling again takes × forking live, to the first token", "prefill-warm.1", "live.1"),
        ("gain.cold-disk", "prefilling again takes × hydrating from a cold disk", "prefill-warm.1", "hydrate-cold.1"),
        (
            "gain.fresh",
            "cold start with prefill takes × a fresh process that hydrates",
            "prefill-fresh.1",
            "hydrate-fresh.1",
        ),
        ("children.live", f"first tokens of {many} live children take × those of one", f"live.{many}", "live.1"),
        (
            "children.hydrate",
            f"first tokens of {many} hydrated children take × those of one",
            f"hydrate-warm.{many}",
            "hydrate-warm.1",
        ),
        ("prefill", "thaw's own prefill takes × the stock model's", "prefill-warm.1", "prefill-stock.1"),
    ]


def _storage(measured: Measured) -> list[r.Derived]:
    out = []
    if "disk" in measured:
        total, snapshot = (
            r.Term(arm="disk", value="total_nbytes", minus="own_nbytes"),
            _value("disk", "snapshot_nbytes"),
        )
        text = "repository after the forks, less their own tokens, in snapshots"
        out.append(r.quotient("disk.forks", text, "snapshots", total, snapshot))
    if {"commit-write", "plain-write"} <= set(measured):
        over, under = _value("plain-write", "write_s"), _value("commit-write", "write_s")
        out.append(r.ratio("io.write", "speed of a commit's write, in plain writes with fsync", over, under))
    if {"hydrate-read", "plain-read"} <= set(measured):
        over, under = _value("plain-read", "read_s"), _value("hydrate-read", "read_s")
        out.append(r.ratio("io.read", "speed of a hydrate's cold read, in plain cold reads", over, under))
    for what in ("write", "read"):
        if f"pack-{what}" in measured:
            over, under = _value(f"pack-{what}", "mb_per_s"), _value(f"file-{what}", "mb_per_s")
            out.append(r.ratio(f"io.pack-{what}", f"speed of a pack's {what} alone, in plain files'", over, under))
    if "memory" in measured:
        extra = r.Term(arm="memory", value="extra_long_nbytes", minus="extra_short_nbytes")
        kv = r.Term(arm="memory", value="kv_long_nbytes", minus="kv_short_nbytes")
        out.append(r.quotient("memory.slope", "extra peak memory for each byte of KV", "bytes", extra, kv))
    return out


def checks(measured: Measured, children: int) -> list[r.Check]:
    out = []
    for n in ("1", str(children)):
        for method in ("live", "hydrate-warm", "hydrate-cold", "hydrate-fresh"):
            name = f"{method}.{n}"
            if name in measured:
                out.append(r.all_hit(f"hit.{name}", f"{_words(name)[0]}: nothing prefilled again", name))
        for method in ("hydrate-warm", "hydrate-cold", "hydrate-fresh", "prefill-warm", "prefill-fresh"):
            out += _equal(measured, method, n)
    return out


def _equal(measured: Measured, method: str, n: str) -> list[r.Check]:
    name, reference = f"{method}.{n}", f"live.{n}"
    if name not in measured or reference not in measured:
        return []
    promised = method.startswith("hydrate")
    return [
        r.equal_outputs(
            f"same-{output}.{name}", f"{_words(name)[0]}: {output} equal those of the live fork, bit for bit",
            name, reference, output, promised=promised,
        )
        for output in ("first_logprobs", "tokens", "logprobs")
    ]  # fmt: skip


def goals(numbers: Sequence[r.Derived], children: int) -> list[r.Goal]:
    """The goals whose numbers were measured."""
    all_goals = [
        r.at_least("hydrate-beats-prefill", "a hydrated first token 20 × sooner than prefilling", "gain.hydrate", 20),
        r.at_least("hydrate-beats-stock", "and 20 × sooner than the stock model's prefill", "gain.hydrate-stock", 20),
        r.at_most(
            "children-live", f"{children} live children's first tokens in less than 2 × one's", "children.live", 2
        ),
        r.at_most("children-hydrated", f"{children} hydrated ones' in less than 2 × one's", "children.hydrate", 2),
        r.at_most("disk", "forks on disk: at most 1.01 × a snapshot and their own tokens", "disk.forks", 1.01),
        r.at_least("write", "a commit writes at no less than 80 % of a plain write with fsync", "io.write", 0.8),
        r.at_least("read", "a hydrate reads at no less than 80 % of a plain cold read", "io.read", 0.8),
        r.at_most(
            "memory", "client memory does not grow with the session (at most 5 % of its KV)", "memory.slope", 0.05
        ),
    ]
    known = {number.name for number in numbers}
    return [goal for goal in all_goals if goal.derived in known]


NOTES = (
    "Every round measures all arms, in an order that is shuffled and then reversed; ratios are of arms in one round.",
    "Warm arms run in one process after one unrecorded measurement of each; hydrating makes a new session that shares"
    " nothing with the live one.",
    "A fresh process finds the weights' files and, when hydrating, the packs in the page cache.",
    "Children of the prefill arms fork from the session that was just read, so its prefill is paid once.",
)


def _first(arm: str) -> r.Term:
    return _value(arm, "first_token_s")


def _value(arm: str, value: str) -> r.Term:
    return r.Term(arm=arm, value=value)


def _is_method(name: str) -> bool:
    return name.partition(".")[0] in METHODS
