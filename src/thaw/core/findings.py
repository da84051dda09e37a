"""What a look at a machine found, as plain values: the doctor returns them, and engines say them of themselves."""

from __future__ import annotations

from typing import Literal

import msgspec

Status = Literal["ok", "info", "warning", "problem"]


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One thing looked at. `text` says what was found; `advice` what to do, empty when there is nothing to do."""

    name: str
    status: Status
    text: str
    advice: str = ""
