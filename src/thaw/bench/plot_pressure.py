"""A picture of returns under pressure in a receipt of `thaw bench vllm`: one row an arm, p50 and p95 of its visits.

A pure function of the receipt, drawn as `plot` draws: one linear axis from 0, whiskers from the least to the largest.
"""

from __future__ import annotations

from thaw.bench import scale
from thaw.bench.plot import LEFT, RIGHT, ROW, STYLE, TOP, WIDTH, BarRow, grid, key, row_of, text
from thaw.core.errors import InvalidRequest
from thaw.receipt import Derived, Receipt, Source, Term, read

ROWS = (
    ("thaw", "thaw, parked sessions", "owned, in host memory", "thaw"),
    ("offload", "vLLM's offload tier", "host memory, LRU, whole blocks", "again"),
    ("native", "vLLM's prefix cache", "GPU memory, LRU", "again"),
)


def percentile(values: list[float], share: float) -> float:
    """The value that `share` of the sorted ones are not above (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, -(-int(share * 100) * len(ordered) // 100) - 1)]


def returns(receipt: Receipt, arm: str, value: str = "first_token_s") -> list[float]:
    """What every return to a session took in this arm; empty where the arm was not run."""
    return [r.values[value] for a in receipt.arms if a.name == f"pressure.{arm}" for r in a.rounds]


def svg(source: Receipt | Source) -> str:
    """The picture. Raises `InvalidRequest` for a receipt without the part pressure, and what `read` raises."""
    receipt = source if isinstance(source, Receipt) else read(source)
    rows = [_row(receipt, *words) for words in ROWS if returns(receipt, words[0])]
    if receipt.kind != "bench.vllm" or not rows:
        raise InvalidRequest(f"a receipt of kind {receipt.kind!r} without arms of pressure has no such picture")
    axis = scale.Axis(max(bar.high for row in rows for _, bar in row.bars), LEFT, WIDTH - RIGHT)
    bottom = TOP + ROW * len(rows)
    height, p = bottom + 96, receipt.parameters
    title = f"First tokens of {p['branches']} children of a session of {p['tree_tokens']:,} tokens, on return"
    where = f"{receipt.versions.get('engine', '')} · {receipt.machine.accelerator or receipt.machine.cpu}"
    foot = f"thaw {receipt.versions.get('thaw', '?')} · receipt {receipt.digest[:15]} · {receipt.time[:10]}"
    body = [
        text(24, 36, title, "t"),
        text(24, 57, f"{p['trees']} sessions over a KV pool of a third of them · {where}", "s"),
        *key("thaw", 24), *key("again", 48), text(76, 80, "p50", "s"),
        *key("thaw many", 120), *key("again many", 144), text(172, 80, "p95", "s"),
        text(WIDTH - 24, 80, "until every child has its first token · whiskers: least and largest visit", "s", "end"),
        *grid(axis, bottom),
        *(line for i, row in enumerate(rows) for line in row_of(row, TOP + i * ROW, axis)),
        text(24, bottom + 58, _recomputed(receipt)),
        text(24, height - 14, foot, "s"),
    ]  # fmt: skip
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" '
        f'role="img" aria-label="{title}">\n<style>{STYLE}</style>\n'
        f'<rect class="p" x=".5" y=".5" width="{WIDTH - 1}" height="{height - 1}" rx="8"/>'
    )
    return "\n".join((head, *body, "</svg>")) + "\n"


def _row(receipt: Receipt, arm: str, title: str, words: str, kind: str) -> BarRow:
    values = returns(receipt, arm)
    p50, p95 = percentile(values, 0.5), percentile(values, 0.95)
    bars = ((kind, _bar(arm, p50, min(values), max(values))), (f"{kind} many", _bar(arm, p95, p95, p95)))
    return BarRow(title, words, bars)


def _bar(arm: str, value: float, low: float, high: float) -> Derived:
    term = Term(arm=f"pressure.{arm}", value="first_token_s")
    return Derived(name=arm, text="", unit="s", how="median", over=term, value=value, low=low, high=high, num_rounds=1)


def _recomputed(receipt: Receipt) -> str:
    told = []
    for arm, title, _, _ in ROWS:
        again = returns(receipt, arm, "recomputed")
        if again:
            told.append(f"{title}: {percentile(again, 0.5):,.0f}")
    return "Tokens prefilled again a return, p50. " + " · ".join(told)
