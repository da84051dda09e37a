"""Numbers as people read them: bytes, counts, durations, ages."""

from __future__ import annotations

import time

_STEPS = ((60, 1, "second"), (3600, 60, "minute"), (86400, 3600, "hour"), (86400 * 60, 86400, "day"))


def nbytes(n: int) -> str:
    """Bytes with three figures and a binary unit: 812 B, 76.1 MiB."""
    if n < 1024:
        return f"{n} B"
    value = float(n)
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        value /= 1024
        if value < 1023.5 or unit == "TiB":
            break
    return f"{value:.0f} {unit}" if value >= 99.95 else f"{value:.1f} {unit}"


def count(n: int, one: str, many: str | None = None) -> str:
    """`3,412 tokens`, `1 token`."""
    return f"{n:,} {one if n == 1 else many or one + 's'}"


def together(*places: str) -> str:
    """As in: a; a and b; a, b and c."""
    return " and ".join([", ".join(places[:-1]), places[-1]] if len(places) > 1 else places)


def seconds(s: float) -> str:
    """A duration with three figures: 7.42 ms, 131 ms, 4.91 s, 2 min 5 s."""
    if s < 0.0995:
        return f"{s * 1e3:.2f} ms" if s < 0.00995 else f"{s * 1e3:.1f} ms"
    if s < 0.9995:
        return f"{s * 1e3:.0f} ms"
    if s < 99.5:
        return f"{s:.2f} s" if s < 9.995 else f"{s:.1f} s"
    whole = round(s)
    return f"{whole // 60} min {whole % 60} s"


def age(time_ns: int, now_s: float | None = None) -> str:
    """`5 minutes ago`; dates beyond 60 days."""
    ago = (time.time() if now_s is None else now_s) - time_ns / 1e9
    if ago < 1:
        return "now"
    for limit, unit, name in _STEPS:
        if ago < limit:
            return f"{count(int(ago / unit), name)} ago"
    return time.strftime("%Y-%m-%d", time.localtime(time_ns / 1e9))


def moment(time_ns: int) -> str:
    """Local time with its zone: 2031-04-05 06:07:08 +0200."""
    return time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(time_ns / 1e9))


def utc(time_ns: int) -> str:
    """As ISO 8601, in whole seconds: 2031-04-05T04:07:08Z."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time_ns / 1e9))


def plain(text: str) -> str:
    """A table's keys as words: `num_prompt_tokens` → `num prompt tokens`."""
    return text.replace("_", " ")
