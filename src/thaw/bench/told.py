"""What a benchmark leaves: its receipt in a file, and what the receipt says, a JSON line each."""

from __future__ import annotations

import json
from pathlib import Path

from thaw import receipt as r


def tell(receipt: r.Receipt, out: Path | None) -> None:
    """Write the receipt to `out`, if that is given, and print its derived values, checks and goals."""
    if out is not None:
        out.write_bytes(r.dumps(receipt))
    for line in (*receipt.derived, *receipt.checks, *receipt.goals):
        print(json.dumps({name: getattr(line, name) for name in line.__struct_fields__}, default=str))
