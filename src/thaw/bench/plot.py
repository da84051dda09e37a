"""A picture of a fork bench's receipt: an SVG of horizontal bars, written by hand, with no font or script of its own.

One linear axis that starts at 0, one row a way of getting to the first token, two bars a row: one child and all.
Bars are medians, whiskers the least and the largest round. Colours follow the reader's light or dark setting. A pure
function of the receipt: the same receipt gives the same bytes.
"""

from __future__ import annotations

from xml.sax.saxutils import escape

import msgspec

from thaw.bench import scale
from thaw.core.errors import InvalidRequest
from thaw.receipt import Derived, Receipt, Source, read

WIDTH, LEFT, RIGHT, TOP = 880, 262, 92, 106
ROW, BAR, GAP = 50, 13, 4
ROWS = (
    ("live", "Fork, live", "the engine still holds the session", "thaw"),
    ("hydrate-warm", "Hydrate, warm process", "from packs in the page cache", "thaw"),
    ("hydrate-cold", "Hydrate, warm process, cold disk", "packs dropped from the page cache", "thaw"),
    ("hydrate-fresh", "Hydrate, fresh process", "boot of the engine included", "thaw"),
    ("prefill-warm", "Prefill again, warm process", "thaw's engine reads all tokens", "again"),
    ("prefill-stock", "Prefill again, stock model", "transformers alone, no thaw", "again"),
    ("prefill-fresh", "Cold start and prefill", "boot of the engine included", "again"),
)
STYLE = """
text{font:13px system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif;fill:#1f2328}
.t{font-size:18px;font-weight:600}.s{fill:#59636e;font-size:12px}.n{font-variant-numeric:tabular-nums}
.p{fill:#fff;stroke:#d1d9e0}.g{stroke:#d1d9e0}.w{stroke:#1f2328;stroke-width:1.2}
.thaw{fill:#0a69c8}.again{fill:#b35c1e}.many{opacity:.55}
@media (prefers-color-scheme:dark){text{fill:#e6edf3}.s{fill:#9da7b1}.p{fill:#0d1117;stroke:#3d444d}.g{stroke:#30363d}
.w{stroke:#e6edf3}.thaw{fill:#4493f8}.again{fill:#e8924a}}
"""


class BarRow(msgspec.Struct, frozen=True):
    """One way: its words, and (bar's class, number) for one child and for all."""

    title: str
    text: str
    bars: tuple[tuple[str, Derived], ...]


def svg(source: Receipt | Source) -> str:
    """The picture of a receipt of kind `bench.fork`: the receipt, or where `thaw.receipt.read` finds one.

    Raises `InvalidRequest` for another kind, and what `read` raises."""
    receipt = source if isinstance(source, Receipt) else read(source)
    rows = _rows(receipt)
    if receipt.kind != "bench.fork" or not rows:
        raise InvalidRequest(f"a receipt of kind {receipt.kind!r} has no picture; only bench.fork has one")
    top = max(number.high for row in rows for _, number in row.bars)
    axis = scale.Axis(top, LEFT, WIDTH - RIGHT)
    bottom = TOP + ROW * len(rows)
    words = _conclusions(receipt)
    height = bottom + 46 + 20 * len(words) + 26
    body = [
        *_head(receipt),
        *grid(axis, bottom),
        *(line for i, row in enumerate(rows) for line in row_of(row, TOP + i * ROW, axis)),
        *(text(24, bottom + 58 + 20 * i, line) for i, line in enumerate(words)),
        text(24, height - 14, _foot(receipt), "s"),
    ]
    return "\n".join((_open(receipt, height), *body, "</svg>")) + "\n"


def _rows(receipt: Receipt) -> list[BarRow]:
    many = receipt.parameters.get("children")
    out = []
    for method, title, text, kind in ROWS:
        found = [
            (kind, receipt.number(f"{method}.1.first")),
            (f"{kind} many", receipt.number(f"{method}.{many}.first")),
        ]
        bars = tuple((name, number) for name, number in found if number is not None)
        if bars:
            out.append(BarRow(title, text, bars))
    return out


def _open(receipt: Receipt, height: int) -> str:
    label = escape(f"First token of a session of {receipt.parameters.get('num_tokens')} tokens, by how it is reached")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" '
        f'role="img" aria-label="{label}">\n<style>{STYLE}</style>\n'
        f'<rect class="p" x=".5" y=".5" width="{WIDTH - 1}" height="{height - 1}" rx="8"/>'
    )


def _head(receipt: Receipt) -> list[str]:
    model, tokens = receipt.model, receipt.parameters.get("num_tokens")
    name = f"{model.name}, {model.dtype}" if model else "no model"
    machine = f"{receipt.machine.accelerator or receipt.machine.cpu}, {receipt.machine.cores} cores"
    many = receipt.parameters.get("children")
    return [
        text(24, 36, f"Time to the first token of a session of {tokens:,} tokens", "t"),
        text(24, 57, f"{name} · {receipt.versions.get('engine', '')} · {machine}", "s"),
        *key("thaw", 24),
        *key("again", 48),
        text(76, 80, "one child", "s"),
        *key("thaw many", 150),
        *key("again many", 174),
        text(202, 80, f"{many} children: until all have their first token", "s"),
        text(WIDTH - 24, 80, "bars: median · whiskers: least and largest round", "s", anchor="end"),
    ]


def key(kind: str, x: int) -> list[str]:
    return [f'<rect class="{kind}" x="{x}" y="71" width="22" height="9"/>']


def grid(axis: scale.Axis, bottom: int) -> list[str]:
    out = []
    for tick in axis.ticks:
        x = axis.x(tick)
        out.append(f'<line class="g" x1="{x:.1f}" y1="{TOP - 8}" x2="{x:.1f}" y2="{bottom + 2}"/>')
        out.append(text(x, bottom + 18, scale.label(tick, axis.step), "s n", anchor="middle"))
    out.append(text(axis.x(axis.top), bottom + 34, "seconds, linear from 0", "s", anchor="end"))
    return out


def row_of(row: BarRow, y: int, axis: scale.Axis) -> list[str]:
    out = [text(24, y + 15, row.title), text(24, y + 31, row.text, "s")]
    for i, (name, number) in enumerate(row.bars):
        top = y + 3 + i * (BAR + GAP) + (0 if len(row.bars) > 1 else (BAR + GAP) // 2)
        x, middle = axis.x(number.value), top + BAR / 2
        low, high = axis.x(number.low), axis.x(number.high)
        out.append(
            f'<rect class="{name}" x="{LEFT}" y="{top}" width="{max(x - LEFT, 1):.1f}" height="{BAR}" rx="1.5"/>'
        )
        if high - low > 2:
            out.append(
                f'<path class="w" d="M{low:.1f} {middle}H{high:.1f}M{low:.1f} {top + 3}v7M{high:.1f} {top + 3}v7"/>'
            )
        out.append(text(max(x, high) + 7, top + 11, scale.seconds(number.value), "n"))
    return out


def _conclusions(receipt: Receipt) -> list[str]:
    """What the numbers say, with their intervals."""
    out = []
    for name, words in (
        ("gain.hydrate", "Hydrated, the first token comes {} × sooner than by prefilling again"),
        ("gain.hydrate-stock", "Hydrated, it comes {} × sooner than by the stock model's own prefill"),
        ("gain.live", "Forked live, it comes {} × sooner than by prefilling again"),
    ):
        number = receipt.number(name)
        if number is not None:
            low, high = scale.figures(number.low), scale.figures(number.high)
            interval = f" (95 %: {low} to {high})" if number.num_rounds > 1 else ""
            out.append(words.format(scale.figures(number.value)) + interval)
    exactness = _exactness(receipt)
    return [*out, exactness] if exactness else out


def _exactness(receipt: Receipt) -> str:
    same = [c for c in receipt.checks if c.how == "equal-outputs" and c.promised and c.output == "logprobs"]
    hits = [c for c in receipt.checks if c.how == "all-hit"]
    if not same or not hits:
        return ""
    equal, checked = sum(c.num_equal for c in same), sum(c.num_checked for c in same)
    hit, asked = sum(c.num_equal for c in hits), sum(c.num_checked for c in hits)
    return (
        f"Log probabilities equal those of the live fork bit for bit in {equal} of {checked} rounds; "
        f"nothing prefilled again in {hit} of {asked}"
    )


def _foot(receipt: Receipt) -> str:
    rounds, version = receipt.parameters.get("rounds"), receipt.versions.get("thaw", "?")
    return f"{rounds} paired rounds · thaw {version} · receipt {receipt.digest[:15]} · {receipt.time[:10]}"


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "") -> str:
    """Words at a point; `kind`: classes of `STYLE`."""
    attributes = (f' class="{kind}"' if kind else "") + (f' text-anchor="{anchor}"' if anchor else "")
    return f'<text x="{x:.6g}" y="{y:.6g}"{attributes}>{escape(words)}</text>'
