"""What several verbs print: a point, a turn, a ref, a proof."""

from __future__ import annotations

from typing import TYPE_CHECKING

from thaw.cli import output, words
from thaw.core.ids import short

if TYPE_CHECKING:
    from thaw.core.kv_ranges import KVRange
    from thaw.core.objects import Turn
    from thaw.core.proof import Proof
    from thaw.repo.log import LogEntry

MARGIN = "  "


def heading(text: str) -> None:
    output.line(output.style(text, "bold"))


def field(name: str, value: str, *, wide: int = 12) -> None:
    """`name        value`, the name dim."""
    output.line(f"{output.style(name.ljust(wide), 'dim')}{value}")


def block(text: str, *, limit: int | None = None, indent: str = MARGIN) -> None:
    """Text of a model or a file, wrapped and indented; `limit` lines at most, said when cut."""
    lines = wrapped(text, output.width() - len(indent))
    shown = lines if limit is None or len(lines) <= limit else [*lines[: limit - 1], _rest(len(lines) - limit + 1)]
    for each in shown:
        output.line(f"{indent}{each}".rstrip())


def wrapped(text: str, width: int) -> list[str]:
    """Lines of at most `width` columns, broken at spaces where there are some."""
    import textwrap

    out: list[str] = []
    for each in output.clean(text).expandtabs(4).splitlines() or [""]:
        out += textwrap.wrap(each, width, drop_whitespace=True, replace_whitespace=False) or [""]
    return out


def _rest(n: int) -> str:
    return output.style(f"… {words.count(n, 'more line')}", "dim")


def turn_title(turn: Turn, number: int) -> str:
    """`turn 2  assistant, 40 tokens [3,412, 3,452), length`."""
    who = turn.role or turn.kind
    parts = [f"{who}, {words.count(turn.end - turn.start, 'token')} [{turn.start:,}, {turn.end:,})"]
    if turn.kind == "completion":
        parts.append(f"ended by {_end(turn)}" if turn.finish_reason else "unfinished")
    return f"{output.style(f'turn {number}', 'bold')}  {output.style(', '.join(parts), 'dim')}"


def _end(turn: Turn) -> str:
    if turn.stop_reason is None:
        return str(turn.finish_reason)
    reason = repr(turn.stop_reason) if isinstance(turn.stop_reason, str) else f"token {turn.stop_reason}"
    return f"{turn.finish_reason} ({reason})"


def proof_line(proof: Proof) -> str:
    """`3,411 of 3,412 tokens cached, 0 prefilled again, 76.1 MiB read and verified in 131 ms`."""
    text = f"{proof.num_cached_tokens:,} of {words.count(proof.num_prompt_tokens, 'token')} cached"
    text += f", {proof.num_recomputed_tokens:,} prefilled again"
    if proof.kv_ranges:
        text += f", KV of {kv_by_policy(proof.kv_ranges)}"
    if proof.nbytes:
        text += f", {words.nbytes(proof.nbytes)} read"
    if proof.verification not in ("none", "live-shared"):
        text += f" ({proof.verification})"
    load = proof.stages_s.get("load")
    return text + (f" in {words.seconds(load)}" if load else "")


def states(points: tuple[int, ...], nbytes: int) -> str:
    """`3 of 1.2 MiB each, after 599, 600, 611 tokens`: the kept states of recurrent layers."""
    from thaw.core.cache import list_of

    return f"{len(points):,} of {words.nbytes(nbytes)} each, after {list_of(points)}"


def few_states(points: tuple[int, ...], nbytes: int) -> str:
    """`3 states (3.6 MiB)`."""
    return f"{words.count(len(points), 'state')} ({words.nbytes(len(points) * nbytes)})"


def kv_by_policy(ranges: tuple[KVRange, ...], room: int | None = None) -> str:
    """`tokens 0-511 policy '0', 512-640 policy '1'`, on at most `room` columns: which weights computed the KV."""
    from thaw.core.kv_ranges import text

    return text(ranges) if room is None else output.one_line(text(ranges), room)


def plain_entry(entry: LogEntry) -> dict[str, object]:
    """A commit as JSON has it; states only where its model keeps some, `shallow` where history ends at it,
    `kv_ranges` where other weights computed some of its KV."""
    import msgspec

    plain = {**msgspec.structs.asdict(entry), "time_ns": str(entry.time_ns)}
    left_out = {name for name in ("shallow", "kv_ranges") if not plain[name]}
    left_out |= set() if entry.state_nbytes else {"points", "state_nbytes"}
    return {key: value for key, value in plain.items() if key not in left_out}


def commit_id(identifier: str) -> str:
    return output.style(short(identifier), "yellow")
